"""vb-core as its users run it."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.checkpoint import Checkpoint, CheckpointMetadata, Stem, collect_tensors
from voxelbridge.core.checkpoint import write_checkpoint as write
from voxelbridge.core.cli import app
from voxelbridge.core.command_line import run_app

TINY = EncoderConfig(
    kind="plain",
    features=(2, 3),
    strides=((1, 1, 1), (2, 2, 2)),
    kernels=((3, 3, 3), (3, 3, 3)),
    blocks=(2, 2),
    conv_bias=False,
)


def write_tiny(path: Path, *, value: float = 0.5, license_text: str = "CC-BY-4.0") -> None:
    encoder = build_encoder(TINY, in_channels=1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(value)
    metadata = CheckpointMetadata(
        method="mae",
        arch=TINY,
        stems={"ct": Stem(channels=1)},
        license=license_text,
        citations=("Doe 2024",),
    )
    write(path, Checkpoint(metadata, collect_tensors(encoder)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    return path


def test_a_missing_source_beside_an_existing_target_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["import"], ["export", "--to", "nnssl"]):
        status, out, err = call(capsys, *words, file.parent / "none.pth", "-o", file)
        assert (status, out) == (1, "")
        assert "none.pth" in err
        assert len(err.splitlines()) == 1


def test_a_path_that_cannot_be_written_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = file / "card.md"  # below a file
    status, _, err = call(capsys, "card", file, "-o", blocked)
    assert (status, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: ")
    assert "tiny.safetensors" in err
    status, _, err = call(capsys, "card", file, "-o", file.parent)
    assert (status, len(err.splitlines())) == (1, 1)
    assert str(file.parent) in err


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of vb-core."""
    try:
        run_app(app, [str(argument) for argument in arguments])
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_answers_without_importing_torch() -> None:
    code = (
        "import sys; from voxelbridge.core.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'safetensors', 'SimpleITK'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("inspect", "verify", "compare", "export", "card", "fetch", "doctor"):
        assert command in result.stdout


def test_inspect_json_is_the_metadata_object(file: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = call(capsys, "inspect", file, "--json")
    facts = json.loads(out)
    assert (status, err) == (0, "")
    assert facts["schema"] == 1
    assert facts["method"] == "mae"
    assert facts["arch"]["features"] == [2, 3]
    assert facts["stems"]["ct"]["channels"] == 1
    assert len(facts["tensors_sha256"]) == 64


def test_inspect_prints_size_and_citations(file: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, _ = call(capsys, "inspect", file)
    encoder = build_encoder(TINY, in_channels=1)
    assert status == 0
    assert f"{sum(p.numel() for p in encoder.parameters())} parameters" in out
    assert "please cite      Doe 2024" in out


def test_verify_accepts_a_sound_file(file: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = call(capsys, "verify", file)
    assert (status, err) == (0, "")
    assert f"{file}: ok" in out


def test_verify_json_says_ok_or_why_not(file: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = call(capsys, "verify", file, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {"path": str(file), "ok": True, "problems": []}
    file.write_bytes(file.read_bytes()[:-1])
    status, out, err = call(capsys, "verify", file, "--json")
    facts = json.loads(out)
    assert (status, facts["ok"]) == (1, False)
    assert err == f"error: {facts['problems'][0]}\n"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_damaged_file_is_one_line_on_stderr(
    file: Path, command: str, capsys: pytest.CaptureFixture
) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, out, err = call(capsys, command, file)
    assert status == 1
    assert out == ""
    assert err.startswith(f"error: {file}: ")
    assert err.count("\n") == 1


def test_compare_of_a_file_with_itself_finds_nothing(
    file: Path, capsys: pytest.CaptureFixture
) -> None:
    status, out, _ = call(capsys, "compare", file, file, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["verdict"] == "identical"
    assert found["same"] is found["same_architecture"] is True
    assert found["metadata"] == []
    assert found["tensors"] == {}


def test_compare_names_what_differs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other.safetensors"
    write_tiny(other, value=0.75, license_text="MIT")
    status, out, _ = call(capsys, "compare", file, other)
    assert status == 0
    assert "license: CC-BY-4.0 -> MIT" in out
    assert "encoder.stem.conv.weight: largest difference 0.25, relative 0.5" in out
    assert out.splitlines()[-1] == "same architecture, different weights"
    assert "metadata: 1 differences" in out


def test_doctor_reports_versions_and_a_verdict(capsys: pytest.CaptureFixture) -> None:
    status, out, _ = call(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["cpu_threads"] >= 1
    assert facts["free_disk_gib"] > 0
    assert "\n" not in facts["verdict"]
    status, out, _ = call(capsys, "doctor")
    assert out.splitlines()[-1].split(":")[0] in ("ready", f"{len(facts['problems'])} problems")


def fake_store(monkeypatch: pytest.MonkeyPatch, problems: list[str]) -> None:
    class CaseStore:
        cases = ("a", "b")

        @classmethod
        def open(cls, path: Path) -> "CaseStore":
            return cls()

        def verify(self) -> list[str]:
            return problems

    module = types.ModuleType("voxelbridge.core.data.case_store")
    module.CaseStore = CaseStore  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_verify_of_a_store_prints_every_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake_store(monkeypatch, ["case a: altered", "case b: missing"])
    status, out, err = call(capsys, "verify", tmp_path)
    assert status == 1
    assert out.splitlines() == ["case a: altered", "case b: missing"]
    assert err == f"error: {tmp_path}: 2 problems in 2 cases; see above\n"
    status, out, err_of_json = call(capsys, "verify", tmp_path, "--json")
    problems = ["case a: altered", "case b: missing"]
    assert (status, err_of_json) == (1, err)
    assert json.loads(out) == {"path": str(tmp_path), "ok": False, "problems": problems}


def test_verify_of_a_sound_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake_store(monkeypatch, [])
    assert call(capsys, "verify", tmp_path) == (0, f"{tmp_path}: ok, 2 cases\n", "")


def test_verify_of_a_store_without_the_data_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "voxelbridge.core.data.case_store", None)
    status, _, err = call(capsys, "verify", tmp_path)
    assert status == 1
    assert "install voxelbridge-core[data]" in err


def test_wrong_usage_ends_with_status_2(capsys: pytest.CaptureFixture) -> None:
    assert call(capsys, "inspect")[0] == 2
    assert call(capsys, "unknown")[0] == 2
