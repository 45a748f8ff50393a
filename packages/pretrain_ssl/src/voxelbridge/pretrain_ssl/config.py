"""The config of a self-supervised pre-training."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator
from pydantic_core.core_schema import ValidationInfo

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.arch.init import InitMethod
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.train.settings import TrainingSettings
from voxelbridge.pretrain_ssl.cases import Sampling
from voxelbridge.pretrain_ssl.method import Method

KIND = "pretrain_ssl"  # of a run directory


class PretrainConfig(TrainingSettings):
    """Encoder, method and training of one pre-training run."""

    encoder: Literal["resenc_l", "plain", "resenc_small", "plain_small"]
    method: Method
    sampling: Sampling = Sampling()
    augmentation: SpatialAugmentation = SpatialAugmentation()  # nnssl's values are nnU-Net's
    init: InitMethod = "torch_default"  # nnssl draws its networks this way
    validate_every_steps: PositiveInt = 1000
    validation_patches: NonNegativeInt = 16  # fixed patches and masks; 0 turns validation off
    pictures: NonNegativeInt = 2  # drawn of the first validation patches, at every validation
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.1  # of the cases; more end the run

    @field_validator("method")
    @classmethod
    def _fits_patch_and_encoder(cls, value: Method, info: ValidationInfo) -> Method:
        patch_size, encoder = info.data.get("patch_size"), info.data.get("encoder")
        if patch_size is None or encoder is None:
            return value  # what is wrong with these is said already
        value.check_patch(patch_size)
        size = value.network_input(patch_size)
        total = cumulative_strides(ENCODER_PRESETS[encoder].strides)[-1]
        if any(edge % step for edge, step in zip(size, total, strict=True)):
            what = "patch_size" if size == patch_size else "the method's crop size"
            raise ValueError(
                f"the total stride {list(total)} of {encoder} does not divide {what} {list(size)}"
            )
        return value
