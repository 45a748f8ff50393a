"""Volumes that cannot be read: each is said once, skipped and counted; too many end the run."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from voxelbridge.core.errors import DataError
from voxelbridge.core.train.distributed import World

FAILED = "failed"  # key of a batch: (case, message) of every volume that its making skipped


class FailureWatch:
    """Counts the cases that could not be read; DataError above a share of `num_cases`.

    Of several ranks only the one that `speaks` prints: what it met at once, what the others met
    at the next `agree`.
    """

    def __init__(self, num_cases: int, *, max_share: float, speaks: bool = True) -> None:
        self._num_cases = num_cases
        self._max_share = max_share
        self._speaks = speaks
        self._messages: dict[str, str] = {}
        self._untold: dict[str, str] = {}  # what the other ranks do not know yet

    @property
    def count(self) -> int:
        """Different cases that failed so far, as far as this rank knows."""
        return len(self._messages)

    def watch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches without their failures, which are reported here. Any: views of a method."""
        for batch in batches:
            self.take(batch)
            yield batch

    def take(self, batch: dict[str, Any]) -> None:  # Any: views of a method
        """Takes the failures out of `batch` and reports them."""
        for case_id, message in batch.pop(FAILED):
            if self._add(case_id, message):
                self._untold[case_id] = message
                self._check()

    def agree(self, world: World) -> int:
        """`count` over all ranks, which then know each other's failures; every rank must ask."""
        for messages in world.gather(self._untold):
            for case_id, message in messages.items():
                self._add(case_id, message)
        self._untold = {}
        self._check()
        return self.count

    def _add(self, case_id: str, message: str) -> bool:
        """Whether the case is new."""
        if case_id in self._messages:
            return False
        self._messages[case_id] = message
        if self._speaks:
            print(f"skipped: {message}", file=sys.stderr, flush=True)
        return True

    def _check(self) -> None:
        if self.count > self._max_share * self._num_cases:
            raise DataError(
                f"{self.count} of {self._num_cases} cases could not be read, more than "
                f"max_failed_share {self._max_share:g} allows; the last one: "
                f"{list(self._messages.values())[-1]}"
            )
