"""The config of a supervised pre-training on many data sets."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator
from pydantic_core.core_schema import ValidationInfo

from voxelbridge.core.arch.config import (
    AnyDecoderConfig,
    DecoderConfig,
    UFPNConfig,
    cumulative_strides,
)
from voxelbridge.core.arch.init import InitMethod
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.train.settings import PatchSize, TrainingSettings
from voxelbridge.pretrain_sup.losses import Reduction
from voxelbridge.pretrain_sup.sampling import Sampling

KIND = "pretrain_sup"  # of a run directory


class MultiTalentConfig(TrainingSettings):
    """Network, sampling and training of one run; the label space comes with the store."""

    encoder: Literal["resenc_l", "plain", "resenc_small", "plain_small"]
    decoder: AnyDecoderConfig  # kind "unet" or "ufpn" (the pyramid of the Retina U-Net)
    sampling: Sampling = Sampling()
    augmentation: SpatialAugmentation = SpatialAugmentation()  # as nnU-Net
    init: InitMethod = "kaiming"  # nnU-Net's and nnDetection's
    reduction: Reduction = "mean"  # over the samples of a step; see docs/methods/multitalent.md
    deep_supervision: bool = True  # losses on all levels of the decoder, not on the finest alone
    supervise_coarsest: bool = False  # on the coarsest of them as well
    validate_every_steps: PositiveInt = 1000
    validation_patches: NonNegativeInt = 64  # fixed, of all data sets alike; 0: no validation

    @field_validator("encoder")
    @classmethod
    def _divides_patch(cls, value: str, info: ValidationInfo) -> str:
        patch_size: PatchSize | None = info.data.get("patch_size")
        total = cumulative_strides(ENCODER_PRESETS[value].strides)[-1]
        if patch_size and any(n % step for n, step in zip(patch_size, total, strict=True)):
            raise ValueError(
                f"its total stride {list(total)} does not divide patch_size {list(patch_size)}"
            )
        return value

    @field_validator("decoder")
    @classmethod
    def _fits_encoder(cls, value: AnyDecoderConfig, info: ValidationInfo) -> AnyDecoderConfig:
        encoder = info.data.get("encoder")
        levels = len(ENCODER_PRESETS[encoder].features) if encoder else None
        match value:
            case DecoderConfig(convs_per_stage=convs) if levels and len(convs) != levels - 1:
                raise ValueError(
                    f"convs_per_stage needs {levels - 1} entries, one fewer than the stages of "
                    f"{encoder}, got {len(convs)}"
                )
            case UFPNConfig(first_level=first) if levels and first >= levels:
                raise ValueError(f"first_level must be below {levels}, the stages of {encoder}")
            case _:
                return value
