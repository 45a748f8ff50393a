import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from voxelbridge.core.config import Config
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.run import (
    RunDirectory,
    RunLockedError,
    code_version,
    read_run_config,
)


class Inner(Config):
    rate: float = 1e-2


class Example(Config):
    steps: int
    size: tuple[int, int] = (1, 2)
    inner: Inner = Inner()


def open_run(path: Path, config: Config | None = None, *, kind: str = "test") -> RunDirectory:
    return RunDirectory.open_or_create(path, config or Example(steps=3), kind=kind)


def test_config_is_written_with_schema_and_kind_and_read_back(tmp_path: Path) -> None:
    with open_run(tmp_path / "deep" / "run") as run:
        assert json.loads((run.path / "config.json").read_text()) == {
            "schema": 1,
            "kind": "test",
            "steps": 3,
            "size": [1, 2],
            "inner": {"rate": 0.01},
        }
        assert run.checkpoints.is_dir()
        assert read_run_config(run.path, Example, kind="test") == Example(steps=3)


def test_differing_config_lists_the_differing_keys(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    other = Example(steps=4, inner=Inner(rate=0.5))
    with pytest.raises(ConfigError, match=r"steps: 3 -> 4; inner\.rate: 0\.01 -> 0\.5"):
        open_run(tmp_path, other)
    open_run(tmp_path).close()  # the lock was given back


def test_run_of_another_kind_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    with pytest.raises(ConfigError, match="a run of kind test, expected detect"):
        open_run(tmp_path, kind="detect")


def test_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").touch()
    with pytest.raises(ConfigError, match=r"holds thesis\.docx but no config\.json"):
        open_run(tmp_path)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, "schema": 2}))
    with pytest.raises(ConfigError, match="expected schema 1"):
        open_run(tmp_path)


def test_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run directory \(config\.json is missing\)"):
        read_run_config(tmp_path / "nowhere", Example, kind="test")


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-x-config.json").touch()
    with open_run(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoints", "config.json"]


def test_facts_are_kept_and_must_not_change(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.keep("data.json", {"store": "abc", "cases": {"train": 3}})
        run.keep("data.json", {"store": "abc", "cases": {"train": 3}})
        with pytest.raises(DataError, match=r"cases\.train: 3 -> 4"):
            run.keep("data.json", {"store": "abc", "cases": {"train": 4}})


def test_each_start_is_recorded(tmp_path: Path) -> None:
    for device in ("cpu", "cuda:0"):
        with open_run(tmp_path) as run:
            run.record_start(device=device, arguments={"workers": 2})
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content["schema"] == 1
    assert [start["device"] for start in content["starts"]] == ["cpu", "cuda:0"]
    assert content["starts"][0]["arguments"] == {"workers": 2}
    versions = content["starts"][0]["versions"]
    assert {"voxelbridge-core", "torch", "numpy", "SimpleITK", "blosc2"} <= versions.keys()
    assert versions["torch"]
    assert "code" in content["starts"][0]


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_code_is_the_commit_of_the_repository_that_tracks_it(tmp_path: Path) -> None:
    code = tmp_path / "src" / "part"
    code.mkdir(parents=True)
    (code / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    (tmp_path / "other").touch()
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "x")
    assert code_version(code) is None  # installed into somebody's repository, not part of it
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-qm", "y")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_version(code) == commit
    (code / "a.py").write_text("2")
    assert code_version(code) == f"{commit}-dirty"
    assert code_version(tmp_path.parent / "nowhere") is None


HOLD = """
import sys, time
from pathlib import Path
from voxelbridge.core.config import Config
from voxelbridge.core.run import RunDirectory
class Empty(Config): pass
with RunDirectory.open_or_create(Path(sys.argv[1]), Empty(), kind="test"):
    print("held", flush=True)
    time.sleep(60)
"""


class Empty(Config):
    pass


def test_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunLockedError, match=f"process {holder.pid} on .* is training here"):
            open_run(tmp_path, Empty())
    finally:
        holder.kill()
        holder.communicate()
    open_run(tmp_path, Empty()).close()


def test_forked_children_do_not_hold_the_lock(tmp_path: Path) -> None:
    # Data workers outlive a killed parent by seconds; the same command must start at once.
    code = HOLD.replace(
        'print("held"',
        'import os\n    if os.fork() == 0: time.sleep(20); os._exit(0)\n    print("held"',
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    holder.kill()
    holder.wait()
    open_run(tmp_path, Empty()).close()
    for child in children:
        os.kill(int(child), 9)
    holder.communicate()
