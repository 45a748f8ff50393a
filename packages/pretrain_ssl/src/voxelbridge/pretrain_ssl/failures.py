"""Volumes that cannot be read: each is said once, skipped and counted; too many end the run."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from voxelbridge.core.errors import DataError

FAILED = "failed"  # key of a batch: (case, message) of every volume that its making skipped


class FailureWatch:
    """Counts the cases that could not be read; DataError above a share of `num_cases`."""

    def __init__(self, num_cases: int, *, max_share: float) -> None:
        self._num_cases = num_cases
        self._max_share = max_share
        self._messages: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Different cases that failed so far."""
        return len(self._messages)

    def watch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches without their failures, which are reported here. Any: views of a method."""
        for batch in batches:
            for case_id, message in batch.pop(FAILED):
                self._report(case_id, message)
            yield batch

    def _report(self, case_id: str, message: str) -> None:
        if case_id in self._messages:
            return
        self._messages[case_id] = message
        print(f"skipped: {message}", file=sys.stderr, flush=True)
        if self.count > self._max_share * self._num_cases:
            raise DataError(
                f"{self.count} of {self._num_cases} cases could not be read, more than "
                f"max_failed_share {self._max_share:g} allows; the last one: {message}"
            )
