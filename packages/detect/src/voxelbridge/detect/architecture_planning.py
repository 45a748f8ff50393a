"""Patch size, strides and kernels that suit a data set's spacing and extent, and a GPU's memory.

nnDetection's rules (arXiv 2106.00817, after nnU-Net, arXiv 1904.08128). They measured memory on a
GPU; here it comes from `memory_model`, so that planning needs none. Axes are z, y, x and are never
transposed: strides and kernels per axis say what a changed order would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from voxelbridge.core.arch.config import Triple, cumulative_strides
from voxelbridge.core.arch.presets import PLAIN
from voxelbridge.core.errors import ConfigError

START_EDGE = 512  # voxels of the coarsest axis in the first, far too large, patch
MIN_MAP = 4  # cells: a map is pooled along an axis while that leaves as many
SAME_SPACING = 2.0  # axes within this factor of the finest are pooled and convolved together
START_FEATURES, MAX_FEATURES = 32, 320
MAX_STAGES = 12  # what an EncoderConfig takes
FINEST_HEAD_LEVEL = 2
NUM_HEAD_LEVELS = 4  # wanted; a network of more than six stages has one more
MIN_PATCH = 16  # voxels: the smallest patch that is pooled at all


@dataclass(frozen=True)
class Topology:
    """A patch size and the stages that pool it, finest first."""

    patch_size: Triple
    strides: tuple[Triple, ...]  # relative to the stage before; the first is 1, 1, 1
    kernels: tuple[Triple, ...]


# Table 5 of arXiv 2509.15947.
FIXED_TOPOLOGY = Topology((128, 128, 128), strides=PLAIN.strides, kernels=PLAIN.kernels)


def plan_topology(spacing_mm: Sequence[float], patch_size: Sequence[int]) -> Topology:
    """The stages for a patch, which is enlarged to multiples of the total stride.

    An axis is halved while its spacing is below twice the finest one that can still be halved, and
    it has at least 8 cells; a lone axis needs 12. A kernel covers 3 voxels of an axis from the
    stage on at which the axis' spacing is below twice the finest, 1 before; the deepest is 3x3x3.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    size = np.asarray(patch_size, dtype=np.int64)
    near = np.zeros(3, dtype=bool)
    strides, kernels = [np.ones(3, dtype=np.int64)], []
    while len(strides) < MAX_STAGES:
        near |= spacing < SAME_SPACING * spacing.min()
        pooled = size >= 2 * MIN_MAP
        if pooled.any():
            pooled &= spacing < SAME_SPACING * spacing[pooled].min()
        if not pooled.any() or (pooled.sum() == 1 and size[pooled][0] < 3 * MIN_MAP):
            break
        kernels.append(np.where(near, 3, 1))
        strides.append(np.where(pooled, 2, 1))
        spacing = np.where(pooled, 2 * spacing, spacing)
        size = np.where(pooled, -(-size // 2), size)
    kernels.append(np.full(3, 3))
    total = np.prod(strides, axis=0)
    padded = -(-np.asarray(patch_size, dtype=np.int64) // total) * total
    return Topology(
        _triple(padded),
        strides=tuple(_triple(stride) for stride in strides),
        kernels=tuple(_triple(kernel) for kernel in kernels),
    )


def plan_features(num_stages: int) -> tuple[int, ...]:
    """Channels per stage: 32, doubled from stage to stage, at most 320."""
    return tuple(min(START_FEATURES * 2**stage, MAX_FEATURES) for stage in range(num_stages))


def plan_head_levels(num_stages: int) -> tuple[int, ...]:
    """Stages whose maps carry anchors: the last four, from stage 2 on where there are more."""
    first = min(max(1, num_stages - NUM_HEAD_LEVELS), FINEST_HEAD_LEVEL, num_stages - 1)
    return tuple(range(first, num_stages))


def first_patch(spacing_mm: Sequence[float], median_shape: Sequence[int]) -> Triple:
    """The patch that the search starts from: at most the median image, both finer axes equal."""
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    shape = np.asarray(median_shape, dtype=np.int64)
    wanted = np.round(START_EDGE * spacing.max() / spacing).astype(np.int64)
    finer = [axis for axis in range(3) if axis != int(np.argmax(spacing))]
    limit = shape.copy()
    limit[finer] = shape[finer].min()
    return _triple(np.minimum(wanted, limit))


def fit_topology(
    spacing_mm: Sequence[float],
    median_shape: Sequence[int],
    *,
    bytes_of: Callable[[Topology], int],
    budget: int,
) -> Topology:
    """The largest topology, by nnDetection's search, of which `bytes_of` is at most `budget`.

    While it needs too much, the axis that is largest relative to the median image loses as many
    voxels as one cell of the deepest map has (half of them where that map has but four cells).
    Raises ConfigError when the smallest patch does not fit.
    """
    shape = np.asarray(median_shape, dtype=np.int64)
    patch = np.asarray(first_patch(spacing_mm, median_shape), dtype=np.int64)
    topology = plan_topology(spacing_mm, _triple(patch))
    if len(topology.strides) == 1:  # images of a few voxels: enlarged, so that there is a pyramid
        enlarged = (shape > 1) | (np.count_nonzero(shape > 1) < 2)
        patch = np.where(enlarged, np.maximum(patch, MIN_PATCH), 1)
        topology = plan_topology(spacing_mm, _triple(patch))
    while (needed := bytes_of(topology)) > budget:
        patch = np.asarray(topology.patch_size)
        total = np.asarray(cumulative_strides(topology.strides)[-1])
        order = np.argsort(-patch / shape, kind="stable")
        axis = next((int(a) for a in order if patch[a] > MIN_PATCH), None)
        if axis is None:
            raise ConfigError(
                f"--gpu-memory: got {budget / 2**30:.2f} GiB, but a patch of {patch.tolist()} "
                f"needs {needed / 2**30:.2f} GiB; give more or a smaller batch_size"
            )
        step = int(total[axis])
        patch[axis] -= step // 2 if step > 1 and patch[axis] <= MIN_MAP * step else step
        topology = _shrunk(spacing_mm, patch, before=topology)
    return topology


def _shrunk(spacing_mm: Sequence[float], patch: np.ndarray, *, before: Topology) -> Topology:
    """The topology of a smaller patch, which padding must not make as large as it was."""
    after = plan_topology(spacing_mm, _triple(patch))
    while np.prod(after.patch_size) >= np.prod(before.patch_size):
        patch = patch - (patch == patch.max())
        after = plan_topology(spacing_mm, _triple(patch))
    return after


def _triple(values: Sequence[int] | np.ndarray) -> Triple:
    z, y, x = (int(value) for value in values)
    return z, y, x
