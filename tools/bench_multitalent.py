"""Step time of multi-data-set training against the same network with one stem and one head.

    uv run tools/bench_multitalent.py [--device cuda] [--quick]

Six data sets, a stem and a head each, against one data set of the same label count; encoder,
decoder, patch, batch and losses are equal. Batches hold noise, drawn beforehand, and every sample
goes to the next of the six data sets, so that a batch meets them all: more than a training draws.
Steps of the two alternate in one run; the ratio is the median of those of steps side by side, and
at most 1.1. On a GPU a ResEnc-L U-Net in bfloat16, 6 patches of 128^3; on a CPU a small one. Needs
torch, numpy, safetensors, pydantic and typer alone.
"""

import statistics
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from stopwatch import DeviceName, Threads, now, prepare_device

from voxelbridge.core.arch.config import DecoderConfig
from voxelbridge.core.arch.presets import RESENC_L, RESENC_SMALL
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.optim import SGD, build_optimizer
from voxelbridge.core.train.steps import StepResult, move, place, train_steps
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import build_label_space
from voxelbridge.pretrain_sup.model import build_network
from voxelbridge.pretrain_sup.objective import MultiTalentObjective

DATASETS = 6
TARGETS = 5  # of each data set
LIMIT = 1.1
WARM_UP = 3
Batch = dict[str, Any]  # as a `SegmentationBatch`, without the libraries that read files


def batches(
    names: list[str], *, edge: int, size: int, count: int, device: torch.device
) -> Iterator[Batch]:
    """`count` batches of noise for the data sets `names` in turn, drawn once, on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (edge, edge, edge)
    images = [torch.randn(1, *shape, generator=generator) for _ in range(size)]
    segmentations = [
        torch.randint(0, TARGETS + 1, shape, generator=generator, dtype=torch.int32)
        for _ in range(size)
    ]
    fixed = move({"images": images, "segmentations": segmentations}, device)
    for number in range(count):
        datasets = [names[(number * size + sample) % len(names)] for sample in range(size)]
        yield {**fixed, "datasets": datasets, "heads": datasets, "cases": datasets}


def training(
    names: list[str], *, device: torch.device, small: bool, edge: int, size: int, steps: int
) -> Iterator[StepResult]:
    """The steps of a training on the data sets `names`, of one channel each."""
    targets = tuple(Target(f"organ {n}", (n,)) for n in range(1, TARGETS + 1))
    space = build_label_space(
        [DatasetLabels(name, ("CT",), targets, None, 1) for name in names], layout="per_dataset"
    )
    encoder = RESENC_SMALL if small else RESENC_L
    torch.manual_seed(0)
    network = build_network(
        encoder,
        DecoderConfig(convs_per_stage=(1,) * (len(encoder.features) - 1), conv_bias=True),
        stems=dict.fromkeys(names, 1),
        heads=space.output_layers,
        init="kaiming",
    )
    objective = MultiTalentObjective(network, space, reduction="mean")
    precision = "bf16" if device.type == "cuda" else "fp32"
    place(objective, device, precision)
    return train_steps(
        objective,
        batches(names, edge=edge, size=size, count=steps, device=device),
        build_optimizer(SGD(), objective),
        world=World(device),
        learning_rate=lambda _: 1e-6,  # noise teaches nothing: the weights shall stay sound
        first_step=0,
        steps=steps,
        precision=precision,
        clip_norm=12.0,
        accumulation_steps=1,
        seed=0,
    )


def bench(
    device: DeviceName = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run?")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Steps measured of each.")] = 15,
    threads: Threads = 1,
) -> None:
    """Steps with six stems and heads, and with one, in turn."""
    place_ = prepare_device(device, threads=threads)
    small = quick or device == "cpu"
    edge = 16 if quick else 48 if small else 128
    size = DATASETS  # each data set once in a batch
    repeats = min(repeats, 2) if quick else repeats
    names = [f"set{n}" for n in range(DATASETS)]
    runs = [
        training(chosen, device=place_, small=small, edge=edge, size=size, steps=WARM_UP + repeats)
        for chosen in (names[:1], names)
    ]
    seconds: list[list[float]] = [[], []]
    for step in range(WARM_UP + repeats):
        order = (0, 1) if step % 2 else (1, 0)  # neither always follows the other
        for which in order:
            start = now(place_)
            next(runs[which])
            if step >= WARM_UP:
                seconds[which].append(now(place_) - start)
    one, many = (statistics.median(times) for times in seconds)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    network = "ResEnc-L" if not small else "small"
    print(f"{network} U-Net, {size} patches of {edge}^3, {repeats} steps each")
    print("| stems and heads | step |\n|---|---|")
    print(f"| 1 | {one * 1e3:,.1f} ms |\n| {DATASETS} | {many * 1e3:,.1f} ms |")
    verdict = "kept" if ratio <= LIMIT else "exceeded"
    print(f"ratio {ratio:.3f}, at most {LIMIT}: {verdict}")


if __name__ == "__main__":
    typer.run(bench)
