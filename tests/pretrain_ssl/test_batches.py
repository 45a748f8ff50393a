from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import DataError
from voxelbridge.pretrain_ssl.batches import (
    PatchSampler,
    channel_count,
    mirror,
    split_cases,
    validation_batch,
    validation_sampler,
)
from voxelbridge.pretrain_ssl.methods.mae import MAE


def sampler(store: Path, *, patch: tuple[int, int, int] = (16, 16, 16)) -> PatchSampler:
    cases = CaseStore.open(store)
    ids = [record.case_id for record in cases.cases]
    return PatchSampler(cases, ids, patch, 3, MAE(block_size=8))


def test_batch_has_images_and_hidden_blocks(tiny_store: Path) -> None:
    batch = sampler(tiny_store)(0, np.random.default_rng(0))
    assert batch["image"].shape == (3, 1, 16, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["hidden"].shape == (3, 2, 2, 2)
    assert batch["hidden"].dtype == torch.bool
    assert batch["hidden"].sum(dim=(1, 2, 3)).tolist() == [6, 6, 6]


def test_batch_depends_on_seed_and_step_alone(tiny_store: Path) -> None:
    make = sampler(tiny_store)
    first = list(step_batches(make, seed=5, first_step=0, steps=4, workers=0))
    later = list(step_batches(make, seed=5, first_step=2, steps=4, workers=1))
    other = next(iter(step_batches(make, seed=6, first_step=2, steps=4, workers=0)))
    for a, b in zip(first[2:], later, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first[2]["image"], other["image"])


def test_small_volume_is_padded_with_zeros(tiny_store: Path) -> None:
    cases = CaseStore.open(tiny_store)
    small = PatchSampler(cases, ["case00"], (16, 16, 16), 1, MAE(block_size=8), mirror=False)
    image = small(0, np.random.default_rng(0))["image"][0, 0]
    empty = (image == 0).flatten(1).all(dim=1)
    assert empty.sum() == 4  # 12 of 16 slices are image
    assert empty[:2].all()
    assert empty[-2:].all()


def test_validation_batches_are_fixed_and_not_mirrored(tiny_store: Path) -> None:
    held_out = validation_sampler(sampler(tiny_store), ["case03"])
    first, again = (validation_batch(held_out, 1, seed=0) for _ in range(2))
    other = validation_batch(held_out, 2, seed=0)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["image"], other["image"])
    assert not held_out.mirror
    assert first["image"].shape[0] == 1


def test_mirror_flips_each_axis_half_of_the_time() -> None:
    patch = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    rng = np.random.default_rng(0)
    corners = [int(mirror(patch, rng)[0, 0, 0, 0]) for _ in range(4000)]
    counts = np.bincount(corners, minlength=8)
    assert np.abs(counts / 4000 - 1 / 8).max() < 0.02


@pytest.mark.parametrize(("cases", "held_out"), [(1, 0), (9, 0), (10, 1), (100, 5), (5000, 50)])
def test_split_size(cases: int, held_out: int) -> None:
    names = [f"c{number}" for number in range(cases)]
    training, validation = split_cases({name: name for name in names[::-1]}, seed=0)
    assert len(validation) == held_out
    assert sorted(training + validation) == sorted(names)
    assert (training, validation) == split_cases({name: name for name in names}, seed=0)


def test_split_depends_on_the_seed() -> None:
    names = [f"c{number:03d}" for number in range(100)]
    patients = {name: name for name in names}
    assert split_cases(patients, seed=0) != split_cases(patients, seed=1)


def test_scans_of_one_patient_stay_on_one_side() -> None:
    patients = {
        f"p{patient:02d}_scan{scan}": f"p{patient:02d}"
        for patient in range(30)
        for scan in range(3)
    }
    training, validation = split_cases(patients, seed=3)
    assert len(validation) == 3
    assert {patients[case] for case in validation}.isdisjoint(patients[case] for case in training)
    assert sorted(training + validation) == sorted(patients)


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
