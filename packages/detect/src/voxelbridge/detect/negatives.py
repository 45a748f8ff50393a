"""Which anchors enter the classification loss with hard-negative mining (nnDetection's rule)."""

import torch
from torch import Tensor


@torch.no_grad()
def sample_hard_negatives(
    positive: Tensor,
    negative: Tensor,
    *,
    foreground_probability: Tensor,
    num_samples: int,
    positive_fraction: float = 0.33,
    pool_factor: float = 20.0,
    min_negatives: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of the sampled positive and negative anchors; three (N,) tensors -> two index tensors.

    `positive` and `negative` are bool masks; an anchor in neither is ignored. Up to
    num_samples * positive_fraction positives are drawn, then (1 / positive_fraction - 1) negatives
    for each of them (as for one where there is none, at least `min_negatives`) out of the
    pool_factor times as many negatives of highest foreground probability. The sample is not filled
    up to `num_samples`. nnDetection counts over the whole batch (32 samples per image).
    A generator (on the tensors' device) draws without replacement; without one the first are
    taken: positives in row order, negatives hardest first.
    """
    if not 0.0 < positive_fraction < 1.0:
        raise ValueError(f"positive_fraction: got {positive_fraction}, expected inside (0, 1)")
    positive_rows = positive.nonzero().squeeze(1)
    num_positive = min(len(positive_rows), int(num_samples * positive_fraction))
    per_positive = abs(1 - 1 / positive_fraction)
    num_negative = max(int(max(1, num_positive) * per_positive), min_negatives)
    pool = _hardest(negative, foreground_probability, int(num_negative * pool_factor))
    num_negative = min(num_negative, len(pool))
    return (
        _draw(positive_rows, num_positive, generator),
        _draw(pool, num_negative, generator),
    )


def _hardest(negative: Tensor, probability: Tensor, count: int) -> Tensor:
    rows = negative.nonzero().squeeze(1)
    top = probability[rows].topk(min(count, len(rows))).indices
    return rows[top]


def _draw(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    if generator is None or count == len(rows):
        return rows[:count]
    order = torch.randperm(len(rows), generator=generator, device=rows.device)
    return rows[order[:count]]
