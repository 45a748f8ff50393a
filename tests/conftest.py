"""What all tests share: one torch thread, the reference folder, the skip of GPU tests."""

from pathlib import Path

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
