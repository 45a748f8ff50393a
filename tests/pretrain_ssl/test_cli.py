import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.checkpoint import read_checkpoint
from voxelbridge.core.command_line import run_app
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.pretrain_ssl.cli import app


def call(*arguments: str) -> int:
    try:
        run_app(app, arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from voxelbridge.pretrain_ssl.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'scipy', 'SimpleITK', 'blosc2'} & sys.modules.keys()"
    )
    for words in ([], ["train"], ["prepare"], ["export"], ["show"]):
        subprocess.run([sys.executable, "-c", code, *words, "--help"], check=True, timeout=60)


def test_show_prints_every_value_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "mae", "--set", "schedule.steps=100", "--set", "optim.lr=0.02") == 0
    lines = capsys.readouterr().out.splitlines()
    values = {line.split("=")[0].strip(): line.split("=", 1)[1].strip() for line in lines}
    assert values["schedule.steps"] == "100  (--set)"
    assert values["optim.lr"] == "0.02  (--set)"
    assert values["patch_size"] == "[192, 192, 192]  (preset)"
    assert values["seed"] == "0  (default)"


def test_show_takes_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from voxelbridge.core.config import preset_path

    text = preset_path("voxelbridge.pretrain_ssl", "mae_small").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("batch_size = 2", "batch_size = 4"))
    assert call("show", str(tmp_path / "mine.toml")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["batch_size", "=", "4", "(preset)"] in lines


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["show", "maee"], 2, "did you mean mae?"),
        (["show", "mae", "--set", "batchsize=3"], 2, "did you mean batch_size?"),
        (["show", "mae", "--set", "method.block_size=5"], 2, "do not divide the patch"),
        (["export", "nowhere", "-o", "x.safetensors"], 2, "nowhere: not a run directory"),
        (["prepare", "nowhere", "store"], 1, "nowhere: does not exist; accepted are"),
        (["train", "mae_small", "--store", "no", "--run", "run"], 1, "not a finished case store"),
    ],
)
def test_errors_are_one_line_with_the_right_status(
    words: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_from_images_to_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for number in range(2):
        array = np.random.default_rng(number).normal(size=(1, 18, 18, 18)).astype(np.float32)
        grid = Grid.from_parts((18, 18, 18), (1.0, 1.0, 1.0))
        write_image(source / f"{number}.nii.gz", Volume(array, grid))
    (source / "junk.nii.gz").write_bytes(b"junk")
    store, run, output = (str(tmp_path / name) for name in ("store", "run", "out.safetensors"))
    assert call("prepare", str(source), store, "--workers", "0") == 1
    captured = capsys.readouterr()
    assert "junk" in captured.err
    assert "2 cases (0 were there), 1 failed" in captured.out
    settings = ["--set", "schedule.steps=2", "--set", "patch_size=[16,16,16]"]
    places = ["--store", store, "--run", run, "--device", "cpu", "--workers", "0"]
    assert call("train", "mae_small", *places, *settings) == 0
    captured = capsys.readouterr()
    assert "no validation: the store has fewer than 10 patients" in captured.out
    assert captured.err == ""
    assert call("export", run, "-o", output) == 0
    assert read_checkpoint(output).metadata.source.steps == 2
