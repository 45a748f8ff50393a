import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_ssl.batches import (
    NothingReadableError,
    PatchSampler,
    empty_share,
    on_device,
)
from voxelbridge.pretrain_ssl.cases import Sampling, case_order
from voxelbridge.pretrain_ssl.failures import FAILED
from voxelbridge.pretrain_ssl.methods.mae import MAE
from voxelbridge.pretrain_ssl.methods.models_genesis import ModelsGenesis


def sampler(
    store: Path,
    *,
    ids: list[str] | None = None,
    patches: int = 3,
    rank: int = 0,
    ranks: int = 1,
    augmentation: SpatialAugmentation | None = None,
    sampling: Sampling | None = None,
    method: MAE | None = None,
    seed: int = 5,
) -> PatchSampler:
    cases = CaseStore.open(store)
    sampling = sampling or Sampling()
    chosen = ids or [record.case_id for record in cases.cases]
    return PatchSampler(
        cases,
        case_order(cases, chosen, sampling, seed=seed),
        (16, 16, 16),
        patches,
        method or MAE(block_size=8),
        seed=seed,
        augmentation=augmentation or SpatialAugmentation.mirroring(),
        centre_mask=sampling.centre_mask,
        max_empty=sampling.max_empty,
        rank=rank,
        ranks=ranks,
    )


def one_channel(shape: tuple[int, int, int], value: float = 1.0) -> dict:
    return {
        "image": np.full((1, *shape), value, np.float32),
        "grid": Grid.from_parts(shape, (1.0, 1.0, 1.0)),
        "boxes": np.zeros((0, 6)),
        "labels": [],
    }


