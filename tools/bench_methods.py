"""The four self-supervised methods side by side: loading, forward, backward, memory of a step.

    uv run tools/bench_methods.py [--device cuda] [--quick]

One network and one crop for all: on a CPU the small encoder and ResEnc-L at 64^3, on a GPU ResEnc-L
at 96^3 to 192^3 in bfloat16. The methods take turns, step by step, so that a busy machine slows all
of them. "loading" is the making of a batch in one process, from a case store where blosc2 is
installed, else of noise in memory; "idle" is the share of its time that a training with one
loading process waits for batches. "memory" is what a step needs beyond weights and gradients, in a
process of its own. VoCo sees the base crops that fit its patch and four target crops.
"""

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from stopwatch import DeviceName, Threads, now, prepare_device
from torch import nn

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.train.estimate import peak_memory, reset_peak_memory
from voxelbridge.core.train.steps import autocast, move, place
from voxelbridge.pretrain_ssl.method import Method
from voxelbridge.pretrain_ssl.methods.mae import MAE
from voxelbridge.pretrain_ssl.methods.models_genesis import ModelsGenesis
from voxelbridge.pretrain_ssl.methods.s3d import S3D
from voxelbridge.pretrain_ssl.methods.voco import VoCo

GIB = 2**30
Batch = dict[str, Any]  # tensors
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Setting:
    """What all methods are measured at."""

    encoder: str
    edge: int
    batch: int
    precision: Precision
    block: int  # edge of the blocks that MAE and S3D hide
    grid: tuple[int, int, int]  # VoCo's base crops (z, y, x)

    @property
    def patch(self) -> tuple[int, int, int]:
        """The crop (z, y, x)."""
        return self.edge, self.edge, self.edge


CPU = (
    Setting("resenc_small", 48, 2, "fp32", 8, (2, 2, 2)),
    Setting("resenc_l", 64, 1, "fp32", 16, (2, 1, 1)),
    Setting("resenc_l", 64, 1, "bf16", 16, (2, 1, 1)),
)
# ResEnc-L needs crops of which one edge at least is 64.
GRIDS = {96: (3, 1, 1), 128: (2, 2, 2), 160: (5, 1, 1), 192: (3, 3, 3)}
GPU = tuple(Setting("resenc_l", edge, 2, "bf16", 16, grid) for edge, grid in GRIDS.items())
QUICK = (Setting("resenc_small", 32, 1, "fp32", 8, (2, 2, 2)),)


@dataclass
class Cost:
    """Seconds of each part of a step, one entry per round; bytes of a step above what was there."""

    loading: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    peak: int = 0
    idle: float | None = None

    @property
    def step(self) -> float:
        """Median seconds of forward and backward pass together."""
        return statistics.median(a + b for a, b in zip(self.forward, self.backward, strict=True))


def methods(setting: Setting) -> dict[str, Method]:
    """The four methods at one setting."""
    return {
        "mae": MAE(block_size=setting.block),
        "s3d": S3D(block_size=setting.block),
        "models_genesis": ModelsGenesis(),
        "voco": VoCo(base_grid=setting.grid, rot90_axes=(1, 2)),
    }


@contextmanager
def batch_makers(
    setting: Setting, chosen: dict[str, Method]
) -> Iterator[dict[str, Callable[[int], Batch]]]:
    """Per method what makes the batch of a step: from a case store, or of noise without blosc2."""
    if importlib.util.find_spec("blosc2") is None:
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((1, *setting.patch), dtype=np.float32)

        def of_noise(method: Method) -> Callable[[int], Batch]:
            return lambda _step: _noise_batch(method, noise, setting.batch, rng)

        yield {name: of_noise(method) for name, method in chosen.items()}
        return
    from voxelbridge.core.data.augment import SpatialAugmentation
    from voxelbridge.pretrain_ssl.batches import PatchSampler
    from voxelbridge.pretrain_ssl.cases import Sampling, case_order

    with tempfile.TemporaryDirectory() as folder:
        store = _noise_store(Path(folder), 2 * setting.edge)
        ids = [record.case_id for record in store.cases]
        order = case_order(store, ids, Sampling(), seed=0)
        yield {
            name: PatchSampler(
                store, order, setting.patch, setting.batch, method, seed=0,
                augmentation=SpatialAugmentation()
                if name in ("mae", "s3d")
                else SpatialAugmentation.none(),
            )
            for name, method in chosen.items()
        }  # fmt: skip


