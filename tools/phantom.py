"""CT-like phantom volumes with lesions of two classes, as a raw data set in nnDetection layout.

A case is a block of a body: textured soft tissue in fat, a vertebra, a liver, a fluid-filled
stomach, bowel-like fat and contrast-filled vessels. `hyperdense` lesions (calcified) are brighter
and `hypodense` lesions (with gas) darker than all organs, so that a small network learns them on a
CPU in a minute: this shows that a pipeline works, not how good a method is.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from scipy import ndimage

from voxelbridge.core.command_line import run_app
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import write_json
from voxelbridge.core.progress import track

CLASS_NAMES = ("hyperdense", "hypodense")
SPACING_MM = (1.5, 1.5, 1.5)
DEFAULT_SIZE = (48, 48, 48)  # voxels, z y x
EMPTY_EVERY = 8  # one case in eight has no lesion
LESION_HU = ((400.0, 500.0), (-380.0, -300.0))  # per class; noise and texture come on top
LESION_COUNTS = (3, 5)  # of a case that is not empty
RADIUS_RANGE = (3.5, 7.0)  # voxels
MIN_LESION_VOXELS = 30
PLACEMENT_ATTEMPTS = 200

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]
Size = tuple[int, int, int]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class PhantomCase:
    """One volume: `image` (D, H, W) int16 in HU, `instances` (D, H, W) uint8 (0 = none, ids from 1
    without gaps), `labels[i]` = class of instance i + 1, and the LPS position of voxel 0."""

    case_id: str
    image: NDArray[np.int16]
    instances: NDArray[np.uint8]
    labels: tuple[int, ...]
    origin_mm: tuple[float, float, float]  # z, y, x


class Noise:
    """Smooth random fields of one case: each scale is filtered once, then shifted for every use."""

    def __init__(self, rng: np.random.Generator, size: Size) -> None:
        self.rng = rng
        self.size = size
        self._fields: dict[float, FloatArray] = {}

    def smooth(self, sigma: float) -> FloatArray:
        """Gaussian-filtered noise (D, H, W) of unit standard deviation; `sigma` in voxels."""
        if sigma not in self._fields:
            white = self.rng.standard_normal(self.size, np.float32)
            field = ndimage.gaussian_filter(white, sigma, mode="wrap", truncate=3.0)
            self._fields[sigma] = field / max(float(field.std()), 1e-6)
        shift = tuple(self.rng.integers(self.size).tolist())
        return np.roll(self._fields[sigma], shift, axis=(0, 1, 2))

    def texture(self) -> FloatArray:
        """Multi-scale smooth noise in HU, standard deviation about 20."""
        return 14 * self.smooth(4.0) + 14 * self.smooth(1.5)


def make_case(split: Split, index: int, *, size: Size = DEFAULT_SIZE, seed: int) -> PhantomCase:
    """Case `index` of a split; it depends on (seed, split, index, size) and on no other case."""
    rng = np.random.default_rng([seed, ("train", "test").index(split), index])
    noise = Noise(rng, size)
    image, allowed, centres = _anatomy(noise)
    instances = np.zeros(size, np.uint8)
    labels: list[int] = []
    if index % EMPTY_EVERY != EMPTY_EVERY // 2 - 1:
        wanted = int(rng.integers(LESION_COUNTS[0], LESION_COUNTS[1] + 1))
        classes = [index % 2, *rng.integers(0, len(CLASS_NAMES), size=wanted - 1).tolist()]
        for label in classes:
            coverage = _place_lesion(noise, allowed=allowed, centres=centres, taken=instances > 0)
            if coverage is not None:
                level = rng.uniform(*LESION_HU[label])
                _paint(image, coverage, level + 0.4 * noise.texture())
                labels.append(label)
                instances[coverage > 0.5] = len(labels)
    image += 24.0 * noise.smooth(0.5)
    origin = tuple(np.round(rng.uniform(-200, 200, size=3), 1).tolist())
    return PhantomCase(
        case_id=f"{split}_{index:04d}",
        image=np.clip(np.rint(image), -1024, 3071).astype(np.int16),
        instances=instances,
        labels=tuple(labels),
        origin_mm=(origin[0], origin[1], origin[2]),
    )


def write_phantom_dataset(
    folder: Path, *, num_train: int, num_test: int, size: Size = DEFAULT_SIZE, seed: int
) -> None:
    """Writes `num_train` labelled cases and `num_test` unseen labelled cases below `folder`.

    Training cases go to imagesTr and labelsTr, test cases to imagesTs and labelsTs. Case k of a
    split is the same whatever the counts. Files of an earlier call are overwritten, not removed.
    """
    dataset = {
        "task": "Task000_Phantom",
        "name": "CT-like phantoms with hyperdense and hypodense lesions",
        "dim": 3,
        "target_class": None,
        "test_labels": True,
        "modalities": {"0": "CT"},
        "labels": {str(index): name for index, name in enumerate(CLASS_NAMES)},
        "generator": {"size": list(size), "seed": seed},
    }
    write_json(folder / "dataset.json", dataset)
    for index in track(range(num_train), description="phantoms to train on"):
        _write_case(folder, make_case("train", index, size=size, seed=seed), "train")
    for index in track(range(num_test), description="phantoms to test on"):
        _write_case(folder, make_case("test", index, size=size, seed=seed), "test")


def _write_case(folder: Path, case: PhantomCase, split: Split) -> None:
    suffix = "Tr" if split == "train" else "Ts"
    labels = folder / f"labels{suffix}"
    grid = _grid(case)
    image_path = folder / f"images{suffix}" / f"{case.case_id}_0000.nii.gz"
    write_image(image_path, Volume(case.image[None], grid))
    write_image(labels / f"{case.case_id}.nii.gz", Volume(case.instances[None], grid))
    instances = {str(number): label for number, label in enumerate(case.labels, start=1)}
    write_json(labels / f"{case.case_id}.json", {"instances": instances})


def _grid(case: PhantomCase) -> Grid:
    z, y, x = case.origin_mm
    return Grid.from_parts(case.image.shape, SPACING_MM, origin_mm=(x, y, z))


def _anatomy(noise: Noise) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Noise-free HU volume, where lesions may grow and where their centres may lie, (D, H, W)."""
    rng, size = noise.rng, noise.size
    _, y, x = _unit_coordinates(size)
    image = np.full(size, -110.0, np.float32)
    wobble = noise.smooth(6.0)
    half_y, half_x = rng.uniform(0.80, 0.92), rng.uniform(0.90, 0.99)
    skin = _distance([y / half_y, x / half_x], [half_y, half_x], size) + 0.8 * wobble
    _paint(image, _coverage(skin), -100.0 + 0.5 * noise.texture())
    muscle = skin + rng.uniform(2.0, 3.5) + 0.8 * noise.smooth(3.0)
    _paint(image, _coverage(muscle), 40.0 + noise.texture())

    side = rng.choice([-1.0, 1.0])  # the liver's side; the stomach lies on the other
    within = np.maximum(muscle + 1.0, 0.0) * 9.0  # keeps organs inside the muscle wall
    liver = _blob(noise, (rng.uniform(-0.4, 0.4), -0.15, side * 0.55), (0.9, 0.42, 0.36))
    _paint(image, _coverage(liver + within), 105.0 + 0.7 * noise.texture())
    for _ in range(2):
        fat = _blob(noise, rng.uniform(-0.55, 0.55, 3), rng.uniform(0.20, 0.32, 3))
        _paint(image, _coverage(np.abs(fat) - 1.0 + within), -95.0 + 0.5 * noise.texture())
    stomach = _blob(noise, (rng.choice([-0.9, 0.9]), -0.2, -side * 0.5), (0.75, 0.42, 0.34))
    _paint(image, _coverage(stomach + within), -20.0 + 0.7 * noise.texture())
    for _ in range(3):
        vessel = _tube(noise)
        _paint(image, _coverage(vessel + within), 160.0 + 0.4 * noise.texture())
    bone = _vertebra(noise)
    _paint(image, _coverage(bone), 230.0 + 2.0 * noise.texture())
    _paint(image, _coverage(bone + 2.2), 130.0 + 1.5 * noise.texture())
    allowed = (muscle < -1.0) & (bone > 0.5)
    return image, allowed, allowed & (stomach > 0)


