"""How fast our ResEnc-L trains, beside the same network of dynamic-network-architectures.

Both networks run the same step (forward and backward, batch 1) in turns in one process, so that
what else the machine does hits both alike; printed are medians and their ratio. Run with
`uv run tools/bench_encoder.py`.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

from voxelbridge.core.arch.encoder import ResEncoder
from voxelbridge.core.arch.presets import RESENC_L

Row = dict[str, float | int | str | None]

SMALLEST = 64  # voxels; the deepest map needs more than one cell


def main() -> None:
    """Measures and prints; see --help for the options."""
    typer.run(bench)


def bench(
    sizes: Annotated[str, typer.Option(help="Edges of the cubic patches, in voxels.")] = "64,96",
    repeats: Annotated[int, typer.Option(min=1, help="Steps measured per network.")] = 3,
    *,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0: its own choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Step times of ResEnc-L, ours and the peer's, in float32 and under bfloat16 autocast."""
    edges = [int(edge) for edge in sizes.split(",")]
    if any(edge < SMALLEST or edge % 32 for edge in edges):
        raise typer.BadParameter(f"patch edges must be multiples of 32 from {SMALLEST} on")
    if threads:
        torch.set_num_threads(threads)
    ours, peer = build_pair(torch.device(device))
    rows = []
    for edge in edges:
        for precision in ("fp32", "bf16"):
            row = measure_pair(ours, peer, edge=edge, precision=precision, repeats=repeats)
            rows.append(row)
            if not as_json:
                print(describe(row), flush=True)
    if as_json:
        facts = {
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "repeats": repeats,
            "steps": rows,
        }
        print(json.dumps(facts, indent=2))


def describe(row: Row) -> str:
    """One line of the table."""
    line = f"{row['edge']}^3 {row['precision']}: ours {row['ours_s']:.3f} s"
    if row["peer_s"] is None:
        return f"{line} (dynamic-network-architectures is not installed: no comparison)"
    return f"{line}, peer {row['peer_s']:.3f} s, peer / ours = {row['ratio']:.3f}"


def build_pair(device: torch.device) -> tuple[nn.Module, nn.Module | None]:
    """Our ResEnc-L and the peer's, with the same weights; None where the peer is not installed."""
    ours = ResEncoder(RESENC_L)
    try:
        from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
    except ImportError:
        return ours.to(device), None
    network: Any = ResidualEncoder  # its type hints exclude the nested lists it wants
    peer = network(
        1,
        len(RESENC_L.features),
        list(RESENC_L.features),
        nn.Conv3d,
        [list(kernel) for kernel in RESENC_L.kernels],
        [list(stride) for stride in RESENC_L.strides],
        list(RESENC_L.blocks),
        conv_bias=RESENC_L.conv_bias,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
    )
    with torch.no_grad():
        for theirs, mine in zip(peer.parameters(), ours.parameters(), strict=True):
            mine.copy_(theirs)
    return ours.to(device), peer.to(device)


def measure_pair(
    ours: nn.Module, peer: nn.Module | None, *, edge: int, precision: str, repeats: int
) -> Row:
    """Median step times after one unmeasured step each; who starts changes every turn."""
    device = next(ours.parameters()).device
    image = torch.randn(1, 1, edge, edge, edge, generator=torch.Generator().manual_seed(0))
    image = image.to(device)
    steps: dict[str, Callable[[], None]] = {"ours": lambda: training_step(ours, image, precision)}
    if peer is not None:
        steps["peer"] = lambda: training_step(peer, image, precision)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for turn in range(repeats):
        for name in sorted(steps, reverse=bool(turn % 2)):
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "edge": edge,
        "precision": precision,
        "ours_s": medians["ours"],
        "peer_s": medians.get("peer"),
        "ratio": medians["peer"] / medians["ours"] if "peer" in medians else None,
    }


def training_step(encoder: nn.Module, image: Tensor, precision: str) -> None:
    """Forward, backward and release of the gradients; waits for the device."""
    with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs = encoder(image)
    torch.stack([output.float().mean() for output in outputs]).sum().backward()
    encoder.zero_grad(set_to_none=True)
    if image.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
