"""The best weights of a training so far: `checkpoints/best.safetensors`.

Which figure decides: `Validation.deciding`. Of equal values the earlier step counts. After a
restart the attempts before it count no more.

A killed run goes on from its last state and validates the steps after it once more. Nothing of the
training's state is needed for that: the stored best is the maximum over all validations done, a
repeated validation cannot change a maximum, and a file that was just being replaced is either the
old or the new one (`weights`). So the end is that of a run left alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from voxelbridge.core.errors import CheckpointError
from voxelbridge.detect.weights import StoredWeights, stored_weights, write_weights

LOWER_IS_BETTER = ("val_total",)


class BestWeights:
    """Keeps the best weights in the run directory; for the process that writes it."""

    def __init__(self, run: Path, deciding: Sequence[str]) -> None:
        self._run = run
        self._deciding = deciding
        try:
            self._best = stored_weights(run, "best")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; restore it, or delete it: then the best of the validations to come "
                "is kept"
            ) from error

    @property
    def best(self) -> StoredWeights | None:
        """What is stored now."""
        return self._best

    def offer(
        self, detector: nn.Module, values: Mapping[str, float], *, step: int, attempt: int = 0
    ) -> bool:
        """Stores the weights, and says so, if the `values` measured after `step` are the best."""
        metric = next((name for name in self._deciding if name in values), None)
        if metric is None:
            return False
        value = values[metric]
        if not _is_better(self._best, metric, value, step=step, attempt=attempt):
            return False
        self._best = write_weights(
            self._run, detector, weights="best", step=step, attempt=attempt, metric=(metric, value)
        )
        return True


def _is_better(
    best: StoredWeights | None, metric: str, value: float, *, step: int, attempt: int
) -> bool:
    if best is None or best.metric != metric or best.value is None or best.step is None:
        return True
    if attempt != best.attempt:
        return attempt > best.attempt
    if value == best.value:
        return step < best.step
    return value < best.value if metric in LOWER_IS_BETTER else value > best.value