def _vertebra(noise: Noise) -> FloatArray:
    """Signed distance (voxels) of a vertebral column with discs' waists and a spinous process."""
    rng, size = noise.rng, noise.size
    z, y, x = _unit_coordinates(size)
    waist = 1.0 - 0.12 * np.cos(2 * np.pi * (z * rng.uniform(1.0, 1.6) + rng.uniform()))
    middle = rng.uniform(-0.08, 0.08)
    body = _distance([(y - 0.45) / 0.2 / waist, (x - middle) / 0.26 / waist], [0.2, 0.26], size)
    process = _distance([(y - 0.68) / 0.14, (x - middle) / 0.07], [0.14, 0.07], size)
    return np.minimum(body, process) + 0.4 * noise.smooth(2.0)


def _tube(noise: Noise) -> FloatArray:
    """Signed distance (voxels) of a winding vessel that runs along one random axis."""
    rng, size = noise.rng, noise.size
    axis = int(rng.integers(3))
    coordinates = _unit_coordinates(size)
    square = np.zeros((), np.float32)
    for other in [k for k in range(3) if k != axis]:
        wave = np.sin(rng.uniform(1, 3) * coordinates[axis] + rng.uniform(0, 6.3))
        offset = coordinates[other] - rng.uniform(-0.6, 0.6) - rng.uniform(0.05, 0.25) * wave
        square = square + (offset * size[other] / 2) ** 2
    return (np.sqrt(square) - rng.uniform(1.2, 2.6)).astype(np.float32)


