"""The pages are true: code blocks run, commands and options exist, links lead somewhere."""

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.main import get_command

from voxelbridge.core.arch.encoder import ResEncoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Stem,
    collect_tensors,
    write_checkpoint,
)
from voxelbridge.core.cli import app as core_app
from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.volume import Grid
from voxelbridge.detect.cli import app as detect_app
from voxelbridge.pretrain_ssl.cli import app as ssl_app
from voxelbridge.pretrain_sup.cli import app as sup_app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "packages").glob("*/README.md"),
    ]
)
APPS = {"vb-core": core_app, "vb-ssl": ssl_app, "vb-sup": sup_app, "vb-detect": detect_app}
MODULES = {
    "voxelbridge.core.cli": "vb-core",
    "voxelbridge.pretrain_ssl.cli": "vb-ssl",
    "voxelbridge.pretrain_sup.cli": "vb-sup",
    "voxelbridge.detect.cli": "vb-detect",
}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")  # to pages and to pictures
LANGUAGES = {"python", "bash", "sh", "text", "json", "toml", "csv", ""}
SHELL_STOPS = {"&&", "||", ";", "|", "&", ">", ">>", "2>"}

# Folders and endings of text files that people read; generated folders are not ours.
TEXT = {".py", ".md", ".toml", ".html", ".js", ".css", ".sh", ""}
SKIPPED = {"__pycache__", "dist", "quickstart-run", "runs", "node_modules"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [code for language, code in BLOCK.findall(text) if language in languages]


def with_blocks(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


@pytest.fixture(scope="session")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples of the pages find in their folder: `encoder.safetensors` and `STORE`."""
    folder = tmp_path_factory.mktemp("examples")
    metadata = CheckpointMetadata(method="mae", arch=RESENC_SMALL, stems={"main": Stem(channels=1)})
    tensors = collect_tensors(ResEncoder(RESENC_SMALL))
    write_checkpoint(folder / "encoder.safetensors", Checkpoint(metadata, tensors))
    writer = CaseStoreWriter(folder / "STORE")
    writer.write_case(
        "case0",
        np.zeros((1, 8, 8, 8), dtype=np.float32),
        grid=Grid.from_parts((8, 8, 8), (1.0, 1.0, 1.0)),
        boxes=np.array([[1, 1, 1, 3, 3, 3]], dtype=np.float32),
        labels=np.array([0]),
    )
    writer.finish()
    return folder


@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_blocks_run(
    page: Path, example_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for item in example_files.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__", "path": Path("STORE")}
    for code in blocks(page, "python"):
        if "from monai" in code:  # no dependency of ours: people who have it may read on
            pytest.importorskip("monai")
        exec(compile(code, name_of(page), "exec"), names)


@pytest.mark.parametrize("page", with_blocks("bash", "sh"), ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    for code in blocks(page, "bash", "sh"):
        for program, arguments in command_lines(code):
            parse(program, arguments)


def test_command_lines_are_found_in_every_dress() -> None:
    code = (
        "# a comment with vb-core nonsense\n"
        "vb-ssl show mae \\\n  --set seed=1 # why\n"
        "uv run vb-core doctor --json && vb-core verify A > log\n"
        "torchrun --nproc-per-node 4 -m -- voxelbridge.pretrain_ssl.cli show mae\n"
    )
    assert list(command_lines(code)) == [
        ("vb-ssl", ["show", "mae", "--set", "seed=1"]),
        ("vb-core", ["doctor", "--json"]),
        ("vb-core", ["verify", "A"]),
        ("vb-ssl", ["show", "mae"]),
    ]


@pytest.mark.parametrize("line", ["vb-ssl show --no-such", "vb-ssl fly", "vb-detect predict RUN"])
def test_wrong_command_lines_are_noticed(line: str) -> None:
    program, *arguments = line.split()
    with pytest.raises(Exception, match=r"No such|Missing"):
        parse(program, arguments)


@pytest.mark.parametrize("page", with_blocks("bash", "sh"), ids=name_of)
def test_modules_that_pages_start_have_a_main_guard(page: Path) -> None:
    for code in blocks(page, "bash", "sh"):
        for module in MODULES:
            if module in code:
                source = importlib.import_module(module).__file__
                assert source is not None
                assert 'if __name__ == "__main__":' in Path(source).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_name_a_known_language_and_hold_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0, "a code block is not closed"
    for language, code in BLOCK.findall(text):
        assert language in LANGUAGES
        match language:
            case "json":
                json.loads(code)
            case "toml":
                tomllib.loads(code)
            case _:
                pass


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert missing == []


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for target in LINK.findall(index.read_text(encoding="utf-8"))
        if "://" not in target
    }
    pages = set((ROOT / "docs").rglob("*.md")) - {index}
    assert sorted(name_of(page) for page in pages - linked) == []


def test_decisions_have_the_four_parts_and_20_to_40_lines() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{i + 1:04d}" for i in range(len(pages))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for part in ("Context", "Choice", "Alternatives", "Consequence"):
            assert f"\n## {part}" in text, f"{page.name} lacks {part}"
        assert 15 <= len(text.splitlines()) <= 45, page.name


def test_no_package_index_and_no_path_of_one_machine() -> None:
    # Written in pieces, or this file would find itself.
    indexes = ["py" + "pi.org", "python" + "hosted.org", "index" + "-url", "down" + "load.pytorch"]
    homes = ["ho" + "me", "ro" + "ot", "Us" + "ers", "wo" + "rk", "t" + "mp"]
    address = re.compile("|".join(indexes))
    machine = re.compile(rf"(?<![\w.\])}}/~-])/(?:{'|'.join(homes)})/")
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not address.search(line), f"{name_of(path)}:{number}"
            assert not machine.search(line), f"{name_of(path)}:{number}"


@pytest.mark.parametrize("page", with_blocks("bash", "sh", "python"), ids=name_of)
def test_no_environment_variable_is_asked_for(page: Path) -> None:
    for code in blocks(page, "bash", "sh", "python"):
        assert not re.search(r"^\s*(export |[A-Z_]{3,}=\S+ )", code, re.MULTILINE)
        assert "environ" not in code


def command_lines(code: str) -> Iterator[tuple[str, list[str]]]:
    """Program and arguments of every one of our commands in a shell block."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        position = 0
        while position < len(words):
            program = MODULES.get(words[position], words[position])
            position += 1
            if program not in APPS:
                continue
            arguments: list[str] = []
            while position < len(words) and words[position] not in SHELL_STOPS:
                arguments.append(words[position])
                position += 1
            yield program, arguments


def parse(program: str, arguments: list[str]) -> None:
    """Reads the arguments as the program would, without running it; raises what it would."""
    app: typer.Typer = APPS[program]
    group = get_command(app)
    commands = getattr(group, "commands", {})
    if not arguments or arguments[0].startswith("-"):
        assert arguments == ["--help"], f"{program} {arguments}"
        return
    name, *rest = arguments
    assert name in commands, f"No such command: {program} {name}"
    if rest != ["--help"]:
        commands[name].make_context(name, rest)


def text_files() -> Iterator[Path]:
    hidden = [ROOT / ".ci", ROOT / ".gitignore", ROOT / ".python-version"]
    for top in sorted(ROOT.iterdir()):
        if top.name.startswith(".") and top not in hidden:
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in TEXT and not SKIPPED & set(path.parts):
                yield path
