"""Reference arrays for box operations, brought to our box order.

The reference program stores boxes as (a0 low, a1 low, a0 high, a1 high, a2 low, a2 high), and
deltas in the same interleaving.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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


@pytest.fixture(scope="session")
def stubs() -> ModuleType:
    """The module `stub_runs.py`: a small store, finished runs, proposals that a test decides."""
    path = Path(__file__).with_name("stub_runs.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[[str], list[Any]]:  # Any: JSON values
    """`two_ranks(script)` runs it under torchrun; what each rank wrote to FOLDER/RANK.json.

    The script is given the folder of these tests, to import them, and FOLDER.
    """

    def run(script: str) -> list[Any]:
        path = tmp_path / "rank.py"
        path.write_text(script)
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", path, str(Path(__file__).parent), str(tmp_path),
            ],
            timeout=240, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    return run
