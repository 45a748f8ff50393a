"""Preparing cases: ours against nnU-Net v2's preprocessor on one raw data set, in one process.

    uv run --isolated --no-project --with nnunetv2 --with-editable "packages/core[data]" \\
        tools/bench_prepare.py --volumes FOLDER [--quick] [--json]

FOLDER holds ct_lung_nodule/ and ct_abdomen/ with their labels. Both sides read NIfTI, crop,
resample to 1 mm, normalise, find the places of each label and write compressed arrays. One thread;
the sides alternate, CPU seconds are compared. Peak memory is measured in one child process per
side. Without nnunetv2 only our side runs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from voxelbridge.core.data.array_file import read_whole
from voxelbridge.core.data.case_store import CaseStoreWriter
from voxelbridge.core.data.foreground import class_locations
from voxelbridge.core.data.image_io import read_image, write_image
from voxelbridge.core.data.normalize import CTPercentile
from voxelbridge.core.data.preprocess import crop_mapping, labels_to_stored, preprocess
from voxelbridge.core.data.resample import Resampling
from voxelbridge.core.data.volume import Volume, reorientation_to_lps

SPACING_MM = (1.0, 1.0, 1.0)
PATCH_SIZE = (128, 128, 128)
CT = CTPercentile(lower=-1000.0, upper=800.0, mean=40.0, std=250.0)
CASES = {
    "ct_lung_nodule": ("ct_lung_nodule/ct.nrrd", "ct_lung_nodule/nodule_seg.nrrd"),
    "ct_abdomen": ("ct_abdomen/ct.nii.gz", "ct_abdomen/vertebrae_seg.nii.gz"),
}
RULES = {
    "ours": Resampling(),
    "ours, nnU-Net's rules": Resampling(image="nnunet", labels="nnunet"),
}
PEER = "nnU-Net"
NUM_LABELS = 8
LARGEST_LABEL_DIFFERENCE = 1e-4  # part of the voxels: nnU-Net marks zeros at the border first

Side = Literal["ours", "ours, nnU-Net's rules", "nnU-Net"]


def main() -> None:
    """Command line: prints a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--volumes", type=Path, required=True, help="folder of real volumes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small crops, one round")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--memory-of", choices=[*RULES, PEER], help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
        if arguments.memory_of is not None:
            print(json.dumps(_peak_memory(arguments.memory_of, arguments.raw, Path(folder))))
            return
        raw = Path(folder) / "raw"
        write_raw(raw, arguments.volumes, quick=arguments.quick)
        rounds = 1 if arguments.quick else arguments.rounds
        result = measure(raw, Path(folder), rounds=rounds)
        result["peak_memory_mib"] = _memory_of_children(raw, arguments.volumes)
    if arguments.json:
        print(json.dumps(result))
        return
    _print(result)


def write_raw(raw: Path, volumes: Path, *, quick: bool) -> None:
    """A raw data set in nnU-Net's layout; LPS order, so that both sides keep the axes."""
    for case, (image_file, label_file) in CASES.items():
        image = read_image(volumes / image_file)
        labels = read_image(volumes / label_file)
        ids = np.unique(labels.array)
        dense = Volume(np.searchsorted(ids, labels.array).astype(np.uint8), labels.grid)
        for volume, path in (
            (image, raw / "imagesTr" / f"{case}_0000.nii.gz"),
            (dense, raw / "labelsTr" / f"{case}.nii.gz"),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            canonical = reorientation_to_lps(volume.grid).apply_volume(volume)
            write_image(path, _crop(canonical) if quick else canonical)


def measure(raw: Path, folder: Path, *, rounds: int) -> dict[str, Any]:
    """CPU seconds of each side and case, the peer's multiple of ours, and the stored sizes."""
    sides = _sides(raw, folder)
    seconds: dict[str, dict[str, list[float]]] = {s: {c: [] for c in CASES} for s in sides}
    for _ in range(rounds):
        for case in CASES:
            for side, run in sides.items():
                for old in (folder / _slug(side)).rglob(f"{case}*.*"):
                    old.unlink()  # nnU-Net cannot write over a file
                started = time.process_time()
                run(case)
                seconds[side][case].append(time.process_time() - started)
    result: dict[str, Any] = {
        "cpu_s": {s: {c: statistics.median(v) for c, v in by.items()} for s, by in seconds.items()},
        "mib": {side: _size_mib(folder / _slug(side)) for side in sides},
    }
    if PEER in sides:
        result["times_faster"] = {
            side: {
                case: statistics.median(
                    peer / own
                    for own, peer in zip(seconds[side][case], seconds[PEER][case], strict=True)
                )
                for case in CASES
            }
            for side in RULES
        }
        result["labels_differ"] = _label_differences(folder)
    return result


def _sides(raw: Path, folder: Path) -> dict[str, Callable[[str], None]]:
    sides: dict[str, Callable[[str], None]] = {
        side: _our_side(raw, folder / _slug(side), rules) for side, rules in RULES.items()
    }
    if find_spec("nnunetv2") is not None:
        sides[PEER] = _peer_side(raw, folder / _slug(PEER))
    return sides


def _our_side(raw: Path, store: Path, rules: Resampling) -> Callable[[str], None]:
    writer = CaseStoreWriter(store, patch_size=PATCH_SIZE)

    def run(case: str) -> None:
        image = read_image(raw / "imagesTr" / f"{case}_0000.nii.gz")
        labels = read_image(raw / "labelsTr" / f"{case}.nii.gz").array[0]
        mapping = crop_mapping(image)
        prepared = preprocess(
            image, mapping, spacing_mm=SPACING_MM, normalization=[CT], resampling=rules
        )
        del image  # the file's voxels are not needed while the arrays are written
        stored = labels_to_stored(labels, prepared.mapping, resampling=rules, spacing_mm=SPACING_MM)
        writer.write_case(
            case,
            prepared.image,
            grid=prepared.mapping.stored_grid,
            boxes=[],
            labels=[],
            mapping=prepared.mapping,
            segmentation=stored,
            locations=class_locations(stored, range(1, NUM_LABELS + 1)),
        )

    return run


def _peer_side(raw: Path, out: Path) -> Callable[[str], None]:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import (  # type: ignore[import-not-found]
        DefaultPreprocessor,
    )
    from nnunetv2.utilities.plans_handling.plans_handler import (  # type: ignore[import-not-found]
        PlansManager,
    )

    out.mkdir(parents=True)
    plans = PlansManager(_plans())
    configuration = plans.get_configuration("3d_fullres")
    labels = {"background": 0, **{f"label{n}": n for n in range(1, NUM_LABELS + 1)}}
    description = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
    }
    preprocessor = DefaultPreprocessor(verbose=False)

    def run(case: str) -> None:
        preprocessor.run_case_save(
            str(out / case),
            [str(raw / "imagesTr" / f"{case}_0000.nii.gz")],
            str(raw / "labelsTr" / f"{case}.nii.gz"),
            plans,
            configuration,
            description,
        )

    return run


