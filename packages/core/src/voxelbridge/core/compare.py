"""What differs between two checkpoints: metadata, weights, and what their stages give."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.arch.encoder import Encoder, build_encoder
from voxelbridge.core.checkpoint import Checkpoint
from voxelbridge.core.config import differing_keys
from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.transfer import transfer_encoder

INPUT_SEED = 0
MIN_EDGE = 16  # voxels of the fixed input, at least
_HASHES = ("tensors_sha256:", "metadata_sha256:")

Kind = Literal["only in A", "only in B", "shape", "type", "values"]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor; differences of values are None where the two cannot be subtracted."""

    kind: Kind
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    max_abs: float | None = None
    relative: float | None = None  # length of the difference by the length of A

    def describe(self) -> str:
        match self.kind:
            case "only in A":
                return f"only in A {self.shape_a}"
            case "only in B":
                return f"only in B {self.shape_b}"
            case "shape":
                return f"shape {self.shape_a} and {self.shape_b}"
            case "type" | "values":
                other = "other type, " if self.kind == "type" else ""
                return f"{other}largest difference {self.max_abs:.3g}, relative {self.relative:.3g}"


@dataclass(frozen=True)
class StageDifference:
    """What one encoder stage of A and of B give on the same input."""

    shape: tuple[int, ...]  # (B, C, D, H, W)
    max_abs: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """`stages` is None where the encoders cannot be given the same input; `why_no_stages` says why.

    `tensors` counts a single stem under one name, however the files call it.
    """

    same_architecture: bool  # encoder, decoder, and the stems' channels
    metadata: tuple[str, ...]
    tensors: Mapping[str, TensorDifference]
    num_tensors: int
    stages: tuple[StageDifference, ...] | None
    why_no_stages: str | None = None
    input_size: tuple[int, int, int] | None = None
    stem: str | None = None  # whose images the stages were given

    @property
    def same(self) -> bool:
        return not self.metadata and not self.tensors

    @property
    def verdict(self) -> str:
        if not self.same_architecture:
            return "different architecture"
        if self.tensors:
            return "same architecture, different weights"
        return "identical" if self.same else "identical weights, different metadata"

    def as_json(self) -> dict[str, Any]:  # Any: JSON values
        return {
            "verdict": self.verdict,
            "same": self.same,
            "same_architecture": self.same_architecture,
            "metadata": list(self.metadata),
            "tensors": {name: asdict(difference) for name, difference in self.tensors.items()},
            "stages": None if self.stages is None else [asdict(stage) for stage in self.stages],
            "why_no_stages": self.why_no_stages,
            "input_size": self.input_size,
            "stem": self.stem,
        }

    def lines(self) -> list[str]:
        """A table for people; the verdict is the last line."""
        lines = [f"metadata: {len(self.metadata)} differences"]
        lines += [f"  {line}" for line in self.metadata]
        lines.append(f"tensors: {len(self.tensors)} of {self.num_tensors} differ")
        lines += [f"  {name}: {found.describe()}" for name, found in self.tensors.items()]
        if self.stages is None:
            lines.append(f"stages: not compared ({self.why_no_stages})")
        else:
            size = "x".join(str(edge) for edge in self.input_size or ())
            lines.append(f"stages: outputs on a fixed input of {size} voxels, stem {self.stem}")
            lines += [
                f"  stage {index}: largest difference {stage.max_abs:.3g}, "
                f"relative {stage.relative:.3g}"
                for index, stage in enumerate(self.stages)
            ]
        return [*lines, self.verdict]


def compare_checkpoints(a: Checkpoint, b: Checkpoint, *, stem: str | None = None) -> Comparison:
    """Differences of metadata, tensors and, for equal encoders, stage outputs.

    `stem` names the one (that both have) whose images the stages are given; None takes A's default
    or only one, else the first that both have.
    """
    metadata = tuple(
        line for line in differing_keys(a.metadata, b.metadata) if not line.startswith(_HASHES)
    )
    own, other = _with_one_stem_name(a), _with_one_stem_name(b)
    names = dict.fromkeys([*own, *other])
    tensors = {
        name: difference
        for name in names
        if (difference := _difference(own.get(name), other.get(name))) is not None
    }
    outputs = _stages(a, b, stem=stem)
    return Comparison(
        same_architecture=_architecture(a) == _architecture(b),
        metadata=metadata,
        tensors=tensors,
        num_tensors=len(names),
        stages=outputs.stages,
        why_no_stages=outputs.why_none,
        input_size=outputs.size,
        stem=outputs.stem,
    )


