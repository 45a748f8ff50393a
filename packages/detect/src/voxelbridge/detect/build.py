"""The one place where a configuration and a plan become modules."""

from torch import nn

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder, build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.config import load_config, preset_path
from voxelbridge.detect.anchor_planning import AnchorSizes, default_anchor_sizes
from voxelbridge.detect.config import DetectConfig, RetinaUNetConfig
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
    encoder = build_encoder(ENCODER_PRESETS[config.encoder], in_channels=in_channels)
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


def load_detect_config(preset: str) -> DetectConfig:
    """The config of a shipped preset or of a TOML file."""
    return load_config(DetectConfig, preset_path("voxelbridge.detect", preset)).config


def head_strides(config: DetectConfig) -> tuple[Triple, ...]:
    """Voxels per cell of the maps that carry anchors, finest first."""
    strides = cumulative_strides(ENCODER_PRESETS[config.encoder].strides)
    return tuple(strides[level] for level in config.detector.head_levels)


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
