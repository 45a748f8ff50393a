"""Augmented patches per CPU second: ours against nnU-Net v2's own loader and transforms.

    uv run --isolated --no-project --with nnunetv2 --with-editable "packages/core[data]" \\
        tools/bench_augment.py --volumes FOLDER [--quick] [--json]

FOLDER holds ct_lung_nodule/ and ct_abdomen/ with their labels; both are brought to 1 mm and stored
once by us and once by nnU-Net's own writer, with equal voxels. Each side then makes patches of
128^3 (image and labels) at uniform positions: rotation by +-30 degrees, scale 0.7 to 1.4, mirroring
and nothing else. nnU-Net reads its enlarged patch through nnUNetDataLoader and transforms it with
batchgeneratorsv2. One thread, alternating rounds in one process, CPU seconds; ratios are medians
over the rounds.
Without nnunetv2 only our side runs.

Then each transform of intensities on one patch of 128^3, in CPU milliseconds of one thread, ours
against batchgenerators (the library of nnDetection; left out where it is not installed),
nnDetection's list as it is drawn, and our loader with and without that list. With a GPU, ours there
too, in milliseconds of the clock.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.augment_intensity import IntensityAugmentation, IntensityParams
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.image_io import read_image
from voxelbridge.core.data.normalize import CTPercentile
from voxelbridge.core.data.patches import uniform_start
from voxelbridge.core.data.preprocess import crop_mapping, labels_to_stored, preprocess

SPACING_MM = (1.0, 1.0, 1.0)
PATCH = (128, 128, 128)
CT = CTPercentile(lower=-1000.0, upper=800.0, mean=40.0, std=250.0)
CASES = {
    "ct_lung_nodule": ("ct_lung_nodule/ct.nrrd", "ct_lung_nodule/nodule_seg.nrrd"),
    "ct_abdomen": ("ct_abdomen/ct.nii.gz", "ct_abdomen/vertebrae_seg.nii.gz"),
}
MIXES = {"as in training": 0.2, "always rotated and scaled": 1.0, "only mirrored": 0.0}
OURS, PEER = "ours", "nnU-Net"
LIST = "nnDetection's list"
INTENSITIES = {  # what of `IntensityParams` makes a transform that changes something
    "noise": {"noise_std": [0.05], "noise_seed": [1.0]},
    "blur": {"blur_sigma": [[0.75, 0.75, 0.75]]},
    "brightness": {"brightness": [1.2]},
    "contrast": {"contrast": [1.2]},
    "inverted gamma": {"inverted_gamma": [1.3]},
    "gamma": {"gamma": [1.3]},
    "low resolution": {"zoom": [[0.7, 0.7, 0.7]]},
}

MakePatch = Callable[[], Any]  # Any: a batch of either side


@dataclass(frozen=True)
class Setting:
    """How much is measured."""

    rounds: int
    patches: int  # per round and side


FULL = Setting(5, 20)
QUICK = Setting(2, 6)


def main() -> None:
    """Command line: prints a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--volumes", type=Path, required=True, help="folder of real volumes")
    parser.add_argument("--quick", action="store_true", help="fewer patches")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if missing := [
        p for pair in CASES.values() for p in pair if not (arguments.volumes / p).is_file()
    ]:
        print(f"left out: {arguments.volumes} has no {missing[0]}")
        return
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        torch.set_num_threads(1)
        result = measure(arguments.volumes, Path(folder), QUICK if arguments.quick else FULL)
    if arguments.json:
        print(json.dumps(result))
        return
    intensity, loader = result.pop("intensity_ms"), result.pop("loader")
    for mix, row in result.items():
        ratio = f"  ratio {row['ratio']:.1f}x" if "ratio" in row else "  (nnunetv2 not installed)"
        rates = "  ".join(f"{side} {row[side]:6.1f}/s" for side in (OURS, PEER) if side in row)
        print(f"{mix:26s} {rates}{ratio}; ours reads {row['voxels_read']:.2f} x the patch's voxels")
    for name, row in intensity.items():
        print(f"{name:26s} " + "  ".join(f"{side} {ms:7.1f} ms" for side, ms in row.items()))
    print("as in training, patches/s: " + ", ".join(f"{n} {r:.1f}" for n, r in loader.items()))


