from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.case_index import CaseRecord
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_sup.dataset_labels import PADDING, DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import LabelSpace, build_label_space, encode_target
from voxelbridge.pretrain_sup.sampling import (
    Sampling,
    case_order,
    choose_head,
    choose_place,
    choose_voxel,
    split_datasets,
)

Many = tuple[CaseStore, LabelSpace]


def index_of(sizes: dict[str, int], *, scans: int = 1) -> CaseStore:
    """A store without arrays: `sizes` cases per data set, each patient with `scans` of them."""
    cases = [
        CaseRecord(
            f"{name}__{number:03d}", (1, 8, 8, 8), (1.0, 1.0, 1.0), np.zeros((0, 6), np.float32),
            np.zeros(0, np.int64), {}, Provenance(f"p{number // scans}", dataset=name),
        )
        for name, size in sizes.items()
        for number in range(size)
    ]  # fmt: skip
    return CaseStore(Path("store"), cases, digest="", verify=False)


def shares(store: CaseStore, sampling: Sampling, draws: int) -> dict[str, float]:
    names = [record.case_id for record in store.cases]
    order = case_order(store, names, sampling, seed=3)
    counts = Counter(order.strata[order.draw(index)[0]].name for index in range(draws))
    return {name: count / draws for name, count in counts.items()}


def test_data_sets_are_drawn_by_the_square_root_of_their_size() -> None:
    sizes = {"tiny": 1, "small": 10, "middle": 65, "large": 400}
    found = shares(index_of(sizes), Sampling(), 100_000)
    roots = {name: size**0.5 for name, size in sizes.items()}
    for name, root in roots.items():
        assert found[name] == pytest.approx(root / sum(roots.values()), rel=0.01)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(dataset_exponent=1.0), {"a": 0.1, "b": 0.9}),
        (Sampling(dataset_exponent=0.0), {"a": 0.5, "b": 0.5}),
        (
            Sampling(dataset_exponent=0.0, dataset_weights={"a": 0.7, "b": 0.3}),
            {"a": 0.7, "b": 0.3},
        ),
        (Sampling(dataset_weights={"a": 3.0}), {"a": 0.5, "b": 0.5}),
        (Sampling(dataset_weights={"a": 0.0}), {"b": 1.0}),
    ],
)
def test_shares_can_be_set(sampling: Sampling, expected: dict[str, float]) -> None:
    assert shares(index_of({"a": 4, "b": 36}), sampling, 20_000) == pytest.approx(
        expected, rel=0.01
    )


def test_an_unknown_data_set_in_the_weights_is_named() -> None:
    store = index_of({"a": 4})
    with pytest.raises(ConfigError, match=r"sampling\.dataset_weights: no case belongs to 'c'"):
        case_order(store, ["a__000"], Sampling(dataset_weights={"c": 1.0}), seed=0)


def test_cases_of_a_data_set_come_in_turn() -> None:
    store = index_of({"a": 5, "b": 2})
    names = [record.case_id for record in store.cases]
    order = case_order(store, names, Sampling(), seed=0)
    drawn = [case for index in range(200) if (case := order.case(index)).startswith("a")]
    for first in range(0, len(drawn) - 5, 5):
        assert len(set(drawn[first : first + 5])) == 5


def test_a_store_of_one_data_set_is_refused() -> None:
    store = index_of({"a": 1})
    store.cases[0] = record = CaseRecord(
        "x", (1, 8, 8, 8), (1.0, 1.0, 1.0), np.zeros((0, 6), np.float32), np.zeros(0, np.int64), {}
    )
    store = CaseStore(Path("store"), [record], digest="", verify=False)
    with pytest.raises(DataError, match="case x: its data set is not known"):
        case_order(store, ["x"], Sampling(), seed=0)


def test_validation_patients_are_split_off_each_data_set() -> None:
    store = index_of({"large": 120, "middle": 30, "tiny": 8}, scans=2)
    training, validation = split_datasets(store, seed=0)
    assert sorted(training + validation) == sorted(record.case_id for record in store.cases)
    counts = Counter(name.split("__")[0] for name in validation)
    assert counts == {"large": 6, "middle": 2}  # 60, 15 and 4 patients with two cases each

    def patients(names: list[str]) -> set[tuple[str | None, str | None]]:
        sources = [store.record(name).provenance for name in names]
        return {(source.dataset, source.patient) for source in sources}

    assert not patients(training) & patients(validation)
    assert (training, validation) == split_datasets(store, seed=0)
    assert validation != split_datasets(store, seed=1)[1]


def test_parts_of_a_data_set_are_drawn_alike(many_classes: Many) -> None:
    _, space = many_classes
    rng = np.random.default_rng(0)
    counts = Counter(choose_head(rng, space, "bones").name for _ in range(6_000))
    assert set(counts) == {f"bones.{part}" for part in range(6)}
    assert min(counts.values()) > 850
    assert {choose_head(rng, space, "glioma").name for _ in range(10)} == {"glioma"}


