"""Folds hold out every case once and never part a patient."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.errors import DataError
from voxelbridge.detect.splits import make_splits, read_splits, write_splits


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 23), st.integers(1, 5))
def test_every_case_is_held_out_once_and_patients_stay_together(cases: int, per: int) -> None:
    names = [f"case{number:02d}" for number in range(cases)]
    groups = {name: f"p{number // per}" for number, name in enumerate(names)}
    splits = make_splits(names, groups)
    if len(set(groups.values())) == 1:
        assert splits == [{"train": names, "val": names}]
        return
    held_out = [name for split in splits for name in split["val"]]
    assert sorted(held_out) == names
    for split in splits:
        assert not {groups[name] for name in split["train"]} & {groups[n] for n in split["val"]}
        assert sorted(split["train"] + split["val"]) == names


def test_the_order_of_the_cases_does_not_matter() -> None:
    names = [f"c{number}" for number in range(12)]
    assert make_splits(names, {}) == make_splits(names[::-1], {})


def test_written_splits_read_back(tmp_path: Path) -> None:
    splits = make_splits(["a", "b", "c"], {})
    write_splits(tmp_path, splits)
    assert read_splits(tmp_path) == splits
    with pytest.raises(DataError, match="prepare"):
        read_splits(tmp_path / "absent")
