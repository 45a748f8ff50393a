"""Reference arrays for box operations in our box order, and a tiny raw data set.

The reference program stores boxes as (a0 low, a1 low, a0 high, a1 high, a2 low, a2 high), and
deltas in the same interleaving.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume

FROM_REFERENCE = [0, 1, 4, 2, 3, 5]


class ReferenceArrays:
    """Named arrays of one reference file as tensors."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self._arrays = {name: archive[name] for name in archive.files}

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self._arrays[name])

    def boxes(self, name: str) -> Tensor:
        """Boxes or deltas (..., 6) in our order."""
        return self.tensor(name)[..., FROM_REFERENCE]

    def number(self, name: str) -> float:
        return float(self._arrays[name])

    def text(self, name: str) -> str:
        return str(self._arrays[name])


@pytest.fixture(scope="session")
def boxops(shared: Path) -> Callable[[str], ReferenceArrays]:
    """`boxops("nms")` holds the arrays of the reference file of that name."""
    return lambda name: ReferenceArrays(shared / "golden" / "boxops" / f"{name}.npz")


@pytest.fixture
def raw_dataset(tmp_path: Path) -> Path:
    """Six cases of about 20 x 24 x 28 voxels, two classes, one of the cases empty; two test cases.

    Axes are stored flipped and permuted, so that forgetting the orientation shows.
    """
    root = tmp_path / "raw"
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (root / folder).mkdir(parents=True)
    description = {"name": "tiny", "modalities": {"0": "CT"}, "labels": {"0": "hot", "1": "cold"}}
    (root / "dataset.json").write_text(json.dumps(description))
    rng = np.random.default_rng(5)
    for number in range(8):
        split = "Tr" if number < 6 else "Ts"
        write_tiny_case(root, split, f"case{number}", rng, empty=number == 2)
    return root


def write_tiny_case(
    root: Path, split: str, name: str, rng: np.random.Generator, *, empty: bool
) -> None:
    shape = (20, 24, 28)
    image = rng.normal(0.0, 20.0, size=shape).astype(np.float32) + 40.0
    instances = np.zeros(shape, dtype=np.int16)
    classes: dict[str, int] = {}
    if not empty:
        for instance, value in ((1, 300.0), (2, -200.0)):
            z, y = (int(rng.integers(0, size - 6)) for size in shape[:2])
            x = 2 if instance == 1 else 18
            inside = (slice(z, z + 6), slice(y, y + 6), slice(x, x + 6))
            image[inside] = value
            instances[inside] = instance
            classes[str(instance)] = instance - 1
    directions = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    grid = Grid.from_parts(shape, (2.0, 1.0, 1.0), directions=directions, origin_mm=(5, -7, 11))
    write_image(root / f"images{split}" / f"{name}_0000.nii.gz", Volume(image[None], grid))
    write_image(root / f"labels{split}" / f"{name}.nii.gz", Volume(instances[None], grid))
    (root / f"labels{split}" / f"{name}.json").write_text(json.dumps({"instances": classes}))
