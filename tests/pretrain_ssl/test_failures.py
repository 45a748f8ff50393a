import pytest

from voxelbridge.core.errors import DataError
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
