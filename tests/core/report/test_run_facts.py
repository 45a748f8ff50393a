"""What a page tells of a run: progress, newest values, device, settings."""

from pathlib import Path

from voxelbridge.core.config import Config
from voxelbridge.core.report.run_facts import (
    last_value,
    progress,
    read_if_there,
    run_notes,
    settings_table,
    start_facts,
)


class Inner(Config):
    rate: float | None = None


class Settings(Config):
    tag: str
    optim: Inner = Inner()


def test_progress_counts_from_the_first_step() -> None:
    assert progress([], 4000) == "0 of 4,000"
    assert progress([{"step": 3}, {"step": 1199}], 4000) == "1,200 of 4,000"


def test_last_value_is_that_of_the_newest_record_which_has_it() -> None:
    records = [{"step": 0, "val_loss": 2}, {"step": 1, "val_loss": 1.5}, {"step": 2}]
    assert last_value(records, "val_loss") == 1.5
    assert last_value(records, "other") is None


def test_start_facts_are_those_of_the_last_start() -> None:
    starts = [{"device": "cpu"}, {"device": "cuda:0", "gpus": ["A", "B"]}]
    assert start_facts(starts) == {"device": "cuda:0, A, B", "starts": "2"}
    assert start_facts([{}]) == {"device": "", "starts": "1"}
    assert start_facts([]) == {}


def test_notes_say_what_is_missing() -> None:
    assert run_notes(finished=True, validated=True) == []
    unfinished, unvalidated = run_notes(finished=False, validated=False)
    assert "not finished" in unfinished
    assert "no validation" in unvalidated


def test_settings_are_dotted_and_escaped() -> None:
    table = settings_table(Settings(tag="<b>"))
    assert '<th scope="row">tag</th><td class="text">&lt;b&gt;</td>' in table
    assert '<th scope="row">optim.rate</th><td class="text">none</td>' in table


def test_a_missing_file_says_nothing(tmp_path: Path) -> None:
    assert read_if_there(tmp_path / "data.json") == {}
