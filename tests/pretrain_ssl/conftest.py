from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.volume import Grid


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve one-channel cases of about 20^3 voxels; one of them smaller than a patch."""
    root = tmp_path_factory.mktemp("tiny") / "store"
    rng = np.random.default_rng(0)
    writer = CaseStoreWriter(root, patch_size=(16, 16, 16))
    for number in range(12):
        shape = (20, 18 + number, 24) if number else (12, 20, 20)
        image = rng.standard_normal((1, *shape)).astype(np.float32)
        writer.write_case(
            f"case{number:02d}",
            image,
            grid=Grid.from_parts(shape, (1.0, 1.0, 1.0)),
            boxes=np.zeros((0, 6), np.float32),
            labels=np.zeros(0, np.int64),
            extra={"normalization": [{"name": "zscore", "nonzero_only": False}]},
        )
    writer.finish()
    return root
