"""MultiTalent on a handful of real volumes: nine data sets, one network, minutes on a CPU.

    uv run tools/multitalent_demo.py --data SAMPLES --out multitalent-demo

Builds nnU-Net data sets from the sample volumes (organs, vertebrae, aorta, lungs, chest, glioma
with two channels, a lung nodule, tumours in brain and breast MR) and trains one network on all of
them: half an hour on two idle cores. `vb-sup predict` and `vb-sup evaluate` then tell the Dice on
its own training cases: that the network can learn all of it at once. It says nothing about unseen
cases. Nothing is mirrored, because many organs are told apart by their side.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from voxelbridge.core.command_line import run_app

SPACING_MM = (4.0, 4.0, 4.0)
LARGE_ORGAN_ML = 100.0  # smaller ones of the 61 organs are left out
SETTINGS = (
    "patch_size=[48,48,48]",  # 192 mm
    "augmentation.mirror_probability=0.0",
    # Many targets in few cases: drawn more often.
    "sampling.dataset_weights.organs=4.0",
    "sampling.dataset_weights.spine=2.0",
    "sampling.dataset_weights.chest=2.0",
)
Labels = Mapping[str, int | list[int]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder of the sample volumes.")],
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 3000,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
) -> None:
    from voxelbridge.core.config import load_config, preset_path
    from voxelbridge.pretrain_sup.config import MultiTalentConfig
    from voxelbridge.pretrain_sup.prepare import prepare
    from voxelbridge.pretrain_sup.prepare_sources import PrepareRequest
    from voxelbridge.pretrain_sup.train import train

    raw = build_datasets(data, out / "raw")
    store, run = out / "store", out / "run"
    report = prepare(raw, store, request=PrepareRequest(spacing_mm=SPACING_MM), workers=2)
    assert not report.failures, report.failures
    overrides = [f"schedule.steps={steps}", *SETTINGS]
    preset = preset_path("voxelbridge.pretrain_sup", "multitalent_small")
    config = load_config(MultiTalentConfig, preset, overrides).config
    train(config, store=store, run=run, device=device, workers=0)


def build_datasets(data: Path, raw: Path) -> list[Path]:
    """The nine data sets as folders below `raw`."""
    organs = _ids(data / "ct_abdomen/multiorgan_seg.nii.gz", least_ml=LARGE_ORGAN_ML)
    spine = _ids(data / "ct_abdomen/vertebrae_seg.nii.gz")
    chest = _ids(data / "ct_chest_lowres/seg.seg.nrrd")
    ct = data / "ct_abdomen/ct.nii.gz"
    gliomas = sorted(path for path in (data / "mr_glioma_2seq").iterdir() if path.is_dir())
    write_dataset(
        raw / "organs", ["CT"], {f"organ_{n}": n for n in organs},
        {"abdomen": ([ct], [data / "ct_abdomen/multiorgan_seg.nii.gz"])},
    )  # fmt: skip
    write_dataset(
        raw / "spine", ["CT"], {f"vertebra_{n}": n for n in spine},
        {"abdomen": ([ct], [data / "ct_abdomen/vertebrae_seg.nii.gz"])},
    )  # fmt: skip
    write_dataset(
        raw / "aorta", ["CT"], {"aorta": 1, "T12": 2},
        {"chest": ([data / "ct_aorta/ct.nii.gz"],
                   [data / "ct_aorta/aorta.nii.gz", data / "ct_aorta/vertebrae_T12.nii.gz"])},
    )  # fmt: skip
    write_dataset(
        raw / "lungs", ["CT"], {"lungs": 1},
        {"lung": ([data / "ct_lung_elastix/lung.mha"], [data / "ct_lung_elastix/lung_mask.mha"])},
    )  # fmt: skip
    write_dataset(
        raw / "chest", ["CT"], {f"segment_{n}": n for n in chest},
        {"chest": ([data / "ct_chest_lowres/ct.nrrd"], [data / "ct_chest_lowres/seg.seg.nrrd"])},
    )  # fmt: skip
    write_dataset(
        raw / "glioma", ["T1c", "FLAIR"],
        {"whole": [1, 2, 3, 4], "core": [1, 3, 4], "enhancing": [4]},
        {folder.name: ([folder / "t1c.nii.gz", folder / "flair.nii.gz"],
                       [folder / "tumour_seg.nii.gz"]) for folder in gliomas},
    )  # fmt: skip
    write_dataset(
        raw / "nodule", ["CT"], {"nodule": 1},
        {"lung1": ([data / "ct_lung_nodule/ct.nrrd"], [data / "ct_lung_nodule/nodule_seg.nrrd"])},
    )  # fmt: skip
    for name in ("brain", "breast"):
        folder = data / f"mr_{name}_tumour"
        write_dataset(
            raw / name, ["MR"], {"tumour": 1},
            {name: ([folder / "mr.nrrd"], [folder / "tumour_seg.nrrd"])},
        )  # fmt: skip
    return sorted(path for path in raw.iterdir() if path.is_dir())


def write_dataset(
    folder: Path,
    channels: Sequence[str],
    labels: Labels,
    cases: Mapping[str, tuple[Sequence[Path], Sequence[Path]]],
) -> None:
    """An nnU-Net data set: per case its channels, and maps of which the k-th of several gives k.

    Ids that `labels` does not name become background.
    """
    import numpy as np

    from voxelbridge.core.data.image_io import read_image, write_image
    from voxelbridge.core.data.volume import Volume

    named = [n for ids in labels.values() for n in ([ids] if isinstance(ids, int) else ids)]
    for case, (images, maps) in cases.items():
        for number, image in enumerate(images):
            write_image(folder / "imagesTr" / f"{case}_{number:04d}.nii.gz", read_image(image))
        first = read_image(maps[0])
        merged = np.where(np.isin(first.array, named), first.array, 0).astype(np.int16)
        for number, path in enumerate(maps[1:], start=2):
            merged[read_image(path).array > 0] = number
        write_image(folder / "labelsTr" / f"{case}.nii.gz", Volume(merged, first.grid))
    description = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, **labels},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1))


def _ids(path: Path, *, least_ml: float = 0.0) -> list[int]:
    """Label ids of a map that fill at least so many millilitres."""
    import numpy as np

    from voxelbridge.core.data.image_io import read_image

    volume = read_image(path)
    voxel_ml = float(np.prod(volume.grid.spacing_mm)) / 1000
    ids, counts = np.unique(volume.array, return_counts=True)
    return [int(n) for n, c in zip(ids, counts, strict=True) if n > 0 and c * voxel_ml >= least_ml]


if __name__ == "__main__":
    run_app(app)
