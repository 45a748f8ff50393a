"""From a normalised volume to one label map: windows, probabilities, all heads of a data set.

nnU-Net's inference (its code, defaults): windows overlap by half, a window counts by a Gaussian
around its centre, mirrored copies are averaged. Differs: probabilities are averaged, not logits;
the Gaussian (sigma 1/8 of the window) is symmetric about the centre and not cut off.

Memory follows one row of windows, not the volume: windows run along z, and planes that no later
window reaches are decoded at once. K outputs need K x patch depth x H x W x 4 bytes of the stored
grid: with 128 x 400 x 400 voxels 1.6 GiB for 21 outputs, 9.4 GiB for 123.
Shapes: K outputs of all heads together, C channels, D H W voxels of the stored (resampled) grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, groupby
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from voxelbridge.core.errors import DataError
from voxelbridge.core.tiles import Triple, padded_tiles, read_window
from voxelbridge.core.train.steps import autocast
from voxelbridge.pretrain_sup.label_space import Head, LabelSpace, decode_target
from voxelbridge.pretrain_sup.model import SegmentationNetwork

OVERLAP = 0.5
SIGMA = 1 / 8  # of the window's edge
THRESHOLD = 0.5  # of a sigmoid


@dataclass(frozen=True, eq=False)
class Predictor:
    """A network that answers for one data set, and how its windows are laid and averaged."""

    network: SegmentationNetwork  # one output layer for each of `heads`, in evaluation mode
    heads: tuple[Head, ...]  # of one data set
    overlapping: bool  # the data set has regions: a voxel may be in several targets
    stem: str
    patch_size: Triple
    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    mirror_axes: tuple[int, ...] = ()  # averaged over all subsets of these axes (0 = z)
    overlap: float = OVERLAP

    @classmethod
    def build(
        cls,
        network: SegmentationNetwork,
        space: LabelSpace,
        *,
        heads: Sequence[str],
        stem: str,
        patch_size: Triple,
        device: torch.device,
        precision: Literal["fp32", "bf16"] = "fp32",
        mirror_axes: Sequence[int] = (),
        overlap: float = OVERLAP,
    ) -> "Predictor":
        """The predictor of `heads`, which shares its weights with `network`, on its device."""
        chosen = tuple(space.head(name) for name in heads)
        datasets = {head.dataset for head in chosen}
        if len(datasets) != 1:
            raise ValueError(f"heads of one data set expected, got those of {sorted(datasets)}")
        return cls(
            _with_outputs(network, space, chosen).eval(),
            chosen,
            space.dataset(chosen[0].dataset).regions,
            stem,
            patch_size,
            device,
            precision,
            tuple(mirror_axes),
            overlap,
        )

    @property
    def num_outputs(self) -> int:
        """K: outputs of all heads together."""
        return sum(self.network.head_outputs[head.name] for head in self.heads)


def predict_labels(
    predictor: Predictor, image: NDArray[np.float32], *, shape: Triple | None = None
) -> NDArray[np.unsignedinteger[Any]]:
    """Original label ids of a normalised volume (C, D, H, W), 0 where no target is.

    On `shape` (None: the volume's own) over the same outer edges: probabilities are interpolated
    linearly, then decoded. Raises DataError where the network's output is not finite.
    """
    depth, height, width = image.shape[1:] if shape is None else shape
    painted = max(_painted(head) for head in predictor.heads)
    labels = np.zeros((depth, height, width), np.uint8 if painted < 1 << 8 else np.uint16)
    low, high, weight = _linear_taps(image.shape[1], depth)
    first = done = 0  # number of the block's first plane; output planes written so far
    before: Tensor | None = None  # the last plane of the block before
    for block in probability_planes(predictor, image):
        end = first + block.shape[1]
        while done < depth and high[done] < end:
            below = before if low[done] < first else block[:, low[done] - first]
            assert below is not None
            plane = torch.lerp(below, block[:, high[done] - first], float(weight[done]))
            if plane.shape[1:] != (height, width):
                plane = F.interpolate(plane[None], size=(height, width), mode="bilinear")[0]
            ids = merge_heads(predictor.heads, plane, overlapping=predictor.overlapping)
            labels[done] = ids.cpu().numpy()
            done += 1
        before, first = block[:, -1].clone(), end
    return labels


def merge_heads(heads: Sequence[Head], probabilities: Tensor, *, overlapping: bool) -> Tensor:
    """One map of original ids (...) from the probabilities (K, ...) of heads of one data set.

    `overlapping`: the targets of all heads are regions above one half, painted as one data set's
    (`decode_target`). Otherwise every head names its most probable target, or background (for
    sigmoids: none above one half); where heads name different targets the most probable is taken.
    """
    flat = probabilities.reshape(len(probabilities), 1, 1, -1)
    space = probabilities.shape[1:]
    if overlapping:
        targets = tuple(target for head in heads for target in head.targets)
        return decode_target(replace(heads[0], targets=targets), flat > THRESHOLD).reshape(space)
    ids = torch.zeros(flat.shape[1:], dtype=torch.int64, device=flat.device)
    best = torch.zeros(flat.shape[1:], dtype=flat.dtype, device=flat.device)
    for head, own in zip(heads, flat.split([_outputs(head) for head in heads]), strict=True):
        probability, number = own.max(dim=0)
        if head.regions:  # the joint layout has a sigmoid for each of exclusive targets
            number = torch.where(probability > THRESHOLD, number + 1, 0)
        wins = (number > 0) & (probability > best)
        ids = torch.where(wins, decode_target(replace(head, regions=False), number), ids)
        best = torch.where(wins, probability, best)
    return ids.reshape(space)


def probability_planes(predictor: Predictor, image: NDArray[np.float32]) -> Iterator[Tensor]:
    """Probabilities (K, n, H, W) of a normalised volume (C, D, H, W), n >= 1 planes at a time.

    Planes come in their order, each once, in memory that the next ones overwrite. An axis shorter
    than the window is padded with 0 on both sides, as in training. Raises DataError where the
    network's output is not finite.
    """
    size, extent = predictor.patch_size, image.shape[1:]
    starts = list(padded_tiles(extent, size, overlap=predictor.overlap))
    origin = starts[0]  # below 0 on axes that are padded
    padded = tuple(max(edges) for edges in zip(extent, size, strict=True))
    shares = [
        _shares(sorted({start[axis] - origin[axis] for start in starts}), size[axis], padded[axis])
        for axis in range(3)
    ]
    device = _where_to_add(predictor, padded)
    total = torch.zeros((predictor.num_outputs, size[0], *padded[1:]), device=device)
    rows = [(z, list(row)) for z, row in groupby(starts, key=lambda start: start[0])]
    for number, (z, row) in enumerate(rows):
        for start in row:
            found = _window_probabilities(predictor, read_window(image, start, size)).to(device)
            z_share, y_share, x_share = (
                shares[axis][start[axis] - origin[axis]].to(device) for axis in range(3)
            )
            weights = z_share[:, None, None] * y_share[:, None] * x_share
            y, x = start[1] - origin[1], start[2] - origin[2]
            total[:, :, y : y + size[1], x : x + size[2]] += found.mul_(weights)
        following = rows[number + 1][0] if number + 1 < len(rows) else z + size[0]
        inside = [slice(-o, -o + n) for o, n in zip(origin[1:], extent[1:], strict=True)]
        finished = total[:, max(-z, 0) : min(following, extent[0]) - z, inside[0], inside[1]]
        if not finished.sum().isfinite():
            raise DataError("the network's output is not finite; check the image and the run")
        yield finished
        step = following - z
        kept = total[:, step:]
        total[:, : size[0] - step] = kept if 2 * step >= size[0] else kept.clone()
        total[:, size[0] - step :] = 0


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All subsets of `axes`, the empty one first."""
    return list(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))


