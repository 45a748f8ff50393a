"""How the scores of true and false positives spread."""

from typing import Any

import numpy as np

from voxelbridge.detect.evaluate.ranked import Floats, RankedHits

BINS = 20


def bin_edges(scores: Floats) -> Floats:
    """Edges of BINS equal bins: over [0, 1] where all scores lie there, else over their range."""
    low, high = float(scores.min(initial=0.0)), float(scores.max(initial=1.0))
    if low >= 0.0 and high <= 1.0:
        return np.linspace(0.0, 1.0, BINS + 1)
    low, high = float(scores.min()), float(scores.max())
    if not np.isfinite(high - low):  # scores at both ends of what a float holds
        low, high = low / 4, high / 4
    edges = np.linspace(low, high, BINS + 1)
    return edges if (np.diff(edges) > 0).all() else np.linspace(low - 1.0, high + 1.0, BINS + 1)


def score_histogram(ranked: RankedHits, threshold: int, edges: Floats) -> dict[str, Any]:
    """True and false positives of each bin [a, b), the last one closed."""
    hit = np.zeros(len(ranked.rows), dtype=bool)
    hit[ranked.hits[threshold]] = True
    place = np.searchsorted(edges, ranked.scores, side="right") - 1
    place = np.clip(place, 0, len(edges) - 2)
    return {
        "true_positives": np.bincount(place[hit], minlength=len(edges) - 1).tolist(),
        "false_positives": np.bincount(place[~hit], minlength=len(edges) - 1).tolist(),
    }
