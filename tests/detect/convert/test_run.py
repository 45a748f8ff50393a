"""The command: every source is reachable, options belong to sources, failures end with status 1."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from voxelbridge.core.command_line import run_app
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.detect.cli import app
from voxelbridge.detect.cli_data import ConvertSource
from voxelbridge.detect.convert.run import OPTIONS, Source


def test_command_knows_the_sources() -> None:
    assert get_args(ConvertSource) == get_args(Source)
    assert set(OPTIONS) <= set(get_args(Source))


@pytest.mark.parametrize("source", get_args(Source))
def test_empty_folder_is_one_line_saying_what_was_expected(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    status, told = _run(["convert", source, str(tmp_path / "empty"), str(tmp_path / "out")], capsys)
    assert status == 1
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_counts_are_printed_and_failures_end_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = Grid.from_parts((9, 9, 9), (1.0, 1.0, 1.0))
    for name in "ab":
        write_image(tmp_path / f"{name}.nii.gz", Volume(np.zeros((1, 9, 9, 9), np.uint8), grid))
    (tmp_path / "t.csv").write_text("case,x,y,z,diameter\na,4,4,4,2\n")
    arguments = ["convert", "csv", str(tmp_path), str(tmp_path / "out"), "--workers", "1"]
    _run_well(arguments)
    printed = capsys.readouterr().out
    assert f"2 cases with 1 objects are in {tmp_path / 'out'}" in printed
    assert "note: 1 images have no row" in printed
    _run_well(arguments)  # all done: the same counts again, and OUT below SRC is no input
    assert "2 cases with 1 objects" in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("case,x,y,z,diameter\na,4,4,4,2\ngone,4,4,4,2\n")
    status, told = _run([*arguments[:3], str(tmp_path / "new")], capsys)
    assert status == 1
    assert "1 cases have no image: gone" in told
    assert "1 failures, see the lines above; the other 2 cases are in" in told


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["csv", "{src}", "{out}", "--test-subset", "3"], "--test-subset is no option of csv"),
        (["lidc", "{src}", "{out}", "--class", "a"], "--class is no option of lidc"),
        (["csv", "{src}", "{src}"], "source and target are the same folder"),
    ],
)
def test_wrong_usage_ends_with_status_2(
    arguments: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(src=tmp_path, out=tmp_path / "out") for text in arguments]
    status, told = _run(["convert", *filled], capsys)
    assert (status, told.count("\n")) == (2, 1)
    assert match in told


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        run_app(app, arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def _run_well(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_app(app, arguments)
    assert ended.value.code == 0
