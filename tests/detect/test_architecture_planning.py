"""Patch size and stages from spacing, extent and memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.arch.config import cumulative_strides
from voxelbridge.core.errors import ConfigError
from voxelbridge.detect.architecture_planning import (
    FIXED_TOPOLOGY,
    Topology,
    first_patch,
    fit_topology,
    plan_features,
    plan_head_levels,
    plan_topology,
)
from voxelbridge.detect.plan_request import check_patch

ISOTROPIC = (1.0, 1.0, 1.0)


def test_the_papers_cube_gets_the_papers_stages() -> None:
    assert plan_topology(ISOTROPIC, (128, 128, 128)) == FIXED_TOPOLOGY
    assert plan_features(6) == (32, 64, 128, 256, 320, 320)
    assert plan_head_levels(6) == (2, 3, 4, 5)


def test_a_coarse_axis_is_pooled_and_convolved_later() -> None:
    topology = plan_topology((5.0, 1.0, 1.0), (16, 128, 128))
    assert topology.strides[1:4] == ((1, 2, 2), (1, 2, 2), (2, 2, 2))
    # In plane 1, 2 and 4 mm: from the third stage on z is within twice of it.
    assert topology.kernels[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    assert cumulative_strides(topology.strides)[-1] == (4, 32, 32)
    turned = plan_topology((1.0, 1.0, 5.0), (128, 128, 16))
    assert turned.strides == tuple((z, y, x) for x, z, y in topology.strides)


def test_two_coarse_axes_wait_for_the_fine_one() -> None:
    topology = plan_topology((1.0, 5.0, 5.0), (64, 32, 32))
    assert topology.strides[1:3] == ((2, 1, 1), (2, 1, 1))
    assert topology.kernels[0] == (3, 1, 1)


def test_the_patch_is_enlarged_to_multiples_of_the_stride() -> None:
    topology = plan_topology(ISOTROPIC, (100, 33, 8))
    total = cumulative_strides(topology.strides)[-1]
    assert topology.patch_size == (112, 40, 8)
    assert total == (16, 8, 2)


def test_a_slice_is_never_pooled_across() -> None:
    topology = plan_topology(ISOTROPIC, (1, 64, 64))
    assert all(stride[0] == 1 for stride in topology.strides)


@pytest.mark.parametrize(
    ("stages", "levels"),
    [(1, (0,)), (2, (1,)), (3, (1, 2)), (5, (1, 2, 3, 4)), (7, (2, 3, 4, 5, 6))],
)
def test_head_levels_by_number_of_stages(stages: int, levels: tuple[int, ...]) -> None:
    assert plan_head_levels(stages) == levels


def test_the_first_patch_is_the_median_image_with_equal_fine_axes() -> None:
    assert first_patch((5.0, 1.0, 1.0), (40, 300, 200)) == (40, 200, 200)
    assert first_patch(ISOTROPIC, (1000, 1000, 1000)) == (512, 512, 512)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 600)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    budget=st.integers(10_000, 10_000_000),
)
def test_every_planned_topology_can_be_built_and_fits(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], budget: int
) -> None:
    def voxels(topology: Topology) -> int:
        return int(np.prod(topology.patch_size))

    topology = fit_topology(spacing, shape, bytes_of=voxels, budget=budget)
    check_patch(topology.patch_size, topology.strides, topology.kernels)
    assert voxels(topology) <= budget
    assert topology.kernels[-1] == (3, 3, 3)
    deepest = np.array(topology.patch_size) // cumulative_strides(topology.strides)[-1]
    assert np.prod(deepest) > 1


def test_too_little_memory_is_an_error_that_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"--gpu-memory: got 0\.00 GiB, but a patch of \[16, "):
        fit_topology(ISOTROPIC, (300, 300, 300), bytes_of=lambda _: 2**30, budget=1000)


def test_more_memory_never_gives_a_smaller_patch() -> None:
    sizes = [
        np.prod(
            fit_topology(
                (1.25, 0.7, 0.7),
                (250, 400, 400),
                bytes_of=lambda topology: int(np.prod(topology.patch_size)),
                budget=budget,
            ).patch_size
        )
        for budget in (50_000, 500_000, 5_000_000)
    ]
    assert sizes == sorted(sizes)
