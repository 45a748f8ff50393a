"""The settings that every training shares, under the same names in every part."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from voxelbridge.core.config import Config
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.optim import Optim
from voxelbridge.core.train.schedule import PolySchedule
from voxelbridge.core.train.steps import MemoryFormat

PatchSize = tuple[PositiveInt, PositiveInt, PositiveInt]  # voxels, z y x


class TrainingSettings(Config):
    """Base of a part's training config; what costs GPU-weeks when wrong has no default."""

    patch_size: PatchSize
    batch_size: PositiveInt  # patches per optimizer step of the whole job, all ranks together
    schedule: PolySchedule
    optim: Optim
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay float32
    clip_norm: Annotated[float, Field(gt=0)] | None = (
        None  # global gradient norm; none: not clipped
    )
    accumulation_steps: PositiveInt = 1  # parts that one step's patches are computed in
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every_steps: PositiveInt = 50
    checkpoint_every_steps: PositiveInt = 1000
    checkpoint_every_minutes: Annotated[float, Field(gt=0)] | None = None  # as well, by rank 0
    keep_checkpoints: PositiveInt = 1  # newest training states that stay on the disk
    memory_format: MemoryFormat = "auto"  # see `place`
    compile: bool = False  # torch.compile of the objective's forward
    activation_checkpointing: Annotated[int, Field(ge=0)] = (
        0  # finest encoder stages whose activations the backward pass computes again
    )


def patches_per_pass(settings: TrainingSettings, *, ranks: int) -> int:
    """Patches in one forward pass of one rank; a batch that does not divide is a ConfigError."""
    parts = ranks * settings.accumulation_steps
    if settings.batch_size % parts:
        raise ConfigError(
            f"batch_size: got {settings.batch_size}, expected a multiple of {parts} "
            f"({ranks} ranks x accumulation_steps {settings.accumulation_steps})"
        )
    return settings.batch_size // parts
