"""Several ranks are one job: their patches, losses and weights are those of one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.detect.batches import DetectionBatch, PatchSampler, case_objects
from voxelbridge.detect.prepare import prepare

PRESETS = ("retunet_small", "defdetr_small")
STEPS = 6
SETTINGS = (
    "patch_size=[16,16,16]", "batch_size=4", f"schedule.steps={STEPS}", "schedule.warmup_steps=1",
    "schedule.frozen.steps=2", 'schedule.frozen.parts=["detector.encoder"]', "log_every_steps=1",
    "validation_batches=3", "validate_every_steps=3", "averaging.name=ema", "averaging.decay=0.5",
    'optim={"name":"sgd","lr":1e-3}',  # Adam makes large steps of rounding in tiny gradients
)  # fmt: skip
RANK = """
import hashlib, json, sys
import torch
torch.set_num_threads(1)
from voxelbridge.core.train import loop
from voxelbridge.detect.train import train
after = loop.Training._after
digests = []
def noted(self, result):
    tensors = [p.detach().numpy() for p in self._objective.parameters()]
    tensors += [b.numpy() for b in self._objective.buffers()]
    with self.averaged():
        tensors += [p.detach().clone().numpy() for p in self._objective.parameters()]
    parts = b"".join(t.tobytes() for t in tensors)
    digests.append(hashlib.sha256(parts).hexdigest())
    with open(f"{sys.argv[3]}.{self._world.rank}.json", "w") as stream:
        json.dump(digests, stream)
    return after(self, result)
loop.Training._after = noted
train(
    sys.argv[1], store=__import__("pathlib").Path(sys.argv[2]),
    run=__import__("pathlib").Path(sys.argv[3]), overrides=sys.argv[4:], device="cpu", workers=0,
)
"""


@pytest.fixture
def store(raw_dataset: Path, tmp_path: Path) -> Path:
    prepare(raw_dataset, tmp_path / "store", workers=0)
    return tmp_path / "store"


def sampler(store: Path, **changed: Any) -> PatchSampler:
    cases = CaseStore.open(store)
    table = case_objects(cases, [record.case_id for record in cases.cases])
    values = {"batch_size": 4, "object_fraction": 0.5} | changed
    return PatchSampler(
        cases, table, (16, 16, 16), augmentation=SpatialAugmentation.mirroring(), **values
    )


def patches(one: PatchSampler, number: int) -> list[bytes]:
    batch = one(number, np.random.default_rng([7, number]))
    assert isinstance(batch, DetectionBatch)
    return [image.numpy().tobytes() for image in batch.image]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_draw_together_what_one_process_draws(store: Path, ranks: int) -> None:
    for number in range(3):
        whole = patches(sampler(store), number)
        assert len(set(whole)) == 4
        parts = [
            patches(sampler(store, batch_size=4 // ranks, rank=rank, ranks=ranks), number)
            for rank in range(ranks)
        ]
        assert sorted(patch for part in parts for patch in part) == sorted(whole)


def test_half_of_a_steps_patches_lie_on_objects_however_it_is_cut(store: Path) -> None:
    """Also where a rank has one patch only, of which a half rounds to nothing."""
    for ranks, parts in ((1, 1), (4, 1), (2, 2), (1, 4)):
        for step in range(4):
            found = 0
            for part in range(parts):
                number = step * parts + part
                for rank in range(ranks):
                    own = sampler(
                        store, batch_size=4 // ranks // parts, rank=rank, ranks=ranks, parts=parts
                    )
                    batch = own(number, np.random.default_rng(number))
                    assert isinstance(batch, DetectionBatch)
                    found += sum(len(target.boxes) > 0 for target in batch.targets)
            assert found >= 2


def start(words: list[str], ranks: int) -> "subprocess.Popen[bytes]":
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_two_ranks_train_as_one_process(store: Path, tmp_path: Path, preset: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    runs = {1: tmp_path / "one", 2: tmp_path / "two"}
    for ranks, run in runs.items():
        process = start([str(script), preset, str(store), str(run), *SETTINGS], ranks)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
    digests = [json.loads(Path(f"{runs[2]}.{rank}.json").read_text()) for rank in (0, 1)]
    assert len(digests[0]) == STEPS
    assert digests[0] == digests[1]  # parameters, buffers and averages after each step
    one, two = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs.values()
    )
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for name in set(expected) - {"val_map_0.10", "val_map_range"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (
                expected["step"],
                name,
            )
    torch.testing.assert_close(weights(runs[2]), weights(runs[1]), rtol=0, atol=2e-5)


def weights(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / "detector.safetensors")