@dataclass(frozen=True)
class _Stages:
    stages: tuple[StageDifference, ...] | None = None
    why_none: str | None = None
    size: tuple[int, int, int] | None = None
    stem: str | None = None


def _architecture(checkpoint: Checkpoint) -> object:
    stems = checkpoint.metadata.stems
    channels = {name: stem.channels for name, stem in stems.items()}
    if len(stems) == 1:
        channels = dict.fromkeys([""], *channels.values())
    return checkpoint.metadata.arch, checkpoint.metadata.decoder, channels


def _with_one_stem_name(checkpoint: Checkpoint) -> dict[str, Tensor]:
    if len(checkpoint.metadata.stems) > 1:
        return dict(checkpoint.tensors)
    prefix = checkpoint.stem_prefix(next(iter(checkpoint.metadata.stems)))
    return {
        f"encoder.stem.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor
        for name, tensor in checkpoint.tensors.items()
    }


def _difference(a: Tensor | None, b: Tensor | None) -> TensorDifference | None:
    if a is None or b is None:
        here = a if b is None else b
        assert here is not None
        shape = tuple(here.shape)
        if b is None:
            return TensorDifference("only in A", shape, None)
        return TensorDifference("only in B", None, shape)
    shapes = tuple(a.shape), tuple(b.shape)
    if a.shape != b.shape:
        return TensorDifference("shape", *shapes)
    if a.dtype == b.dtype and a.equal(b):
        return None
    kind: Kind = "values" if a.dtype == b.dtype else "type"
    return TensorDifference(kind, *shapes, *_distances(a, b))


def _distances(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and length of the difference by the length of `a`."""
    delta = a.double() - b.double()
    if not delta.numel():
        return 0.0, 0.0
    length = float(a.double().norm())
    distance = float(delta.norm())
    relative = distance / length if length else float(distance > 0)
    return float(delta.abs().max()), relative


def _stages(a: Checkpoint, b: Checkpoint, *, stem: str | None) -> _Stages:
    if stem is not None:
        for checkpoint in (a, b):
            if stem not in checkpoint.metadata.stems:
                known = ", ".join(checkpoint.metadata.stems)
                raise CheckpointError(f"{checkpoint.origin}: has no stem {stem!r}, has: {known}")
    if a.metadata.arch != b.metadata.arch:
        return _Stages(why_none="the encoders differ")
    pair = _stem_pair(a, b, stem=stem)
    if pair is None:
        return _Stages(why_none="no stem of theirs takes the same channels")
    size = _input_size(a)
    channels = a.metadata.stems[pair[0]].channels
    generator = torch.Generator().manual_seed(INPUT_SEED)
    image = torch.randn(1, channels, *size, generator=generator)
    with torch.no_grad():
        first = _encoder(a, pair[0])(image)
        second = _encoder(b, pair[1])(image)
    stages = tuple(
        StageDifference(tuple(one.shape), *_distances(one, two))
        for one, two in zip(first, second, strict=True)
    )
    words = pair[0] if pair[0] == pair[1] else f"{pair[0]} of A and {pair[1]} of B"
    return _Stages(stages, size=size, stem=words)


def _stem_pair(a: Checkpoint, b: Checkpoint, *, stem: str | None) -> tuple[str, str] | None:
    ours, theirs = a.metadata.stems, b.metadata.stems
    if stem is None and len(ours) == len(theirs) == 1:
        pairs = [(next(iter(ours)), next(iter(theirs)))]
    else:
        wanted = [stem] if stem is not None else [a.metadata.stem_unless_named, *ours]
        pairs = [(name, name) for name in wanted if name in ours and name in theirs]
    fitting = [(x, y) for x, y in pairs if ours[x].channels == theirs[y].channels]
    return fitting[0] if fitting else None


def _input_size(checkpoint: Checkpoint) -> tuple[int, int, int]:
    z, y, x = cumulative_strides(checkpoint.metadata.arch.strides)[-1]
    return _edge(z), _edge(y), _edge(x)


def _edge(stride: int) -> int:
    return stride * max(2, -(-MIN_EDGE // stride))


def _encoder(checkpoint: Checkpoint, stem: str) -> Encoder:
    with torch.device("meta"):
        encoder = build_encoder(
            checkpoint.metadata.arch, in_channels=checkpoint.metadata.stems[stem].channels
        )
    encoder.to_empty(device="cpu")
    transfer_encoder(checkpoint, encoder, stem=stem)
    return encoder.eval()
