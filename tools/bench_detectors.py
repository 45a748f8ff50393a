"""Step time and peak memory of the four detectors, on synthetic patches.

    uv run tools/bench_detectors.py [--device cuda] [--quick]

On a GPU the paper's presets run as they train: 128^3, batch 4, bfloat16 autocast, losses, clipping
and optimizer included, with everything training and in the phase with a frozen encoder. Memory
stands beside the paper's figures (arXiv 2509.15947). On a CPU only the small presets run, for the
time of a step. Needs torch, and triton on a GPU; without scipy a greedy matching stands in.
"""

import importlib.util
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from stopwatch import DeviceName, Threads, now, prepare_device
from torch import Tensor

from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.optim import build_optimizer
from voxelbridge.core.train.steps import place, train_steps
from voxelbridge.detect import detr_criterion
from voxelbridge.detect.build import build_detector, build_objective, load_detect_config
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.detections import Targets

GB = 1e9
PAPER_GB = {"retunet": 10, "resenc_retunet": 12, "defdetr": 11, "resenc_defdetr": 15}
QUERIES = 300
OBJECTS = 4  # per patch
ENCODER = ("detector.encoder",)


@dataclass(frozen=True)
class Cost:
    """Median seconds of a step; peak bytes in tensors and taken from the device (GPU only)."""

    seconds: float
    tensors: int
    reserved: int


@dataclass(frozen=True)
class SyntheticBatch:
    """What the objectives read of a `DetectionBatch`, without the libraries that read files."""

    image: Tensor  # (B, 1, D, H, W)
    targets: tuple[Targets, ...]
    foreground: Tensor  # (B, D, H, W) bool

    def to(self, device: torch.device) -> "SyntheticBatch":
        """The batch on `device`."""
        targets = tuple(target.to(device) for target in self.targets)
        return SyntheticBatch(self.image.to(device), targets, self.foreground.to(device))


def synthetic(config: DetectConfig, passes: int, device: torch.device) -> Iterator[SyntheticBatch]:
    """`passes` batches of noise with a few boxes each, already on the device."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor(config.patch_size, dtype=torch.float32)
    batch = config.batch_size // config.accumulation_steps
    image = torch.randn(batch, 1, *config.patch_size, generator=generator)
    targets = []
    for _ in range(batch):
        low = torch.rand(OBJECTS, 3, generator=generator) * size * 0.6
        edges = size * (0.1 + 0.2 * torch.rand(OBJECTS, 3, generator=generator))
        labels = torch.zeros(OBJECTS, dtype=torch.int64)
        targets.append(Targets(boxes=torch.cat([low, low + edges], dim=1), labels=labels))
    made = SyntheticBatch(image, tuple(targets), foreground=image[:, 0] > 1).to(device)
    for _ in range(passes):
        yield made


def measure(
    config: DetectConfig, *, device: torch.device, frozen: bool, warm_up: int, repeats: int
) -> Cost:
    """Costs of the config's training step, after `warm_up` steps that compile and tune."""
    torch.manual_seed(0)
    detector = build_detector(config, in_channels=1, num_classes=1, queries=QUERIES)
    objective = build_objective(detector, config)
    place(objective, device, config.precision)
    steps = warm_up + repeats
    results = train_steps(
        objective,
        synthetic(config, steps * config.accumulation_steps, device),
        build_optimizer(config.optim, objective),
        world=World(device),
        learning_rate=lambda _: 1e-6,  # noise teaches nothing: the weights shall stay sound
        first_step=0,
        steps=steps,
        precision=config.precision,
        clip_norm=config.clip_norm,
        accumulation_steps=config.accumulation_steps,
        seed=0,
        frozen_parts=lambda _: ENCODER if frozen else (),
    )
    for _ in range(warm_up):
        next(results)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # what searching for the fastest algorithms took
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        start = now(device)
        next(results)
        seconds.append(now(device) - start)
    return Cost(
        statistics.median(seconds),
        torch.cuda.max_memory_allocated(device) if on_gpu else 0,
        torch.cuda.max_memory_reserved(device) if on_gpu else 0,
    )


def describe(name: str, full: Cost, frozen: Cost) -> str:
    """One row of the table."""
    row = [name, f"{full.seconds * 1e3:,.0f} ms", f"{frozen.seconds * 1e3:,.0f} ms"]
    if full.reserved:
        row += [f"{cost.tensors / GB:.1f} / {cost.reserved / GB:.1f} GB" for cost in (full, frozen)]
        paper = PAPER_GB.get(name)
        row.append("" if paper is None else f"{paper} GB: {_verdict(full, paper)}")
    return "| " + " | ".join(row) + " |"


def bench(
    device: DeviceName = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small presets: does it run?")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Steps measured.")] = 5,
    threads: Threads = 1,
) -> None:
    """Training steps of RetUNet, ResEnc-RetUNet, DefDETR and ResEnc-DefDETR."""
    place_ = prepare_device(device, threads=threads)
    small = quick or device == "cpu"
    if importlib.util.find_spec("scipy") is None:
        detr_criterion.cheapest_pairs = _greedy_pairs
        print("scipy is not installed: objects are matched greedily")
    columns = ["detector", "step", "step, encoder frozen"]
    if device == "cuda":
        columns += ["peak: tensors / reserved", "the same, encoder frozen", "paper"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for name in PAPER_GB:
        preset = f"{name}_small" if small else name
        config = load_detect_config(preset)
        costs = []
        for frozen in (False, True):
            try:
                cost = measure(
                    config, device=place_, frozen=frozen, warm_up=1 if small else 3,
                    repeats=min(repeats, 2) if small else repeats,
                )  # fmt: skip
            except torch.cuda.OutOfMemoryError:
                cost = Cost(float("nan"), 0, 0)
            costs.append(cost)
            if device == "cuda":
                torch.cuda.empty_cache()
        print(describe(preset, *costs), flush=True)


def _greedy_pairs(cost: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    left = cost.copy()
    pairs = []
    for _ in range(min(cost.shape)):
        row, column = np.unravel_index(left.argmin(), left.shape)
        pairs.append((int(row), int(column)))
        left[row], left[:, column] = np.inf, np.inf
    rows, columns = zip(*sorted(pairs), strict=True)
    return np.array(rows), np.array(columns)


def _verdict(cost: Cost, paper_gb: int) -> str:
    return "kept" if cost.reserved <= paper_gb * GB else "exceeded"


if __name__ == "__main__":
    typer.run(bench)
