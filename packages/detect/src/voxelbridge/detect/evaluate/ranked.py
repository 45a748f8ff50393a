"""Ranked predictions with their hits, and what any resample of the images makes of them.

A resample is a weight per image, how often it was drawn; its predictions and objects count that
often. It is what an evaluation of the drawn images gives, copies of an image following each other
as images of their own. Letters: K kept predictions by descending score, T IoU thresholds, R rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from voxelbridge.detect.evaluate.assign import Assignment
from voxelbridge.detect.evaluate.average_precision import average_precision_of_hits, hits_needed
from voxelbridge.detect.evaluate.froc import last_of_each_score
from voxelbridge.detect.evaluate.tables import BoxTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

FEW_POINTS = 2_000  # of a curve: searched whole, which is faster than bisecting so few


@dataclass(frozen=True, eq=False)
class RankedHits:
    """The kept predictions of one class, or of all classes together, by descending score.

    rows (K,) of the prediction table; case_index (K,) image of each; ends: positions of the last of
    each run of equal scores; hits: per threshold the positions of the true positives, targets: the
    object rows they find; objects_per_case (images,). copies (K,): see `with_copies`.
    """

    rows: Ints
    case_index: Ints
    scores: Floats
    ends: Ints
    hits: tuple[Ints, ...]
    targets: tuple[Ints, ...]
    objects_per_case: Ints
    copies: Ints | None = None

    @classmethod
    def of(
        cls,
        assignment: Assignment,
        ground_truth: BoxTable,
        predictions: BoxTable,
        *,
        num_cases: int,
        label: int | None = None,
    ) -> Self:
        """The predictions and objects of class `label`; None: of all classes."""
        assert predictions.scores is not None
        kept, found, objects = assignment.kept, assignment.found, ground_truth.case_index
        if label is not None:
            mine = predictions.labels[kept] == label
            kept, found = kept[mine], found[:, mine]
            objects = objects[ground_truth.labels == label]
        hits = tuple(np.flatnonzero(row >= 0) for row in found)
        scores = predictions.scores[kept]
        return cls(
            rows=kept,
            case_index=predictions.case_index[kept],
            scores=scores,
            ends=last_of_each_score(scores),
            hits=hits,
            targets=tuple(row[at] for row, at in zip(found, hits, strict=True)),
            objects_per_case=np.bincount(objects, minlength=num_cases),
        )

    def restricted(self, threshold: int, keep: Flags, objects_per_case: Ints) -> Self:
        """Only the predictions flagged in `keep` (K,), at threshold number `threshold` alone."""
        place = np.cumsum(keep) - 1
        stays = keep[self.hits[threshold]]
        scores = self.scores[keep]
        return replace(
            self,
            rows=self.rows[keep],
            case_index=self.case_index[keep],
            scores=scores,
            ends=last_of_each_score(scores),
            hits=(place[self.hits[threshold][stays]],),
            targets=(self.targets[threshold][stays],),
            objects_per_case=objects_per_case,
        )

    def with_copies(self, most: int) -> Self:
        """Fit for weights up to `most` in `average_precisions`, exactly so where scores tie.

        Copies of an image follow each other. Where hits and errors of one image share a score, its
        predictions a, b drawn twice rank a, b, a, b and not a, a, b, b: such runs are written out,
        the copy number of a written-out prediction in `copies` and -1 for all others.
        """
        run = self._mixed_runs()
        if most < 2 or not len(run):
            return self
        again = np.repeat(np.flatnonzero(run >= 0), most)
        copy = np.tile(np.arange(most), int((run >= 0).sum()))
        alone = np.flatnonzero(run < 0)
        source = np.concatenate([alone, again])
        copies = np.concatenate([np.full(len(alone), -1), copy])
        start = np.where(copies < 0, source, run[source])
        order = np.lexsort((source, copies, start))
        source, copies = source[order], copies[order]
        flags = np.zeros((len(self.hits), len(self.rows)), dtype=bool)
        found = np.full((len(self.hits), len(self.rows)), -1, dtype=np.int64)
        for row, (at, target) in enumerate(zip(self.hits, self.targets, strict=True)):
            flags[row, at], found[row, at] = True, target
        hits = tuple(np.flatnonzero(row[source]) for row in flags)
        scores = self.scores[source]
        return replace(
            self,
            rows=self.rows[source],
            case_index=self.case_index[source],
            scores=scores,
            ends=last_of_each_score(scores),
            hits=hits,
            targets=tuple(row[source[at]] for row, at in zip(found, hits, strict=True)),
            copies=copies,
        )

    def weigh(self, weights: Ints) -> "WeighedHits":
        """The ranking where image n counts `weights[n]` times."""
        each = weights[self.case_index]
        if self.copies is not None:
            each = np.where(self.copies < 0, each, each > self.copies)
        objects = int(self.objects_per_case @ weights)
        return WeighedHits(self, each, np.cumsum(each), objects, int(weights.sum()))

    def _mixed_runs(self) -> Ints:
        """First position of the run of equal case and score that mixes hits and errors, else -1.

        (K,); empty where there is no such run at all.
        """
        new = np.ones(len(self.rows), dtype=bool)
        new[1:] = (self.scores[1:] != self.scores[:-1]) | (
            self.case_index[1:] != self.case_index[:-1]
        )
        if new.all():
            return np.zeros(0, dtype=np.int64)
        starts = np.flatnonzero(new)
        number = np.cumsum(new) - 1
        lengths = np.diff(np.append(starts, len(new)))
        mixed = np.zeros(len(starts), dtype=bool)
        for at in self.hits:
            count = np.bincount(number[at], minlength=len(starts))
            mixed |= (count > 0) & (count < lengths)
        return np.where(mixed[number], starts[number], -1) if mixed.any() else starts[:0]


@dataclass(frozen=True, eq=False)
class WeighedHits:
    """A ranking under one weight per image.

    each (K,) how often a prediction counts, counted (K,) how many up to and with it.
    """

    ranked: RankedHits
    each: Ints
    counted: Ints
    num_objects: int
    num_images: int

    def average_precisions(self) -> Floats:
        """AP at every threshold, (T,); NaN where there is no object."""
        if self.num_objects == 0:
            return np.full(len(self.ranked.hits), np.nan)
        needed = hits_needed(self.num_objects)
        return np.array(
            [
                average_precision_of_hits(np.cumsum(self.each[hits]), self.counted[hits], needed)
                for hits in self.ranked.hits
            ]
        )

    def sensitivities(
        self, threshold: int, rates: Sequence[float], *, nan_without_hit: bool
    ) -> Floats:
        """Sensitivity at the FROC rates, (R,), at threshold number `threshold`.

        NaN where there is no object; with `nan_without_hit` also where there are predictions of
        which none is a true positive, otherwise 0 there.
        """
        if self.num_objects == 0:
            return np.full(len(rates), np.nan)
        hits = self.ranked.hits[threshold]
        true = np.concatenate([[0], np.cumsum(self.each[hits])])
        if true[-1] == 0:
            undefined = nan_without_hit and len(self.counted) > 0 and self.counted[-1] > 0
            return np.full(len(rates), np.nan if undefined else 0.0)
        wanted = np.asarray(rates, dtype=np.float64)
        before = self._last_points(hits, true, wanted)
        x0, y0 = self._point(hits, true, before)
        x1, y1 = self._point(hits, true, np.minimum(before + 1, len(self.ranked.ends)))
        rise = x1 > x0  # not at the curve's last point
        slope = np.divide(y1 - y0, x1 - x0, out=np.zeros_like(y0), where=rise)
        return np.where(x0 == wanted, y0, slope * (wanted - x0) + y0)

    def _last_points(self, hits: Ints, true: Ints, wanted: Floats) -> Ints:
        """The last point of the curve at each rate or before; (R,) -> (R,)."""
        if len(self.ranked.ends) <= FEW_POINTS:
            rates, _ = self._point(hits, true, np.arange(len(self.ranked.ends) + 1))
            return np.searchsorted(rates, wanted, side="right") - 1
        low = np.zeros(len(wanted), dtype=np.int64)
        high = np.full(len(wanted), len(self.ranked.ends))
        while (low < high).any():
            middle = (low + high + 1) // 2
            rate, _ = self._point(hits, true, middle)
            low, high = (
                np.where(rate <= wanted, middle, low),
                np.where(rate <= wanted, high, middle - 1),
            )
        return low

    def _point(self, hits: Ints, true: Ints, number: Ints) -> tuple[Floats, Floats]:
        """False positives per image and sensitivity of points; number 0 is (0, 0), without any."""
        position = self.ranked.ends[np.maximum(number, 1) - 1]
        found = true[np.searchsorted(hits, position, side="right")]
        some = number > 0
        return (
            np.where(some, (self.counted[position] - found) / self.num_images, 0.0),
            np.where(some, found / self.num_objects, 0.0),
        )
