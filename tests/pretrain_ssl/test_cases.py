from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_ssl.cases import channel_count, check_masks


def test_cases_of_different_channel_counts_are_refused(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    for name, channels in (("a", 1), ("b", 2)):
        writer.write_case(
            name,
            np.ones((channels, 4, 4, 4), np.float32),
            grid=Grid.from_parts((4, 4, 4), (1.0, 1.0, 1.0)),
            boxes=np.zeros((0, 6)),
            labels=[],
        )
    writer.finish()
    with pytest.raises(DataError, match="case b has 2 channels, case a has 1"):
        channel_count(CaseStore.open(tmp_path))


def test_unknown_masks_are_refused_by_name(tiny_store: Path) -> None:
    check_masks(CaseStore.open(tiny_store), [])
    with pytest.raises(ConfigError, match=r"mask 'anatomy': no case .* has it; it has no masks"):
        check_masks(CaseStore.open(tiny_store), ["anatomy"])