@torch.no_grad()
def _window_probabilities(predictor: Predictor, window: NDArray[np.float32]) -> Tensor:
    """(C, *patch) -> (K, *patch) float32 on the predictor's device, the mean of all mirrorings."""
    image = torch.from_numpy(np.ascontiguousarray(window)).to(predictor.device)[None]
    names = [head.name for head in predictor.heads]
    total: Tensor | None = None
    for axes in mirrorings(predictor.mirror_axes):
        turned = [2 + axis for axis in axes]
        with autocast(predictor.device, predictor.precision):
            logits = predictor.network.predict(image.flip(turned), stem=predictor.stem, heads=names)
        probabilities = torch.cat(
            [_probabilities(head, logits.pop(head.name).float()) for head in predictor.heads], dim=1
        ).flip(turned)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    return total[0] / len(mirrorings(predictor.mirror_axes))


def _probabilities(head: Head, logits: Tensor) -> Tensor:
    return logits.sigmoid() if head.regions else logits.softmax(dim=1)


def _outputs(head: Head) -> int:
    return len(head.targets) + (not head.regions)


def _painted(head: Head) -> int:
    """The largest label id that the head may write."""
    return max(max(*target.ids, target.paint or 0) for target in head.targets)


def _shares(starts: Sequence[int], edge: int, extent: int) -> dict[int, Tensor]:
    """By window start the share (edge,) that the window has in each of its voxels, on one axis.

    The Gaussian of a window is a product over axes and windows lie on a grid, so that the shares of
    all windows that cover a voxel are products too, and add up to 1.
    """
    place = (np.arange(edge) - (edge - 1) / 2) / (SIGMA * edge)
    gaussian = np.exp(-0.5 * place**2)
    total = np.zeros(extent)
    for start in starts:
        total[start : start + edge] += gaussian
    return {
        start: torch.from_numpy((gaussian / total[start : start + edge]).astype(np.float32))
        for start in starts
    }


def _linear_taps(
    old: int, new: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Planes below and above each of `new` positions over equal outer edges; the upper's weight."""
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    position = np.asarray(np.clip(centres, 0, old - 1), dtype=np.float64)
    low = np.floor(position).astype(np.int64)
    weight = np.asarray(position - low, dtype=np.float64)
    return low, np.minimum(low + (weight > 0), old - 1), weight


def _where_to_add(predictor: Predictor, padded: Sequence[int]) -> torch.device:
    """The network's device where it has room for the sums, else the CPU."""
    if predictor.device.type != "cuda":
        return predictor.device
    free, _ = torch.cuda.mem_get_info(predictor.device)
    needed = 4 * predictor.num_outputs * predictor.patch_size[0] * padded[1] * padded[2]
    return predictor.device if 2 * needed < free else torch.device("cpu")


def _with_outputs(
    network: SegmentationNetwork, space: LabelSpace, heads: Sequence[Head]
) -> SegmentationNetwork:
    """The network with an output layer per head: of a joint layer no other output is computed."""
    outputs = {head.name: space.num_outputs(head) for head in heads}
    own = SegmentationNetwork(network.encoder, network.decoder, outputs)
    with torch.no_grad():
        for head in heads:
            layer, channels = network.heads[space.layer_of(head)], space.channels_of(head)
            for level, source in zip(own.heads[head.name].levels, layer.levels, strict=True):
                state = {name: t[channels] for name, t in source.state_dict().items()}
                level.to(next(source.parameters()).device)
                level.load_state_dict(state)
    return own
