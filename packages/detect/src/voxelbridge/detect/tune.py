"""How much of a detector trains: all, what follows the encoder, or low-rank updates besides."""

from collections.abc import Collection
from typing import assert_never

from torch import nn

from voxelbridge.detect.build import Detector
from voxelbridge.detect.config import FullTuning, LinearTuning, LowRankTuning, Tuning
from voxelbridge.detect.low_rank import add_low_rank_updates


def apply_tuning(detector: Detector, tune: Tuning, *, left_at_init: Collection[str] = ()) -> None:
    """Freezes what does not train and adds what trains in its place, before the optimizer is built.

    `left_at_init` names parameters of the encoder that no checkpoint gave, such as a stem drawn
    anew: with low-rank updates they train whole. A linear tuning freezes them with the rest.
    """
    match tune:
        case FullTuning():
            pass
        case LinearTuning():
            detector.encoder.requires_grad_(False)
        case LowRankTuning():
            add_low_rank_updates(
                detector.encoder, rank=tune.rank, alpha=tune.alpha, trained=left_at_init
            )
        case _:
            assert_never(tune)


def describe_tuning(detector: Detector, tune: Tuning) -> str:
    """How many parameters train: of the encoder, and of what follows it."""
    encoder = _trainable(detector.encoder)
    others = _trainable(detector) - encoder
    rank = f" (rank {tune.rank}, alpha {tune.alpha:g})" if isinstance(tune, LowRankTuning) else ""
    return (
        f"tune {tune.name}{rank}: {encoder + others:,} parameters train, "
        f"{encoder:,} of them in the encoder"
    )


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
