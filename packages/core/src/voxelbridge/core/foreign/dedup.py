"""One copy of every weight: networks of dynamic-network-architectures store each up to four times.

A block registers its convolution and its norm by name and again in the list `all_modules` that its
forward pass runs; the encoder stands in the decoder once more. So where copies differ, the one in
`all_modules` is what was trained (the sparse trainer of nnssl's S3D leaves the others at init).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from voxelbridge.core.foreign.safe_torch import ForeignFile
from voxelbridge.core.safetensors_header import refusal

_LISTED = re.compile(r"(?P<block>.+)\.all_modules\.(?P<index>\d+)\.(?P<rest>weight|bias)")
_NESTED = "decoder.encoder."


@dataclass(frozen=True, eq=False)
class Deduplicated:
    """Weights without aliases; `num_aliases` second names with the same values are gone.

    `stale`: weights of which another copy held other values than the trained one that is kept.
    """

    weights: dict[str, Tensor]
    num_aliases: int
    stale: tuple[str, ...]


def remove_aliases(file: ForeignFile, weights: Mapping[str, Tensor]) -> Deduplicated:
    """One tensor per weight under its own name; CheckpointError where copies contradict."""
    copies: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in weights.items():
        copies.setdefault(_own_name(name, weights), []).append((name, tensor))
    kept: dict[str, Tensor] = {}
    stale: list[str] = []
    num_aliases = 0
    for name, found in copies.items():
        trained = [pair for pair in found if ".all_modules." in pair[0]] or found
        first_name, first = trained[0]
        for other_name, other in trained[1:]:
            if not _same(first, other):
                raise refusal(
                    file.path,
                    f"{first_name} and {other_name} are one weight but hold different values; "
                    "no copy can be told to be the trained one",
                )
        others = [] if trained is found else [p for p in found if ".all_modules." not in p[0]]
        if any(other.shape != first.shape for _, other in others):
            raise refusal(file.path, f"{name} is stored twice, in different shapes")
        same = sum(_same(first, other) for _, other in others)
        num_aliases += len(trained) - 1 + same
        if same < len(others):
            stale.append(name)
        kept[name] = first
    return Deduplicated(kept, num_aliases, tuple(stale))


def _own_name(name: str, weights: Mapping[str, Tensor]) -> str:
    if name.startswith(_NESTED):
        name = name.removeprefix("decoder.")
    match = _LISTED.fullmatch(name)
    if match is None:
        return name
    prefix = f"{match['block']}.all_modules.{match['index']}"
    shapes = [weights[key].ndim for key in _copies(f"{prefix}.weight") if key in weights]
    kind = "conv" if any(ndim > 1 for ndim in shapes) else "norm"
    return f"{match['block']}.{kind}.{match['rest']}"


def _copies(name: str) -> Iterator[str]:
    yield name
    yield f"decoder.{name}"


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    # Bytes, not values: NaN equals itself here and is refused elsewhere.
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
