"""The configuration of a detector's training: one TOML preset over these typed fields."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.config import Config
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


class DetectConfig(TrainingSettings):
    """Everything a person decides about fine-tuning a detector."""

    encoder: Literal["resenc_l", "plain", "resenc_small", "plain_small"]
    init: Literal["kaiming", "torch_default"] = "torch_default"
    detector: RetinaUNetConfig = RetinaUNetConfig()
    object_fraction: Fraction = 0.5  # of a batch's patches that lie on an object
    mirror: bool = True
    validation_batches: Annotated[int, Field(ge=0)] = 0  # fixed patches; 0: no validation
    validate_every_steps: PositiveInt = 2500
    post_processing: PostProcessing = PostProcessing()

    @model_validator(mode="after")
    def _fits_the_encoder(self) -> "DetectConfig":
        strides = cumulative_strides(ENCODER_PRESETS[self.encoder].strides)
        levels = self.detector.head_levels
        if list(levels) != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError("detector.head_levels must be neighbouring levels, finest first")
        if not 0 <= levels[0] <= levels[-1] < len(strides):
            raise ValueError(
                f"detector.head_levels: {self.encoder} has levels 0..{len(strides) - 1}"
            )
        for edge, stride in zip(self.patch_size, strides[-1], strict=True):
            if edge % stride or edge < 2 * stride:
                raise ValueError(
                    f"patch_size {list(self.patch_size)}: every edge must be a multiple of "
                    f"{stride} and at least {2 * stride} for the encoder {self.encoder}"
                )
        return self
