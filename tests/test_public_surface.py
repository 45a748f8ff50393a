"""Names, commands and options that others script against: changing one breaks a test here."""

import importlib
import json
from importlib import metadata
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from voxelbridge.core.cli import app as core_app
from voxelbridge.core.command_line import run_app
from voxelbridge.detect.cli import app as detect_app
from voxelbridge.pretrain_ssl.cli import app as ssl_app
from voxelbridge.pretrain_sup.cli import app as sup_app

APPS = {"vb-core": core_app, "vb-ssl": ssl_app, "vb-sup": sup_app, "vb-detect": detect_app}

NAMES = {
    "voxelbridge.core.arch.presets": ("RESENC_L", "PLAIN"),
    "voxelbridge.core.arch.encoder": ("ResEncoder", "PlainEncoder"),
    "voxelbridge.core.checkpoint": ("read_checkpoint", "write_checkpoint"),
    "voxelbridge.core.transfer": ("load_encoder", "transfer_encoder"),
    "voxelbridge.detect.build": ("build_detector",),
}

OPTIONS = {
    "vb-core inspect": ("--json",),
    "vb-core verify": ("--json",),
    "vb-core compare": ("--json", "--stem"),
    "vb-core import": ("-o", "--from", "--plan", "--stem", "--arch", "--json"),
    "vb-core export": ("--to", "-o", "--stem", "--outputs", "--fresh-decoder"),
    "vb-core card": ("-o", "--title"),
    "vb-core fetch": ("-o", "--offline", "--endpoint", "--cache", "--import"),
    "vb-core doctor": ("--json",),
    "vb-ssl prepare": ("--plan", "--workers"),
    "vb-ssl train": ("--store", "--run", "--set", "--device", "--dry-run"),
    "vb-ssl export": ("-o",),
    "vb-ssl report": ("-o",),
    "vb-ssl show": ("--set", "--json"),
    "vb-sup prepare": ("--workers", "--labels", "--layout", "--executor"),
    "vb-sup train": ("--store", "--run", "--set", "--device", "--extend", "--dry-run"),
    "vb-sup export": ("-o", "--default-stem", "--license"),
    "vb-sup predict": ("--images", "--out"),
    "vb-sup evaluate": (),
    "vb-sup report": ("-o",),
    "vb-sup show": ("--set", "--json"),
    "vb-sup catalogue": ("--json",),
    "vb-detect prepare": ("--plan", "--workers"),
    "vb-core overlap": ("--json",),
    "vb-detect convert": ("--seed", "--workers"),
    "vb-detect check": ("--deep", "--json"),
    "vb-detect train": (
        "--store",
        "--run",
        "--init",
        "--stem",
        "--init-parts",
        "--tune",
        "--fold",
        "--set",
        "--device",
    ),
    "vb-detect sweep": ("--store", "--objective", "--only", "--skip", "--tta", "--json"),
    "vb-detect cross-validate": ("--store", "--out", "--folds", "--init", "--set", "--device"),
    "vb-detect out-of-fold": ("--out", "--store", "--no-sweep", "--tta"),
    "vb-detect predict": (
        "--images",
        "--out",
        "--tta",
        "--min-score",
        "--max-boxes",
        "--weights",
        "--dicom-sr",
        "--overwrite",
    ),
    "vb-detect evaluate": (
        "--ground-truth",
        "--predictions",
        "--cases",
        "--output",
        "--convention",
        "--num-classes",
        "--bootstrap",
        "--seed",
        "--iou",
        "--fppi",
        "--operating-point",
        "--size-measure",
        "--size-edge",
        "--plots",
    ),
    "vb-detect rank": ("--output", "--baseline", "--measure", "--samples", "--seed"),
    "vb-detect evaluate-luna16": (
        "--annotations",
        "--excluded",
        "--scans",
        "--predictions",
        "--output",
        "--reading",
        "--bootstrap",
        "--seed",
    ),
    "vb-detect evaluate-pn9": (
        "--annotations",
        "--scans",
        "--predictions",
        "--output",
        "--reading",
        "--bootstrap",
        "--seed",
    ),
    "vb-detect evaluate-cta-a": (
        "--ground-truth",
        "--predictions",
        "--cases",
        "--output",
        "--num-classes",
        "--bootstrap",
        "--seed",
        "--workers",
    ),
    "vb-detect evaluate-ribfrac": (
        "--ground-truth",
        "--predictions",
        "--output",
        "--undefined",
        "--workers",
    ),
    "vb-detect report": ("-o",),
    "vb-detect info": ("--json",),
    "vb-detect show": ("--set", "--store", "--json"),
    "vb-detect export": ("-o", "--check"),
    "vb-detect schedule": ("--set", "--json", "--plot"),
    "vb-detect study": (),  # run, status, report: tests/detect/test_study.py
}

