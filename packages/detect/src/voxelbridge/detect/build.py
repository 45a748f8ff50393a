"""The one place where a configuration and a plan become modules."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from torch import nn

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.arch.encoder import Encoder, build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.checkpoint import read_checkpoint
from voxelbridge.core.config import (
    Resolved,
    flatten,
    load_config,
    merged_settings,
    preset_path,
    read_layers,
    validate,
)
from voxelbridge.core.errors import ConfigError
from voxelbridge.detect.anchor_planning import AnchorSizes, default_anchor_sizes
from voxelbridge.detect.config import (
    DeformableDETRConfig,
    DetectConfig,
    InitParts,
    LinearTuning,
    PlannedStages,
    RetinaUNetConfig,
    TuneName,
    encoder_config,
)
from voxelbridge.detect.deform_transformer import DecoderBlock, DeformableTransformer, EncoderBlock
from voxelbridge.detect.deformable_detr import (
    BoxHead,
    ChannelMapper,
    DeformableDETR,
    initialize_transformer,
)
from voxelbridge.detect.detr_criterion import DETRCriterion
from voxelbridge.detect.objective import DETRObjective, Objective, RetinaObjective
from voxelbridge.detect.retina_criterion import RetinaCriterion
from voxelbridge.detect.retina_head import RetinaHead
from voxelbridge.detect.retina_unet import RetinaUNet, Triple

if TYPE_CHECKING:  # networks alone need no data libraries
    from voxelbridge.detect.plan import Plan

DEFAULT_QUERIES = 300  # nnDetection v2, where nothing is planned

Detector = RetinaUNet | DeformableDETR


def build_detector(
    preset: str | DetectConfig,
    *,
    in_channels: int,
    num_classes: int,
    anchor_sizes: AnchorSizes | None = None,
    queries: int | None = None,
) -> Detector:
    """The detector of a preset's name (or of a loaded config), initialised from torch's generator.

    `anchor_sizes` (Retina U-Net) and `queries` (Deformable DETR, where the config has none) come
    from the data's plan. Without it anchors of 4, 8 and 16 voxels at stride 4 are scaled over the
    levels, and there are 300 queries.
    """
    config = load_detect_config(preset) if isinstance(preset, str) else preset
    encoder = build_encoder(encoder_config(config), in_channels=in_channels)
    initialize(encoder, config.init)
    match config.detector:
        case RetinaUNetConfig() as detector:
            sizes = anchor_sizes or default_anchor_sizes(
                head_strides(config), sizes_per_axis=detector.sizes_per_axis
            )
            return _retina_unet(detector, encoder, num_classes=num_classes, anchor_sizes=sizes)
        case DeformableDETRConfig() as detector:
            count = detector.queries or queries or DEFAULT_QUERIES
            return _deformable_detr(detector, encoder, num_classes=num_classes, queries=count)
        case _:
            assert_never(config.detector)


def build_objective(detector: Detector, config: DetectConfig) -> Objective:
    """The detector with the losses of its config: what is trained."""
    match detector, config.detector:
        case RetinaUNet(), RetinaUNetConfig() as settings:
            return RetinaObjective(detector, RetinaCriterion(settings), settings)
        case DeformableDETR(), DeformableDETRConfig() as settings:
            criterion = DETRCriterion(
                focal_gamma=settings.focal_gamma,
                focal_alpha=settings.focal_alpha,
                class_cost=settings.class_cost,
                l1_cost=settings.l1_cost,
                giou_cost=settings.giou_cost,
            )
            return DETRObjective(detector, criterion, settings)
        case _:
            raise ValueError(f"{type(detector).__name__} is no {config.detector.name}")


def load_detect_config(
    preset: str,
    overrides: Sequence[str] = (),
    *,
    plan: "Plan | None" = None,
    init: Path | None = None,
) -> DetectConfig:
    """The config of a shipped preset or of a TOML file, with `key=value` overrides.

    Where it says `architecture = "plan"`, patch size, head levels and stages come from `plan`. What
    such a file states itself stays; `--set architecture=plan` replaces what the preset states.
    Where it says `architecture = "checkpoint"`, the stages are those of the checkpoint `init`.
    """
    return resolve_detect_config(preset, overrides, plan=plan, init=init).config


def resolve_detect_config(
    preset: str,
    overrides: Sequence[str] = (),
    *,
    plan: "Plan | None" = None,
    init: Path | None = None,
) -> Resolved[DetectConfig]:
    """As `load_detect_config`, with the origin of every value; "plan" for those of the plan."""
    path = preset_path("voxelbridge.detect", preset)
    if _takes_the_checkpoint(path, overrides):
        return _settled(_with_checkpoint(preset, path, overrides, init=init))
    own = None if _asks_for(overrides, "preset") else _stated_beside_the_plan(path)
    if _asks_for(overrides, "plan"):
        own = set()
    if own is None:
        return _settled(load_config(DetectConfig, path, overrides))
    if plan is None:
        raise ConfigError(
            f'{preset}: architecture = "plan" takes patch size and stages from a store\'s plan; '
            "name the store with --store"
        )
    planned = [text for text in _plan_settings(plan) if text.partition("=")[0] not in own]
    resolved = load_config(DetectConfig, path, [*planned, *overrides])
    given = {text.partition("=")[0] for text in overrides}
    keys = {text.partition("=")[0] for text in planned} - given
    origins = {key: "plan" if key in keys else name for key, name in resolved.origins.items()}
    return _settled(Resolved(resolved.config, origins))


def with_arguments(
    preset: str,
    overrides: Sequence[str],
    *,
    stem: str | None = None,
    init_parts: InitParts | None = None,
    tune: TuneName | None = None,
) -> list[str]:
    """`overrides` with what arguments of a command say about settings; they win over `--set`.

    `tune` keeps the figures (rank, alpha) of a preset that tunes in the same way.
    """
    path = preset_path("voxelbridge.detect", preset)
    before: list[str] = []
    after: list[str] = []
    if stem is not None:
        after.append(f"transfer.stem={stem}")
    if init_parts is not None:
        after.append(f"transfer.parts={init_parts}")
    if tune is not None:
        stated = merged_settings(DetectConfig, path).get("tune")
        if not (isinstance(stated, dict) and stated.get("name") == tune):
            before.append(f"tune={json.dumps({'name': tune})}")
        after.append(f"tune.name={tune}")
    return [*before, *overrides, *after]


def require_checkpoint(init: Path | None, overrides: Sequence[str], *, stem: str | None) -> None:
    """ConfigError where a command says how a checkpoint is taken over, and names none."""
    if init is not None:
        return
    given = [f"--set {text}" for text in overrides if text.startswith(("transfer.", "transfer="))]
    if stem is not None:
        given.insert(0, f"--stem {stem}")
    if given:
        raise ConfigError(
            f"{given[0]}: says how a checkpoint is taken over, and there is none; name it with "
            f"--init, or leave {given[0]} out"
        )


def head_strides(config: DetectConfig) -> tuple[Triple, ...]:
    """Voxels per cell of the maps that the detector reads, finest first."""
    strides = cumulative_strides(encoder_config(config).strides)
    return tuple(strides[level] for level in config.detector.head_levels)


def _takes_the_checkpoint(path: Path, overrides: Sequence[str]) -> bool:
    if any(text.startswith("architecture=") for text in overrides):
        return _asks_for(overrides, "checkpoint")
    for layer in read_layers(DetectConfig, path):
        if "architecture" in layer.tree:  # a run's own config has the stages in it
            return layer.tree["architecture"] == "checkpoint" and layer.source.suffix != ".json"
    return False


def _with_checkpoint(
    preset: str, path: Path, overrides: Sequence[str], *, init: Path | None
) -> Resolved[DetectConfig]:
    if init is None:
        raise ConfigError(
            f'{preset}: architecture = "checkpoint" takes the stages of a checkpoint; name it with '
            "--init, which `vb-detect train` and `cross-validate` have, or take "
            "architecture=preset"
        )
    arch = read_checkpoint(init).metadata.arch
    stages = {key: getattr(arch, key) for key in PlannedStages.model_fields}
    taken = [f"stages.{key}={json.dumps(value)}" for key, value in stages.items()]
    resolved = load_config(DetectConfig, path, [*taken, *overrides])
    kind = encoder_config(resolved.config).kind
    if kind != arch.kind:
        raise ConfigError(
            f"{init}: holds a {arch.kind} encoder, {resolved.config.encoder} of {preset} is a "
            f"{kind} one; take a preset with such an encoder"
        )
    keys = {text.partition("=")[0] for text in taken} - {t.partition("=")[0] for t in overrides}
    origins = {key: "checkpoint" if key in keys else name for key, name in resolved.origins.items()}
    return Resolved(resolved.config, origins)


def _asks_for(overrides: Sequence[str], architecture: str) -> bool:
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("architecture=")]
    return bool(chosen) and chosen[-1] == architecture


def _stated_beside_the_plan(path: Path) -> set[str] | None:
    """Keys that win over the plan's where the preset takes a plan; None where it takes none.

    Those of the file that says so and of the files that extend it. A run's own config, which has
    its plan in it, takes none.
    """
    own: set[str] = set()
    for layer in read_layers(DetectConfig, path):
        own |= set(flatten(layer.tree))
        if "architecture" in layer.tree:
            is_planned = layer.tree["architecture"] == "plan" and layer.source.suffix != ".json"
            return own if is_planned else None
    return None


def _settled(resolved: Resolved[DetectConfig]) -> Resolved[DetectConfig]:
    """Without the phase of a frozen encoder, and its steps, where the encoder never trains."""
    config = resolved.config
    frozen = config.schedule.frozen
    if not isinstance(config.tune, LinearTuning) or frozen is None:
        return resolved
    if any(part.split(".")[:2] != ["detector", "encoder"] for part in frozen.parts):
        return resolved
    schedule = config.schedule.model_copy(
        update={"steps": config.schedule.steps - frozen.steps, "frozen": None}
    )
    origins = {k: v for k, v in resolved.origins.items() if not k.startswith("schedule.frozen.")}
    origins |= {"schedule.frozen": "tune", "schedule.steps": "tune"}
    tree = config.model_copy(update={"schedule": schedule}).model_dump(mode="json")
    return Resolved(validate(DetectConfig, tree, where="tune linear"), origins)


def _plan_settings(plan: "Plan") -> list[str]:
    values = {
        "patch_size": plan.patch_size,
        "detector.head_levels": plan.head_levels,
        "stages.features": plan.features,
        "stages.strides": plan.strides,
        "stages.kernels": plan.kernels,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _retina_unet(
    config: RetinaUNetConfig, encoder: Encoder, *, num_classes: int, anchor_sizes: AnchorSizes
) -> RetinaUNet:
    neck = UFPN(
        encoder.channels,
        encoder.strides,
        out_channels=config.channels,
        first_level=config.head_levels[0],
        upsample_bias=config.upsample_bias,
    )
    initialize(neck, config.neck_init, fan="fan_out")  # nnDetection v2
    head = RetinaHead(
        config.channels,
        config.sizes_per_axis**3,
        num_classes=num_classes,
        num_levels=len(config.head_levels),
        activation=config.head_activation,
    )
    return RetinaUNet(
        encoder,
        neck,
        head,
        segmenter=nn.Conv3d(neck.channels[0], 2, kernel_size=1),
        head_levels=config.head_levels,
        anchor_sizes=anchor_sizes,
    )


def _deformable_detr(
    config: DeformableDETRConfig, encoder: Encoder, *, num_classes: int, queries: int
) -> DeformableDETR:
    width, levels = config.width, len(config.head_levels)
    sizes = {
        "heads": config.heads,
        "levels": levels,
        "points": config.points,
        "hidden": config.hidden,
    }
    transformer = DeformableTransformer(
        [EncoderBlock(width, **sizes) for _ in range(config.encoder_blocks)],
        [DecoderBlock(width, **sizes) for _ in range(config.decoder_blocks)],
        [nn.Linear(width, num_classes) for _ in range(config.decoder_blocks + 1)],
        [BoxHead(width) for _ in range(config.decoder_blocks + 1)],
        width=width,
        levels=levels,
        queries=queries,
    )
    projection = ChannelMapper([encoder.channels[level] for level in config.head_levels], width)
    initialize_transformer(
        projection,
        transformer,
        class_prior=config.class_prior,
        zero_box_heads=config.box_head_init == "zero",
    )
    return DeformableDETR(encoder, projection, transformer, levels=config.head_levels)
