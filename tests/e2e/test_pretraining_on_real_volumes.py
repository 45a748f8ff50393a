"""Each method learns on real CT and MR, patients held out; its encoder starts both detectors."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from voxelbridge.core.config import load_config, preset_path
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patient_split import patients_of, split_cases
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.detect.prepare import prepare as prepare_detection
from voxelbridge.pretrain_ssl.config import PretrainConfig
from voxelbridge.pretrain_ssl.export import export
from voxelbridge.pretrain_ssl.prepare import prepare
from voxelbridge.pretrain_ssl.train import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = {"mae": 120, "s3d": 120, "models_genesis": 120, "voco": 100}
PATCH = "patch_size=[64,64,64]"  # in smaller ones the mean of a patch is hard to beat
CLEARLY = 0.85  # of the trivial predictor's loss
COPIES = ("orientations", "lung_small")  # one head stored 24 times, one lung stored twice
FORMATS = (".gz", ".mha", ".nrrd")


@pytest.fixture(scope="module")
def images(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the real volumes, which knows their patients and modalities."""
    folder = tmp_path_factory.mktemp("real")
    subjects: dict[str, dict[str, object]] = {}
    with (shared / "data" / "manifest.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            path = shared / "data" / row["file"]
            is_copy = any(name in row["file"] for name in COPIES)
            is_image = row["role"].startswith("image") and path.suffix in FORMATS
            if is_copy or not is_image:
                continue
            patient = "_".join(path.relative_to(shared / "data").parts[:-1])
            subject = subjects.setdefault(
                patient, {"subject_id": patient, "subject_info": None, "sessions": {}}
            )
            sessions = subject["sessions"]
            assert isinstance(sessions, dict)
            session = sessions.setdefault(
                "1", {"session_id": "1", "session_info": None, "images": []}
            )
            modality = "CT" if row["modality"] == "CT" else "MR"
            session["images"].append(
                {"name": path.name, "image_path": str(path), "modality": modality,
                 "image_info": {}, "associated_masks": None}
            )  # fmt: skip
    dataset = {"dataset_index": "1", "name": "real", "dataset_info": None, "subjects": subjects}
    collection = {
        "collection_index": 1,
        "collection_name": "Dataset001_Real",
        "datasets": {"1": dataset},
    }
    (folder / "pretrain_data.json").write_text(json.dumps(collection))
    report = prepare(folder, folder / "store", plan="none", workers=0)
    assert not report.failures
    return folder / "store"


@pytest.fixture(scope="module")
def vertebrae(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detection store of the abdominal CT with its eight vertebrae."""
    raw = tmp_path_factory.mktemp("vertebrae") / "raw"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    source = shared / "data" / "ct_abdomen"
    (raw / "imagesTr" / "abdomen_0000.nii.gz").symlink_to(source / "ct.nii.gz")
    (raw / "labelsTr" / "abdomen.nii.gz").symlink_to(source / "vertebrae_seg.nii.gz")
    (raw / "labelsTr" / "abdomen.json").write_text(
        json.dumps({"instances": {str(number): 0 for number in range(26, 34)}})
    )
    (raw / "dataset.json").write_text(
        json.dumps({"name": "spine", "modalities": {"0": "CT"}, "labels": {"0": "vertebra"}})
    )
    prepare_detection(raw, raw.parent / "store", workers=0)
    return raw.parent / "store"


def seed_that_holds_out(modality: str, store: CaseStore) -> int:
    """The first seed whose held-out patients have this modality alone."""
    modalities = {record.case_id: record.provenance.modality for record in store.cases}
    for seed in range(100):
        _, held_out = split_cases(patients_of(store), seed=seed)
        if {modalities[case] for case in held_out} == {modality}:
            return seed
    raise AssertionError(f"no seed holds out {modality}")


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("method", STEPS)
def test_method_beats_the_trivial_predictor_on_unseen_patients(
    method: str,
    modality: str,
    images: Path,
    vertebrae: Path,
    tmp_path: Path,
    fine_tune_both_detectors: Callable[..., None],
) -> None:
    run, steps = tmp_path / "run", STEPS[method]
    seed = seed_that_holds_out(modality, CaseStore.open(images))
    overrides = [
        f"seed={seed}", f"schedule.steps={steps}", f"validate_every_steps={steps}",
        "validation_patches=16", "pictures=0",
    ]  # fmt: skip
    if method != "voco":
        overrides.append(PATCH)
    preset = preset_path("voxelbridge.pretrain_ssl", f"{method}_small")
    config = load_config(PretrainConfig, preset, overrides).config
    train(config, store=images, run=run, device="cpu", workers=0)
    last = [record for record in read_metrics(run / "metrics.jsonl") if "val_loss" in record][-1]
    loss, trivial = last["val_loss"], last["val_trivial"]
    print(f"{method}, {modality} held out: loss {loss:.3f}, trivial predictor {trivial:.3f}")
    assert loss < CLEARLY * trivial
    if modality == "MR":
        return  # one encoder of each method is enough for the detectors
    checkpoint = tmp_path / "encoder.safetensors"
    export(run, checkpoint)
    fine_tune_both_detectors(checkpoint, store=vertebrae, steps=20)
