"""Atomic writes: a file exists completely or not at all."""

from pathlib import Path

import pytest

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import (
    atomic_write,
    read_json,
    remove_partial_files,
    sha256_of,
    write_json,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_parents_are_made_and_the_suffix_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "x.b2nd"
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".b2nd"
        temporary.write_bytes(b"abc")
    assert path.read_bytes() == b"abc"
    assert sha256_of(path).startswith("ba7816bf")


def test_nan_is_not_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_broken_and_missing_json_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"broken\.json: not valid JSON"):
        read_json(path)
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        read_json(tmp_path / "absent.json")
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="not valid JSON"):
        read_json(path)


def test_what_a_killed_writer_left_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-abc-x.json").write_text("half")
    (tmp_path / "x.json").write_text("{}")
    remove_partial_files(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_target_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "inside").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_json(tmp_path / "taken", {})
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.json", Path("/proc/self/x.json")):
        with pytest.raises(DataError, match=rf"^{path}: cannot be written \("):
            write_json(path, {})
