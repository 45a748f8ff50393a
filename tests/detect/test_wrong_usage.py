"""Wrong command lines of `vb-detect`: told in one line before anything is done or written."""

from pathlib import Path

import pytest

from voxelbridge.core.command_line import run_app
from voxelbridge.detect.cli import app

NO_CHECKPOINT = "says how a checkpoint is taken over, and there is none; name it with --init"
TRAIN = "train retunet_small --store store --run run"
FOLDS = "cross-validate retunet_small --store store"


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (f"{TRAIN} --stem nothing", 2, f"--stem nothing: {NO_CHECKPOINT}"),
        (f"{TRAIN} --set transfer.adapt=true", 2, f"--set transfer.adapt=true: {NO_CHECKPOINT}"),
        (f"{FOLDS} --out out --stem main", 2, f"--stem main: {NO_CHECKPOINT}"),
        (f"{FOLDS} --out out --folds 3-1", 2, "--folds 3-1: goes down; write 1-3"),
        (f"{FOLDS} --out file/out", 1, "file is a file; name another folder"),
        ("out-of-fold run --out file", 1, "file is a file; name another folder"),
        ("study run missing_piece --gpus 0,,1 --dry-run", 2, "such as 0,1,2, got ''"),
        ("study run missing_piece --executor slrum --dry-run", 2, "local, dask:ADDRESS or slurm"),
        ("study status missing_pice", 2, "no such file; did you mean missing_piece? shipped"),
        ("info resenc_retunett", 2, "a .toml file; did you mean resenc_retunet? shipped are"),
        (
            "evaluate-luna16 --annotations a --excluded b --scans scans --predictions p --output o",
            1,
            "scans: cannot be read (No such file or directory)",
        ),
    ],
)  # fmt: skip
def test_it_is_told_in_one_line_and_nothing_is_written(
    line: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        run_app(app, line.split())
    (told,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == status
    assert told.startswith("error: ")
    assert said in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
