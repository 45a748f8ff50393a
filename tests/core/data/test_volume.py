"""Grids, reorientation and world coordinates."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data.volume import (
    Grid,
    Reorientation,
    Volume,
    box_corners_to_world,
    boxes_from_world_mm,
    boxes_to_world_mm,
    edges_to_world,
    match_grid,
    reorientation_to_lps,
    world_to_edges,
)

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def _rotation(rng: np.random.Generator) -> np.ndarray:
    matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return matrix


def _grid(rng: np.random.Generator) -> Grid:
    return Grid.from_parts(
        rng.integers(1, 9, size=3).tolist(),
        rng.uniform(0.3, 6.0, size=3).tolist(),
        directions=_rotation(rng),
        origin_mm=rng.uniform(-500, 500, size=3).tolist(),
    )


def _boxes(rng: np.random.Generator, shape: tuple[int, ...], count: int = 5) -> np.ndarray:
    low = rng.uniform(0, 0.5, size=(count, 3)) * shape
    return np.concatenate([low, low + rng.uniform(0.1, 0.5, size=(count, 3)) * shape], axis=1)


def test_lps_grid_maps_centre_of_first_voxel_to_origin() -> None:
    grid = Grid.from_parts((4, 5, 6), (3.0, 2.0, 1.0), origin_mm=(10, 20, 30))
    assert edges_to_world([0.5, 0.5, 0.5], grid).tolist() == [10, 20, 30]
    assert edges_to_world([1.5, 0.5, 0.5], grid).tolist() == [10, 20, 33]
    assert grid.spacing_mm == (3.0, 2.0, 1.0)


def test_world_box_of_known_voxels() -> None:
    grid = Grid.from_parts((10, 10, 10), (2.0, 1.0, 0.5))
    box = boxes_to_world_mm([[0, 0, 0, 2, 4, 6]], grid)
    assert box.tolist() == [[1.25, 1.5, 1.0, 3.0, 4.0, 4.0]]


@few
@given(seeds)
def test_world_to_edges_inverts_edges_to_world(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid, points = _grid(rng), rng.uniform(-20, 20, size=(7, 3))
    np.testing.assert_allclose(
        world_to_edges(edges_to_world(points, grid), grid), points, atol=1e-9
    )


@few
@given(seeds)
def test_reorientation_keeps_every_voxel_and_box_at_its_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = _grid(rng)
    array = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    change = reorientation_to_lps(grid)
    moved, moved_grid = change.apply_array(array), change.apply_grid(grid)
    index = np.argwhere(moved >= 0)
    world = edges_to_world(index + 0.5, moved_grid)
    source = np.rint(world_to_edges(world, grid) - 0.5).astype(int)
    assert np.array_equal(array[tuple(source.T)], moved[tuple(index.T)])
    boxes = _boxes(rng, grid.shape)
    here = np.sort(box_corners_to_world(boxes, grid), axis=1)
    there = np.sort(box_corners_to_world(change.apply_boxes(boxes), moved_grid), axis=1)
    np.testing.assert_allclose(here, there, atol=1e-7)


@few
@given(seeds)
def test_inverse_reorientation_restores_arrays_boxes_and_grids(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = _grid(rng)
    change = Reorientation(
        grid.shape,
        tuple(rng.permutation(3).tolist()),
        tuple((rng.random(3) < 0.5).tolist()),
    )
    array = rng.normal(size=(2, *grid.shape))
    assert np.array_equal(change.inverse().apply_array(change.apply_array(array)), array)
    boxes = rng.integers(0, 9, size=(4, 6))
    assert np.array_equal(change.inverse().apply_boxes(change.apply_boxes(boxes)), boxes)
    back = change.inverse().apply_grid(change.apply_grid(grid))
    np.testing.assert_allclose(back.affine, grid.affine, atol=1e-9)
    assert Reorientation.from_json(change.to_json()) == change
    assert change.inverse().inverse() == change


@few
@given(seeds)
def test_reorientation_of_any_oblique_grid_is_a_permutation_and_settles(seed: int) -> None:
    grid = _grid(np.random.default_rng(seed))
    change = reorientation_to_lps(grid)
    assert sorted(change.permutation) == [0, 1, 2]
    again = reorientation_to_lps(change.apply_grid(grid))
    assert again.permutation == (0, 1, 2)
    assert again.flips == (False, False, False)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1.0, -1.0), repeat=3)))
def test_all_48_axis_orders_reach_the_lps_directions(
    order: tuple[int, ...], signs: tuple[float, ...]
) -> None:
    directions = np.eye(3)[:, list(order)] * np.array(signs)
    grid = Grid.from_parts((2, 3, 4), (1, 1, 1), directions=directions)
    moved = reorientation_to_lps(grid).apply_grid(grid)
    np.testing.assert_array_equal(moved.directions, np.eye(3)[:, ::-1])


def test_grid_at_45_degrees_keeps_the_order_of_the_file() -> None:
    for jitter in (0.0, 1e-9, -1e-9):  # what rounding of a header does must not decide
        c, s = np.cos(np.pi / 4 + jitter), np.sin(np.pi / 4 + jitter)
        directions = np.array([[0, -s, c], [0, c, s], [1, 0, 0]])
        change = reorientation_to_lps(Grid.from_parts((2, 3, 4), (1, 1, 1), directions=directions))
        assert change.permutation == (0, 1, 2)


@few
@given(seeds)
def test_world_box_round_trip_is_exact_on_axis_aligned_grids(seed: int) -> None:
    rng = np.random.default_rng(seed)
    directions = np.eye(3)[:, rng.permutation(3)] * rng.choice([-1.0, 1.0], size=3)
    grid = Grid.from_parts((9, 8, 7), (2.0, 0.7, 0.3), directions=directions, origin_mm=(5, -9, 80))
    boxes = _boxes(rng, grid.shape)
    back = boxes_from_world_mm(boxes_to_world_mm(boxes, grid), grid)
    np.testing.assert_allclose(back, boxes, atol=1e-9)


@few
@given(seeds)
def test_world_box_of_an_oblique_grid_encloses_the_box(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = _grid(rng)
    boxes = _boxes(rng, grid.shape)
    back = boxes_from_world_mm(boxes_to_world_mm(boxes, grid), grid)
    assert (back[:, :3] <= boxes[:, :3] + 1e-7).all()
    assert (back[:, 3:] >= boxes[:, 3:] - 1e-7).all()


def test_no_boxes_stay_no_boxes() -> None:
    grid = Grid.from_parts((2, 2, 2), (1, 1, 1))
    assert boxes_to_world_mm([], grid).shape == (0, 6)
    assert boxes_from_world_mm(np.zeros((0, 6)), grid).shape == (0, 6)
    assert reorientation_to_lps(grid).apply_boxes([]).shape == (0, 6)


@few
@given(seeds)
def test_resampled_grid_keeps_the_outer_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = _grid(rng)
    new = grid.resampled(rng.integers(1, 20, size=3).tolist())
    for corner in product((0.0, 1.0), repeat=3):
        here = edges_to_world(np.array(corner) * grid.shape, grid)
        there = edges_to_world(np.array(corner) * new.shape, new)
        np.testing.assert_allclose(here, there, atol=1e-9)


def test_cropped_grid_moves_the_first_voxel() -> None:
    grid = Grid.from_parts((9, 9, 9), (3.0, 2.0, 1.0)).cropped((1, 2, 3), (2, 2, 2))
    assert grid.origin_mm == (3.0, 4.0, 3.0)


def test_match_grid_turns_a_flipped_copy_and_refuses_another_place() -> None:
    grid = Grid.from_parts((2, 3, 4), (1, 2, 3))
    array = np.arange(24.0).reshape(1, 2, 3, 4)
    flipped = Reorientation(grid.shape, (2, 0, 1), (True, False, True)).apply_volume(
        Volume(array, grid)
    )
    matched = match_grid(flipped, grid)
    assert matched is not None
    assert np.array_equal(matched.array, array)
    assert match_grid(flipped, Grid.from_parts((2, 3, 4), (1, 2, 3), origin_mm=(9, 0, 0))) is None
    assert match_grid(flipped, Grid.from_parts((2, 3, 5), (1, 2, 3))) is None


def test_grids_without_extent_are_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        Grid.from_parts((2, 2, 2), (1, 0, 1))
    with pytest.raises(ValueError, match="positive"):
        Grid.from_parts((2, 0, 2), (1, 1, 1))
    with pytest.raises(ValueError, match="finite"):
        Grid.from_parts((2, 2, 2), (1, float("nan"), 1))


def test_grid_json_round_trip_is_exact() -> None:
    grid = _grid(np.random.default_rng(3))
    back = Grid.from_json(grid.to_json())
    assert back.shape == grid.shape
    assert np.array_equal(back.affine, grid.affine)
