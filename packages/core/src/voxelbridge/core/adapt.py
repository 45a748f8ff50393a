"""Weights for an encoder that differs from the checkpoint's: what is changed, and why.

Depth, kernels of 1 and 3, biases and strides can be reconciled; kind and widths cannot. Channels
of the image are the business of the stem's policies (`transfer`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from voxelbridge.core.arch.config import EncoderConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """One place where a checkpoint and an encoder differ, and what adapting does there.

    `name` is a tensor, a stage or a field of the architecture; `remedy` None: nothing helps.
    """

    name: str
    theirs: str  # of the checkpoint
    ours: str
    remedy: str | None

    def describe(self) -> str:
        return f"{self.name}: checkpoint {self.theirs}, encoder {self.ours}" + (
            "" if self.remedy is None else f" -> {self.remedy}"
        )


@dataclass(frozen=True, eq=False)
class Adapted:
    """Weights after adaptation; `allow` are the differences that are left and explained."""

    weights: dict[str, Tensor]
    differences: tuple[Difference, ...]
    allow: tuple[str, ...]


def adapt_weights(
    weights: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    theirs: EncoderConfig,
    ours: EncoderConfig,
) -> Adapted:
    """`weights` (`stem.*`, `stages.*`) brought to the shapes of `targets` where there is a way.

    A kernel edge of 3 becomes 1 by the mean along that axis, one of 1 becomes 3 with zeros around
    it (the same function). A bias before a norm has no effect: one that is missing is zero. Stages
    that only one side has stay at init or unused.
    """
    differences = _config_differences(theirs, ours)
    allow = [d.name for d in differences if d.remedy is not None and d.name == "strides"]
    stages = (len(theirs.features), len(ours.features))
    for stage in range(min(stages), max(stages)):
        there = stage < stages[0]
        differences.append(
            Difference(
                f"stages.{stage}",
                f"{theirs.features[stage]} channels" if there else "none",
                "none" if there else f"{ours.features[stage]} channels",
                "not used" if there else "left at init",
            )
        )
        allow.append(f"stages.{stage}")
    adapted = dict(weights)
    for name in sorted({*weights, *targets}):
        source, target = weights.get(name), targets.get(name)
        if source is not None and target is not None and source.shape != target.shape:
            adapted[name], remedy = _with_kernel(source, tuple(target.shape))
            differences.append(
                Difference(name, str(tuple(source.shape)), str(tuple(target.shape)), remedy)
            )
        elif name.endswith(".conv.bias") and (source is None) != (target is None):
            if _covered(name, allow):
                continue
            if source is not None:
                remedy = "not used: without effect before a norm"
                allow.append(name)
            else:
                assert target is not None
                adapted[name] = torch.zeros(target.shape)
                remedy = "zeros: without effect before a norm"
            shapes = [str(None if t is None else tuple(t.shape)) for t in (source, target)]
            differences.append(Difference(name, shapes[0], shapes[1], remedy))
    return Adapted(adapted, tuple(differences), tuple(allow))


def difference_table(differences: Sequence[Difference]) -> str:
    """A text table: place, both sides, and what adapting does or why it cannot."""
    rows = [("place", "checkpoint", "encoder", "what to do")] + [
        (d.name, d.theirs, d.ours, d.remedy or "cannot be adapted") for d in differences
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


def _config_differences(theirs: EncoderConfig, ours: EncoderConfig) -> list[Difference]:
    """Differences of the stages that both have; those that show in tensors too are told there."""
    common = min(len(theirs.features), len(ours.features))
    found: list[Difference] = []
    if theirs.kind != ours.kind:
        found.append(Difference("kind", theirs.kind, ours.kind, None))
    if theirs.strides[:common] != ours.strides[:common]:
        found.append(
            Difference(
                "strides",
                str(theirs.strides[:common]),
                str(ours.strides[:common]),
                "weights are copied as they are, at other resolutions",
            )
        )
    elif theirs.strides != ours.strides:
        found.append(
            Difference("strides", str(theirs.strides), str(ours.strides), "the common ones agree")
        )
    return found


def _with_kernel(weight: Tensor, shape: Shape) -> tuple[Tensor, str | None]:
    """`weight` with the kernel of `shape`, and how in words; None where there is no way."""
    old, new = tuple(weight.shape), shape
    edges = {*zip(old[2:], new[2:], strict=False)}
    fits = len(old) == len(new) == 5 and old[:2] == new[:2]
    if not fits or any(a != b and (a, b) not in ((3, 1), (1, 3)) for a, b in edges):
        return weight, None
    words: list[str] = []
    for axis in range(2, 5):
        if old[axis] == 3 and new[axis] == 1:
            weight = weight.float().mean(dim=axis, keepdim=True).to(weight.dtype)
            words.append(f"mean along {'zyx'[axis - 2]}")
        elif old[axis] == 1 and new[axis] == 3:
            weight = torch.cat([torch.zeros_like(weight), weight, torch.zeros_like(weight)], axis)
            words.append(f"zeros around along {'zyx'[axis - 2]}")
    return weight, ", ".join(words)


def _covered(name: str, allow: Sequence[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allow)
