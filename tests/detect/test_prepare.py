"""Preparing: what is in the store, what is named when a case is bad, what is skipped."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.foreground import boxes_from_instances
from voxelbridge.core.data.provenance import content_hashes
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.build import load_detect_config
from voxelbridge.detect.evaluate.tables import read_cases, read_ground_truth
from voxelbridge.detect.fingerprint import CASES_FILE
from voxelbridge.detect.plan import read_plan
from voxelbridge.detect.plan_request import parse_request
from voxelbridge.detect.prepare import describe, prepare
from voxelbridge.detect.prepare_survey import survey
from voxelbridge.detect.splits import read_splits


def test_the_store_holds_every_case_on_the_planned_grid(raw_dataset: Path, tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    prepare(raw_dataset, store_path, workers=0)
    store, plan = CaseStore.open(store_path), read_plan(store_path)
    assert [record.case_id for record in store.cases] == [f"case{n}" for n in range(6)]
    # File axes z, y, x are patient axes R-L (2 mm), A-P and S-I: in LPS order x has 2 mm.
    assert plan.spacing_mm == (1.0, 1.0, 2.0)
    assert plan.num_objects_per_class == (5, 5)
    assert plan.normalization[0].name == "ct_percentile"
    record = store.record("case0")
    assert record.shape == (1, 28, 24, 20)
    assert record.labels.tolist() == [0, 1]
    ids, boxes = boxes_from_instances(store.read_instances("case0"))
    assert ids.tolist() == [1, 2]
    np.testing.assert_array_equal(boxes, record.boxes)
    assert store.verify() == []


def test_fixed_spacing_scales_boxes_exactly(raw_dataset: Path, tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    prepare(raw_dataset, store_path, rule="fixed", workers=0)
    store = CaseStore.open(store_path)
    assert store.record("case0").shape == (1, 28, 24, 40)
    sizes = store.record("case0").boxes[:, 3:] - store.record("case0").boxes[:, :3]
    np.testing.assert_allclose(sizes, [[6, 6, 12], [6, 6, 12]])


def test_ground_truth_is_in_the_files_own_voxels(raw_dataset: Path, tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    prepare(raw_dataset, store_path, workers=0)
    raw = RawDataset.open(raw_dataset)
    for prefix, cases in (("", raw.cases), ("test_", raw.test_cases)):
        names = read_cases(store_path / f"{prefix}cases.csv")
        assert names == [case.case_id for case in cases]
        table = read_ground_truth(store_path / f"{prefix}ground_truth.csv", names)
        for index, case in enumerate(cases):
            objects = case.read_objects(case.read_image().grid)
            rows = table.case_index == index
            np.testing.assert_array_equal(table.boxes[rows], objects.boxes)
            np.testing.assert_array_equal(table.labels[rows], objects.labels)
    details = CaseStore.open(store_path).details("case0")
    original = details.mapping.boxes_to_original(CaseStore.open(store_path).record("case0").boxes)
    np.testing.assert_allclose(original, details.extra["original_boxes"], atol=1e-4)


def test_a_second_call_does_nothing_again(raw_dataset: Path, tmp_path: Path) -> None:
    store_path = tmp_path / "store"
    prepare(raw_dataset, store_path, workers=0)
    array = store_path / "cases" / "case1.b2nd"
    before = array.stat().st_mtime_ns
    prepare(raw_dataset, store_path, workers=0)
    assert array.stat().st_mtime_ns == before


def test_a_bad_case_is_named_and_the_others_are_stored(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = raw_dataset / "imagesTr" / "case3_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"1 of 6 cases could not be prepared \(case3\)"):
        prepare(raw_dataset, tmp_path / "store", workers=1)
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "case3" in error
    store = CaseStore.open(tmp_path / "store")
    assert [record.case_id for record in store.cases] == [
        "case0", "case1", "case2", "case4", "case5",
    ]  # fmt: skip
    held = [name for fold in read_splits(tmp_path / "store") for name in fold["val"]]
    assert "case3" not in held


def test_missing_things_are_one_line_for_all_cases(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (raw_dataset / "labelsTr").glob("*.json"):
        path.unlink()
    expected = r"dataset\.json: no 'things', and none of 6 label maps .*\[\"cold\"\]$"
    with pytest.raises(DataError, match=expected):
        prepare(raw_dataset, tmp_path / "store", workers=0)
    with pytest.raises(DataError, match=expected):
        survey(raw_dataset, tmp_path / "store", parse_request("default"))
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "store").exists()


def test_another_plan_on_an_existing_store_is_refused(raw_dataset: Path, tmp_path: Path) -> None:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    with pytest.raises(ConfigError, match=r"another plan .*spacing_mm"):
        prepare(raw_dataset, tmp_path / "store", rule="fixed", workers=0)


def test_own_splits_and_patients_are_kept(raw_dataset: Path, tmp_path: Path) -> None:
    own = [{"train": ["case0", "case1"], "val": ["case5"]}]
    (raw_dataset / "splits.json").write_text(json.dumps(own))
    prepare(raw_dataset, tmp_path / "a", workers=0)
    assert read_splits(tmp_path / "a") == own
    (raw_dataset / "splits.json").unlink()
    (raw_dataset / "groups.json").write_text(
        json.dumps({f"case{n}": f"p{n // 2}" for n in range(6)})
    )
    prepare(raw_dataset, tmp_path / "b", workers=0)
    for fold in read_splits(tmp_path / "b"):
        assert len(fold["val"]) == 2
        assert int(fold["val"][0][-1]) // 2 == int(fold["val"][1][-1]) // 2


def test_only_some_cases_can_be_taken(raw_dataset: Path, tmp_path: Path) -> None:
    prepare(raw_dataset, tmp_path / "store", workers=0, only=["case0", "case4"])
    store = CaseStore.open(tmp_path / "store")
    assert [record.case_id for record in store.cases] == ["case0", "case4"]


def test_a_case_knows_its_patient_its_origin_and_its_content(
    raw_dataset: Path, tmp_path: Path
) -> None:
    (raw_dataset / "groups.json").write_text(json.dumps({"case0": "p7"}))
    (raw_dataset / "origins.json").write_text(json.dumps({"case0": ["kits:case_00000"]}))
    prepare(raw_dataset, tmp_path / "store", workers=0)
    store = CaseStore.open(tmp_path / "store")
    provenance = store.record("case0").provenance
    assert provenance.patient == "p7"
    assert provenance.origin_ids == ("kits:case_00000",)
    volume = RawDataset.open(raw_dataset).cases[0].read_image()
    assert provenance.content_sha256 == content_hashes(volume)
    assert store.record("case1").provenance.patient is None


def test_locations_are_voxels_of_their_class(raw_dataset: Path, tmp_path: Path) -> None:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    store = CaseStore.open(tmp_path / "store")
    instances = store.read_instances("case0")
    for label, places in store.read_locations("case0").items():
        values = {int(instances[tuple(place)]) for place in places}
        assert values == {label + 1}  # the instance ids of this data set are class + 1
    assert store.read_locations("case2") == {}


def test_overlapping_boxes_survive_and_need_no_instances(raw_dataset: Path, tmp_path: Path) -> None:
    boxes = [[2.0, 3.0, 4.0, 10.0, 11.0, 12.0], [5.5, 3.0, 4.0, 12.0, 11.0, 12.0]]
    content = {"boxes": [{"label": 0, "box": box} for box in boxes]}
    (raw_dataset / "labelsTr" / "case1.json").write_text(json.dumps(content))
    (raw_dataset / "labelsTr" / "case1.nii.gz").unlink()
    prepare(raw_dataset, tmp_path / "store", rule="fixed", workers=0)
    store = CaseStore.open(tmp_path / "store")
    record = store.record("case1")
    assert "instances" not in record.files
    assert len(record.boxes) == 2
    original = store.details("case1").mapping.boxes_to_original(record.boxes)
    np.testing.assert_allclose(original, boxes, atol=1e-5)


def test_workers_and_their_number_change_nothing(raw_dataset: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 0), ("b", 3)):
        prepare(raw_dataset, tmp_path / name, workers=workers)
    for file in ("plan.json", "fingerprint.json", "index.jsonl", "splits.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_work_on_a_case_can_be_sent_elsewhere(raw_dataset: Path, tmp_path: Path) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from functools import partial

    from voxelbridge.detect.fingerprint import measure_case

    case = RawDataset.open(raw_dataset).cases[0]
    spawned = multiprocessing.get_context("spawn")  # as a cluster's worker: nothing is inherited
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        there = pool.submit(partial(measure_case, num_samples=50), case).result()
    assert there.digest() == measure_case(case, num_samples=50).digest()
    with pytest.raises(ConfigError, match="'local' or 'dask:ADDRESS'"):
        prepare(raw_dataset, tmp_path / "store", executor="slurm")


def test_an_interrupted_preparation_reads_only_what_is_left(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(raw_dataset, tmp_path / "whole", workers=0)
    store = tmp_path / "store"
    prepare(raw_dataset, store, workers=0, only=["case0", "case1"])
    lines = (store / CASES_FILE).read_text().split()
    shutil.rmtree(store)
    store.mkdir()
    (store / CASES_FILE).write_text("\n".join(lines) + "\n" + lines[0][:80])  # killed in mid-line
    capsys.readouterr()
    prepare(raw_dataset, store, workers=0)
    assert "reading cases: 4 done" in capsys.readouterr().out
    assert (store / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


def test_a_repaired_case_joins_the_store_under_its_plan(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = raw_dataset / "imagesTr" / "case3_0000.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[:-200])
    with pytest.raises(DataError, match="case3"):
        prepare(raw_dataset, tmp_path / "store", workers=0)
    plan = (tmp_path / "store" / "plan.json").read_bytes()
    image.write_bytes(whole)
    prepared = prepare(raw_dataset, tmp_path / "store", workers=0)
    assert "keeps its plan, which was made from 5 cases" in capsys.readouterr().out
    assert (tmp_path / "store" / "plan.json").read_bytes() == plan
    assert (prepared.num_cases, prepared.num_new) == (6, 1)


def test_a_changed_case_is_not_mixed_with_the_old_ones(raw_dataset: Path, tmp_path: Path) -> None:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    other = (raw_dataset / "imagesTr" / "case4_0000.nii.gz").read_bytes()
    labels = raw_dataset / "labelsTr"
    (raw_dataset / "imagesTr" / "case5_0000.nii.gz").write_bytes(other)
    (labels / "case5.nii.gz").write_bytes((labels / "case4.nii.gz").read_bytes())
    with pytest.raises(ConfigError, match="cases changed since: case5"):
        prepare(raw_dataset, tmp_path / "store", workers=0)


def test_a_case_that_fails_while_it_is_stored_is_a_failure_too(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    prepare(raw_dataset, store, workers=0)
    (store / "cases" / "case4.json").unlink()
    image = raw_dataset / "imagesTr" / "case4_0000.nii.gz"
    stat = image.stat()
    image.write_bytes(b"\0" * stat.st_size)  # same size and time: the fingerprint is reused
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"1 of 6 cases could not be prepared \(case4\)"):
        prepare(raw_dataset, store, workers=0)
    assert "case4" in capsys.readouterr().err
    assert len(CaseStore.open(store).cases) == 5


def test_the_summary_tells_what_was_decided(raw_dataset: Path, tmp_path: Path) -> None:
    prepared = prepare(raw_dataset, tmp_path / "store", rule="fixed", workers=0)
    text = describe(prepared, tmp_path / "store")
    assert "cases        6 (6 new)" in text
    assert "objects      10 of 2 classes" in text
    assert "spacing      1 x 1 x 1 mm" in text
    assert "patch        128 x 128 x 128 voxels, 6 stages" in text


def test_nnunets_resampling_is_planned_and_kept(raw_dataset: Path, tmp_path: Path) -> None:
    request = parse_request("fixed", resampling="nnunet")
    prepare(raw_dataset, tmp_path / "store", request=request, workers=0)
    plan = read_plan(tmp_path / "store")
    assert (plan.resampling.image, plan.resampling.labels) == ("nnunet", "nnunet")
    with pytest.raises(ConfigError, match=r"different: resampling.*the options changed"):
        prepare(raw_dataset, tmp_path / "store", rule="fixed", workers=0)


def test_a_dry_run_counts_and_writes_nothing(raw_dataset: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    before = survey(raw_dataset, store, parse_request("fixed"))
    assert not store.exists()
    assert (before.num_cases, before.num_done, before.num_waiting) == (6, 0, 6)
    assert before.estimated_bytes == 6 * 28 * 24 * 40 * 4
    prepare(raw_dataset, store, rule="fixed", workers=0, only=["case1", "case2"])
    after = survey(raw_dataset, store, parse_request("fixed"))
    assert (after.num_done, after.num_waiting) == (2, 4)
    assert "waiting      4" in after.describe()


def test_a_dry_run_names_unreadable_headers(raw_dataset: Path, tmp_path: Path) -> None:
    (raw_dataset / "imagesTr" / "case1_0000.nii.gz").write_bytes(b"no image")
    found = survey(raw_dataset, tmp_path / "store", parse_request("default"))
    assert found.num_sampled == 5
    assert "case1" in found.describe()
    assert found.spacing_mm == (1.0, 1.0, 2.0)


def test_a_planned_architecture_trains_a_step(raw_dataset: Path, tmp_path: Path) -> None:
    from voxelbridge.detect.train import train

    request = parse_request(
        "default", settings=["spacing_mm=[1,1,4]", "features=[8,16,32]", "batch_size=2"]
    )
    prepare(raw_dataset, tmp_path / "store", request=request, workers=0)
    plan = read_plan(tmp_path / "store")
    assert plan.kernels[0] == (3, 3, 1)
    assert plan.strides[1] == (2, 2, 1)
    config = load_detect_config("retunet_small", ["architecture=plan"], plan=plan)
    assert config.patch_size == plan.patch_size
    assert config.stages is not None
    assert config.stages.strides == plan.strides
    assert config.detector.head_levels == plan.head_levels
    train(
        "retunet_small",
        store=tmp_path / "store",
        run=tmp_path / "run",
        overrides=["architecture=plan", "batch_size=2"],
        device="cpu",
        workers=0,
        dry_run=True,
    )
    assert not (tmp_path / "run").exists()


def test_a_preset_may_leave_the_architecture_to_the_plan(raw_dataset: Path, tmp_path: Path) -> None:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    plan = read_plan(tmp_path / "store")
    features = [4, 8, 8, 8, 8][: len(plan.strides)]
    preset = tmp_path / "mine.toml"
    preset.write_text(
        'encoder = "plain_small"\narchitecture = "plan"\nbatch_size = 2\n'
        f"stages.features = {features}\n"
        '[schedule]\nname = "poly"\nsteps = 1\n[optim]\nname = "adamw"\nlr = 1e-3\n'
    )
    with pytest.raises(ConfigError, match="--store"):
        load_detect_config(str(preset))
    config = load_detect_config(str(preset), plan=plan)
    assert config.patch_size == plan.patch_size
    assert config.stages is not None
    assert list(config.stages.features) == features  # what the file states itself stays
    own = load_detect_config(str(preset), ["patch_size=[16,16,16]"], plan=plan)
    assert own.patch_size == (16, 16, 16)


def test_the_command_prepares_and_plans_by_its_options(
    raw_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from voxelbridge.detect.cli import app

    del capsys
    store = tmp_path / "store"
    arguments = ["prepare", str(raw_dataset), str(store), "--workers", "0"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0
    assert "waiting      6" in dry.output
    done = CliRunner().invoke(
        app, [*arguments, "--plan", "fixed", "--gpu-memory", "6 GiB", "--set", "num_queries=99"]
    )
    assert done.exit_code == 0, done.output
    assert "plan fixed" in done.output
    assert "note: a training step with the plain encoder needs" in done.output
    assert read_plan(store).num_queries == 99
