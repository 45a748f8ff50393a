import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.resample import resample_image, resample_labels
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_sup.label_space import read_label_space
from voxelbridge.pretrain_sup.plan import read_plan
from voxelbridge.pretrain_sup.prepare import describe, prepare
from voxelbridge.pretrain_sup.prepare_sources import PrepareRequest

WriteDataset = Callable[..., Path]
Case = tuple[np.ndarray, np.ndarray]


def case(shape: tuple[int, int, int] = (8, 10, 12), *, channels: int = 1, seed: int = 0) -> Case:
    """A noise image with an organ (1) and in it a lesion (2)."""
    rng = np.random.default_rng(seed)
    image = rng.normal(100, 20, (channels, *shape)).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    labels[1:7, 2:8, 2:9] = 1
    labels[3:5, 4:6, 4:7] = 2
    image[:, labels == 1] += 50
    image[:, labels == 2] += 200
    return image, labels


@pytest.fixture
def two(write_dataset: WriteDataset, tmp_path: Path) -> tuple[Path, Path]:
    """A CT data set with two classes, and an MR data set of two channels with regions."""
    ct = write_dataset(
        tmp_path / "Dataset001_CT", {"a": case(seed=1), "b": case(seed=2)}, groups={"a": "p1"}
    )
    mr = write_dataset(
        tmp_path / "Dataset002_MR",
        {"a": case(channels=2, seed=3)},
        channels=("T1c", "FLAIR"),
        labels={"background": 0, "whole": [1, 2], "core": 2},
        spacing=(2.0, 1.0, 1.0),
    )
    return ct, mr


def test_two_data_sets_become_one_store(two: tuple[Path, Path], tmp_path: Path) -> None:
    report = prepare(two, tmp_path / "store", workers=0)
    assert (report.num_cases, report.num_new, report.failures) == (3, 3, ())
    store = CaseStore.open(tmp_path / "store")
    assert [record.case_id for record in store.cases] == [
        "Dataset001_CT__a",
        "Dataset001_CT__b",
        "Dataset002_MR__a",
    ]
    assert [record.shape for record in store.cases] == [(1, 8, 10, 12)] * 2 + [(2, 16, 10, 12)]
    first, _, last = (record.provenance for record in store.cases)
    assert (first.patient, first.dataset, first.modality) == ("p1", "Dataset001_CT", "CT")
    assert (last.patient, last.dataset, last.modality) == (None, "Dataset002_MR", "T1c+FLAIR")
    assert len(last.content_sha256) == 2
    space = read_label_space(tmp_path / "store" / "label_space.json")
    assert space == report.label_space
    assert [head.regions for head in space.heads] == [False, True]
    assert store.verify() == []


