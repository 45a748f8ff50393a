import json
from pathlib import Path

import pytest
import torch

from voxelbridge.core.errors import DataError
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.metrics import Meter, MetricsFile, mean_of_meters, read_metrics

WORLD = World(torch.device("cpu"))


def test_meter_gives_the_mean_in_float64() -> None:
    meter = Meter()
    values = torch.rand(100)
    for value in values:
        meter.add({"total": value, "one": torch.tensor(1.0)})
    means = meter.means(WORLD)
    assert means["total"] == pytest.approx(values.double().mean().item(), rel=1e-15)
    assert means["one"] == 1.0


def test_meter_goes_on_from_its_state_to_the_last_bit() -> None:
    values = torch.rand(20)
    straight, first, second = Meter(), Meter(), Meter()
    for value in values:
        straight.add({"total": value})
    for value in values[:7]:
        first.add({"total": value})
    second.load_state(json.loads(json.dumps(first.state())))
    for value in values[7:]:
        second.add({"total": value})
    assert second.means(WORLD) == straight.means(WORLD)


def test_empty_meter_has_no_means() -> None:
    meter = Meter()
    assert meter.means(WORLD) == {}
    meter.add({"total": torch.tensor(2.0)})
    meter.reset()
    assert meter.state() == {"sums": {}, "counts": {}}


def test_mean_of_a_name_is_over_the_additions_that_have_it() -> None:
    meter = Meter()
    meter.add({"total": torch.tensor(2.0), "lung": torch.tensor(1.0)})
    meter.add({"total": torch.tensor(4.0), "liver": torch.tensor(5.0)})
    meter.add({"total": torch.tensor(6.0), "lung": torch.tensor(2.0)})
    assert meter.means(WORLD) == {"total": 4.0, "lung": 1.5, "liver": 5.0}
    resumed = Meter()
    resumed.load_state(json.loads(json.dumps(meter.state())))
    for one in (meter, resumed):
        one.add({"liver": torch.tensor(0.1)})
    assert resumed.state() == meter.state()
    meter.reset()
    meter.add({"liver": torch.tensor(3.0)})
    assert meter.means(WORLD) == {"liver": 3.0}


def test_meters_of_ranks_are_weighted_by_count() -> None:
    states = [
        {"sums": {"total": 4.0, "lung": 4.0}, "counts": {"total": 1, "lung": 1}},
        {"sums": {"total": 0.0, "liver": 6.0}, "counts": {"total": 3, "liver": 2}},
    ]
    means = {"total": 1.0, "lung": 4.0, "liver": 3.0}
    assert mean_of_meters(states) == means
    assert mean_of_meters([*states, {"sums": {}, "counts": {}}]) == means


def test_last_record_of_a_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step, loss in ((0, 3.0), (1, 2.0), (1, 1.5), (2, 1.0)):
        metrics.write({"step": step, "loss": loss})
    metrics.flush_to_disk()
    metrics.close()
    assert [record["loss"] for record in read_metrics(path)] == [3.0, 1.5, 1.0]


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b'{"step": 2}', b"\0" * 40, b"\0\n", b"\n"])
def test_torn_tail_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n'
    path.write_bytes(whole + tail)
    metrics = MetricsFile(path)
    metrics.write({"step": 2, "loss": 0.25})
    metrics.close()
    assert path.read_bytes() == whole + b'{"step": 2, "loss": 0.25}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nan_is_not_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.write({"step": 0, "loss": float("nan")})
    metrics.close()


def test_broken_metrics_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl: not a metrics file"):
        read_metrics(path)
