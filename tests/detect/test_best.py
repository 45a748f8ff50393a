"""Which validated weights are kept, and that no kill can change the answer."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from voxelbridge.core.errors import CheckpointError
from voxelbridge.detect.best import BestWeights
from voxelbridge.detect.weights import (
    Which,
    file_of,
    read_weights,
    stored_weights,
    write_weights,
)

DECIDING = ("val_map_range", "val_total")


def network(number: float) -> nn.Linear:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, number)
    nn.init.zeros_(layer.bias)
    return layer


def stored_number(run: Path, weights: Which = "best") -> float:
    layer = network(-1)
    read_weights(run, layer, weights=weights)
    return float(layer.weight.detach())


def offer(best: BestWeights, step: int, value: float, *, attempt: int = 0) -> bool:
    return best.offer(network(step), {"val_map_range": value}, step=step, attempt=attempt)


def test_the_highest_value_is_kept_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    best = BestWeights(tmp_path, DECIDING)
    taken = [offer(best, step, value) for step, value in enumerate([0.1, 0.3, 0.3, 0.2, 0.4])]
    assert taken == [True, True, False, False, True]
    assert stored_number(tmp_path) == 4
    content = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert (content["schema"], content["step"], content["attempt"]) == (1, 4, 0)
    assert (content["metric"], content["value"]) == ("val_map_range", 0.4)


def test_a_loss_decides_by_its_lowest_value_where_there_is_no_map(tmp_path: Path) -> None:
    best = BestWeights(tmp_path, DECIDING)
    taken = [
        best.offer(network(step), {"val_total": value}, step=step)
        for step, value in enumerate([2.0, 1.0, 1.5])
    ]
    assert taken == [True, True, False]
    assert not best.offer(network(9), {"val_case_map_range": 1.0}, step=9)
    assert stored_number(tmp_path) == 1


def test_after_a_restart_the_new_attempt_counts(tmp_path: Path) -> None:
    best = BestWeights(tmp_path, DECIDING)
    assert offer(best, 50, 0.4)
    assert offer(best, 10, 0.1, attempt=1)
    assert not offer(best, 60, 0.9)  # an older attempt seen again
    assert stored_number(tmp_path) == 10


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3]), min_size=1, max_size=6),
    data=st.data(),
)
def test_a_killed_run_ends_with_the_same_best(
    values: list[float], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    alone = tmp_path_factory.mktemp("alone")
    best = BestWeights(alone, DECIDING)
    for step, value in enumerate(values):
        offer(best, step, value)
    killed = tmp_path_factory.mktemp("killed")
    start = 0  # of the next process: where its last state is
    for _ in range(3):
        end = data.draw(st.integers(start, len(values)))
        best = BestWeights(killed, DECIDING)
        for step in range(start, end):
            offer(best, step, values[step])
        torn = _tear(killed, data)
        # A state is saved after what was written before it, so it is never ahead of a torn file.
        latest = max(start, end - 1) if torn is None else torn
        start = data.draw(st.integers(min(start, latest), latest))
    best = BestWeights(killed, DECIDING)
    for step in range(start, len(values)):
        offer(best, step, values[step])
    assert stored_weights(killed, "best") == stored_weights(alone, "best")
    assert stored_number(killed) == stored_number(alone)


def _tear(run: Path, data: st.DataObject) -> int | None:
    """Now and then nothing of the last replacement but its JSON file has reached the disk.

    Then the step whose weights were lost.
    """
    facts = file_of(run, "best").with_suffix(".json")
    if not facts.exists() or not data.draw(st.booleans()):
        return None
    content = json.loads(facts.read_text())
    previous = content["previous"]
    if previous is None:
        return None
    again = run / "again"
    figure = (previous["metric"], previous["value"])
    write_weights(again, network(previous["step"]), step=previous["step"], metric=figure)
    file_of(again, "last").replace(file_of(run, "best"))
    return int(content["step"])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    offer(BestWeights(tmp_path, DECIDING), 1, 0.5)
    path = file_of(tmp_path, "best")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"best\.safetensors: changed or damaged"):
        stored_number(tmp_path)
    with pytest.raises(CheckpointError, match="delete it"):
        BestWeights(tmp_path, DECIDING)
    path.unlink()
    assert BestWeights(tmp_path, DECIDING).best is None


def test_what_is_missing_is_told_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the training has not finished$"):
        stored_number(tmp_path, "last")
    with pytest.raises(CheckpointError, match=r"nothing was validated yet \(see validation_bat"):
        stored_number(tmp_path)
    offer(BestWeights(tmp_path, DECIDING), 7, 0.25)
    with pytest.raises(
        CheckpointError, match=r"take --weights best \(step 7, val_map_range 0\.25\)"
    ):
        stored_number(tmp_path, "last")
    write_weights(tmp_path, network(9), step=9)
    assert stored_number(tmp_path, "last") == 9
    file_of(tmp_path, "best").unlink()
    with pytest.raises(CheckpointError, match="take --weights last"):
        stored_number(tmp_path)
