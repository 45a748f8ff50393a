"""What a TOML file changes about the labels of data sets."""

import json
from pathlib import Path

import pytest

from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.declaration import (
    DatasetDeclaration,
    apply_declaration,
    declared_label_space,
    read_declaration,
)

LABELS = DatasetLabels(
    "organs",
    ("CT",),
    tuple(Target(name, (number,)) for number, name in enumerate("abcde", start=1)),
    6,
    3,
)


def changed(**changes: object) -> DatasetLabels:
    declaration = DatasetDeclaration.model_validate(changes)
    return apply_declaration(LABELS, declaration, where="datasets.organs")


def ids_of(labels: DatasetLabels) -> dict[str, tuple[int, ...]]:
    return {target.name: target.ids for target in labels.targets}


def test_nothing_declared_changes_nothing() -> None:
    assert changed() == LABELS


def test_merged_targets_stand_where_the_first_one_stood() -> None:
    labels = changed(merge={"bd": ("d", "b")})
    assert list(ids_of(labels).items()) == [("a", (1,)), ("bd", (4, 2)), ("c", (3,)), ("e", (5,))]
    assert not labels.regions
    assert ids_of(changed(merge={"a": ("a", "b")}))["a"] == (1, 2)


def test_left_out_is_background_and_not_annotated_never_counts() -> None:
    labels = changed(leave_out=("b",), not_annotated=("c", "background"))
    assert list(ids_of(labels)) == ["a", "d", "e"]
    assert labels.left_out == (2,)
    assert labels.uncounted == (6, 3, 0)
    assert labels.legal_ids == LABELS.legal_ids


def test_names_are_those_before_the_renaming() -> None:
    labels = changed(rename={"a": "b", "b": "a"}, leave_out=("c",), merge={"de": ("d", "e")})
    assert ids_of(labels) == {"b": (1,), "a": (2,), "de": (4, 5)}


def test_own_targets_replace_those_of_the_file_and_may_overlap() -> None:
    labels = changed(targets={"all": (1, 2, 3), "core": 2})
    assert labels.regions
    assert ids_of(labels) == {"all": (1, 2, 3), "core": (2,)}
    assert labels.left_out == (4, 5)
    assert not changed(targets={"ab": (1, 2), "c": 3}).regions
    assert changed(regions=True).regions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leave_out": ("liver",)}, r"organs.leave_out: no target 'liver'; there are a, b"),
        ({"rename": {"z": "y"}}, r"organs.rename: no target 'z'"),
        ({"rename": {"a": "b"}}, r"organs: .*two targets are named 'b'"),
        ({"merge": {"a": ("b", "c")}}, r"merge.a: there is another target 'a'"),
        ({"merge": {"x": ()}}, r"merge.x: no target is named"),
        ({"merge": {"x": ("a", "a")}}, r"merge.x: no target 'a'"),
        ({"leave_out": tuple("abcde")}, r"organs: .*no target"),
        ({"targets": {"a": (1, 2), "b": 2}, "regions": False}, r"must be regions"),
        ({"targets": {"a": (1, 6)}}, r"label ids 6 belong to a target"),
    ],
)
def test_contradictions_name_the_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        changed(**changes)
    assert "\n" not in str(caught.value)


TOML = """
layout = "per_dataset"
max_targets = 2

[datasets.one]
name = "first"
leave_out = ["b"]

[datasets."two (v1.1)"]
name = "second"
[datasets."two (v1.1)".merge]
both = ["a", "b"]
"""


def folders(root: Path, *names: str) -> list[Path]:
    for name in names:
        for file in ("imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz"):  # names are enough
            (root / name / file).parent.mkdir(parents=True)
            (root / name / file).touch()
        content = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
        }
        (root / name / "dataset.json").write_text(json.dumps(content))
    return [root / name for name in names]


def test_declaration_file_gives_the_label_space(tmp_path: Path) -> None:
    path = tmp_path / "labels.toml"
    path.write_text(TOML)
    space = declared_label_space(
        folders(tmp_path, "one", "two (v1.1)", "three"), read_declaration(path)
    )
    assert [dataset.name for dataset in space.datasets] == ["first", "second", "three"]
    assert {head.name: [t.name for t in head.targets] for head in space.heads} == {
        "first": ["a", "c"],
        "second": ["both", "c"],
        "three.0": ["a", "b"],
        "three.1": ["c"],
    }


def test_equal_folder_names_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    (first,), (second,) = folders(tmp_path / "x", "organs"), folders(tmp_path / "y", "organs")
    path = tmp_path / "labels.toml"
    path.write_text("")
    with pytest.raises(DataError, match="two data sets are named 'organs'"):
        declared_label_space([first, second], read_declaration(path))
    path.write_text(f"[datasets.'{second}']\nname = 'others'\n")
    space = declared_label_space([first, second], read_declaration(path))
    assert [dataset.name for dataset in space.datasets] == ["organs", "others"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[datasets.on]\n", "datasets.on: no data set folder has this name; did you mean one?"),
        ("layout = 'both'\n", r"labels.toml: layout: got \"both\""),
        ("layuot = 'joint'\n", "did you mean layout?"),
        ("[datasets.one]\nmerge = ['a']\n", "datasets.one.merge"),
        ("[datasets.one]\nname = 'a.b'\n", "data set 'a.b': the name cannot be"),
        ("max_targets = 0\n", "max_targets"),
    ],
)
def test_mistakes_in_the_file_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.toml"
    path.write_text(text)
    with pytest.raises(VoxelbridgeError, match=message) as caught:
        declared_label_space(folders(tmp_path, "one"), read_declaration(path))
    assert "\n" not in str(caught.value)
