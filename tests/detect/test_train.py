"""From a tiny store to a run that predicts, for both kinds of detector."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Stem,
    collect_tensors,
    write_checkpoint,
)
from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.files import sha256_of, write_json
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.detect.build import Detector, build_detector, load_detect_config
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.plan import read_plan
from voxelbridge.detect.predict_cases import predict_cases
from voxelbridge.detect.prepare import prepare
from voxelbridge.detect.sine_encoding import POSITION_RULE
from voxelbridge.detect.train import load_run, train
from voxelbridge.detect.weights import write_weights

TINY = (
    "patch_size=[16,16,16]",
    "schedule.steps=3",
    "schedule.warmup_steps=1",
    "log_every_steps=1",
    "validation_batches=1",
    "validate_every_steps=3",
)


@pytest.fixture
def store(raw_dataset: Path, tmp_path: Path) -> Path:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    return tmp_path / "store"


def run_of(store: Path, preset: str, overrides: Sequence[str] = ()) -> Path:
    run = store.parent / "run"
    train(preset, store=store, run=run, overrides=[*TINY, *overrides], device="cpu", workers=0)
    return run


def test_deformable_detr_trains_and_predicts(
    store: Path, raw_dataset: Path, tmp_path: Path
) -> None:
    frozen = 'schedule.frozen={"steps": 1, "parts": ["detector.encoder"]}'
    run = run_of(store, "defdetr_small", ["detector.queries=null", frozen])
    records = read_metrics(run / "metrics.jsonl")
    assert {"proposal_giou", "aux_l1"} <= set(records[0])
    assert any("val_total" in record for record in records)
    facts = json.loads((run / "detector.json").read_text())
    assert facts["queries"] == read_plan(store).num_queries
    assert facts["position_encoding"] == POSITION_RULE
    assert facts["anchor_sizes"] is None
    with safe_open(run / "checkpoints" / "detector.safetensors", framework="pt") as archive:
        assert archive.metadata() == {"position_encoding": POSITION_RULE}
    detector, config, _ = load_run(run)
    assert isinstance(detector, DeformableDETR)
    assert detector.transformer.queries == facts["queries"]
    assert config.detector.name == "deformable_detr"
    out = tmp_path / "out"
    predict_cases([run], [raw_dataset / "imagesTs"], out, device="cpu", pictures=False)
    assert (out / "predictions.csv").read_text().count("\n") > 1


def test_positions_of_another_rule_are_refused(store: Path) -> None:
    run = run_of(store, "defdetr_small", ["schedule.steps=2", "validation_batches=0"])
    detector, _, _ = load_run(run)
    facts = json.loads((run / "detector.json").read_text())
    write_json(run / "detector.json", {**facts, "position_encoding": "trimmed"})
    with pytest.raises(CheckpointError, match="got trimmed, expected even_split_then_zeros"):
        load_run(run)
    write_json(run / "detector.json", facts)
    _write_without_metadata(run, detector)
    with pytest.raises(CheckpointError, match=r"detector\.safetensors: .*got None"):
        load_run(run)
    write_weights(run, detector)
    load_run(run)


def _write_without_metadata(run: Path, detector: Detector) -> None:
    from safetensors.torch import save_file

    path = run / "checkpoints" / "detector.safetensors"
    save_file({name: t.contiguous() for name, t in detector.state_dict().items()}, path)
    write_json(path.with_suffix(".json"), {"schema": 1, "sha256": sha256_of(path)})


def test_a_retina_unet_with_mined_negatives_trains_and_predicts(
    store: Path, raw_dataset: Path, tmp_path: Path
) -> None:
    run = run_of(
        store,
        "retunet_small",
        ["detector.classification_loss=hard_negatives", "detector.box_loss=giou"],
    )
    facts = json.loads((run / "detector.json").read_text())
    assert facts["queries"] is None
    assert facts["position_encoding"] is None
    assert len(facts["anchor_sizes"]) == 2
    out = tmp_path / "out"
    predict_cases([run], [raw_dataset / "imagesTs"], out, device="cpu", pictures=False)
    assert (out / "predictions.csv").is_file()


def test_an_encoder_of_a_checkpoint_enters_deformable_detr(store: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    encoder = build_encoder(RESENC_SMALL, in_channels=1)
    path = tmp_path / "encoder.safetensors"
    metadata = CheckpointMetadata(
        method="mae", arch=RESENC_SMALL, stems={"ct": Stem(channels=1, modality="CT")}
    )
    write_checkpoint(path, Checkpoint(metadata, collect_tensors(encoder), origin=str(path)))
    run = tmp_path / "run"
    frozen = 'schedule.frozen={"steps": 1, "parts": ["detector.encoder"]}'
    train(
        "resenc_defdetr_small", store=store, run=run, init=path, overrides=[*TINY, frozen],
        device="cpu", workers=0,
    )  # fmt: skip
    transfer = json.loads((run / "transfer.json").read_text())
    assert transfer["left_at_init"] == []
    assert len(transfer["loaded"]) == len(encoder.state_dict())
    assert transfer["unused"] == []


def test_planned_stages_fit_deformable_detr(store: Path) -> None:
    plan = read_plan(store)
    config = load_detect_config("defdetr", ["architecture=plan"], plan=plan)
    with torch.device("meta"):
        detector = build_detector(config, in_channels=1, num_classes=2, queries=plan.num_queries)
    assert isinstance(detector, DeformableDETR)
    assert detector.levels == plan.head_levels
    assert detector.encoder.config.features == plan.features
    assert detector.transformer.queries == plan.num_queries