def _plans() -> dict[str, Any]:
    # what nnU-Net's planner writes for one CT channel, at a spacing of 1 mm; its default settings
    def resampling(*, is_seg: bool, order: int) -> dict[str, Any]:
        return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}

    function = "resample_data_or_seg_to_shape"
    return {
        "dataset_name": "Dataset001_Bench",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "mean": CT.mean,
                "std": CT.std,
                "percentile_00_5": CT.lower,
                "percentile_99_5": CT.upper,
            }
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(PATCH_SIZE),
                "spacing": list(SPACING_MM),
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "architecture": {},  # preprocessing builds no network
                "resampling_fn_data": function,
                "resampling_fn_data_kwargs": resampling(is_seg=False, order=3),
                "resampling_fn_seg": function,
                "resampling_fn_seg_kwargs": resampling(is_seg=True, order=1),
            }
        },
    }


def _label_differences(folder: Path) -> dict[str, float]:
    """Part of the voxels whose label differs between nnU-Net and ours with its rules; checked."""
    store = folder / _slug("ours, nnU-Net's rules") / "cases"
    differences: dict[str, float] = {}
    for case in CASES:
        ours = _labels_in(store / f"{case}.segmentation.b2nd")
        theirs = _labels_in(folder / _slug(PEER) / f"{case}_seg.b2nd")[0]
        part = float(np.mean(ours != np.maximum(theirs, 0)))  # -1 marks zeros at the border
        if part > LARGEST_LABEL_DIFFERENCE:
            raise SystemExit(f"error: {case}: {part:.2g} of the labels differ from nnU-Net's")
        differences[case] = part
    return differences


def _labels_in(path: Path) -> NDArray[Any]:
    array = blosc2.open(str(path), mode="r")
    assert isinstance(array, blosc2.NDArray)
    return read_whole(array)


def _peak_memory(side: str, raw: Path, folder: Path) -> dict[str, float]:
    # in a fresh process: this side alone, the imports it needs included
    run = (
        _peer_side(raw, folder / "out")
        if side == PEER
        else _our_side(raw, folder / "out", RULES[side])
    )
    peaks: dict[str, float] = {}
    for case in CASES:
        run(case)
        peaks[case] = _peak_mib()
    return peaks


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent before the child took its own program
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return float(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _memory_of_children(raw: Path, volumes: Path) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for side in [*RULES, *([PEER] if find_spec("nnunetv2") is not None else [])]:
        options = ["--volumes", str(volumes), "--memory-of", side, "--raw", str(raw)]
        done = subprocess.run(
            [sys.executable, __file__, *options], check=True, capture_output=True, text=True
        )
        peaks[side] = max(json.loads(done.stdout.splitlines()[-1]).values())
    return peaks


def _print(result: dict[str, Any]) -> None:
    for side, by_case in result["cpu_s"].items():
        for case, seconds in by_case.items():
            ratio = result.get("times_faster", {}).get(side, {}).get(case)
            faster = "" if ratio is None else f"  {ratio:5.1f}x as fast as {PEER}"
            print(f"{case:15s} {side:22s} {seconds:7.2f} CPU s{faster}")
    for side, peak in result["peak_memory_mib"].items():
        print(f"{side:22s} peak memory {peak:6.0f} MiB, files {result['mib'][side]:.0f} MiB")
    for case, part in result.get("labels_differ", {}).items():
        print(f"{case:15s} labels by nnU-Net's rules: {part:.1e} of the voxels differ")
    if "times_faster" not in result:
        print("nnunetv2 is not installed here: only our side ran (see --help)")


def _slug(side: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in side)


def _size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def _crop(volume: Volume) -> Volume:
    quarter = tuple(n // 4 for n in volume.grid.shape)
    size = tuple(n // 2 for n in volume.grid.shape)
    window = tuple(slice(q, q + n) for q, n in zip(quarter, size, strict=True))
    return Volume(volume.array[(slice(None), *window)], volume.grid.cropped(quarter, size))


if __name__ == "__main__":
    main()
