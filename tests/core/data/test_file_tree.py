from pathlib import Path

import pytest

from voxelbridge.core.data.file_tree import broken_link, walk_files


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return path


def names(folder: Path) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() for path in walk_files(folder)]


def test_files_are_found_behind_links_and_hidden_ones_are_not(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    put(tree / "b" / "2")
    put(tree / "1")
    put(tree / ".git" / "annex" / "3")
    put(tree / "b" / ".hidden")
    (tree / "a").symlink_to(put(tmp_path / "elsewhere" / "image"))
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    assert names(tree) == ["1", "a", "b/2", "linked/image"]
    (tmp_path / "same").symlink_to(tree)
    assert names(tmp_path / "same") == names(tree)


def test_linked_folders_are_searched_once_and_loops_end(tmp_path: Path) -> None:
    tree, outside = tmp_path / "top" / "tree", tmp_path / "outside"
    put(tree / "own" / "1")
    put(tree / ".cache" / "2")
    put(outside / "3")
    for link, target in {
        "again": tree / "own",  # its files are found anyway
        "cached": tree / ".cache",  # these are not
        "up": tmp_path / "top",
        "self": tree,
        "x": outside,
        "y": outside,
    }.items():
        (tree / link).symlink_to(target)
    (outside / "back").symlink_to(tree)
    (outside / "round").symlink_to(outside)
    assert names(tree) == ["own/1", "cached/2", "x/3"]


def test_broken_links_say_what_to_do(tmp_path: Path) -> None:
    gone, loop = tmp_path / "gone", tmp_path / "loop"
    gone.symlink_to(tmp_path / "objects" / "key")
    loop.symlink_to(loop)
    assert "git annex get" in (broken_link(gone) or "")
    assert broken_link(loop) == "is a link that leads back to itself; remove it"
    put(tmp_path / "objects" / "key")
    assert broken_link(gone) is None
    assert broken_link(tmp_path / "nothing") is None


@pytest.mark.parametrize("folder", [".", "tree/..", "./tree"])
def test_paths_start_with_the_folder_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    put(tmp_path / "tree" / "1")
    monkeypatch.chdir(tmp_path)
    (found,) = walk_files(Path(folder))
    assert Path(found).is_relative_to(Path(folder))