def measure(setting: Setting, device: torch.device, rounds: int) -> dict[str, Cost]:
    """Costs of every method; each round gives every method one step."""
    chosen = methods(setting)
    networks: dict[str, nn.Module] = {}
    for name, method in chosen.items():
        torch.manual_seed(0)
        network = method.build(build_encoder(ENCODER_PRESETS[setting.encoder], in_channels=1))
        networks[name] = place(network, device, setting.precision)
    costs = {name: Cost() for name in chosen}
    with batch_makers(setting, chosen) as makers:
        for number in range(rounds + 1):
            for name, network in networks.items():
                cost = Cost() if number == 0 else costs[name]  # the first step only warms up
                start = time.perf_counter()
                batch = makers[name](number)
                cost.loading.append(time.perf_counter() - start)
                _step(network, batch, device, setting.precision, cost)
                network.zero_grad(set_to_none=True)
        if importlib.util.find_spec("blosc2") is not None:
            for name, network in networks.items():
                costs[name].idle = _idle(network, makers[name], device, setting.precision, rounds)
    return costs


def memory_of(setting: Setting, name: str, device_name: str, threads: int) -> int:
    """Bytes that one step takes above weights and gradients; for a fresh process."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    method = methods(setting)[name]
    network = method.build(build_encoder(ENCODER_PRESETS[setting.encoder], in_channels=1))
    place(network, device, setting.precision)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    noise = np.random.default_rng(0).standard_normal((1, *setting.patch), dtype=np.float32)
    batch = _noise_batch(method, noise, setting.batch, np.random.default_rng(0))
    before = _memory(device)
    reset_peak_memory(device)
    _step(network, batch, device, setting.precision, Cost())
    return peak_memory(device) - before


def _noise_batch(
    method: Method, noise: NDArray[np.float32], count: int, rng: np.random.Generator
) -> Batch:
    views = [method.views(noise, rng, masks={}) for _ in range(count)]
    return {name: torch.from_numpy(np.stack([view[name] for view in views])) for name in views[0]}


def _step(
    network: nn.Module, batch: Batch, device: torch.device, precision: Precision, cost: Cost
) -> None:
    batch = {name: value for name, value in batch.items() if name != "failed"}
    batch = move(batch, device)
    start = now(device)
    with autocast(device, precision):
        loss = network(batch)["total"]
    middle = now(device)
    loss.backward()
    cost.forward.append(middle - start)
    cost.backward.append(now(device) - middle)


def _idle(
    network: nn.Module,
    make: Callable[[int], Batch],
    device: torch.device,
    precision: Precision,
    steps: int,
) -> float:
    """Share of the time in which steps wait for one loading process, after the first batch."""
    from voxelbridge.core.data.batches import step_batches

    def make_batch(step: int, _rng: np.random.Generator) -> Batch:
        return make(step)

    batches = step_batches(make_batch, seed=0, first_step=0, steps=steps + 1, workers=1)
    next(batches)
    start = time.perf_counter()
    waited = 0.0
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        _step(network, batch, device, precision, Cost())
        network.zero_grad(set_to_none=True)
    return waited / (time.perf_counter() - start)


def _noise_store(root: Path, edge: int) -> Any:  # Any: CaseStore, imported where blosc2 is
    from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
    from voxelbridge.core.data.volume import Grid

    writer = CaseStoreWriter(root)
    rng = np.random.default_rng(0)
    for number in range(2):
        image = rng.standard_normal((1, edge, edge, edge), dtype=np.float32)
        writer.write_case(
            f"noise{number}", image, grid=Grid.from_parts((edge, edge, edge), (1.0, 1.0, 1.0)),
            boxes=np.zeros((0, 6)), labels=[],
        )  # fmt: skip
    writer.finish()
    return CaseStore.open(root)


def _memory(device: torch.device) -> int:
    """Bytes in use now: by torch on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def bench(
    device: DeviceName = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A tiny network: does it run?")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Steps measured of each method.")] = 5,
    threads: Threads = 1,
) -> None:
    """Steps of MAE, S3D, Models Genesis and VoCo at one network and crop."""
    place_ = prepare_device(device, threads=threads)
    settings = QUICK if quick else GPU if device == "cuda" else CPU
    columns = "network, crop, batch|method|loading|forward|backward|step / MAE's|memory|idle"
    print("| " + columns.replace("|", " | ") + " |\n" + "|---" * 8 + "|", flush=True)
    for setting in settings:
        try:
            costs = measure(setting, place_, 1 if quick else rounds)
        except torch.cuda.OutOfMemoryError:
            print(f"| {setting.encoder}, {setting.edge}^3 | out of memory | | | | | | |")
            continue
        for name, cost in costs.items():
            # Spawned: a forked process would inherit what the measurements above left in memory.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                cost.peak = pool.submit(memory_of, setting, name, device, threads).result()
            parts = [
                f"{statistics.median(values) * 1e3:,.0f} ms"
                for values in (cost.loading, cost.forward, cost.backward)
            ]
            idle = "" if cost.idle is None else f"{cost.idle:.0%}"
            where = f"{setting.encoder}, {setting.edge}^3, {setting.batch}, {setting.precision}"
            ratio = f"{cost.step / costs['mae'].step:.2f}"
            row = [where, name, *parts, ratio, f"{cost.peak / GIB:.2f} GiB", idle]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    typer.run(bench)