def _place_lesion(
    noise: Noise, *, allowed: BoolArray, centres: BoolArray, taken: BoolArray
) -> FloatArray | None:
    """Coverage (D, H, W) in [0, 1] of a new lesion, or None where no room was found.

    Its centre lies in soft tissue; bone, the body wall and the volume's border may cut it. Two
    voxels to every other lesion stay free.
    """
    rng, size = noise.rng, noise.size
    largest = min(RADIUS_RANGE[1], min(size) / 5)
    smallest = min(RADIUS_RANGE[0], 0.7 * largest)
    forbidden = np.asarray(ndimage.maximum_filter(taken, size=5), np.bool_)
    candidates = np.argwhere(centres & ~forbidden)
    for _ in range(PLACEMENT_ATTEMPTS if len(candidates) else 0):
        radii = rng.uniform(smallest, largest) * rng.uniform(0.8, 1.2, size=3)
        centre = candidates[rng.integers(len(candidates))]
        offsets = np.ogrid[tuple(slice(0, length) for length in size)]
        unit = [
            (offset - middle) / radius
            for offset, middle, radius in zip(offsets, centre, radii, strict=True)
        ]
        norm = np.sqrt(sum(np.square(part) for part in unit))
        distance = (norm - 1) * radii.min() + 0.5 * noise.smooth(2.0)
        coverage = _coverage(distance) * allowed
        mask = coverage > 0.5
        parts = np.zeros(size, np.int32)
        ndimage.label(mask, np.ones((3, 3, 3)), output=parts)
        if parts.max() == 1 and mask.sum() >= MIN_LESION_VOXELS and not (mask & forbidden).any():
            return coverage
    return None


def _unit_coordinates(size: Size) -> list[FloatArray]:
    """Open grids of z, y, x with the volume's faces at -1 and 1."""
    axes = [(2 * np.arange(length, dtype=np.float32) + 1) / length - 1 for length in size]
    return [axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]]


def _blob(noise: Noise, centre: NDArray | tuple, radii: NDArray | tuple) -> FloatArray:
    """Signed distance (voxels) of a wobbly ellipsoid; centre and radii in unit coordinates."""
    size = noise.size
    unit = [
        (coordinate - middle) / radius
        for coordinate, middle, radius in zip(_unit_coordinates(size), centre, radii, strict=True)
    ]
    return _distance(unit, list(radii), size) + 1.2 * noise.smooth(4.0)


def _distance(unit: list[FloatArray], radii: list[float], size: Size) -> FloatArray:
    """About the signed distance in voxels to the unit sphere of scaled coordinates `unit`."""
    norm = np.sqrt(sum(np.square(part) for part in unit))
    return np.broadcast_to((norm - 1) * min(radii) * min(size) / 2, size).astype(np.float32)


def _coverage(distance: FloatArray) -> FloatArray:
    """Share of each voxel inside a surface, from its signed distance in voxels."""
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _paint(image: FloatArray, coverage: FloatArray, level: FloatArray) -> None:
    image += coverage * (level - image)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    out: Annotated[Path, typer.Argument(help="folder of the new raw data set")],
    train: Annotated[int, typer.Option(min=0, help="labelled training cases")] = 64,
    test: Annotated[int, typer.Option(min=0, help="unseen labelled test cases")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="seed of the whole data set")] = 0,
    size: Annotated[
        tuple[int, int, int], typer.Option(metavar="Z Y X", help="voxels per axis")
    ] = DEFAULT_SIZE,
) -> None:
    if min(size) < 16:
        raise ConfigError(f"--size {size}: a phantom needs at least 16 voxels per axis")
    write_phantom_dataset(out, num_train=train, num_test=test, size=size, seed=seed)
    print(json.dumps({"dataset": str(out), "train": train, "test": test, "seed": seed}))


if __name__ == "__main__":
    run_app(app)
