"""The one place where a configuration and a plan become modules."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from torch import nn

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.arch.encoder import Encoder, build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.config import Tree, flatten, load_config, preset_path
from voxelbridge.core.errors import ConfigError
from voxelbridge.detect.anchor_planning import AnchorSizes, default_anchor_sizes
from voxelbridge.detect.config import (
    DeformableDETRConfig,
    DetectConfig,
    RetinaUNetConfig,
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
    preset: str, overrides: Sequence[str] = (), *, plan: "Plan | None" = None
) -> DetectConfig:
    """The config of a shipped preset or of a TOML file, with `key=value` overrides.

    Where it says `architecture = "plan"`, patch size, head levels and stages come from `plan`. What
    such a file states itself stays; `--set architecture=plan` replaces what the preset states.
    """
    path = preset_path("voxelbridge.detect", preset)
    stated = _stated(path)
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("architecture=")]
    if (chosen[-1] if chosen else stated.get("architecture")) != "plan":
        return load_config(DetectConfig, path, overrides).config
    if path.suffix == ".json" and not chosen:  # a run's own config: the plan is in it already
        return load_config(DetectConfig, path, overrides).config
    if plan is None:
        raise ConfigError(
            f'{preset}: architecture = "plan" takes patch size and stages from a store\'s plan; '
            "name the store with --store"
        )
    own = set() if chosen else set(flatten(stated))
    planned = [text for text in _plan_settings(plan) if text.partition("=")[0] not in own]
    return load_config(DetectConfig, path, [*planned, *overrides]).config


def head_strides(config: DetectConfig) -> tuple[Triple, ...]:
    """Voxels per cell of the maps that the detector reads, finest first."""
    strides = cumulative_strides(encoder_config(config).strides)
    return tuple(strides[level] for level in config.detector.head_levels)


def _stated(path: Path) -> Tree:
    """The settings in a preset file; none where it is broken: `load_config` says what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


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