def test_image_and_labels_are_cropped_resampled_and_normalised(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    image, labels = case()
    padding = ((2, 1), (0, 0), (3, 3))
    padded = (np.pad(image, ((0, 0), *padding)), np.pad(labels, padding))
    folder = write_dataset(tmp_path / "one", {"a": padded}, spacing=(2.0, 1.0, 1.0))
    prepare([folder], tmp_path / "store", workers=0)
    store = CaseStore.open(tmp_path / "store")
    resampled = resample_image(image, (16, 10, 12))
    expected = (resampled - resampled.mean()) / resampled.std()
    np.testing.assert_allclose(store.read_image("one__a"), expected, atol=1e-4)
    expected_labels = resample_labels(labels, (16, 10, 12))
    stored = store.read_segmentation_patch("one__a", (0, 0, 0), (16, 10, 12))
    np.testing.assert_array_equal(stored, expected_labels)
    assert store.details("one__a").mapping.crop_start == (2, 0, 3)


def test_segmentation_and_locations_keep_the_original_ids(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    image, labels = case()
    ids = np.array([0, 41, 7], np.uint8)
    names = {"background": 0, "small": 7, "organ": 41, "absent": 90, "ignore": 91}
    folder = write_dataset(tmp_path / "one", {"a": (image, ids[labels])}, labels=names)
    prepare([folder], tmp_path / "store", workers=0)
    store = CaseStore.open(tmp_path / "store")
    stored = store.read_segmentation_patch("one__a", (0, 0, 0), labels.shape)
    np.testing.assert_array_equal(stored, ids[labels])
    locations = store.read_locations("one__a")
    assert sorted(locations) == [7, 41]
    for number, voxels in locations.items():
        np.testing.assert_array_equal(voxels, np.argwhere(stored == number))


def test_orientation_of_the_file_does_not_matter(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    image, labels = case()
    plain = write_dataset(tmp_path / "plain", {"a": (image, labels)})
    flipped = write_dataset(tmp_path / "flipped", {"a": (image, labels)})
    # the same voxels, stored with the x axis the other way round
    directions = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    grid = Grid.from_parts(
        labels.shape, (1.0, 1.0, 1.0), directions=directions, origin_mm=(labels.shape[2] - 1, 0, 0)
    )
    for name, array in (("imagesTr/a_0000", image), ("labelsTr/a", labels[None])):
        path = flipped / f"{name}.nii.gz"
        write_image(path, Volume(np.ascontiguousarray(array[..., ::-1]), grid))
    prepare([plain, flipped], tmp_path / "store", workers=0)
    store = CaseStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.read_image("plain__a"), store.read_image("flipped__a"))
    first, second = (
        store.read_segmentation_patch(f"{name}__a", (0, 0, 0), labels.shape)
        for name in ("plain", "flipped")
    )
    np.testing.assert_array_equal(first, second)


def test_labels_outside_the_voxels_other_than_0_are_kept(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    image, labels = case()
    image[:, :, :, :4] = 0
    folder = write_dataset(tmp_path / "one", {"a": (image, labels)})
    prepare([folder], tmp_path / "store", workers=0)
    store = CaseStore.open(tmp_path / "store")
    shape = store.record("one__a").shape[1:]
    assert shape == (8, 10, 10)
    stored = store.read_segmentation_patch("one__a", (0, 0, 0), shape)
    assert (stored > 0).sum() == (labels > 0).sum()


def test_ct_takes_the_foreground_of_its_data_set(two: tuple[Path, Path], tmp_path: Path) -> None:
    prepare(two, tmp_path / "store", request=PrepareRequest(normalization="auto"), workers=0)
    plan = read_plan(tmp_path / "store")
    assert plan is not None
    (scheme,) = plan.datasets["Dataset001_CT"].normalization
    assert scheme.name == "ct_percentile"
    foreground = np.concatenate([case(seed=n)[0][0][case(seed=n)[1] > 0] for n in (1, 2)])
    assert scheme.mean == pytest.approx(foreground.mean(), abs=1.0)
    assert scheme.std == pytest.approx(foreground.std(), abs=1.0)
    assert scheme.lower == pytest.approx(np.percentile(foreground, 0.5), abs=3.0)
    image = case(seed=1)[0]
    expected = (np.clip(image, scheme.lower, scheme.upper) - scheme.mean) / scheme.std
    stored = CaseStore.open(tmp_path / "store").read_image("Dataset001_CT__a")
    np.testing.assert_allclose(stored, expected, atol=1e-4)
    schemes = plan.datasets["Dataset002_MR"].normalization
    assert [scheme.name for scheme in schemes] == ["zscore", "zscore"]


def test_ignored_voxels_do_not_enter_the_ct_figures(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    image, labels = case()
    labels[0] = 3
    image[:, 0] = 30_000
    names = {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}
    folder = write_dataset(tmp_path / "one", {"a": (image, labels)}, labels=names)
    prepare([folder], tmp_path / "store", request=PrepareRequest(normalization="ct"), workers=0)
    plan = read_plan(tmp_path / "store")
    assert plan is not None
    (scheme,) = plan.datasets["one"].normalization
    assert scheme.name == "ct_percentile"
    assert scheme.upper < 1000


def test_removed_backgrounds_are_left_out_of_the_z_score(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    image, labels = case()
    brain = tuple(
        np.pad(array, [(0, 0)] * (array.ndim - 3) + [(4, 4)] * 3) for array in (image, labels)
    )
    folder = write_dataset(tmp_path / "one", {"a": brain}, channels=("T1",))
    prepare([folder], tmp_path / "store", workers=0)
    plan = read_plan(tmp_path / "store")
    assert plan is not None
    assert plan.datasets["one"].kept_by_crop < 0.75
    assert plan.datasets["one"].normalization[0].model_dump() == {
        "name": "zscore",
        "nonzero_only": True,
    }


def test_bad_cases_are_named_and_the_others_stored(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    image, labels = case()
    unknown = labels.copy()
    unknown[0, 0, 0] = 9
    holes = image.copy()
    holes[0, 1, 1, 1] = np.nan
    cases = {
        "good": (image, labels),
        "unlabelled": (image, None),
        "unknown": (image, unknown),
        "float": (image, labels * np.float32(0.5)),
        "holes": (holes, labels),
        "constant": (np.full_like(image, 3), labels),
    }
    folder = write_dataset(tmp_path / "one", cases)
    grid = Grid.from_parts(labels.shape, (1.0, 1.0, 1.0))
    off = Grid.from_parts(labels.shape, (1.0, 1.0, 1.5))
    write_image(folder / "imagesTr" / "grid_0000.nii.gz", Volume(image, grid))
    write_image(folder / "labelsTr" / "grid.nii.gz", Volume(labels[None], off))
    (folder / "imagesTr" / "junk_0000.nii.gz").write_bytes(b"junk")
    write_image(folder / "labelsTr" / "junk.nii.gz", Volume(labels[None], grid))
    report = prepare([folder], tmp_path / "store", workers=1)
    assert report.num_cases == 1
    assert [record.case_id for record in CaseStore.open(tmp_path / "store").cases] == ["one__good"]
    reasons = {
        "unlabelled": "the label map is missing",
        "unknown": "the label map holds 9",
        "float": "not whole numbers",
        "holes": "1 voxels are NaN",
        "constant": "every voxel is 3",
        "grid": "label grid",
        "junk": "junk_0000.nii.gz",
    }
    assert len(report.failures) == len(reasons)
    for name, reason in reasons.items():
        lines = [text for text in report.failures if text.startswith(f"data set one: case {name}:")]
        assert len(lines) == 1, name
        assert reason in lines[0]
        assert lines[0].count(f"case {name}") == 1


def test_a_data_set_can_be_added_later(two: tuple[Path, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = prepare(two[:1], store, workers=0)
    arrays = store / "cases" / "Dataset001_CT__a.b2nd"
    before = arrays.stat().st_mtime_ns
    report = prepare(two, store, workers=0)
    assert (report.num_cases, report.num_new) == (3, 1)
    assert arrays.stat().st_mtime_ns == before
    assert report.label_space.heads[: len(first.label_space.heads)] == first.label_space.heads
    together = prepare(two, tmp_path / "other", workers=0)
    assert together.label_space == report.label_space
    assert (store / "index.jsonl").read_bytes() == (tmp_path / "other/index.jsonl").read_bytes()


def test_processes_store_what_one_process_stores(two: tuple[Path, Path], tmp_path: Path) -> None:
    request = PrepareRequest(normalization="auto")
    for workers in (0, 2):
        prepare(two, tmp_path / f"store{workers}", request=request, workers=workers)
    for name in ("index.jsonl", "prepare.json", "label_space.json"):
        one, other = (tmp_path / f"store{workers}" / name for workers in (0, 2))
        assert one.read_bytes() == other.read_bytes()


def test_an_executor_s_processes_store_the_same(two: tuple[Path, Path], tmp_path: Path) -> None:
    with ProcessPoolExecutor(1) as pool:
        prepare(two, tmp_path / "pool", executor=pool)
    prepare(two, tmp_path / "store", workers=0)
    indices = [(tmp_path / name / "index.jsonl").read_bytes() for name in ("pool", "store")]
    assert indices[0] == indices[1]


def test_a_damaged_case_is_prepared_again(two: tuple[Path, Path], tmp_path: Path) -> None:
    prepare(two, tmp_path / "store", workers=0)
    index = (tmp_path / "store" / "index.jsonl").read_bytes()
    damaged = tmp_path / "store" / "cases" / "Dataset002_MR__a.segmentation.b2nd"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    (tmp_path / "store" / "cases" / ".partial-x-y.b2nd").touch()
    assert prepare(two, tmp_path / "store", workers=0).num_new == 1
    assert (tmp_path / "store" / "index.jsonl").read_bytes() == index
    assert CaseStore.open(tmp_path / "store").verify() == []


def test_instance_maps_become_maps_of_their_classes(raw_dataset: Path, tmp_path: Path) -> None:
    report = prepare([raw_dataset], tmp_path / "store", workers=0)
    (head,) = report.label_space.heads
    assert [(target.name, target.ids) for target in head.targets] == [("hot", (1,)), ("cold", (2,))]
    store = CaseStore.open(tmp_path / "store")
    image = store.read_image("raw__case0")[0]
    labels = store.read_segmentation_patch("raw__case0", (0, 0, 0), image.shape)
    assert image[labels == 1].mean() > 1 > image[labels == 0].mean() > image[labels == 2].mean()
    assert store.read_locations("raw__case2") == {}


def test_adding_needs_the_new_folder_only(two: tuple[Path, Path], tmp_path: Path) -> None:
    prepare(two[:1], tmp_path / "store", workers=0)
    report = prepare(two[1:], tmp_path / "store", workers=0)
    assert report.num_cases == 3
    assert [labels.name for labels in report.label_space.datasets] == [
        "Dataset001_CT",
        "Dataset002_MR",
    ]


def test_cases_that_come_later_get_the_figures_that_the_store_has(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    request = PrepareRequest(normalization="auto")
    folder = write_dataset(tmp_path / "one", {"a": case(seed=1)})
    prepare([folder], tmp_path / "store", request=request, workers=0)
    before = (tmp_path / "store" / "prepare.json").read_text()
    image, labels = case(seed=2)
    write_dataset(folder, {"b": (image + 1000, labels)})
    report = prepare([folder], tmp_path / "store", workers=0)
    assert (report.num_cases, report.num_new) == (2, 1)
    assert (tmp_path / "store" / "prepare.json").read_text() == before


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PrepareRequest(spacing_mm=(2, 2, 2)), "spacing 1 x 1 x 1 mm, asked for 2 x 2 x 2 mm"),
        (PrepareRequest(normalization="ct"), "normalization zscore, asked for ct"),
        (PrepareRequest(layout="joint"), "layout is per_dataset, asked for joint"),
        (PrepareRequest(max_targets=1), "max_targets is 20, asked for 1"),
    ],
)
def test_a_store_keeps_its_plan(
    two: tuple[Path, Path], tmp_path: Path, request_: PrepareRequest, message: str
) -> None:
    prepare(two[:1], tmp_path / "store", workers=0)
    content = {path: path.read_bytes() for path in (tmp_path / "store").glob("*.json*")}
    with pytest.raises(ConfigError, match=message):
        prepare(two, tmp_path / "store", request=request_, workers=0)
    assert content == {path: path.read_bytes() for path in (tmp_path / "store").glob("*.json*")}


def test_a_plan_file_with_two_spacings_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    prepare(two, tmp_path / "store", workers=0)
    path = tmp_path / "store" / "prepare.json"
    content = json.loads(path.read_text())
    content["datasets"]["Dataset002_MR"]["spacing_mm"] = [3, 1, 1]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"data set Dataset002_MR has spacing 3 x 1 x 1 mm"):
        prepare(two, tmp_path / "store", workers=0)


def test_other_spacing_of_a_new_store(two: tuple[Path, Path], tmp_path: Path) -> None:
    request = PrepareRequest(spacing_mm=(2.0, 2.0, 2.0))
    prepare(two, tmp_path / "store", request=request, workers=0)
    assert [record.shape for record in CaseStore.open(tmp_path / "store").cases] == [
        (1, 4, 5, 6),
        (1, 4, 5, 6),
        (2, 8, 5, 6),
    ]


def test_many_targets_are_split_and_none_is_lost(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    shape = (6, 6, 6)
    labels = (np.arange(216).reshape(shape) % 118).astype(np.uint8)
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    names = {"background": 0} | {f"organ{n}": n for n in range(1, 118)}
    folder = write_dataset(tmp_path / "many", {"a": (image, labels)}, labels=names)
    report = prepare([folder], tmp_path / "store", workers=0)
    sizes = [len(head.targets) for head in report.label_space.heads]
    assert sizes == [20, 20, 20, 19, 19, 19]
    assert sorted(CaseStore.open(tmp_path / "store").read_locations("many__a")) == [*range(1, 118)]


def test_declared_labels_name_data_sets_and_merge_targets(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    declaration = tmp_path / "labels.toml"
    declaration.write_text(
        'layout = "joint"\n[datasets.Dataset001_CT]\nname = "liver"\n'
        'merge = {all = ["organ", "lesion"]}\n'
    )
    request = PrepareRequest(labels=declaration)
    report = prepare(two, tmp_path / "store", request=request, workers=0)
    assert report.label_space.layout == "joint"
    assert report.label_space.dataset("liver").targets[0].ids == (1, 2)
    store = CaseStore.open(tmp_path / "store")
    assert store.cases[-1].case_id == "liver__b"
    assert sorted(store.read_locations("liver__b")) == [1, 2]
    declaration.write_text(declaration.read_text().replace("all", "everything"))
    with pytest.raises(ConfigError, match="data set liver: other targets than before"):
        prepare(two, tmp_path / "store", request=request, workers=0)


def test_a_lost_label_space_is_built_again(two: tuple[Path, Path], tmp_path: Path) -> None:
    before = prepare(two, tmp_path / "store", workers=0).label_space
    (tmp_path / "store" / "label_space.json").unlink()
    with pytest.raises(ConfigError, match=r"label_space\.json: missing.*Dataset002_MR"):
        prepare(two[:1], tmp_path / "store", workers=0)
    assert prepare(two, tmp_path / "store", workers=0).label_space == before


def test_other_channels_of_a_known_data_set_are_refused(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "one", {"a": case()})
    prepare([folder], tmp_path / "store", workers=0)
    write_dataset(folder, {"a": case()}, channels=("T1",))
    with pytest.raises(ConfigError, match="data set one: channels T1, in the store CT"):
        prepare([folder], tmp_path / "store", workers=0)


def test_changed_labels_of_a_known_data_set_are_refused(
    write_dataset: WriteDataset, tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "one", {"a": case()})
    prepare([folder], tmp_path / "store", workers=0)
    names = {"background": 0, "organ": 1, "lesion": 2, "vessel": 3}
    write_dataset(folder, {"b": case()}, labels=names)
    with pytest.raises(ConfigError, match="data set one: label ids 3 are new"):
        prepare([folder], tmp_path / "store", workers=0)


def test_a_data_set_without_foreground_has_no_ct_figures(
    two: tuple[Path, Path], write_dataset: WriteDataset, tmp_path: Path
) -> None:
    image, labels = case()
    empty = write_dataset(tmp_path / "empty", {"a": (image, labels * 0)})
    request = PrepareRequest(normalization="auto")
    report = prepare([empty, *two], tmp_path / "store", request=request, workers=0)
    assert report.num_cases == 3
    assert len(report.failures) == 1
    assert report.failures[0].startswith("data set empty: CT statistics need finite foreground")


def test_equal_names_are_refused(write_dataset: WriteDataset, tmp_path: Path) -> None:
    folders = [write_dataset(tmp_path / where / "same", {"a": case()}) for where in ("x", "y")]
    with pytest.raises(DataError, match="two data sets are named 'same'"):
        prepare(folders, tmp_path / "store", workers=0)
    assert not (tmp_path / "store").exists()


def test_a_foreign_folder_is_not_used_as_a_store(two: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"holds files but no prepare\.json"):
        prepare(two[:1], two[1], workers=0)


def test_a_data_set_without_a_readable_case_is_left_out(
    two: tuple[Path, Path], write_dataset: WriteDataset, tmp_path: Path
) -> None:
    constant = write_dataset(tmp_path / "gone", {"a": (np.ones((1, 4, 4, 4)), np.ones((4, 4, 4)))})
    report = prepare([*two, constant], tmp_path / "store", workers=0)
    assert [labels.name for labels in report.label_space.datasets] == [
        "Dataset001_CT",
        "Dataset002_MR",
    ]
    assert len(report.failures) == 1
    with pytest.raises(DataError, match="none of 1 cases can be used; data set gone: case a"):
        prepare([constant], tmp_path / "other", workers=0)


def test_a_dry_run_counts_and_writes_nothing(two: tuple[Path, Path], tmp_path: Path) -> None:
    text = describe(two, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert "Dataset001_CT: 2 cases, 2 waiting; channels CT; heads Dataset001_CT (2 targets)" in text
    prepare(two[:1], tmp_path / "store", workers=0)
    before = sorted((tmp_path / "store").rglob("*"))
    text = describe(two, tmp_path / "store")
    assert sorted((tmp_path / "store").rglob("*")) == before
    assert "Dataset001_CT: 2 cases, 0 waiting" in text
    assert "Dataset002_MR: 1 cases, 1 waiting" in text


def test_raw_files_are_left_as_they_are(two: tuple[Path, Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in two[0].rglob("*") if path.is_file()}
    prepare(two[:1], tmp_path / "store", workers=0)
    assert before == {path: path.read_bytes() for path in two[0].rglob("*") if path.is_file()}


def copy_real(source: Path, target: Path) -> None:
    """A real file under another name and format, voxels as they are."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_image(target, read_image(source))


@pytest.mark.slow
def test_real_volumes_of_three_data_sets(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    organs = tmp_path / "organs"
    copy_real(data / "ct_abdomen/ct.nii.gz", organs / "imagesTr/s1_0000.nii.gz")
    copy_real(data / "ct_abdomen/multiorgan_seg.nii.gz", organs / "labelsTr/s1.nii.gz")
    found = np.unique(read_image(organs / "labelsTr/s1.nii.gz").array)
    names = {"background": 0} | {f"organ_{int(n)}": int(n) for n in found if n > 0}
    describe_set(organs, ["CT"], names)
    glioma = tmp_path / "glioma"
    patients = sorted(path for path in (data / "mr_glioma_2seq").iterdir() if path.is_dir())[:2]
    for patient in patients:
        for number, channel in enumerate(("t1c", "flair")):
            name = f"imagesTr/{patient.name}_{number:04d}.nii.gz"
            copy_real(patient / f"{channel}.nii.gz", glioma / name)
        copy_real(patient / "tumour_seg.nii.gz", glioma / f"labelsTr/{patient.name}.nii.gz")
    regions = {"background": 0, "whole": [1, 2, 3, 4], "core": [1, 3, 4], "enhancing": 4}
    describe_set(glioma, ["T1c", "FLAIR"], regions)
    lung = tmp_path / "lung"
    copy_real(data / "ct_lung_elastix/lung.mha", lung / "imagesTr/l_0000.nii.gz")
    copy_real(data / "ct_lung_elastix/lung_mask.mha", lung / "labelsTr/l.nii.gz")
    mask_ids = [int(n) for n in np.unique(read_image(lung / "labelsTr/l.nii.gz").array) if n > 0]
    describe_set(lung, ["CT"], {"background": 0} | {f"lung{n}": n for n in mask_ids})

    request = PrepareRequest(spacing_mm=(6.0, 6.0, 6.0), normalization="auto")
    report = prepare([organs, glioma, lung], tmp_path / "store", request=request, workers=2)
    assert report.failures == ()
    assert report.num_cases == 2 + len(patients)
    store = CaseStore.open(tmp_path / "store")
    assert {record.shape[0] for record in store.cases} == {1, 2}
    space = report.label_space
    assert sum(len(head.targets) for head in space.heads_of("organs")) == len(names) - 1
    assert len(space.heads_of("organs")) == -(-(len(names) - 1) // 20)
    for record in store.cases:
        shape = record.shape[1:]
        stored = store.read_segmentation_patch(record.case_id, (0, 0, 0), shape)
        present = {int(n) for n in np.unique(stored)} - {0}
        assert present == set(store.read_locations(record.case_id))
        image = store.read_image(record.case_id)
        # labels lie on their voxels: tumours are bright in FLAIR, lungs dark in CT
        if record.provenance.dataset == "glioma":
            assert image[1][stored > 0].mean() > image[1][stored == 0].mean() + 1
        if record.provenance.dataset == "lung":
            assert image[0][stored > 0].mean() < image[0][stored == 0].mean()
    plan = read_plan(tmp_path / "store")
    assert plan is not None
    (scheme,) = plan.datasets["organs"].normalization
    assert scheme.name == "ct_percentile"
    assert -1024 <= scheme.lower < scheme.mean < scheme.upper


def describe_set(folder: Path, channels: list[str], labels: Mapping[str, int | list[int]]) -> None:
    content = {
        "channel_names": {str(n): name for n, name in enumerate(channels)},
        "labels": labels,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
