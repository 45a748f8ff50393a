"""Several ranks are one job: disjoint samples, the joined batch's gradients, exact resume."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.core.checkpoint import read_checkpoint
from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.pretrain_ssl.batches import PatchSampler
from voxelbridge.pretrain_ssl.cases import Sampling, case_order
from voxelbridge.pretrain_ssl.method import Method, Objective
from voxelbridge.pretrain_ssl.methods.mae import MAE
from voxelbridge.pretrain_ssl.methods.models_genesis import ModelsGenesis
from voxelbridge.pretrain_ssl.methods.s3d import S3D
from voxelbridge.pretrain_ssl.methods.voco import VoCo

STEPS = 8
SETTINGS = (
    "patch_size=[16,16,16]", "batch_size=4", f"schedule.steps={STEPS}", "log_every_steps=1",
    "checkpoint_every_steps=1", "validate_every_steps=4", "validation_patches=2", "pictures=0",
    "optim.name=sgd", "optim.lr=0.01",  # Adam makes large steps of rounding in tiny gradients
)  # fmt: skip
METHODS: tuple[Method, ...] = (
    MAE(block_size=8),
    S3D(block_size=8),
    ModelsGenesis(shuffle_windows=50),
    VoCo(base_grid=(2, 2, 1), head_width=16),
)


def command(store: Path, run: Path, ranks: int) -> list[str]:
    settings = [part for text in SETTINGS for part in ("--set", text)]
    words = ["train", "mae_small", "--store", str(store), "--run", str(run), "--device", "cpu"]
    module = ["-m", "--", "voxelbridge.pretrain_ssl.cli"] if ranks > 1 else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    if ranks > 1:  # torchrun gives every rank one thread
        return [sys.executable, *launcher, *module, *words, *settings]
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from voxelbridge.pretrain_ssl.cli import main; main()"
    )
    return [sys.executable, "-c", code, *words, *settings]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def weights(run: Path) -> torch.Tensor:
    tensors = read_checkpoint(run / "checkpoints" / "final.safetensors").tensors
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_train_as_one_process_and_resume_exactly(
    tiny_store: Path, tmp_path: Path
) -> None:
    one, two, broken = tmp_path / "one", tmp_path / "two", tmp_path / "broken"
    first = start(command(tiny_store, one, 1))
    assert start(command(tiny_store, two, 2)).wait() == 0
    assert first.wait() == 0
    # The mean of the two ranks' losses and gradients is that of the batch of four.
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-5)
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=2e-4)

    process = start(command(tiny_store, broken, 2))
    metrics = broken / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for rank in children(process.pid):
        os.kill(rank, signal.SIGKILL)
    process.kill()
    process.wait()
    assert len(losses(broken)) < STEPS
    assert start(command(tiny_store, broken, 2)).wait() == 0
    assert read_metrics(metrics) == read_metrics(two / "metrics.jsonl")
    assert torch.equal(weights(broken), weights(two))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("share", "status"), [("0.2", 0), ("0.1", 1)])
def test_two_ranks_count_failures_together_and_say_each_once(
    tiny_store: Path, tmp_path: Path, share: str, status: int
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(tiny_store, store)
    broken = ("case03", "case08")
    for case in broken:
        (store / "cases" / f"{case}.b2nd").unlink()
    words = [*command(store, run, 2), "--set", f"max_failed_share={share}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode == 0) == (status == 0)
    for case in broken:
        assert done.stderr.count(f"skipped: {store / 'cases' / case}.b2nd") <= 1
    if status == 0:
        assert done.stderr.count("skipped: ") == 2
        assert read_metrics(run / "metrics.jsonl")[-1]["failed_cases"] == 2
    else:
        assert "2 of 12 cases could not be read, more than max_failed_share 0.1" in done.stderr


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_gradients_of_two_halves_average_to_those_of_the_whole_batch(method: Method) -> None:
    rng = np.random.default_rng(0)
    size = (32, 32, 16) if isinstance(method, VoCo) else (16, 16, 16)
    views = [
        method.views(rng.standard_normal((1, *size)).astype(np.float32), rng, masks={})
        for _ in range(4)
    ]
    batch = {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}
    parts = [
        {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()} for rank in range(2)
    ]
    whole = gradient(method, [batch])
    halves = gradient(method, parts)
    scale = max(float(value.abs().max()) for value in whole.values())
    for name, expected in whole.items():
        # 1e-5 of the largest gradient: float32 sums in another order
        torch.testing.assert_close(halves[name], expected, rtol=0, atol=1e-5 * scale, msg=name)


def gradient(method: Method, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean over the batches of the gradient of each one's total, from the same weights."""
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        torch.manual_seed(0)
        objective = method.build(build_encoder(RESENC_SMALL, in_channels=1))
        assert isinstance(objective, Objective)
        objective(batch)["total"].backward()
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                sums[name] = sums.get(name, 0) + parameter.grad / len(batches)
    return sums


def test_ranks_see_disjoint_samples(tiny_store: Path) -> None:
    store = CaseStore.open(tiny_store)
    ids = [record.case_id for record in store.cases]
    order = case_order(store, ids, Sampling(), seed=0)
    seen: dict[int, list[str]] = {0: [], 1: []}
    for rank in range(2):
        sampler = PatchSampler(
            store, order, (16, 16, 16), 3, METHODS[0], seed=0,
            augmentation=SpatialAugmentation.none(), rank=rank, ranks=2,
        )  # fmt: skip
        for number in range(2):  # 2 passes x 2 ranks x 3 patches = the store's twelve cases
            patches = sampler(number)["image"]
            seen[rank] += [owner(store, ids, patch[0].numpy()) for patch in patches]
    assert sorted(seen[0] + seen[1]) == sorted(ids)


def owner(store: CaseStore, ids: list[str], patch: np.ndarray) -> str:
    """The case that a patch was cut from, found by its voxels."""
    voxel = patch[8, 8, 8]
    (found,) = [case for case in ids if (store.read_image(case) == voxel).any()]
    return found
