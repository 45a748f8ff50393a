"""3D deformable attention against grid_sample per level, forward and backward, in one run.

    uv run tools/bench_attention.py [--device cuda] [--quick]

On a CPU our torch path runs beside the published recipe (one grid_sample per level, all sampled
points stacked, then weighted); on a GPU the Triton kernels run beside it, and their bytes a second
beside the measured copy bandwidth and the floors of docs/deformable_attention.md. The two sides
alternate; printed are medians.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from stopwatch import DeviceName, Threads, now
from torch import Tensor
from torch.nn import functional as F

from voxelbridge.detect.deform_attn import deformable_attention_3d

Triple = tuple[int, int, int]
Attention = Callable[[Tensor, Sequence[Triple], Tensor, Tensor], Tensor]

HEADS, CHANNELS, POINTS = 8, 16, 4  # the paper's detectors: width 128
PAPER_SHAPES = ((32, 32, 32), (16, 16, 16), (8, 8, 8), (4, 4, 4))  # strides 4 to 32 of 128^3
SMALL_SHAPES = ((16, 16, 16), (8, 8, 8), (4, 4, 4))
GIB = 2**30

# Assumed of a Hopper GPU, not measured: what gathers and float32 atomics cannot go beyond.
L2_BYTES_PER_SECOND = 5.5e12
ATOMIC_SECTORS_PER_SECOND = 150e9
SECTOR_BYTES = 32
SPEED_GOAL, MEMORY_GOAL = 5.0, 0.5  # of grid_sample's time and memory


@dataclass(frozen=True)
class Cost:
    """Median seconds and the peak of memory above the inputs (GPU only)."""

    forward: float
    backward: float
    peak_bytes: int

    @property
    def both(self) -> float:
        return self.forward + self.backward


def grid_sample_per_level(
    value: Tensor, shapes: Sequence[Triple], locations: Tensor, weights: Tensor
) -> Tensor:
    """The usual torch recipe of deformable attention, carried to three dimensions."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = 2 * locations - 1
    sampled = []
    pieces = value.split([d * h * w for d, h, w in shapes], dim=1)
    for level, (d, h, w) in enumerate(shapes):
        maps = pieces[level].flatten(2).transpose(1, 2).reshape(batch * heads, channels, d, h, w)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        sampled.append(
            F.grid_sample(
                maps.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )[:, :, 0]
        )
    weight = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(sampled, dim=-2).flatten(-2) * weight).sum(-1)
    return out.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()


def ours(value: Tensor, shapes: Sequence[Triple], locations: Tensor, weights: Tensor) -> Tensor:
    """Ours: Triton on a GPU, the torch path on a CPU."""
    return deformable_attention_3d(value, shapes, None, locations, weights)


def measure(
    sides: dict[str, Attention],
    shapes: Sequence[Triple],
    *,
    batch: int,
    queries: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Cost]:
    """Costs of every side on the same inputs, in turns."""
    torch.manual_seed(0)
    cells = sum(d * h * w for d, h, w in shapes)
    value = torch.randn(batch, cells, HEADS, CHANNELS, device=device, dtype=dtype)
    kind = {"device": device, "dtype": torch.float32}
    # as in training: points lie a few cells around their query's own place
    centres = torch.rand(batch, queries, 1, 1, 1, 3, **kind)
    locations = centres + 0.1 * torch.randn(batch, queries, HEADS, len(shapes), POINTS, 3, **kind)
    weights = torch.rand(batch, queries, HEADS, len(shapes) * POINTS, **kind).softmax(-1)
    weights = weights.unflatten(3, (len(shapes), POINTS))
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    timings: dict[str, list[tuple[float, float, int]]] = {name: [] for name in sides}
    for side in sides.values():  # first runs compile and tune
        one_step(side, inputs, shapes)
    for _ in range(repeats):
        for name, side in sides.items():
            timings[name].append(one_step(side, inputs, shapes))
    return {
        name: Cost(
            statistics.median(t[0] for t in rows),
            statistics.median(t[1] for t in rows),
            max(t[2] for t in rows),
        )
        for name, rows in timings.items()
    }


