from dataclasses import dataclass
from typing import Any

import pytest
import torch

from voxelbridge.core.errors import DataError
from voxelbridge.core.train.distributed import World
from voxelbridge.pretrain_ssl.failures import FAILED, FailureWatch


def test_each_failure_is_said_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    watch = FailureWatch(100, max_share=0.02)
    batches = [{"x": 1, FAILED: [("a", "case a: broken")]}, {"x": 2, FAILED: []},
               {"x": 3, FAILED: [("a", "case a: broken"), ("b", "case b: gone")]}]  # fmt: skip
    assert list(watch.watch(batches)) == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert watch.count == 2
    assert capsys.readouterr().err == "skipped: case a: broken\nskipped: case b: gone\n"


def test_too_many_failures_end_the_run() -> None:
    watch = FailureWatch(10, max_share=0.1)
    batches = [{FAILED: [("a", "case a: broken")]}, {FAILED: [("b", "case b: gone")]}]
    with pytest.raises(DataError, match=r"2 of 10 cases .* max_failed_share 0\.1 .*case b: gone"):
        list(watch.watch(batches))


@dataclass
class TwoRanks(World):
    """Rank 0 of two; `other` is what rank 1 gives to an exchange."""

    other: Any = None

    def gather(self, value: Any) -> list[Any]:
        return [dict(value), self.other]


def test_ranks_count_together_and_say_each_case_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch, silent = FailureWatch(9, max_share=0.3), FailureWatch(9, max_share=0.3, speaks=False)
    for one in (watch, silent):
        one.take({FAILED: [("a", "case a: broken")]})
    world = TwoRanks(torch.device("cpu"), other={"a": "case a: broken", "b": "case b: gone"})
    assert watch.agree(world) == 2
    assert silent.agree(world) == 2
    assert capsys.readouterr().err == "skipped: case a: broken\nskipped: case b: gone\n"
    world.other = {"c": "case c: gone"}  # one rank alone has met fewer than the share
    with pytest.raises(DataError, match=r"3 of 9 cases .* max_failed_share 0\.3 .*case c: gone"):
        watch.agree(world)
