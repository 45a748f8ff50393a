"""Who may import whom: read from the import statements, and from what a fresh interpreter loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).resolve().parents[1] / "packages"
PARTS = ("core", "pretrain_sup", "pretrain_ssl", "detect")
# What people get who install voxelbridge-core without extras.
PLAIN_CORE = (
    "adapt",
    "arch",
    "checkpoint",
    "cli",
    "command_line",
    "config",
    "config_errors",
    "config_fields",
    "doctor",
    "errors",
    "files",
    "foreign",
    "report",
    "safetensors_header",
    "tiles",
    "transfer",
    "wording",
)
PLAIN_LIBRARIES = {"numpy", "pydantic", "safetensors", "torch", "typer"}
COMMANDS = {
    "vb-core": "voxelbridge.core.cli",
    "vb-ssl": "voxelbridge.pretrain_ssl.cli",
    "vb-sup": "voxelbridge.pretrain_sup.cli",
    "vb-detect": "voxelbridge.detect.cli",
}


@pytest.mark.parametrize("part", PARTS)
def test_part_imports_only_itself_and_core(part: str) -> None:
    allowed = {part, "core"}
    for path in sources(part):
        ours = {name.split(".")[1] for name, _ in imports(path) if name.startswith("voxelbridge.")}
        assert ours <= allowed, f"{path} imports {sorted(ours - allowed)}"


def test_no_module_imports_the_namespace_itself_or_relatively() -> None:
    for part in PARTS:
        for path in sources(part):
            names = {name for name, _ in imports(path)}
            assert "voxelbridge" not in names, path
            assert not any(name.startswith(".") for name in names), path


def test_plain_core_needs_no_extra() -> None:
    plain = {f"voxelbridge.core.{name}" for name in PLAIN_CORE}
    for path in sources("core"):
        module = module_name(path)
        if not any(module == name or module.startswith(f"{name}.") for name in plain):
            continue
        for name, at_module_level in imports(path):
            if not at_module_level:
                continue
            top = name.partition(".")[0]
            known = top in PLAIN_LIBRARIES or top in sys.stdlib_module_names
            ours = any(name == p or name.startswith(f"{p}.") for p in plain)
            assert known or ours, f"{module} imports {name}"


def test_plain_core_modules_exist() -> None:
    folder = PACKAGES / "core" / "src" / "voxelbridge" / "core"
    for name in PLAIN_CORE:
        assert (folder / f"{name}.py").is_file() or (folder / name).is_dir(), name


def test_voxelbridge_is_a_namespace_without_init_file() -> None:
    roots = [PACKAGES / part / "src" / "voxelbridge" for part in PARTS]
    assert all(root.is_dir() for root in roots)
    assert [root for root in roots if (root / "__init__.py").exists()] == []
    assert [[p.name for p in root.iterdir() if p.suffix == ".py"] for root in roots] == [[]] * 4


def test_init_files_hold_a_docstring_only() -> None:
    for path in PACKAGES.glob("*/src/**/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path
        assert isinstance(body[0].value, ast.Constant), path


def test_importing_detect_loads_neither_torch_nor_triton() -> None:
    assert loaded_after("import voxelbridge.detect") == []


@pytest.mark.parametrize("arguments", [["--help"], ["COMMAND", "--help"]], ids=["app", "command"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_import_torch(command: str, arguments: list[str]) -> None:
    first = "inspect" if command == "vb-core" else "train"
    argv = [command, *(first if word == "COMMAND" else word for word in arguments)]
    code = (
        f"import sys; sys.argv = {argv!r}\n"
        f"from {COMMANDS[command]} import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "else:\n    raise AssertionError('no exit')"
    )
    assert loaded_after(code) == []


def loaded_after(code: str) -> list[str]:
    """Heavy modules in a fresh interpreter after `code`."""
    probe = (
        f"{code}\nimport sys\n"
        "heavy = ('torch', 'triton', 'scipy', 'SimpleITK', 'matplotlib', 'blosc2')\n"
        "print('\\nLOADED', *(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], check=True, capture_output=True, encoding="utf-8"
    )
    return done.stdout.rpartition("LOADED")[2].split()


def sources(part: str) -> list[Path]:
    found = sorted((PACKAGES / part / "src" / "voxelbridge" / part).rglob("*.py"))
    assert found, part
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGES).with_suffix("").parts[2:]  # behind PART/src
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module of a file, and whether importing the file imports it."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")).body, at_module_level=True)


def _imports(body: list[ast.stmt], *, at_module_level: bool) -> Iterator[tuple[str, bool]]:
    for statement in body:
        match statement:
            case ast.Import(names=names):
                yield from ((alias.name, at_module_level) for alias in names)
            case ast.ImportFrom(module=module, level=level):
                yield "." * level + (module or ""), at_module_level
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=inner, orelse=orelse):
                yield from _imports(inner, at_module_level=False)
                yield from _imports(orelse, at_module_level=at_module_level)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _imports(statement.body, at_module_level=False)
            case _:
                for name in ("body", "orelse", "finalbody", "handlers", "cases"):
                    for part in getattr(statement, name, []):
                        nested = [part] if isinstance(part, ast.stmt) else part.body
                        yield from _imports(nested, at_module_level=at_module_level)