def test_batch_has_images_and_hidden_blocks(tiny_store: Path) -> None:
    batch = sampler(tiny_store)(0)
    assert batch["image"].shape == (3, 1, 16, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["hidden"].shape == (3, 2, 2, 2)
    assert batch["hidden"].dtype == torch.bool
    assert batch["hidden"].sum(dim=(1, 2, 3)).tolist() == [6, 6, 6]
    assert batch[FAILED] == []


def test_batch_depends_on_seed_and_pass_alone(tiny_store: Path) -> None:
    make = sampler(tiny_store, augmentation=SpatialAugmentation())
    first = list(step_batches(make, seed=5, first_step=0, steps=4, workers=0))
    later = list(step_batches(make, seed=5, first_step=2, steps=4, workers=1))
    for a, b in zip(first[2:], later, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    other = sampler(tiny_store, seed=6)(2)
    assert not torch.equal(first[2]["image"], other["image"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_draw_together_what_one_process_would(tiny_store: Path, ranks: int) -> None:
    together = sampler(tiny_store, patches=6)
    parts = [
        sampler(tiny_store, patches=6 // ranks, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    for number in range(3):
        batches = [part(number) for part in parts]
        whole = together(number)
        for name in ("image", "hidden"):
            assert torch.equal(whole[name], torch.cat([batch[name] for batch in batches]))


def test_deferred_turning_and_scaling_gives_the_same_batch(tiny_store: Path) -> None:
    always = SpatialAugmentation(rotation_probability=0.7, scale_probability=0.7)
    at_once = sampler(tiny_store, patches=6, augmentation=always)
    deferred = replace(at_once, defer=True)
    (later,) = on_device([deferred(1)], torch.device("cpu"))
    expected = at_once(1)
    torch.testing.assert_close(later["image"], expected["image"], rtol=0, atol=1e-5)
    assert torch.equal(later["hidden"], expected["hidden"])
    genesis = ModelsGenesis(shuffle_windows=5)  # its views need the voxels: nothing is deferred
    batch = replace(deferred, method=genesis)(1)
    assert isinstance(batch["image"], torch.Tensor)


def test_no_case_comes_twice_before_all_came_once(tiny_store: Path) -> None:
    make = sampler(tiny_store, patches=3)
    drawn = [make.order.case(index) for index in range(24)]
    assert set(Counter(drawn[:12]).values()) == {1}
    assert set(Counter(drawn[12:]).values()) == {1}


def test_small_volume_is_padded_with_zeros(tiny_store: Path) -> None:
    small = sampler(tiny_store, ids=["case00"], patches=1, augmentation=SpatialAugmentation.none())
    image = small(0)["image"][0, 0]
    empty = (image == 0).flatten(1).all(dim=1)
    assert empty.sum() == 4  # 12 of 16 slices are image
    assert empty[:2].all()
    assert empty[-2:].all()


def test_validation_batches_are_fixed_and_not_augmented(tiny_store: Path) -> None:
    training = sampler(tiny_store, augmentation=SpatialAugmentation())
    held_out = training.for_validation(case_order(training.store, ["case03"], Sampling(), seed=0))
    first, again = (held_out.validation_batch(1) for _ in range(2))
    other = held_out.validation_batch(2)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["image"], other["image"])
    assert first["image"].shape[0] == 1
    whole = torch.from_numpy(training.store.read_image("case03"))
    windows = whole[0].unfold(0, 16, 1).unfold(1, 16, 1).unfold(2, 16, 1)
    assert (windows == first["image"][0, 0]).all(dim=(-1, -2, -3)).sum() == 1


def test_unreadable_case_is_replaced_and_named(tiny_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    file = store / "cases" / "case05.b2nd"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    broken, whole = sampler(store, patches=12)(0), sampler(tiny_store, patches=12)(0)
    ((case_id, message),) = broken[FAILED]
    assert case_id == "case05"
    assert str(file) in message
    same = (broken["image"] == whole["image"]).flatten(1).all(dim=1)
    assert same.sum() == 11  # the other samples are what they were
    file.unlink()
    alone = sampler(store, ids=["case05"], patches=1)
    with pytest.raises(DataError, match="20 cases in a row could not be read"):
        alone(0)
    with pytest.raises(NothingReadableError) as caught:
        alone.for_validation(alone.order).validation_batch(0)
    assert {case_id for case_id, _ in caught.value.failures} == {"case05"}
    with pytest.raises(NothingReadableError, match="batch of step 0: 20 cases in a row"):
        next(step_batches(alone, seed=5, first_step=0, steps=1, workers=0))


def test_a_stratum_without_a_readable_case_does_not_end_the_run(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    for name, dataset in (("a1", "A"), ("a2", "A"), ("a3", "A"), ("b1", "B")):
        writer.write_case(name, **one_channel((16, 16, 16)), provenance=Provenance(dataset=dataset))
    writer.finish()
    (tmp_path / "cases" / "b1.b2nd").unlink()
    batch = sampler(tmp_path, patches=8, sampling=Sampling(exponent=0.0))(0)
    assert {case_id for case_id, _ in batch[FAILED]} == {"b1"}
    assert batch["image"].shape == (8, 1, 16, 16, 16)


def test_masks_reach_the_method_and_centre_the_patches(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    inside = np.zeros((24, 40, 40), np.uint8)
    inside[20, 30:34, 5] = 1
    defaced = np.zeros_like(inside)
    defaced[:, :20] = 1
    writer.write_case(
        "a", **one_channel((24, 40, 40)), masks={"anatomy": inside, "anonymization": defaced}
    )
    writer.finish()
    method = MAE(block_size=8, exclude_mask="anonymization")
    make = sampler(
        tmp_path,
        patches=8,
        sampling=Sampling(centre_mask="anatomy"),
        method=method,
        augmentation=SpatialAugmentation.none(),
    )
    excluded = make(0)["excluded"]
    assert excluded.dtype == torch.bool
    # The patch is centred on y 30..33: it begins at 22..25 and sees nothing of y < 20.
    assert not excluded.any()
    anywhere = sampler(tmp_path, patches=8, method=method)(0)["excluded"]
    assert 0 < anywhere.float().mean() < 1


def test_empty_patches_are_drawn_anew_where_that_is_asked_for(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    rng = np.random.default_rng(0)
    head = np.full((1, 64, 64, 64), -0.7, np.float32)
    head[:, 16:48, 16:48, 16:48] = rng.standard_normal((32, 32, 32))
    with_head = one_channel((64, 64, 64))
    with_head["image"] = head
    writer.write_case("a", **with_head)
    writer.write_case("b", **one_channel((64, 64, 64)))  # nowhere anything
    writer.finish()
    filled = {}
    for limit in (1.0, 0.9):
        make = sampler(tmp_path, ids=["a"], patches=40, sampling=Sampling(max_empty=limit))
        filled[limit] = (make(0)["image"] != -0.7).float().mean(dim=(1, 2, 3, 4))
        assert torch.equal(make(0)["image"], make(0)["image"])
    assert float((filled[1.0] < 0.1).float().mean()) > 0.2
    # More than half of all places have a tenth in the head: ten tries find one.
    assert float(filled[0.9].min()) > 0.08
    only_empty = sampler(tmp_path, ids=["b"], sampling=Sampling(max_empty=0.9))
    assert only_empty(0)["image"].shape == (3, 1, 16, 16, 16)


def test_empty_share_is_that_of_the_commonest_value_in_the_fullest_channel() -> None:
    rng = np.random.default_rng(0)
    voxels = np.zeros((2, 32, 16, 20), np.float32)
    assert empty_share(voxels) == 1.0
    voxels[0, 8:] = rng.standard_normal((24, 16, 20))
    voxels[1] = 3
    assert empty_share(voxels) == pytest.approx(0.25)
    assert empty_share(rng.standard_normal((1, 5, 7, 3))) == pytest.approx(1 / 105)


def test_a_mask_of_few_voxels_is_found(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[3, 38, 20] = 1
    writer.write_case("a", **one_channel((40, 40, 40)), masks={"lesion": mask})
    writer.write_case("b", **one_channel((40, 40, 40)), masks={"lesion": 0 * mask})
    writer.finish()
    make = sampler(tmp_path, sampling=Sampling(centre_mask="lesion"))
    rng = np.random.default_rng(0)
    voxel = make._voxel_in_mask("a", "lesion", rng)
    assert voxel is not None
    assert voxel.tolist() == [3, 38, 20]
    assert make._voxel_in_mask("b", "lesion", rng) is None
    assert make(0)["image"].shape == (3, 1, 16, 16, 16)


def test_shares_follow_the_stated_weights(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    for name, dataset, modality in (
        ("a1", "A", "CT"), ("a2", "A", "CT"), ("a3", "A", "MR"), ("b1", "B", "MR"),
        ("c1", None, None),
    ):  # fmt: skip
        writer.write_case(
            name,
            **one_channel((4, 4, 4)),
            provenance=Provenance(patient="p" + name, dataset=dataset, modality=modality),
        )
    writer.finish()
    cases = CaseStore.open(tmp_path)
    ids = [record.case_id for record in cases.cases]

    def shares(sampling: Sampling) -> dict[str, float]:
        order = case_order(cases, ids, sampling, seed=0)
        return dict(zip([s.name for s in order.strata], order.shares.tolist(), strict=True))

    assert shares(Sampling()) == pytest.approx({"A": 0.6, "B": 0.2, "unknown": 0.2})
    assert shares(Sampling(exponent=0.0)) == pytest.approx(
        {"A": 1 / 3, "B": 1 / 3, "unknown": 1 / 3}
    )
    assert shares(Sampling(weights={"B": 3.0, "unknown": 0.0})) == pytest.approx(
        {"A": 0.5, "B": 0.5}
    )
    assert shares(Sampling(strata="modality")) == pytest.approx(
        {"CT": 0.4, "MR": 0.4, "unknown": 0.2}
    )
    assert shares(Sampling(strata="none")) == {"all": 1.0}
    with pytest.raises(ConfigError, match=r"sampling\.weights: no case belongs to 'X'"):
        shares(Sampling(weights={"X": 1.0}))


def test_images_of_a_patient_take_turns(tmp_path: Path) -> None:
    writer = CaseStoreWriter(tmp_path)
    for name, patient in (("a1", "p"), ("a2", "p"), ("a3", "p"), ("b1", "q")):
        writer.write_case(
            name, **one_channel((4, 4, 4)), provenance=Provenance(patient=patient, dataset="A")
        )
    writer.finish()
    cases = CaseStore.open(tmp_path)
    ids = [record.case_id for record in cases.cases]
    order = case_order(cases, ids, Sampling(group="patient"), seed=0)
    counts = Counter(order.case(index) for index in range(24))
    assert counts == {"a1": 4, "a2": 4, "a3": 4, "b1": 12}
