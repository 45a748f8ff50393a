"""What a person asks of planning: the rule, the memory budget, and fields set by hand."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from voxelbridge.core.arch.config import Triple, cumulative_strides
from voxelbridge.core.config import Config, validate
from voxelbridge.core.data.normalize import Normalization
from voxelbridge.core.data.resample import Resampling
from voxelbridge.core.errors import ConfigError

DEFAULT_GPU_MEMORY = "11GiB"  # nnDetection's: a card of the size that it was made for
UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[A-Za-z]+)")

PlanRule = Literal["default", "fixed"]
Millimetres = Annotated[float, Field(gt=0)]
Voxels = Annotated[float, Field(gt=0)]
Spacing = tuple[Millimetres, Millimetres, Millimetres]
PatchSize = tuple[PositiveInt, PositiveInt, PositiveInt]
Strides = tuple[PatchSize, ...]
AxisSizes = Annotated[tuple[Voxels, ...], Field(min_length=1)]


class PlanOverrides(Config):
    """The fields of a plan that `--set` takes; None = planned."""

    spacing_mm: Spacing | None = None
    patch_size: PatchSize | None = None
    batch_size: PositiveInt | None = None
    encoder: Literal["plain", "residual"] | None = None
    features: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    strides: Annotated[Strides, Field(min_length=1, max_length=12)] | None = None
    kernels: Annotated[Strides, Field(min_length=1, max_length=12)] | None = None
    head_levels: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = (
        None
    )
    anchor_sizes: tuple[tuple[AxisSizes, AxisSizes, AxisSizes], ...] | None = None
    num_queries: PositiveInt | None = None
    normalization: tuple[Normalization, ...] | None = None

    @model_validator(mode="after")
    def _are_consistent(self) -> "PlanOverrides":
        if self.kernels and any(edge % 2 == 0 for kernel in self.kernels for edge in kernel):
            raise ValueError(f"kernels {_list(self.kernels)}: every edge must be odd")
        levels = self.head_levels
        if levels and list(levels) != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError(
                f"head_levels {list(levels)}: must be neighbouring stages, finest first"
            )
        for level in self.anchor_sizes or ():
            if len({len(axis) for axis in level}) > 1:
                raise ValueError("anchor_sizes: every axis of a level needs as many sizes")
        return self


@dataclass(frozen=True)
class PlanRequest:
    """What `prepare` was asked for; a store belongs to one request."""

    rule: PlanRule = "default"
    gpu_memory: int = 11 * 2**30  # bytes
    overrides: PlanOverrides = field(default_factory=PlanOverrides)
    resampling: Resampling = field(default_factory=Resampling)

    @property
    def texts(self) -> tuple[str, ...]:
        """The overrides as `key=value`, values as JSON, in the order of the fields."""
        given = self.overrides.model_dump(mode="json", exclude_none=True)
        return tuple(f"{key}={json.dumps(value)}" for key, value in given.items())


def parse_request(
    rule: PlanRule,
    *,
    gpu_memory: str = DEFAULT_GPU_MEMORY,
    spacing_mm: Sequence[float] | None = None,
    settings: Sequence[str] = (),
    resampling: Literal["cubic", "nnunet"] = "cubic",
) -> PlanRequest:
    """The request of a command line; `settings` are `key=value` texts. Raises ConfigError."""
    tree: dict[str, Any] = {}  # Any: JSON values
    if spacing_mm is not None:
        tree["spacing_mm"] = [float(edge) for edge in spacing_mm]
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as patch_size=[96,96,96]")
        if key in tree:
            raise ConfigError(f"--set {setting}: {key} is given twice")
        try:
            tree[key] = json.loads(text)
        except ValueError:
            tree[key] = text  # the validation names the field and what is legal
    overrides = validate(PlanOverrides, tree, where="--spacing" if not settings else "--set")
    return PlanRequest(
        rule,
        parse_bytes(gpu_memory, option="--gpu-memory"),
        overrides,
        Resampling(image="nnunet", labels="nnunet") if resampling == "nnunet" else Resampling(),
    )


def parse_bytes(text: str, *, option: str) -> int:
    """Bytes of a text such as `24GiB`; a number without a unit is refused."""
    found = SIZE.fullmatch(text)
    unit = UNITS.get(found["unit"]) if found else None
    if found is None or unit is None or float(found["number"]) == 0:
        raise ConfigError(
            f"{option}: got {text!r}, expected a number and a unit ({', '.join(UNITS)}), as 24GiB"
        )
    return int(float(found["number"]) * unit)


def check_patch(patch_size: Triple, strides: Sequence[Triple], kernels: Sequence[Triple]) -> None:
    """ValueError unless the stages agree and the patch can be pooled by them."""
    if len(strides) != len(kernels):
        raise ValueError(f"strides has {len(strides)} stages and kernels has {len(kernels)}")
    if tuple(strides[0]) != (1, 1, 1):
        raise ValueError(f"strides: the first stage keeps the resolution, got {list(strides[0])}")
    if any(edge % 2 == 0 for kernel in kernels for edge in kernel):
        raise ValueError(f"kernels {_list(kernels)}: every edge must be odd")
    total = cumulative_strides(tuple(strides))[-1]
    for edge, stride in zip(patch_size, total, strict=True):
        if edge % stride or (stride > 1 and edge < 2 * stride):
            raise ValueError(
                f"patch_size {list(patch_size)}: every edge must be a multiple of the total stride "
                f"{list(total)} and at least twice it"
            )


def _list(values: Sequence[Triple]) -> list[list[int]]:
    return [list(value) for value in values]
