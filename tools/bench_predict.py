"""Whole-case inference: seconds, windows per second, peak memory, against two others in one run.

    uv run tools/bench_predict.py [--device cuda] [--quick]

A volume of noise and blobs, a Retina U-Net with random weights, windows that overlap by half:
- ours: `predict_volume`, from the array to merged boxes.
- straightforward: window by window, one at a time, all pyramid levels and the segmentation, all
  anchors decoded and sorted, plain greedy suppression that ends at the 100 boxes asked for. Same
  windows, same boxes.
- MONAI: `sliding_window_inference` over the maps of the heads, as its own detectors do it: only the
  stitching, without a box. Its grid has fewer windows, so that it is compared per window.
Every contender is a process of its own; they take turns, so that a busy machine slows all. CPU
seconds (of all threads) move less with other work than wall-clock seconds.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelbridge.core.tiles import padded_tiles, read_window
from voxelbridge.core.train.steps import autocast, place
from voxelbridge.detect.box_coder import decode
from voxelbridge.detect.boxes import box_iou, clip_boxes, has_min_side
from voxelbridge.detect.build import build_detector, load_detect_config
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.postprocess import tile_center_weights
from voxelbridge.detect.predict import predict_volume
from voxelbridge.detect.retina_unet import RetinaUNet

Contender = Literal["ours", "straightforward", "MONAI"]
CONTENDERS: tuple[Contender, ...] = ("ours", "straightforward", "MONAI")
OVERLAP = 0.5
CLASSES = 1
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """What all contenders do."""

    preset: str
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    size: int  # of the volume's edges
    patch: int
    threads: int


@dataclass(frozen=True)
class Cost:
    """One pass over the case; `network_*` inside the network's forward."""

    wall: float
    cpu: float
    network_wall: float
    network_cpu: float
    windows: int
    boxes: NDArray[np.float32]  # (N, 6), none of MONAI


class ForwardClock:
    """Counts windows and seconds inside a network's forward."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device = device
        self.reset()
        network.register_forward_pre_hook(self._start)
        network.register_forward_hook(self._stop)

    def reset(self) -> None:
        """Forgets what was counted."""
        self.wall = self.cpu = 0.0
        self.windows = 0

    def now(self) -> tuple[float, float]:
        """Wall-clock seconds and CPU seconds of the process, after the device's work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def _start(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.windows += len(inputs[0])
        self.began = self.now()

    def _stop(self, *_: object) -> None:
        wall, cpu = self.now()
        self.wall += wall - self.began[0]
        self.cpu += cpu - self.began[1]