# "GONE" becomes a path that does not exist.
MISSING_FILE = (
    "vb-core inspect GONE",
    "vb-core verify GONE",
    "vb-core compare GONE GONE",
    "vb-core import GONE -o OUT",
    "vb-core export GONE --to nnunet -o OUT",
    "vb-core card GONE -o OUT",
    "vb-core fetch file:GONE -o OUT",
    "vb-core overlap GONE GONE",
    "vb-detect check GONE",
    "vb-detect convert luna16 GONE OUT",
    "vb-detect evaluate-luna16 --annotations GONE --excluded GONE --scans GONE --predictions GONE "
    "--output OUT",
    "vb-detect evaluate-pn9 --annotations GONE --scans GONE --predictions GONE --output OUT",
    "vb-detect evaluate-cta-a --ground-truth GONE --predictions GONE --cases GONE --output OUT",
    "vb-detect evaluate-ribfrac --ground-truth GONE --predictions GONE --output OUT",
    "vb-ssl prepare GONE STORE",
    "vb-ssl train mae_small --store GONE --run RUN",
    "vb-ssl train GONE.toml --store GONE --run RUN",
    "vb-ssl export GONE -o OUT",
    "vb-ssl report GONE -o OUT",
    "vb-ssl show GONE.toml",
    "vb-sup prepare GONE STORE",
    "vb-sup train multitalent_small --store GONE --run RUN",
    "vb-sup train GONE.toml --store GONE --run RUN",
    "vb-sup export GONE -o OUT",
    "vb-sup predict GONE --images GONE --out OUT",
    "vb-sup report GONE -o OUT",
    "vb-sup show GONE.toml",
    "vb-detect prepare GONE STORE",
    "vb-detect train resenc_retunet_small --store GONE --run RUN",
    "vb-detect train GONE.toml --store GONE --run RUN",
    "vb-detect sweep GONE",
    "vb-detect cross-validate retunet_small --store GONE --out OUT",
    "vb-detect out-of-fold GONE --out OUT",
    "vb-detect predict GONE --images GONE --out OUT",
    "vb-detect evaluate --ground-truth GONE --predictions GONE --cases GONE --output OUT",
    "vb-detect rank GONE --output OUT",
    "vb-detect info GONE.toml",
    "vb-detect schedule GONE.toml",
    "vb-detect show GONE.toml",
    "vb-detect report GONE -o OUT",
    "vb-detect export GONE -o OUT",
    "vb-detect study run GONE.toml",
    "vb-detect study status GONE.toml",
    "vb-detect study report GONE.toml -o OUT",
)


