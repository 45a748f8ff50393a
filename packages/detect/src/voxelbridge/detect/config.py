"""The configuration of a detector's training: one TOML preset over these typed fields."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from voxelbridge.core.arch.config import EncoderConfig, Triple, cumulative_strides
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.config import Config
from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.train.settings import TrainingSettings

Fraction = Annotated[float, Field(ge=0, le=1)]


class RetinaUNetConfig(Config):
    """Retina U-Net after nnDetection v2 (arXiv 2509.15947, section 2.1 and appendix C)."""

    name: Literal["retina_unet"] = "retina_unet"
    # Encoder stages whose maps carry anchors, finest first.
    head_levels: tuple[int, ...] = Field(default=(2, 3, 4, 5), min_length=1)
    channels: PositiveInt = 128  # of the pyramid's coarse maps and of the heads
    sizes_per_axis: PositiveInt = 3  # anchors per cell = sizes_per_axis ** 3
    atss_candidates: PositiveInt = 4  # nearest cells per object and level
    focal_gamma: float = 1.0
    focal_alpha: float = 0.75
    class_weight: float = 0.3  # of the focal loss in the total
    box_weight: float = 1.0
    segmentation_weight: float = 1.0  # of (Dice + CE) / 2; 0 leaves the branch untrained
    normalizer_decay: float = 0.7  # moving average of the number of positive anchors


class PostProcessing(Config):
    """From raw anchors to boxes; scores and IoUs in [0, 1], sizes in voxels of the stored grid."""

    candidates_per_patch: PositiveInt = 10_000
    patch_iou: Fraction = 0.6
    boxes_per_patch: PositiveInt = 100
    min_score: Fraction = 0.0
    min_size: float = 0.01
    model_iou: Fraction = 0.1  # between the windows of one case
    boxes_per_case: PositiveInt = 100
    ensemble_iou: Fraction = 0.5  # weighted box clustering between models and mirrored copies


class PlannedStages(Config):
    """Stages of the encoder, finest first, in place of those that the encoder's name stands for."""

    features: tuple[PositiveInt, ...]
    strides: tuple[Triple, ...]  # z, y, x, relative to the stage before
    kernels: tuple[Triple, ...]


class DetectConfig(TrainingSettings):
    """Everything a person decides about fine-tuning a detector.

    With `architecture = "plan"`, patch size, head levels and stages are those of the store's plan
    (`build.load_detect_config` fills them in); `encoder` still says which blocks the stages have.
    """

    encoder: Literal["resenc_l", "plain", "resenc_small", "plain_small"]
    architecture: Literal["preset", "plan"] = "preset"
    stages: PlannedStages | None = None
    init: Literal["kaiming", "torch_default"] = "torch_default"
    detector: RetinaUNetConfig = RetinaUNetConfig()
    object_fraction: Fraction = 0.5  # of a batch's patches that lie on an object
    augmentation: SpatialAugmentation = SpatialAugmentation()
    # Voxel labels of cases that have boxes only: none (such batches train without the segmentation
    # losses), or the ellipsoids inscribed in the boxes.
    box_masks: Literal["none", "ellipsoid"] = "none"
    validation_batches: Annotated[int, Field(ge=0)] = 0  # fixed patches; 0: no validation
    validate_every_steps: PositiveInt = 2500
    post_processing: PostProcessing = PostProcessing()

    @model_validator(mode="after")
    def _fits_the_encoder(self) -> "DetectConfig":
        if (self.architecture == "plan") != (self.stages is not None):
            raise ValueError(
                'stages and architecture = "plan" belong together; a store\'s plan gives both'
            )
        strides = cumulative_strides(encoder_config(self).strides)
        levels = self.detector.head_levels
        if list(levels) != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError("detector.head_levels must be neighbouring levels, finest first")
        if not 0 <= levels[0] <= levels[-1] < len(strides):
            raise ValueError(
                f"detector.head_levels: {self.encoder} has levels 0..{len(strides) - 1}"
            )
        total = strides[-1]
        for edge, stride in zip(self.patch_size, total, strict=True):
            if edge % stride or (stride > 1 and edge < 2 * stride):
                raise ValueError(
                    f"patch_size {list(self.patch_size)}: every edge must be a multiple of "
                    f"{_by(total)} and at least {_by([2 * step for step in total])} for the "
                    f"encoder {self.encoder}"
                )
        return self


def encoder_config(config: DetectConfig) -> EncoderConfig:
    """The encoder that the config asks for: its preset, or that with the plan's stages.

    Planned stages beyond those of the preset have as many blocks as its last one.
    """
    preset = ENCODER_PRESETS[config.encoder]
    if config.stages is None:
        return preset
    last = len(preset.blocks) - 1
    return EncoderConfig(
        kind=preset.kind,
        features=config.stages.features,
        strides=config.stages.strides,
        kernels=config.stages.kernels,
        blocks=tuple(
            preset.blocks[min(stage, last)] for stage in range(len(config.stages.features))
        ),
        conv_bias=preset.conv_bias,
    )


def _by(edges: Sequence[int]) -> str:
    """One number where all are equal, else all of them."""
    return str(edges[0]) if len(set(edges)) == 1 else str(list(edges))
