"""The config of a self-supervised pre-training."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator
from pydantic_core.core_schema import ValidationInfo

from voxelbridge.core.arch.init import InitMethod
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.train.settings import TrainingSettings
from voxelbridge.pretrain_ssl.method import Method

KIND = "pretrain_ssl"  # of a run directory


class PretrainConfig(TrainingSettings):
    """Encoder, method and training of one pre-training run."""

    encoder: Literal["resenc_l", "plain", "resenc_small", "plain_small"]
    method: Method
    init: InitMethod = "torch_default"  # nnssl draws its networks this way
    validate_every_steps: PositiveInt = 1000
    validation_patches: NonNegativeInt = 16  # fixed patches and masks; 0 turns validation off

    @field_validator("encoder")
    @classmethod
    def _patch_fits_encoder(cls, value: str, info: ValidationInfo) -> str:
        patch_size = info.data.get("patch_size")
        total = [1, 1, 1]
        for stride in ENCODER_PRESETS[value].strides:
            total = [before * step for before, step in zip(total, stride, strict=True)]
        if patch_size and any(edge % step for edge, step in zip(patch_size, total, strict=True)):
            raise ValueError(
                f"its total stride {total} does not divide patch_size {list(patch_size)}"
            )
        return value

    @field_validator("method")
    @classmethod
    def _patch_fits_method(cls, value: Method, info: ValidationInfo) -> Method:
        patch_size = info.data.get("patch_size")
        if patch_size:
            value.check_patch(patch_size)
        return value