@pytest.mark.parametrize("module", NAMES)
def test_python_names_resolve(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in NAMES[module]:
        assert hasattr(loaded, name), name


def test_encoder_gives_stage_outputs_finest_first() -> None:
    import torch

    from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
    from voxelbridge.core.arch.presets import PLAIN, RESENC_L

    with torch.device("meta"):
        image = torch.empty(1, 1, 64, 64, 64)
        for encoder in (ResEncoder(RESENC_L, in_channels=1), PlainEncoder(PLAIN, in_channels=1)):
            shapes = [tuple(stage.shape) for stage in encoder(image)]
            assert [shape[2] for shape in shapes] == [64, 32, 16, 8, 4, 2]
            assert [shape[1] for shape in shapes] == [32, 64, 128, 256, 320, 320]


def test_build_detector_takes_a_preset_name() -> None:
    from voxelbridge.detect.build import build_detector

    detector = build_detector("resenc_retunet_small", in_channels=1, num_classes=1)
    assert sum(parameter.numel() for parameter in detector.parameters()) > 0


def test_commands_are_the_documented_ones() -> None:
    found = {f"{name} {command}" for name, app in APPS.items() for command in commands(app)}
    assert found == set(OPTIONS)


@pytest.mark.parametrize("line", OPTIONS)
def test_command_has_its_documented_options(line: str) -> None:
    program, command = line.split()
    found = commands(APPS[program])[command]
    assert set(OPTIONS[line]) <= found, sorted(set(OPTIONS[line]) - found)


@pytest.mark.parametrize("line", [*APPS, *OPTIONS])
def test_help_exits_with_0(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{line} --help") == 0
    printed = capsys.readouterr()
    assert f"Usage: {line}" in " ".join(printed.out.split())
    assert printed.err == ""


@pytest.mark.parametrize("program", APPS)
def test_version_is_the_one_of_the_installed_package(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = metadata.entry_points(group="console_scripts", name=program)
    assert command.dist is not None
    assert run(f"{program} --version") == 0
    assert capsys.readouterr() == (f"{program} {command.dist.version}\n", "")


@pytest.mark.parametrize(
    "line", ["vb-ssl show mae_small", "vb-sup show multitalent_small", "vb-detect show retunet"]
)
def test_show_as_json_holds_every_value_with_its_origin(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"{line} --set seed=5 --json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert run(f"{line} --set seed=5") == 0
    assert shown["seed"] == {"value": 5, "origin": "--set"}
    assert shown["patch_size"]["origin"] == "preset"
    assert len(shown) == len(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("line", OPTIONS)
def test_unknown_option_exits_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{line} --no-such-option") == 2
    printed = capsys.readouterr()
    assert "--no-such-option" in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vb-ssl train", "vb-ssl train: missing argument 'preset'"),
        ("vb-ssl train mae --store", "option '--store' requires an argument"),
        ("vb-sup trian", "vb-sup: no such command 'trian'. Did you mean 'train'?"),
        ("vb-detect train p --store s --run r --device tpu", "'tpu' is not one of 'auto', 'cpu'"),
        ("vb-core card x --output", "option '--output' requires an argument"),
    ],
)
def test_wrong_usage_is_told_in_one_line(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert said in told
    assert told.endswith("--help\n")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("program", APPS)
def test_unknown_command_exits_with_2(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{program} no-such-command") == 2
    assert "no-such-command" in capsys.readouterr().err


@pytest.mark.parametrize("line", MISSING_FILE)
def test_missing_file_is_one_line_on_stderr(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line) in (1, 2)
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("error: ")
    assert "GONE" in printed.err
    assert "Traceback" not in printed.out
    assert not (tmp_path / "OUT").exists()


def run(line: str) -> int:
    """Exit status of a command line; what it prints goes to pytest's capture."""
    program, *arguments = line.split()
    app = APPS[program]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [program, *arguments])  # typer takes its own name from there
        with pytest.raises(SystemExit) as end:
            run_app(app)
    code = end.value.code
    assert isinstance(code, int | None)
    return code or 0


def commands(app: typer.Typer) -> dict[str, set[str]]:
    """The options of every command of an app."""
    group = get_command(app)
    return {
        name: {text for parameter in command.params for text in parameter.opts}
        for name, command in getattr(group, "commands", {}).items()
    }
