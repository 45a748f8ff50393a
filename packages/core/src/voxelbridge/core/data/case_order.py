"""Which case a training draws when: stated shares kept exactly, nothing repeated too early.

Cases are split into strata (data sets, modalities), each with a weight, and inside a stratum into
groups (patients; or every case on its own). `CaseOrder.case(index)` is a pure function of the seed
and the number of the sample in the whole job, so that

- a resumed training goes on where it was without any saved position,
- N ranks that take every N-th sample draw together what one process would, each case once,
- a stratum's groups are all drawn once before one of them comes again,
- after any number of blocks of `BLOCK` samples every stratum had its share to within one sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import ConfigError

BLOCK = 4096  # samples whose shares are settled together
_BLOCK_STREAM, _STRATUM_STREAM, _GROUP_STREAM = range(3)  # independent random streams of a seed


@dataclass(frozen=True)
class Stratum:
    """Cases drawn with one weight; within it each group is as likely as any other."""

    name: str
    weight: float
    groups: tuple[tuple[str, ...], ...]  # case ids of each group; no group is empty

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups):
            raise ValueError(f"stratum {self.name!r} or one of its groups has no case")
        if not (np.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"stratum {self.name!r}: weight {self.weight}, expected above 0")


class CaseOrder:
    """The endless sequence of cases that a training draws; see the module's page for its laws."""

    def __init__(self, strata: Sequence[Stratum], *, seed: int) -> None:
        if not strata or len({stratum.name for stratum in strata}) != len(strata):
            raise ValueError("a case order needs strata of different names")
        self.strata = tuple(strata)
        weights = np.array([stratum.weight for stratum in strata], dtype=np.float64)
        self.shares: NDArray[np.float64] = weights / weights.sum()
        self._seed = seed
        self._given = np.zeros((1, len(strata)), dtype=np.int64)  # per block, drawn before it
        # Per object, so that an order and its memory go together: a training asks for the same
        # block and the same rounds again and again.
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._round = lru_cache(maxsize=4 * len(strata))(self._make_round)

    def case(self, index: int) -> str:
        """The case of sample `index` (from 0)."""
        stratum, visit = self.draw(index)
        groups = self.strata[stratum].groups
        turn, place = divmod(visit, len(groups))
        number = int(self._round(stratum, turn)[place])
        group = groups[number]
        if len(group) == 1:
            return group[0]
        # A group's members take turns in an order of their own.
        rng = self._generator(_GROUP_STREAM, stratum, number, turn // len(group))
        return group[int(rng.permutation(len(group))[turn % len(group)])]

    def draw(self, index: int) -> tuple[int, int]:
        """Number of the stratum of sample `index`, and how often it was drawn before."""
        block, place = divmod(index, BLOCK)
        strata, earlier = self._block(block)
        stratum = int(strata[place])
        return stratum, int(self._given[block, stratum] + earlier[place])

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Per sample of a block: its stratum, and the samples of it earlier in the block."""
        counts = self._counts_of(block)
        strata = np.repeat(np.arange(len(counts)), counts)
        strata = self._generator(_BLOCK_STREAM, block).permutation(strata)
        earlier = np.empty_like(strata)
        for stratum in range(len(counts)):
            chosen = np.flatnonzero(strata == stratum)
            earlier[chosen] = np.arange(len(chosen))
        return strata, earlier

    def _counts_of(self, block: int) -> NDArray[np.int64]:
        """Samples of each stratum in a block: what its share still lacks, by largest remainder."""
        while len(self._given) < block + 2:
            before = self._given[-1]
            due = self.shares * BLOCK * len(self._given) - before
            counts = np.maximum(np.floor(due), 0).astype(np.int64)
            rest = np.argsort(counts - due, kind="stable")
            missing = BLOCK - int(counts.sum())
            if missing >= 0:
                counts[rest[:missing]] += 1
            else:  # a stratum had been ahead of its share: the last in line give way
                giving = [number for number in rest[::-1] if counts[number] > 0][:-missing]
                counts[giving] -= 1
            self._given = np.vstack([self._given, before + counts])
        return self._given[block + 1] - self._given[block]

    def _make_round(self, stratum: int, turn: int) -> NDArray[np.int64]:
        """The order in which a stratum's groups come in their round `turn`."""
        count = len(self.strata[stratum].groups)
        return self._generator(_STRATUM_STREAM, stratum, turn).permutation(count)

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence((self._seed, *stream)))


def group_cases(
    case_ids: Sequence[str], group_of: Mapping[str, str]
) -> tuple[tuple[str, ...], ...]:
    """`case_ids` by their group, sorted; a case without one is a group of its own."""
    groups: dict[str, list[str]] = {}
    for case_id in sorted(case_ids):
        groups.setdefault(group_of.get(case_id, case_id), []).append(case_id)
    return tuple(tuple(members) for _, members in sorted(groups.items()))


def weighted_strata(
    members: Mapping[str, tuple[tuple[str, ...], ...]],
    *,
    exponent: float,
    weights: Mapping[str, float],
) -> list[Stratum]:
    """Strata with share ~ weight * (number of groups) ** exponent; a weight of 0 leaves one out.

    Exponent 1 draws all groups alike, 0 all strata, 0.5 is MultiTalent's rule. `weights` are
    factors by stratum, 1 where not given; a name that no stratum has, and nothing left to draw,
    are a ConfigError.
    """
    unknown = sorted(weights.keys() - members.keys())
    if unknown:
        known = ", ".join(sorted(members)[:10])
        raise ConfigError(f"weights: no case belongs to {unknown[0]!r}; there are {known}")
    strata = [
        Stratum(name, weights.get(name, 1.0) * len(groups) ** exponent, groups)
        for name, groups in sorted(members.items())
        if weights.get(name, 1.0) > 0
    ]
    if not strata:
        raise ConfigError("weights: all are 0, no case is left to draw; raise one of them")
    return strata
