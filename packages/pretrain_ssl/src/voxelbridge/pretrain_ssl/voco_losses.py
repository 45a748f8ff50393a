"""VoCo's losses (arXiv 2402.17300, section 3): predicted against true overlap of crops.

Embeddings are (B, n, E) of base crops and (B, k, E) of target crops; `overlap` o is (B, k, n), the
share of target crop t that lies in base crop b; the prediction c is a cosine cut at 0. Everything
is computed in float64 whatever autocast says: near c = 0 the logarithm of 1 - |o - c| magnifies
what float32 rounds away, and these are a few thousand numbers. Results are float32 (float64 for
float64 embeddings).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

_COSINE_EPS = 1e-8  # least length that is divided by
_EPS = 1e-6  # inside the logarithm and beside each count


@dataclass(frozen=True)
class OverlapLoss:
    """L_pos where crops share voxels, L_neg where they do not."""

    positive: Tensor
    negative: Tensor

    @property
    def sum(self) -> Tensor:
        """L_pos + L_neg."""
        return self.positive + self.negative


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """max(0, cos) of all pairs: (B, k, E), (B, n, E) -> (B, k, n)."""
    return _cosines(a, b).to(_result_type(a))


def overlap_loss(
    predicted: Tensor, overlap: Tensor, *, counts: Literal["volume", "batch"]
) -> OverlapLoss:
    """How far `predicted` (B, k, n) is from `overlap`.

    L_pos = sum(o * -log(1 - |o - c| + eps)) / (sum(o) + eps) and
    L_neg = sum(c^2 where o = 0) / (number of o = 0 + eps), with the sums over each volume and then
    the mean over the batch, or over the whole batch. Without any term a loss is 0.
    """
    c, o = predicted.double(), overlap.double()
    dims = (1, 2) if counts == "volume" else (0, 1, 2)
    apart = o == 0
    positive = (-o * torch.log(1 - (o - c).abs() + _EPS)).sum(dims) / (o.sum(dims) + _EPS)
    squares = torch.where(apart, c.square(), 0.0)
    negative = squares.sum(dims) / (apart.sum(dims, dtype=c.dtype) + _EPS)
    dtype = _result_type(predicted)
    return OverlapLoss(positive.mean().to(dtype), negative.mean().to(dtype))


def base_similarity(bases: Tensor, *, form: Literal["paper", "nnssl"]) -> Tensor:
    """L_reg: mean over the pairs i < j of base crops (B, n, E) of how alike they are.

    paper: max(0, cos)^2. nnssl: max(0, cos). Gradients go to both crops of a pair. 0 for a single
    base crop.
    """
    num_pairs = max(bases.shape[1] * (bases.shape[1] - 1) // 2, 1)
    alike = _cosines(bases, bases)
    if form == "paper":
        alike = alike.square()
    similarity = alike.triu(diagonal=1).sum(dim=(1, 2)) / num_pairs
    return similarity.mean().to(_result_type(bases))


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it is in half precision."""
    return x.to(_result_type(x))


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        first, second = (normalize(x.double(), dim=-1, eps=_COSINE_EPS) for x in (a, b))
        return (first @ second.transpose(1, 2)).relu()


def _result_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