def test_the_requested_class_is_hit_in_every_part_of_117_classes(many_classes: Many) -> None:
    store, space = many_classes
    rng = np.random.default_rng(1)
    labels = store.read_segmentation_patch("bones__c0", (0, 0, 0), (30, 30, 30))
    locations = store.read_locations("bones__c0")
    hit: Counter[str] = Counter()
    for head in space.heads_of("bones"):
        for _ in range(1_000):
            chosen = choose_voxel(rng, head, locations)
            assert chosen is not None
            target, voxel = chosen
            assert target in head.targets
            assert labels[tuple(voxel)] in target.ids
            hit[target.name] += 1
    assert len(hit) == 117
    assert min(hit.values()) > 20  # 50 expected: every target is as likely


@pytest.mark.parametrize("augmentation", [SpatialAugmentation.none(), SpatialAugmentation()])
def test_a_patch_on_a_target_shows_it_to_its_head(
    many_classes: Many, augmentation: SpatialAugmentation
) -> None:
    import torch

    store, space = many_classes
    rng = np.random.default_rng(2)
    for head in space.heads_of("bones"):
        for _ in range(25):
            params = augmentation.sample(rng, (10, 10, 10))
            place = choose_place(rng, store, "bones__c1", head, params, foreground_probability=1.0)
            assert place.target is not None
            first, size = params.source_box(place.start)
            stored = store.read_segmentation_patch("bones__c1", first, size, pad_value=PADDING)
            shown = np.ascontiguousarray(params.apply_labels(stored))
            target, _ = encode_target(head, torch.from_numpy(shown))
            assert (target == head.targets.index(place.target) + 1).any()


def test_a_region_is_found_under_all_its_ids(many_classes: Many) -> None:
    store, space = many_classes
    locations = store.read_locations("glioma__g")
    rng = np.random.default_rng(3)
    found: dict[str, Counter[int]] = {}
    labels = store.read_segmentation_patch("glioma__g", (0, 0, 0), (6, 14, 9))
    for _ in range(1_000):
        chosen = choose_voxel(rng, space.head("glioma"), locations)
        assert chosen is not None
        target, voxel = chosen
        found.setdefault(target.name, Counter())[int(labels[tuple(voxel)])] += 1
    assert {name: set(ids) for name, ids in found.items()} == {"whole": {4, 9}, "core": {9}}
    assert found["whole"].total() == pytest.approx(500, abs=60)
    assert found["whole"][9] == pytest.approx(found["whole"].total() / 2, abs=60)


def test_a_case_without_the_head_s_targets_gives_patches_anywhere(many_classes: Many) -> None:
    store, _ = many_classes
    other = DatasetLabels("glioma", ("T1c", "FLAIR"), (Target("cyst", (11,)),), None, 1)
    head = build_label_space([other], layout="per_dataset").heads[0]
    params = SpatialAugmentation.none().sample(np.random.default_rng(0), (4, 4, 4))
    rng = np.random.default_rng(4)
    places = [
        choose_place(rng, store, "glioma__g", head, params, foreground_probability=1.0)
        for _ in range(50)
    ]
    assert all(place.target is None for place in places)
    assert len({place.start for place in places}) > 20


def test_a_third_of_the_patches_lie_on_a_target(many_classes: Many) -> None:
    store, space = many_classes
    params = SpatialAugmentation.none().sample(np.random.default_rng(0), (4, 4, 4))
    rng = np.random.default_rng(5)
    places = [
        choose_place(
            rng, store, "glioma__g", space.head("glioma"), params, foreground_probability=0.33
        )
        for _ in range(1_000)
    ]
    assert sum(place.target is not None for place in places) == pytest.approx(330, abs=50)


def test_patches_on_targets_are_centred_and_stay_inside(many_classes: Many) -> None:
    store, space = many_classes
    params = SpatialAugmentation.none().sample(np.random.default_rng(0), (8, 8, 8))
    rng = np.random.default_rng(6)
    centred = 0
    for _ in range(200):
        place = choose_place(
            rng, store, "bones__c2", space.heads[0], params, foreground_probability=1.0
        )
        assert place.voxel is not None
        assert all(0 <= start <= 30 - 8 for start in place.start)
        for start, voxel in zip(place.start, place.voxel, strict=True):
            assert start == min(max(voxel - 4, 0), 22)
        centred += place.start == tuple(voxel - 4 for voxel in place.voxel)
    assert centred > 40


def test_volumes_smaller_than_the_patch_are_centred_in_it(many_classes: Many) -> None:
    store, space = many_classes
    params = SpatialAugmentation.none().sample(np.random.default_rng(0), (10, 10, 10))
    for probability in (0.0, 1.0):
        rng = np.random.default_rng(7)
        place = choose_place(
            rng, store, "glioma__g", space.head("glioma"), params,
            foreground_probability=probability,
        )  # fmt: skip
        assert (place.start[0], place.start[2]) == (-2, 0)