class Dense(nn.Module):
    """The heads' maps, with or without what only training needs."""

    def __init__(self, detector: RetinaUNet, *, everything: bool) -> None:
        super().__init__()
        self.detector = detector
        self.everything = everything

    def forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, C, d, h, w) of class logits and of deltas for each level."""
        network, levels = self.detector, list(self.detector.head_levels)
        features = network.encoder(patches)
        if self.everything:
            pyramid = network.neck(features)
            network.segmenter(pyramid[0]).softmax(dim=1)
            maps = [pyramid[level] for level in levels]
        else:
            maps = network.neck(features, levels=levels)
        classes = [network.head.classifier(level) for level in maps]
        scales = network.head.level_scales
        deltas = [network.head.regressor(m) * s for m, s in zip(maps, scales, strict=True)]
        return (*classes, *deltas)


def phantom(size: int) -> NDArray[np.float32]:
    """A volume (1, S, S, S) of noise with a bright blob in every 50^3 voxels."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, size, size, size), dtype=np.float32)
    for _ in range(max(1, (size // 50) ** 3)):
        edge = int(rng.integers(4, 16))
        z, y, x = rng.integers(0, size - edge, 3)
        image[0, z : z + edge, y : y + edge, x : x + edge] += 3.0
    return image


def straightforward(
    network: Dense, config: DetectConfig, image: NDArray[np.float32], device: torch.device
) -> Detections:
    """The same windows and rules, one window after the other."""
    size, post = config.patch_size, config.post_processing
    anchors = _anchors(network.detector, config, device)
    boxes, scores, labels, weights = [], [], [], []
    for start in padded_tiles(image.shape[1:], size, overlap=OVERLAP):
        patch = torch.from_numpy(read_window(image, start, size)[None].copy()).to(device)
        with torch.no_grad(), autocast(device, config.precision):
            maps = network(patch)
        half = len(maps) // 2
        rows = [m.permute(0, 2, 3, 4, 1).reshape(-1, CLASSES) for m in maps[:half]]
        moved = [m.permute(0, 2, 3, 4, 1).reshape(-1, 6) for m in maps[half:]]
        probability = torch.cat(rows).float().sigmoid().flatten()
        decoded = clip_boxes(decode(torch.cat(moved).float(), anchors), size)
        order = probability.sort(descending=True, stable=True).indices
        order = order[: min(post.candidates_per_patch, len(anchors))]
        order = order[probability[order] > post.min_score]
        order = order[has_min_side(decoded[order // CLASSES], post.min_size)]
        chosen, label = decoded[order // CLASSES], order % CLASSES
        kept = plain_nms(chosen, label, post.patch_iou, limit=post.boxes_per_patch)
        weights.append(tile_center_weights(chosen[kept], size).cpu())
        boxes.append((chosen[kept] + chosen.new_tensor([*start, *start])).cpu())
        scores.append(probability[order][kept].cpu())
        labels.append(label[kept].cpu())
    every, score, label, weight = map(torch.cat, (boxes, scores, labels, weights))
    best = score.sort(descending=True, stable=True).indices[: post.model_top_k]
    every, score, label, weight = every[best], score[best], label[best], weight[best]
    every = clip_boxes(every, image.shape[1:])
    order = (score * weight).sort(descending=True, stable=True).indices
    order = order[has_min_side(every[order], post.min_size)]
    kept = order[plain_nms(every[order], label[order], post.model_iou, limit=post.boxes_per_case)]
    kept = kept[score[kept].sort(descending=True, stable=True).indices]
    return Detections(boxes=every[kept], scores=score[kept], labels=label[kept])


def plain_nms(boxes: Tensor, labels: Tensor, threshold: float, *, limit: int) -> Tensor:
    """Rows kept of boxes given best first: take the best, drop what overlaps it, until enough."""
    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left) and len(kept) < limit:
        best = left[0]
        kept.append(best)
        same = labels[left] == labels[best]
        iou = box_iou(boxes[best][None], boxes[left])[0]
        drop = same & (iou > threshold)
        drop[0] = True
        left = left[~drop]
    return torch.stack(kept) if kept else left


def measured(name: Contender, setting: Setting) -> Callable[[NDArray[np.float32]], Cost]:
    """What one pass of a contender over a volume costs."""
    device = torch.device(setting.device)
    torch.manual_seed(0)
    torch.set_num_threads(setting.threads)
    overrides = [f"patch_size=[{setting.patch},{setting.patch},{setting.patch}]"]
    config = load_detect_config(setting.preset, [*overrides, f'precision="{setting.precision}"'])
    detector = build_detector(config, in_channels=1, num_classes=CLASSES).eval()
    assert isinstance(detector, RetinaUNet)
    # Heads that tell cells apart: at their first values all scores are nearly equal.
    last = detector.head.classifier[-1]
    assert isinstance(last, nn.Conv3d)
    nn.init.normal_(last.weight, std=0.2)
    place(detector, device, config.precision)
    network = detector if name == "ours" else Dense(detector, everything=name != "MONAI").eval()
    clock = ForwardClock(network, device)

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        if name == "ours":
            return predict_volume([(detector, config)], image, device=device).boxes.numpy()
        assert isinstance(network, Dense)
        if name == "straightforward":
            return straightforward(network, config, image, device).boxes.numpy()
        _stitch(network, config, image, device)
        return np.zeros((0, 6), np.float32)

    def cost(image: NDArray[np.float32]) -> Cost:
        clock.reset()
        wall, cpu = clock.now()
        boxes = run(image)
        after_wall, after_cpu = clock.now()
        return Cost(after_wall - wall, after_cpu - cpu, clock.wall, clock.cpu, clock.windows, boxes)

    return cost


def serve(name: Contender, setting: Setting, pipe: Connection) -> None:
    """A contender's process: one pass for every word received; at the end its memory (MiB)."""
    cost = measured(name, setting)
    image = phantom(setting.size)
    cost(phantom(setting.patch))  # compiles and loads what there is to load
    before = _peak_mib()
    pipe.send("ready")
    while pipe.recv() == "go":
        pipe.send(cost(image))
    gpu = torch.cuda.max_memory_allocated() / MIB if setting.device == "cuda" else 0.0
    pipe.send((before, _peak_mib(), gpu))


def bench(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A small volume: does it run?")] = False,
    preset: Annotated[str, typer.Option(help="A Retina U-Net.")] = "retunet_small",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the network.")] = "fp32",
    size: Annotated[int, typer.Option(min=64, help="Edge of the volume in voxels.")] = 300,
    patch: Annotated[int, typer.Option(min=16, help="Edge of the windows.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of every contender.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on the CPU.")] = 1,
) -> None:
    """Inference of one case by three ways with one network."""
    setting = Setting(preset, device, precision, 100 if quick else size, patch, threads)
    names: list[Contender] = [
        name for name in CONTENDERS if name != "MONAI" or find_spec("monai") is not None
    ]
    context = multiprocessing.get_context("spawn")
    pipes: dict[Contender, Connection] = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, setting, theirs), daemon=True).start()
        theirs.close()
        assert pipes[name].recv() == "ready"
    print(
        f"{preset}, {precision}, windows of {patch}^3, volume {setting.size}^3, {threads} threads"
    )
    costs: dict[Contender, list[Cost]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            pipes[name].send("go")
            costs[name].append(pipes[name].recv())
    print(
        "| | CPU s | wall s | windows | windows/s (CPU) | around the network | peak MiB (grown) |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in names:
        pipes[name].send("stop")
        print(_row(name, costs[name], *pipes[name].recv()), flush=True)
    for name in names[1:]:
        for clock in ("cpu", "wall"):
            ratios = _median(costs[name], clock) / _median(costs["ours"], clock)
            per_window = ratios * costs["ours"][0].windows / costs[name][0].windows
            print(f"{name} / ours, {clock}: {ratios:.2f} the case, {per_window:.2f} per window")
    ours, other = costs["ours"][0].boxes, costs["straightforward"][0].boxes
    same = ours.shape == other.shape and float(np.abs(ours - other).max(initial=0)) < 0.01
    print(f"boxes: {len(ours)}, {'the same' if same else 'others'} in the straightforward way")


def _row(name: str, costs: list[Cost], before: float, peak: float, gpu: float) -> str:
    cpu, wall = _median(costs, "cpu"), _median(costs, "wall")
    around = statistics.median((c.cpu - c.network_cpu) / c.network_cpu for c in costs)
    memory = f"{peak:,.0f} ({peak - before:,.0f})" + (f", GPU {gpu:,.0f}" if gpu else "")
    rate = costs[0].windows / cpu
    return (
        f"| {name} | {cpu:.1f} | {wall:.1f} | {costs[0].windows} | {rate:.1f} | "
        f"{100 * around:.1f} % | {memory} |"
    )


def _median(costs: list[Cost], clock: str) -> float:
    return statistics.median(getattr(cost, clock) for cost in costs)


def _stitch(
    network: Dense, config: DetectConfig, image: NDArray[np.float32], device: torch.device
) -> None:
    from monai.inferers.utils import sliding_window_inference

    with torch.no_grad(), autocast(device, config.precision):
        sliding_window_inference(
            torch.from_numpy(image)[None],
            config.patch_size,
            4,
            network,
            overlap=OVERLAP,
            mode="gaussian",
            sw_device=device,
            device=torch.device("cpu"),
        )


def _anchors(detector: RetinaUNet, config: DetectConfig, device: torch.device) -> Tensor:
    with torch.no_grad():
        empty = torch.zeros(1, 1, *config.patch_size, device=device)
        return detector(empty, segment=False).anchors.boxes()


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone; getrusage remembers the parent's
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    typer.run(bench)
