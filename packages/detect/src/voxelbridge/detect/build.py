"""The one place where a configuration and a plan become modules."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder, build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.config import Tree, flatten, load_config, preset_path
from voxelbridge.core.errors import ConfigError
from voxelbridge.detect.anchor_planning import AnchorSizes, default_anchor_sizes
from voxelbridge.detect.config import DetectConfig, RetinaUNetConfig, encoder_config
from voxelbridge.detect.plan import Plan
from voxelbridge.detect.retina_criterion import RetinaCriterion
from voxelbridge.detect.retina_head import RetinaHead
from voxelbridge.detect.retina_unet import RetinaUNet, Triple


def build_detector(
    preset: str | DetectConfig,
    *,
    in_channels: int,
    num_classes: int,
    anchor_sizes: AnchorSizes | None = None,
) -> RetinaUNet:
    """The detector of a preset's name (or of a loaded config), initialised from torch's generator.

    `anchor_sizes` come from the data's plan; without them anchors of 4, 8 and 16 voxels at stride 4
    are scaled over the levels.
    """
    config = load_detect_config(preset) if isinstance(preset, str) else preset
    encoder = build_encoder(encoder_config(config), in_channels=in_channels)
    initialize(encoder, config.init)
    detector = config.detector
    sizes = anchor_sizes or default_anchor_sizes(
        head_strides(config), sizes_per_axis=detector.sizes_per_axis
    )
    return _retina_unet(detector, encoder, num_classes=num_classes, anchor_sizes=sizes)


def build_criterion(config: DetectConfig) -> RetinaCriterion:
    """The losses that belong to the config's detector."""
    detector = config.detector
    return RetinaCriterion(
        candidates=detector.atss_candidates,
        focal_gamma=detector.focal_gamma,
        focal_alpha=detector.focal_alpha,
        normalizer_decay=detector.normalizer_decay,
    )


def load_detect_config(
    preset: str, overrides: Sequence[str] = (), *, plan: Plan | None = None
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
    """Voxels per cell of the maps that carry anchors, finest first."""
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


def _plan_settings(plan: Plan) -> list[str]:
    values = {
        "patch_size": plan.patch_size,
        "detector.head_levels": plan.head_levels,
        "stages.features": plan.features,
        "stages.strides": plan.strides,
        "stages.kernels": plan.kernels,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _retina_unet(
    config: RetinaUNetConfig,
    encoder: ResEncoder | PlainEncoder,
    *,
    num_classes: int,
    anchor_sizes: AnchorSizes,
) -> RetinaUNet:
    neck = UFPN(
        encoder.channels,
        encoder.strides,
        out_channels=config.channels,
        first_level=config.head_levels[0],
    )
    initialize(neck, "kaiming", fan="fan_out")  # nnDetection v2
    head = RetinaHead(
        config.channels,
        config.sizes_per_axis**3,
        num_classes=num_classes,
        num_levels=len(config.head_levels),
    )
    return RetinaUNet(
        encoder,
        neck,
        head,
        segmenter=nn.Conv3d(neck.channels[0], 2, kernel_size=1),
        head_levels=config.head_levels,
        anchor_sizes=anchor_sizes,
    )
