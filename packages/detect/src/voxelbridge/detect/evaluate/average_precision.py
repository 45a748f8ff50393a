"""Average precision of one class: the COCO rule, 101 recall points on the precision envelope."""

import numpy as np
from numpy.typing import NDArray

RECALL_POINTS = np.linspace(0.0, 1.0, 101)


def precision_recall(
    true_positive: NDArray[np.bool_], num_objects: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recall and precision after each prediction, given by descending score; (K,) -> (K,), (K,)."""
    hits = np.cumsum(true_positive)
    return hits / num_objects, hits / np.arange(1, len(hits) + 1)


def average_precision(true_positive: NDArray[np.bool_], num_objects: int) -> float:
    """AP of predictions given by descending score, in [0, 1]; `num_objects` at least 1.

    Precision is made monotone from the right and read at 101 recalls: at each, the first prediction
    whose recall reaches it, 0 where none does. So k of n objects found without an error give
    about (floor(100 k / n) + 1) / 101, not k / n.
    """
    at_hits = np.flatnonzero(true_positive)
    hits = np.arange(1, len(at_hits) + 1)
    return average_precision_of_hits(hits, at_hits + 1, hits_needed(num_objects))


def average_precision_of_hits(
    hits: NDArray[np.int64], predictions: NDArray[np.int64], needed: NDArray[np.int64]
) -> float:
    """AP from the true positives alone: `hits` and `predictions` counted up to each of them.

    `needed` is `hits_needed` of the number of objects.
    Enough because precision falls and recall stands still between true positives.
    """
    precision = hits / np.maximum(predictions, 1)
    first = np.searchsorted(hits, needed, side="left")
    reached = first[first < len(hits)]
    envelope = np.zeros(len(RECALL_POINTS))
    if len(reached):
        best = np.maximum.reduceat(precision, reached)  # between one recall point and the next
        envelope[: len(reached)] = np.maximum.accumulate(best[::-1])[::-1]
    return float(envelope.mean())


def hits_needed(num_objects: int) -> NDArray[np.int64]:
    """The fewest hits whose recall, as a rounded quotient, reaches each recall point; (101,)."""
    needed = np.ceil(RECALL_POINTS * num_objects).astype(np.int64)
    needed += needed / num_objects < RECALL_POINTS  # both products and quotients are rounded
    return needed - ((needed > 0) & ((needed - 1) / num_objects >= RECALL_POINTS))