def one_step(
    side: Attention, inputs: list[Tensor], shapes: Sequence[Triple]
) -> tuple[float, float, int]:
    """Seconds forward and backward, and the peak of memory above the inputs."""
    value, locations, weights = inputs
    for tensor in inputs:
        tensor.grad = None
    on_gpu = value.is_cuda
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = now(value.device)
    out = side(value, shapes, locations, weights)
    middle = now(value.device)
    out.backward(torch.ones_like(out))
    end = now(value.device)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return middle - start, end - middle, peak


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying 1 GiB on the device."""
    source = torch.empty(GIB // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    start = now(source.device)
    for _ in range(10):
        target.copy_(source)
    return 10 * 2 * GIB / (now(source.device) - start)


def describe(title: str, costs: dict[str, Cost]) -> str:
    """One line per side, with its ratio to ours."""
    mine = costs["ours"]
    lines = [title]
    for name, cost in costs.items():
        memory = f", peak {cost.peak_bytes / GIB:.2f} GiB" if cost.peak_bytes else ""
        lines.append(
            f"  {name:<22} forward {cost.forward * 1e3:9.2f} ms, backward "
            f"{cost.backward * 1e3:9.2f} ms, together {cost.both / mine.both:5.2f} x ours{memory}"
        )
    return "\n".join(lines)


def main(
    device: DeviceName = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes: does it run?")] = False,
    threads: Threads = 1,
) -> None:
    """Deformable attention, ours against grid_sample per level."""
    place = torch.device(device)
    torch.set_num_threads(threads)
    sides: dict[str, Attention] = {"ours": ours, "grid_sample per level": grid_sample_per_level}
    small = quick or device == "cpu"
    shapes = SMALL_SHAPES if small else PAPER_SHAPES
    cells = sum(d * h * w for d, h, w in shapes)
    batch, repeats = (1, 3 if quick else 7) if small else (4, 10)
    bandwidth = copy_bandwidth(place) if device == "cuda" else 0.0
    if device == "cuda":
        print(f"{torch.cuda.get_device_name(place)}: copies {bandwidth / 1e12:.2f} TB/s")
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        for what, queries in (("encoder", cells), ("decoder", 300)):
            costs = measure(
                sides, shapes, batch=batch, queries=queries, dtype=dtype, device=place,
                repeats=repeats,
            )  # fmt: skip
            title = (
                f"{what}: batch {batch}, {queries} queries, {cells} cells, {HEADS} heads of "
                f"{CHANNELS}, {len(shapes)} levels, {POINTS} points, {dtype}"
            )
            print(describe(title, costs), flush=True)
            if device == "cuda":
                print(_throughput(costs["ours"], batch, queries, len(shapes), dtype, bandwidth))
                if what == "encoder":
                    print(_goals(costs), flush=True)


def _throughput(
    cost: Cost, batch: int, queries: int, levels: int, dtype: torch.dtype, bandwidth: float
) -> str:
    samples = batch * queries * HEADS * levels * POINTS
    row = CHANNELS * torch.finfo(dtype).bits // 8
    gathered = 8 * samples * row  # eight corners of one head's channels
    atomics = 8 * samples * CHANNELS * 4  # float32 sums
    forward, backward = gathered / cost.forward, (gathered + atomics) / cost.backward
    floor_forward = gathered / L2_BYTES_PER_SECOND
    floor_backward = floor_forward + atomics / SECTOR_BYTES / ATOMIC_SECTORS_PER_SECOND
    return (
        f"  gathers {gathered / 1e9:.1f} GB forward at {forward / 1e12:.2f} TB/s "
        f"({forward / bandwidth:.1f} x copying), gathers and adds "
        f"{(gathered + atomics) / 1e9:.1f} GB backward at {backward / 1e12:.2f} TB/s\n"
        f"  {cost.forward / floor_forward:.1f} x the gather floor ({floor_forward * 1e3:.2f} ms) "
        f"forward, {cost.backward / floor_backward:.1f} x the gather and atomic floor "
        f"({floor_backward * 1e3:.2f} ms) backward"
    )


def _goals(costs: dict[str, Cost]) -> str:
    mine, peer = costs["ours"], costs["grid_sample per level"]
    speed, memory = peer.both / mine.both, mine.peak_bytes / max(peer.peak_bytes, 1)
    return (
        f"  goal {SPEED_GOAL:.0f} x grid_sample's speed: {speed:.1f} x, "
        f"{'reached' if speed >= SPEED_GOAL else 'missed'}; goal half its memory: "
        f"{memory:.2f}, {'reached' if memory <= MEMORY_GOAL else 'missed'}"
    )


if __name__ == "__main__":
    typer.run(main)
