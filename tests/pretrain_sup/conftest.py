import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from voxelbridge.core.arch.blocks import ConvNormAct
from voxelbridge.core.config import load_config, preset_path
from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.foreground import class_locations
from voxelbridge.core.data.image_io import write_image
from voxelbridge.core.data.normalize import ZScore
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.data.volume import Grid, Volume
from voxelbridge.core.run import RunDirectory
from voxelbridge.pretrain_sup.config import KIND, MultiTalentConfig
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import (
    LabelSpace,
    Layout,
    build_label_space,
    write_label_space,
)
from voxelbridge.pretrain_sup.model import SegmentationNetwork
from voxelbridge.pretrain_sup.plan import DatasetPlan, StorePlan, write_plan
from voxelbridge.pretrain_sup.weights import new_network, write_weights

WriteDataset = Callable[..., Path]
StoreCase = Callable[..., None]
RigNetwork = Callable[..., None]
WriteRun = Callable[..., MultiTalentConfig]


def _write_store(root: Path, datasets: Sequence[str], *, layout: Layout) -> Path:
    """A store as `vb-sup prepare` writes it: 18 voxels per axis, images that show their labels.

    `organs`: 10 cases of 10 patients, 3 targets in two heads; `glioma`: 2 cases of two channels,
    regions; `lung`: 1 case with an ignore label.
    """
    known = {
        "organs": DatasetLabels(
            "organs", ("CT",), (Target("a", (1,)), Target("b", (2,)), Target("c", (3,))), None, 10
        ),
        "glioma": DatasetLabels(
            "glioma", ("T1", "T2"), (Target("whole", (1, 2)), Target("core", (2,))), None, 2,
            regions=True,
        ),
        "lung": DatasetLabels("lung", ("CT",), (Target("lung", (2,)),), 3, 1),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    writer = CaseStoreWriter(root, patch_size=(8, 8, 8))
    plan = StorePlan()
    for name in datasets:
        labels = known[name]
        for number in range(labels.num_cases):
            shape = (18, 18, 18)
            segmentation = np.zeros(shape, np.int32)
            for place, value in enumerate((1, 2, 3)):
                low = rng.integers(1, 5)
                segmentation[low : low + 9, low : low + 9, 1 + 6 * place : 5 + 6 * place] = value
            image = rng.normal(0, 0.3, (len(labels.channels), *shape)) + segmentation
            ids = {1, 2, 3}
            writer.write_case(
                f"{name}__c{number}",
                image.astype(np.float32),
                grid=Grid.from_parts(shape, (1.0, 1.0, 1.0)),
                boxes=np.zeros((0, 6), np.float32),
                labels=np.zeros(0, np.int64),
                segmentation=segmentation,
                locations=class_locations(segmentation, ids),
                provenance=Provenance(patient=f"p{number}", dataset=name, modality="CT"),
            )
        of_dataset = DatasetPlan(
            channel_names=labels.channels,
            modality="+".join(labels.channels),
            normalization=(ZScore(),) * len(labels.channels),
            spacing_mm=(1.0, 1.0, 1.0),
            original_spacing_mm=(1.0, 1.0, 1.0),
            kept_by_crop=1.0,
        )
        plan = plan.with_dataset(name, of_dataset)
    writer.finish()
    write_plan(root, plan)
    space = build_label_space([known[name] for name in datasets], layout=layout, max_targets=2)
    write_label_space(root / "label_space.json", space)
    return root


@pytest.fixture(scope="session")
def write_store() -> Callable[..., Path]:
    """See `_write_store`."""
    return _write_store


@pytest.fixture(scope="session")
def organs_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `organs`, `glioma` and `lung` with a head per data set."""
    root = tmp_path_factory.mktemp("organs") / "store"
    return _write_store(root, ("organs", "glioma", "lung"), layout="per_dataset")


@pytest.fixture
def write_dataset() -> WriteDataset:
    """Writes an nnU-Net data set: `cases` maps names to an image (C, D, H, W) and its label map."""

    def write(
        folder: Path,
        cases: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
        *,
        channels: Sequence[str] = ("CT",),
        labels: Mapping[str, Any] | None = None,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        groups: Mapping[str, str] | None = None,
    ) -> Path:
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        description = {
            "channel_names": {str(n): name for n, name in enumerate(channels)},
            "labels": labels or {"background": 0, "organ": 1, "lesion": 2},
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(description))
        if groups is not None:
            (folder / "groups.json").write_text(json.dumps(groups))
        for name, (image, label_map) in cases.items():
            grid = Grid.from_parts(image.shape[1:], spacing)
            for number, channel in enumerate(image):
                path = folder / "imagesTr" / f"{name}_{number:04d}.nii.gz"
                write_image(path, Volume(channel[None], grid))
            if label_map is not None:
                write_image(folder / "labelsTr" / f"{name}.nii.gz", Volume(label_map[None], grid))
        return folder

    return write


@pytest.fixture
def store_case() -> StoreCase:
    """Writes one case of a store for several data sets."""

    def store(
        writer: CaseStoreWriter,
        dataset: str,
        name: str,
        image: np.ndarray,
        segmentation: np.ndarray,
        *,
        patient: str | None = None,
    ) -> None:
        ids = {int(number) for number in np.unique(segmentation) if number > 0}
        writer.write_case(
            f"{dataset}__{name}",
            image.astype(np.float32),
            grid=Grid.from_parts(segmentation.shape, (1.0, 1.0, 1.0)),
            boxes=np.zeros((0, 6), np.float32),
            labels=np.zeros(0, np.int64),
            segmentation=segmentation,
            locations=class_locations(segmentation, ids),
            provenance=Provenance(patient=patient, dataset=dataset),
        )

    return store


@pytest.fixture
def many_classes(tmp_path: Path, store_case: StoreCase) -> tuple[CaseStore, LabelSpace]:
    """A data set of 117 classes whose ids are not their numbers, and one of two channels.

    Every class is a block of 3 voxels per axis in a volume of 30; the image shows the ids.
    """
    shape = (30, 30, 30)
    labels = np.zeros(shape, np.int32)
    ids = [3 * n + 2 for n in range(117)]
    for place, number in enumerate(np.random.default_rng(0).permutation(ids)):
        z, y, x = (1 + 6 * int(index) for index in np.unravel_index(place, (5, 5, 5)))
        labels[z : z + 3, y : y + 3, x : x + 3] = number
    writer = CaseStoreWriter(tmp_path / "many", patch_size=(8, 8, 8))
    for number in range(4):
        store_case(writer, "bones", f"c{number}", labels[None].astype(np.float32), labels)
    small = np.zeros((6, 14, 9), np.int32)
    small[2:5, 6:9, 1:5] = 4
    small[3, 7, 2] = 9
    store_case(writer, "glioma", "g", np.stack([small, -small]), small)
    writer.finish()
    bones = DatasetLabels(
        "bones", ("CT",), tuple(Target(f"bone{n}", (number,)) for n, number in enumerate(ids)),
        None, 4,
    )  # fmt: skip
    regions = (Target("whole", (4, 9)), Target("core", (9,)), Target("cyst", (11,)))
    glioma = DatasetLabels("glioma", ("T1c", "FLAIR"), regions, None, 1, regions=True)
    space = build_label_space([bones, glioma], layout="per_dataset")
    return CaseStore.open(tmp_path / "many"), space


@pytest.fixture
def rig_network() -> RigNetwork:
    """Sets the weights of a residual U-Net so that logits are known: slope * x + bias per output.

    x is the image's first channel as the norms leave it: minus its mean in the window, over its
    standard deviation; without `norms` as it is. `outputs` maps output layers to (slopes, biases).
    """

    def rig(
        network: SegmentationNetwork,
        outputs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        *,
        norms: bool = True,
    ) -> None:
        blocks = [module for module in network.modules() if isinstance(module, ConvNormAct)]
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.fill_(float(name.endswith("norm.weight")))
            for stem in network.encoder.stems.children():
                assert isinstance(stem, ConvNormAct)
                centre = tuple(edge // 2 for edge in stem.conv.kernel_size)
                stem.conv.weight[0, 0][centre] = 1.0  # x and -x: the activations cancel out
                stem.conv.weight[1, 0][centre] = -1.0
            stage = network.decoder.stages
            assert isinstance(stage, nn.ModuleList)
            (block,) = [m for m in stage[0].modules() if isinstance(m, ConvNormAct)]
            centre = tuple(edge // 2 for edge in block.conv.kernel_size)
            width = network.decoder.channels[0]
            for row, sign in enumerate((1.0, -1.0)):
                block.conv.weight[row, width][centre] = sign
                block.conv.weight[row, width + 1][centre] = -sign
            for name, (slopes, biases) in outputs.items():
                finest = network.heads[name].levels[0]
                assert isinstance(finest, nn.Conv3d)
                assert finest.bias is not None
                slope = torch.tensor(slopes) / (1.01 * (1 + 0.01**2))
                finest.weight[:, 0, 0, 0, 0], finest.weight[:, 1, 0, 0, 0] = slope, -slope
                finest.bias.copy_(torch.tensor(biases))
        if not norms:
            for block in blocks:
                block.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]

    return rig


@pytest.fixture
def write_rigged_run(rig_network: RigNetwork) -> WriteRun:
    """Writes a finished run of the small U-Net with known outputs (see `rig_network`)."""

    def write(
        run: Path,
        space: LabelSpace,
        outputs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        *,
        patch_size: tuple[int, int, int] = (16, 24, 32),
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> MultiTalentConfig:
        preset = preset_path("voxelbridge.pretrain_sup", "multitalent_small")
        config = load_config(MultiTalentConfig, preset, [f"patch_size={list(patch_size)}"]).config
        network = new_network(config, space)
        rig_network(network, outputs)
        RunDirectory.open_or_create(run, config, kind=KIND).close()
        write_label_space(run / "label_space.json", space)
        plan = StorePlan(spacing_mm=spacing)
        for labels in space.datasets:
            own = DatasetPlan(
                channel_names=labels.channels,
                modality="+".join(labels.channels),
                normalization=(ZScore(),) * len(labels.channels),
                spacing_mm=spacing,
                original_spacing_mm=spacing,
                kept_by_crop=1.0,
            )
            plan = plan.with_dataset(labels.name, own)
        write_plan(run, plan)
        write_weights(run, network)
        return config

    return write
