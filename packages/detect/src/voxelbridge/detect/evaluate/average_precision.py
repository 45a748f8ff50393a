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
    return average_precision_of_hits(hits, at_hits + 1, num_objects)


def average_precision_of_hits(
    hits: NDArray[np.int64], predictions: NDArray[np.int64], num_objects: int
) -> float:
    """AP from the true positives alone: `hits` and `predictions` counted up to each of them.

    Enough because precision falls and recall stands still between true positives.
    """
    precision = hits / np.maximum(predictions, 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(hits / num_objects, RECALL_POINTS, side="left")
    return float(np.append(envelope, 0.0)[first].mean())
