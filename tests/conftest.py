"""What all tests share: reference folder, tiny raw data set, one torch thread, GPU skips."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference files beside the checkout; tests skip where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"reference folder {SHARED.name}/ is not beside the checkout")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    # Two threads on busy cores slow small tensors down by an order of magnitude.
    import torch

    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-seeds", action="store_true", help="every seed where one is the default; long tests"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-seeds"):
        left = pytest.mark.skip(reason="runs with --all-seeds, as in `make test`")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(left)
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def wait_for_records() -> Callable[[Path, int, subprocess.Popen[str]], None]:
    """Waits until a training in another process has written so many records, or has ended well."""

    def wait(run: Path, count: int, process: subprocess.Popen[str]) -> None:
        path = run / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") >= count:
                return
            time.sleep(0.002)
        assert process.poll() == 0, f"no {count} records (status {process.poll()})"

    return wait


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
        _write_tiny_case(root, split, f"case{number}", rng, empty=number == 2)
    return root


def _write_tiny_case(
    root: Path, split: str, name: str, rng: np.random.Generator, *, empty: bool
) -> None:
    from voxelbridge.core.data.image_io import write_image
    from voxelbridge.core.data.volume import Grid, Volume

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
