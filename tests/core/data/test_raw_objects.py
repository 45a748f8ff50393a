"""Objects from instance maps, semantic maps and boxes."""

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from voxelbridge.core.data.raw_objects import (
    Thing,
    instance_classes,
    no_objects,
    objects_from_boxes,
    objects_from_instances,
    objects_from_semantic,
    values_of,
)
from voxelbridge.core.data.raw_problems import (
    RawDataError,
    grid_differences,
    image_problems,
    problem,
    same_voxels,
)
from voxelbridge.core.data.volume import Grid, Volume, reorientation_to_lps

GRID = Grid.from_parts((6, 7, 8), (2.0, 1.0, 0.5))


def kinds(error: pytest.ExceptionInfo[RawDataError]) -> list[str]:
    return [problem.kind for problem in error.value.problems]


def test_ids_need_not_follow_each_other_and_may_be_large() -> None:
    instances = np.zeros((6, 7, 8), dtype=np.int32)
    instances[0, 0, 0], instances[5, 6, 7], instances[2, 2, 2] = 7, 2_000_000_000, 3
    found = objects_from_instances(instances, {7: 0, 2_000_000_000: 1, 3: 0})
    assert found.ids.tolist() == [3, 7, 2_000_000_000]
    assert found.labels.tolist() == [0, 0, 1]
    assert found.instances is not None
    assert int(found.instances[5, 6, 7]) == 2_000_000_000
    with pytest.raises(RawDataError, match="above 2147483647"):
        objects_from_instances(instances.astype(np.int64) * 2, {6: 0, 14: 0, 4_000_000_000: 1})


def test_an_id_listed_twice_is_refused() -> None:
    with pytest.raises(RawDataError, match="instance 1 is listed twice"):
        instance_classes({"1": 0, "01": 1}, 2)


def test_every_problem_of_the_ids_is_listed_and_the_text_stays_short() -> None:
    with pytest.raises(RawDataError) as error:
        instance_classes({"0": 0, "-1": 0, "a": 0, "1": 5, "2": 1.0, "3": 0}, 2)
    assert kinds(error) == ["label-json"] * 3 + ["unknown-class"] * 2
    assert str(error.value).endswith("and 2 more")


def test_the_problems_survive_the_way_out_of_a_worker_process() -> None:
    error = problem("grid", "size")
    again = copy.copy(error)  # what sending it to another process does
    assert str(again) == "size"
    assert again.problems == error.problems


def test_overlapping_equal_and_touching_boxes_survive_untouched() -> None:
    boxes = [[0, 0, 0, 3, 3, 3], [1.25, 1, 1, 4, 4, 4], [1.25, 1, 1, 4, 4, 4], [0, 3, 0, 3, 6, 3]]
    content = [{"label": n % 2, "box": box, "note": "kept out"} for n, box in enumerate(boxes)]
    found = objects_from_boxes(content, GRID, num_classes=2)
    assert found.boxes.tolist() == boxes
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert found.instances is None


def test_no_boxes_are_legal() -> None:
    found = objects_from_boxes([], GRID, num_classes=0)
    assert found.boxes.shape == (0, 6)
    assert no_objects(GRID).boxes.shape == (0, 6)


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ({"label": 0, "box": [0, 0, 0, 1, 1, 10**400]}, "box-malformed"),
        ({"label": 0, "box": [0, 0, 0, 1, 1, True]}, "box-malformed"),
        ({"label": 0, "box": [0, 0, 0, 1, 1, float("inf")]}, "box-malformed"),
        ({"label": 0, "box": "0 0 0 1 1 1"}, "box-malformed"),
        ({"label": "0", "box": [0, 0, 0, 1, 1, 1]}, "unknown-class"),
        ({"label": 0, "box": [5.5, 0, 0, 5.5, 1, 1]}, "box-inverted"),
        ({"label": 0, "box": [6.0, 0, 0, 6.5, 1, 1]}, "box-outside"),
        ({"label": 0, "box": [-0.5, 0, 0, 0.0, 1, 1]}, "box-outside"),
        ({"label": 0, "box": [0, 0, 0, 1e300, 1, 1]}, "box-outside"),
        ({"label": 0, "box_mm": [1e308, 1e308, 1e308, 1e308, 1, 1]}, "box-outside"),
    ],
)
def test_wrong_boxes_are_named_by_row_and_kind(item: Any, kind: str) -> None:
    good = {"label": 0, "box": [0, 0, 0, 1, 1, 1]}
    with pytest.raises(RawDataError, match="box 1") as error:
        objects_from_boxes([good, item, good], GRID, num_classes=1)
    assert kinds(error) == [kind]
    assert len(str(error.value)) < 300


@settings(deadline=None, max_examples=30)
@given(arrays(np.int32, (3, 4, 4), elements=st.integers(-3, 100_000)))
def test_values_of_a_map_are_those_of_unique(label_map: np.ndarray) -> None:
    assert values_of(label_map) == set(np.unique(label_map).tolist())


def test_specks_are_counted_and_unknown_labels_refused() -> None:
    labels = np.zeros((6, 7, 8), dtype=np.uint8)
    labels[:3, :3, :3], labels[5, 5, 5], labels[5, 0, 0] = 1, 1, 9
    things = [Thing("a", (1,))]
    found = objects_from_semantic(labels, things, 10, label_ids={1, 9})
    assert (found.boxes.tolist(), found.num_specks) == ([[0, 0, 0, 3, 3, 3]], 1)
    assert len(objects_from_semantic(labels, things, 10).boxes) == 1
    with pytest.raises(RawDataError, match="holds 9"):
        objects_from_semantic(labels, things, 10, label_ids={1, 2})


def test_grids_are_equal_in_any_axis_order_and_differences_are_named() -> None:
    directions = -np.eye(3)[:, [2, 0, 1]]
    grid = Grid.from_parts((6, 7, 8), (2.0, 1.0, 0.5), directions=directions, origin_mm=(1, 2, 3))
    turned = reorientation_to_lps(grid).apply_grid(grid)
    assert same_voxels(grid, turned)
    assert same_voxels(turned, grid)
    other = Grid.from_parts((6, 7, 9), (2.0, 1.5, 0.5), origin_mm=(1, 2, 4))
    assert not same_voxels(grid, other)
    words = [text.split()[0] for text in grid_differences(other, grid)]
    assert words == ["size", "spacing", "origin", "direction"]
    assert grid_differences(other, grid)[1] == "spacing 2x1.5x0.5 against 2x1x0.5 mm"


def test_image_problems_are_nan_and_images_without_content() -> None:
    array = np.zeros((2, 6, 7, 8), dtype=np.float32)
    assert [p.kind for p in image_problems(Volume(array, GRID))] == ["constant", "constant"]
    array[0, 0, 0, 0] = 1
    assert image_problems(Volume(array, GRID)) == []
    array[1, 0, 0, :2] = np.nan, -np.inf
    (found,) = image_problems(Volume(array, GRID))
    assert found.message.startswith("channel 1: 1 voxels are NaN and 1 infinite")
