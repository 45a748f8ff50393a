import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.command_line import run_app
from voxelbridge.pretrain_sup.cli import app

WriteDataset = Callable[..., Path]


def call(*arguments: str) -> int:
    try:
        run_app(app, arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def folders(write_dataset: WriteDataset, tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    labels = np.zeros((6, 7, 8), np.uint8)
    labels[2:4, 2:4, 2:5] = 1
    found = []
    for name, channels in (("one", ("CT",)), ("two", ("T1", "T2"))):
        image = rng.normal(size=(len(channels), 6, 7, 8)).astype(np.float32)
        cases = {"a": (image, labels), "b": (image + 1, labels)}
        names = {"background": 0, "thing": 1}
        found.append(str(write_dataset(tmp_path / name, cases, channels=channels, labels=names)))
    return found


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from voxelbridge.pretrain_sup.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'scipy', 'SimpleITK', 'blosc2'} & sys.modules.keys()"
    )
    for words in ([], ["prepare"]):
        subprocess.run([sys.executable, "-c", code, *words, "--help"], check=True, timeout=60)


def test_several_data_sets_and_then_the_store(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    options = ["--workers", "0", "--spacing", "2", "1", "1", "--normalization", "auto"]
    assert call("prepare", *folders, store, *options) == 0
    assert "4 cases (4 new) of 2 data sets, 2 heads, 0 failed" in capsys.readouterr().out
    assert call("prepare", folders[0], store, "--workers", "0") == 0
    assert "4 cases (0 new) of 2 data sets, 2 heads, 0 failed" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("prepare", *folders, str(tmp_path / "store"), "--dry-run") == 0
    assert "two: 2 cases, 2 waiting" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_a_failing_case_is_named_and_costs_status_1(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one" / "labelsTr" / "b.nii.gz").unlink()
    store = str(tmp_path / "store")
    assert call("prepare", *folders, store, "--workers", "0") == 1
    captured = capsys.readouterr()
    assert "failed: data set one: case b: the label map is missing" in captured.err
    assert "3 cases (3 new) of 2 data sets, 2 heads, 1 failed" in captured.out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["nowhere", "store"], 1, "nowhere: no such folder"),
        (["one", "store", "--spacing", "0", "1", "1"], 2, "spacing_mm.0: got 0.0"),
        (["one", "store", "--spacing", "nan", "1", "1"], 2, "spacing_mm"),
        (["one", "two", "--spacing", "1", "1", "1"], 2, "two: holds files"),
        (["one", "store", "--labels", "no.toml"], 2, "no.toml"),
    ],
)
def test_errors_are_one_line_with_the_right_status(
    folders: list[str],
    words: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("prepare", *words) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "store").exists()