def measure(volumes: Path, folder: Path, setting: Setting) -> dict[str, dict[str, Any]]:
    """Patches per CPU second of each side for each mixture of transforms, and intensities."""
    with_peer = find_spec("nnunetv2") is not None
    (folder / PEER).mkdir()
    writer = CaseStoreWriter(folder / OURS, patch_size=PATCH)
    for name, paths in CASES.items():
        _store_case(writer, folder, name, [volumes / path for path in paths], peer=with_peer)
    writer.finish()
    store = CaseStore.open(folder / OURS)
    result: dict[str, dict[str, Any]] = {}
    for mix, probability in MIXES.items():
        augmentation = SpatialAugmentation(
            rotation_probability=probability, scale_probability=probability
        )
        sides: dict[str, MakePatch] = {OURS: _ours(store, augmentation)}
        if with_peer:
            sides[PEER] = _peer(folder / PEER, augmentation)
        result[mix] = _compare(sides, setting) | {"voxels_read": _voxels_read(augmentation)}
    image, _ = _ours(store, SpatialAugmentation.none())()
    result["intensity_ms"] = _intensity_ms(image, setting)
    result["loader"] = _loader_rates(store, setting)
    return result


def _intensity_ms(image: torch.Tensor, setting: Setting) -> dict[str, dict[str, float]]:
    """Milliseconds per patch (1, 1, D, H, W) of each transform, and of the list as drawn."""
    drawn = IntensityAugmentation.nndetection().sample_batch(np.random.default_rng(0), 400, 1)
    table = drawn.to_array()
    jobs = {
        name: [_only(changes).to_array()[None]] * setting.rounds
        for name, changes in INTENSITIES.items()
    } | {LIST: [table[n : n + 1] for n in range(20 * setting.rounds)]}
    result: dict[str, dict[str, float]] = {}
    for name, rows in jobs.items():
        result[name] = {"ours": _ms_of(image, rows)}
        if torch.cuda.is_available():
            result[name]["ours on the GPU"] = _ms_of(image.cuda(), rows * 5)
        if find_spec("batchgenerators") is not None and name in _PEERS:
            result[name]["batchgenerators"] = _peer_ms(name, image[0].numpy(), setting.rounds)
    return result


def _only(changes: dict[str, Any]) -> IntensityParams:
    identity = IntensityParams.identity(1)
    return replace(identity, **{n: np.array(v, np.float32) for n, v in changes.items()})


def _ms_of(image: torch.Tensor, rows: list[NDArray[np.float32]]) -> float:
    IntensityParams.from_array(rows[0]).apply(image)
    clock = time.perf_counter if image.is_cuda else time.process_time
    seconds = []
    for row in rows:
        started = clock()
        IntensityParams.from_array(row).apply(image)
        if image.is_cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    few = len(rows) <= 5 * FULL.rounds
    return 1e3 * (statistics.median(seconds) if few else statistics.fmean(seconds))


_PEER_GAMMA = {"gamma_range": (1.3, 1.3), "retain_stats": True, "per_channel": True}
_PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "noise": ("noise.gaussian_noise", {"noise_variance": (0.05, 0.05)}),
    "blur": ("noise.gaussian_blur", {"sigma_range": (0.75, 0.75)}),
    "brightness": ("color.brightness_multiplicative", {"multiplier_range": (1.2, 1.2)}),
    "contrast": ("color.contrast", {"contrast_range": (1.2, 1.2)}),
    "inverted gamma": (
        "color.gamma",
        {**_PEER_GAMMA, "invert_image": True},
    ),
    "gamma": ("color.gamma", _PEER_GAMMA),
}  # fmt: skip


def _peer_ms(name: str, image: NDArray[np.float32], rounds: int) -> float:
    place, settings = _PEERS[name]
    family, function = place.split(".")
    module = import_module(f"batchgenerators.augmentations.{family}_augmentations")
    seconds = []
    for _ in range(rounds):
        copy = image.copy()  # the library writes into what it gets
        started = time.process_time()
        getattr(module, f"augment_{function}")(copy, **settings)
        seconds.append(time.process_time() - started)
    return 1e3 * statistics.median(seconds)


def _loader_rates(store: CaseStore, setting: Setting) -> dict[str, float]:
    """Patches per CPU second, turned and scaled as in training, without and with intensities."""
    plain = _ours(store, SpatialAugmentation())
    rng = np.random.default_rng(1)
    intensity = IntensityAugmentation.nndetection()

    def changed() -> None:
        image, _ = plain()
        intensity.sample_batch(rng, 1, 1).apply(image)

    sides: dict[str, MakePatch] = {"without intensities": plain, "with them": changed}
    rates = _compare(sides, replace(setting, patches=10 * setting.patches))
    return {name: rates[name] for name in ("without intensities", "with them")}


