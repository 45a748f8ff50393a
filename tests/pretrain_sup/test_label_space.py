"""Heads and outputs of several data sets, their targets as tensors, and the file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelbridge.core.errors import DataError
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import (
    Head,
    LabelSpace,
    Layout,
    build_label_space,
    decode_target,
    encode_target,
    read_label_space,
    write_label_space,
)


def dataset(name: str, targets: int, *, ignore: int | None = None, cases: int = 3) -> DatasetLabels:
    numbered = tuple(Target(f"t{number}", (number,)) for number in range(1, targets + 1))
    return DatasetLabels(name, ("CT",), numbered, ignore, cases)


NESTED = DatasetLabels(
    "lits",
    ("CT",),
    (Target("liver", (1, 2), 1), Target("tumour", (2,), 2)),
    5,
    4,
    regions=True,
    not_annotated=(3,),
    left_out=(4,),
)


@pytest.mark.parametrize(
    ("targets", "sizes"),
    [
        (117, [20, 20, 20, 19, 19, 19]),
        (104, [18, 18, 17, 17, 17, 17]),
        (45, [15, 15, 15]),
        (21, [11, 10]),
        (20, [20]),
        (1, [1]),
    ],
)
def test_many_targets_are_split_and_none_is_lost(targets: int, sizes: list[int]) -> None:
    space = build_label_space([dataset("totalseg", targets)], layout="per_dataset")
    heads = space.heads_of("totalseg")
    assert [len(head.targets) for head in heads] == sizes
    ids = [number for head in heads for target in head.targets for number in target.ids]
    assert ids == list(range(1, targets + 1))
    expected = ["totalseg"] if len(sizes) == 1 else [f"totalseg.{k}" for k in range(len(sizes))]
    assert [head.name for head in heads] == expected
    assert [space.num_outputs(head) for head in heads] == [size + 1 for size in sizes]


@given(targets=st.integers(1, 300), limit=st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_parts_are_as_few_and_as_equal_as_can_be(targets: int, limit: int) -> None:
    space = build_label_space([dataset("x", targets)], layout="per_dataset", max_targets=limit)
    sizes = [len(head.targets) for head in space.heads]
    assert sum(sizes) == targets
    assert len(sizes) == -(-targets // limit)
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1


def test_every_target_of_a_split_data_set_is_foreground_in_exactly_one_part() -> None:
    space = build_label_space([dataset("totalseg", 117, ignore=118)], layout="per_dataset")
    voxels = torch.arange(-1, 119).reshape(1, 1, 120)
    foreground = torch.zeros(120, dtype=torch.int64)
    for head in space.heads:
        target, annotated = encode_target(head, voxels)
        assert annotated.flatten().tolist() == [False, *[True] * 118, False]
        assert int(target.max()) == len(head.targets)
        foreground += (target > 0).flatten().long()
        ids = [0, *(target.ids[0] for target in head.targets)]
        assert torch.equal(decode_target(head, target.clamp(min=0))[target > 0], voxels[target > 0])
        assert (
            decode_target(head, torch.arange(len(ids)).reshape(1, 1, -1)).flatten().tolist() == ids
        )
    assert foreground.tolist() == [0, 0, *[1] * 117, 0]


def test_equal_names_of_two_data_sets_stay_two_targets() -> None:
    first, second = dataset("a", 2), dataset("b", 2)
    softmax = build_label_space([first, second], layout="per_dataset")
    assert softmax.output_layers == {"a": 3, "b": 3}
    joint = build_label_space([first, second, NESTED], layout="joint")
    assert joint.output_layers == {"joint": 6}
    places = [joint.channels_of(head) for head in joint.heads]
    assert places == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert {joint.layer_of(head) for head in joint.heads} == {"joint"}
    assert all(head.regions for head in joint.heads)


def test_joint_layout_does_not_split() -> None:
    space = build_label_space([dataset("totalseg", 117)], layout="joint")
    assert [head.name for head in space.heads] == ["totalseg"]
    assert space.output_layers == {"joint": 117}


def test_regions_have_no_background_output() -> None:
    space = build_label_space([NESTED, dataset("a", 2)], layout="per_dataset")
    assert space.output_layers == {"lits": 2, "a": 3}
    assert space.head("lits").ignore == (5, 3)
    assert space.channels_of(space.head("a")) == slice(0, 3)


@pytest.mark.parametrize("layout", ["per_dataset", "joint"])
def test_extended_space_keeps_heads_and_channels(layout: Layout) -> None:
    space = build_label_space([dataset("a", 5), NESTED], layout=layout, max_targets=3)
    larger = space.extended([dataset("new", 4)])
    assert larger.heads[: len(space.heads)] == space.heads
    for head in space.heads:
        assert larger.channels_of(head) == space.channels_of(head)
    assert [d.name for d in larger.datasets] == ["a", "lits", "new"]
    assert len(larger.heads_of("new")) == (2 if layout == "per_dataset" else 1)
    with pytest.raises(DataError, match="two data sets are named 'a'"):
        space.extended([dataset("a", 1)])


def slow_target(head: Head, segmentation: Tensor) -> tuple[np.ndarray, np.ndarray]:
    shape = tuple(segmentation.shape)
    annotated = np.zeros(shape, dtype=bool)
    classes = np.full(shape, -1)
    members = np.zeros((len(head.targets), *shape), dtype=bool)
    for voxel in np.ndindex(shape):
        value = int(segmentation[voxel])
        if value < 0 or value in head.ignore:
            continue
        annotated[voxel], classes[voxel] = True, 0
        for number, target in enumerate(head.targets):
            if value in target.ids:
                classes[voxel], members[(number, *voxel)] = number + 1, True
    return (members if head.regions else classes), annotated


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
)
@pytest.mark.parametrize("regions", [False, True])
def test_encoding_equals_a_loop_over_voxels(dtype: torch.dtype, regions: bool) -> None:
    targets = (Target("a", (7, 2)), Target("b", (3, 7) if regions else (3,)))
    low = -1 if dtype.is_signed else 0
    values = np.random.default_rng(1).integers(low, 12, size=(3, 4, 5))
    values[0, 0, 0] = 120  # of nobody, above every id
    segmentation = torch.from_numpy(values).to(dtype)
    for ignore in ((), (5,), (0, 11)):
        head = Head("x", "x", targets, regions, ignore)
        target, annotated = encode_target(head, segmentation)
        expected, counted = slow_target(head, segmentation)
        np.testing.assert_array_equal(target.numpy(), expected)
        np.testing.assert_array_equal(annotated.numpy(), counted)
        assert target.dtype == (torch.bool if regions else torch.int64)


def test_decoding_a_softmax_gives_back_single_ids() -> None:
    head = Head("x", "x", (Target("a", (4,)), Target("b", (2,))), False)
    segmentation = torch.tensor([[[0, 2, 4, 2]]])
    assert torch.equal(decode_target(head, encode_target(head, segmentation)[0]), segmentation)


@pytest.mark.parametrize(
    ("paints", "order"),
    [((1, 2, 3), (0, 1, 2)), ((None, None, None), (0, 1, 2)), ((None, None, None), (2, 0, 1))],
)
def test_decoding_nested_regions_gives_back_the_ids(
    paints: tuple[int | None, ...], order: tuple[int, ...]
) -> None:
    nested = [Target("whole", (1, 2, 3)), Target("core", (2, 3)), Target("enhancing", (3,))]
    told = [Target(t.name, t.ids, paint) for t, paint in zip(nested, paints, strict=True)]
    head = Head("brats", "brats", tuple(told[number] for number in order), True)
    segmentation = torch.tensor([[[0, 1, 2, 3, 2, 1]]])
    assert torch.equal(decode_target(head, encode_target(head, segmentation)[0]), segmentation)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([], "at least one data set"),
        ([dataset("a", 1), dataset("a", 2)], "two data sets are named 'a'"),
        ([dataset("Liver", 1), dataset("liver", 2)], "named 'liver' \\(the other 'Liver'\\)"),
        ([dataset("a", 1, cases=0)], "data set a: no case with a label"),
    ],
)
def test_data_sets_that_do_not_fit_together_are_one_line(
    datasets: list[DatasetLabels], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build_label_space(datasets, layout="per_dataset")
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_known_ones() -> None:
    space = build_label_space([dataset("a", 1), dataset("b", 1)], layout="per_dataset")
    for ask in (space.dataset, space.head, space.heads_of):
        with pytest.raises(DataError, match="'c' in the label space; it has a, b"):
            ask("c")


@pytest.mark.parametrize("layout", ["per_dataset", "joint"])
def test_file_gives_back_the_space(layout: Layout, tmp_path: Path) -> None:
    datasets = [dataset("totalseg", 117, ignore=118), NESTED, dataset("a", 3)]
    space = build_label_space(datasets, layout=layout)
    write_label_space(tmp_path / "label_space.json", space)
    assert read_label_space(tmp_path / "label_space.json") == space


def written(tmp_path: Path, space: LabelSpace) -> tuple[Path, dict]:
    path = tmp_path / "label_space.json"
    write_label_space(path, space)
    return path, json.loads(path.read_text())


def test_damaged_files_name_the_file_and_the_place(tmp_path: Path) -> None:
    space = build_label_space([dataset("a", 25), NESTED], layout="per_dataset")
    path, content = written(tmp_path, space)

    def refused(message: str, **changes: object) -> None:
        path.write_text(json.dumps({**content, **changes}))
        with pytest.raises(DataError, match=message) as caught:
            read_label_space(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)

    refused("schema 2, this version reads 1", schema=2)
    refused("layout: ", layout="both")
    refused("heads of data set a do not hold each of its 25", heads=content["heads"][1:])
    refused("two heads", heads=[*content["heads"], content["heads"][0]])
    wrong = {**content["heads"][0], "dataset": "x"}
    refused("head a.0: no data set 'x'", heads=[wrong])
    refused("no target 'x'", heads=[{**content["heads"][0], "targets": ["x"]}])
    broken = {**content["datasets"][1], "name": "a.b"}
    refused("'a.b': the name cannot be", datasets=[content["datasets"][0], broken])
    refused(r"datasets.0.num_cases: ", datasets=[{**content["datasets"][0], "num_cases": "many"}])
    refused("colour", colour="red")
    path.write_text("[]")
    with pytest.raises(DataError, match="schema None"):
        read_label_space(path)