def _compare(sides: dict[str, MakePatch], setting: Setting) -> dict[str, float]:
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for make in sides.values():
        make()  # opens files, builds grids
    for _ in range(setting.rounds):
        for side, make in sides.items():
            started = time.process_time()
            for _ in range(setting.patches):
                make()
            rates[side].append(setting.patches / (time.process_time() - started))
    row = {side: statistics.median(rate) for side, rate in rates.items()}
    if PEER in rates and OURS in rates:
        pairs = zip(rates[OURS], rates[PEER], strict=True)
        row["ratio"] = statistics.median(ours / peer for ours, peer in pairs)
    return row


def _store_case(
    writer: CaseStoreWriter, folder: Path, name: str, paths: list[Path], *, peer: bool
) -> None:
    volume = read_image(paths[0])
    mapping = crop_mapping(volume)
    prepared = preprocess(volume, mapping, spacing_mm=SPACING_MM, normalization=[CT])
    labels = read_image(paths[1]).array[0].astype(np.int32)
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)
    stored = labels_to_stored(labels, prepared.mapping).astype(np.int32)
    grid = prepared.mapping.stored_grid
    writer.write_case(name, prepared.image, grid=grid, boxes=[], labels=[], segmentation=stored)
    if peer:
        _store_peer_case(folder / PEER / name, prepared.image, stored)


def _store_peer_case(path: Path, image: NDArray[np.float32], labels: NDArray[np.int32]) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import (  # type: ignore[import-not-found]
        comp_blosc2_params,
        nnUNetDatasetBlosc2,
    )

    blocks, chunks = comp_blosc2_params(image.shape, PATCH, image.itemsize)
    seg = labels[None].astype(np.int16)
    seg_blocks, seg_chunks = comp_blosc2_params(seg.shape, PATCH, seg.itemsize)
    nnUNetDatasetBlosc2.save_case(
        image,
        seg,
        {"class_locations": {}},
        str(path),
        chunks=chunks,
        blocks=blocks,
        chunks_seg=seg_chunks,
        blocks_seg=seg_blocks,
    )


def _ours(store: CaseStore, augmentation: SpatialAugmentation) -> MakePatch:
    rng = np.random.default_rng(0)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        record = store.cases[int(rng.integers(len(store.cases)))]
        params = augmentation.sample(rng, PATCH)
        start, size = params.source_box(uniform_start(rng, record.shape[1:], PATCH))
        image = params.apply_image(store.read_patch(record.case_id, start, size))
        labels = params.apply_labels(store.read_segmentation_patch(record.case_id, start, size))
        return torch.from_numpy(np.stack([image])), torch.from_numpy(np.stack([labels]))

    return make


def _peer(folder: Path, augmentation: SpatialAugmentation) -> MakePatch:
    # The settings of nnU-Net's default trainer, cut down to its spatial transforms.
    from batchgeneratorsv2.transforms.spatial.mirroring import (  # type: ignore[import-not-found]
        MirrorTransform,
    )
    from batchgeneratorsv2.transforms.spatial.spatial import (  # type: ignore[import-not-found]
        SpatialTransform,
    )
    from batchgeneratorsv2.transforms.utils.compose import (  # type: ignore[import-not-found]
        ComposeTransforms,
    )
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import (  # type: ignore[import-not-found]
        get_patch_size,
    )
    from nnunetv2.training.dataloading.data_loader import (  # type: ignore[import-not-found]
        nnUNetDataLoader,
    )
    from nnunetv2.training.dataloading.nnunet_dataset import (  # type: ignore[import-not-found]
        nnUNetDatasetBlosc2,
    )

    angle = (-np.pi / 6, np.pi / 6)
    enlarged = get_patch_size(PATCH, angle, angle, angle, (0.85, 1.25))
    spatial = SpatialTransform(
        PATCH,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=augmentation.rotation_probability,
        rotation=angle,
        p_scaling=augmentation.scale_probability,
        scaling=augmentation.scale_range,
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    loader = nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(folder)),
        1,
        enlarged,
        PATCH,
        SimpleNamespace(all_labels=list(range(1, 9)), has_ignore_label=False),
        oversample_foreground_percent=0.0,
        transforms=ComposeTransforms([spatial, MirrorTransform(allowed_axes=(0, 1, 2))]),
    )
    return lambda: next(loader)


def _voxels_read(augmentation: SpatialAugmentation) -> float:
    rng = np.random.default_rng(0)
    sizes = [augmentation.sample(rng, PATCH).source_box((0, 0, 0))[1] for _ in range(2000)]
    return float(np.prod(sizes, axis=1).mean() / np.prod(PATCH))


if __name__ == "__main__":
    main()
