"""A small store and finished runs on its folds, with proposals that a test decides."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.mapping import StoredToOriginal
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.run import RunDirectory
from voxelbridge.detect import sweep as sweep_module
from voxelbridge.detect.build import load_detect_config
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.detections import Detections
from voxelbridge.detect.predict import Proposals
from voxelbridge.detect.weights import write_weights

SHAPE = (40, 40, 40)
OBJECTS = ((5, 5, 5, 15, 15, 15), (22, 20, 24, 30, 32, 33))


def write_stub_store(root: Path, *, num_cases: int) -> CaseStore:
    """Cases c0, c1, ... whose voxels hold their number, with two objects each, stored from files
    that are flipped, cropped and twice as fine."""
    writer = CaseStoreWriter(root, patch_size=(16, 16, 16))
    directions = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    grid = Grid.from_parts((84, 84, 84), (1.0, 1.0, 1.0), directions=directions)
    mapping = StoredToOriginal.build(grid, crop_box=(2, 3, 4, 82, 83, 84), stored_shape=SHAPE)
    for number in range(num_cases):
        writer.write_case(
            f"c{number}",
            np.full((1, *SHAPE), number, dtype=np.float32),
            grid=mapping.stored_grid,
            boxes=OBJECTS,
            labels=[0, 1],
            mapping=mapping,
            extra={"original_boxes": mapping.boxes_to_original(OBJECTS).tolist()},
        )
    writer.finish()
    return CaseStore.open(root)


def write_stub_run(
    path: Path,
    store: CaseStore,
    *,
    fold: int,
    held_out: Sequence[str],
    overrides: Sequence[str] = (),
    weight: float | None = None,
) -> Path:
    """A finished run that held out these cases of `store`; `weight` tells its weights apart."""
    config = load_detect_config("retunet_small", overrides)
    with RunDirectory.open_or_create(path, config, kind="detect") as run:
        data = {
            "store": store.digest,
            "fold": fold,
            "train": [case.case_id for case in store.cases if case.case_id not in held_out],
            "val": list(held_out),
            "detector": {"num_classes": 2, "init_checkpoint_sha256": None},
        }
        run.keep("data.json", data)
        run.record_start(device="cpu", arguments={"store": str(store.root)})
    write_stub_weights(path, fold if weight is None else weight)
    return path


def write_stub_weights(path: Path, value: float) -> None:
    """Weights of a run; another value is another file."""
    network: Any = nn.Linear(1, 1)
    nn.init.constant_(network.weight, value)
    nn.init.zeros_(network.bias)
    write_weights(path, network, step=1)


def noisy_proposals(num_cases: int, *, pairs: int, seed: int = 0) -> list[list[Proposals]]:
    """Per case and pair: some boxes near the objects, others anywhere, thin ones too."""
    rng = np.random.default_rng(seed)
    return [[_noisy_pair(rng) for _ in range(pairs)] for _ in range(num_cases)]


class StubDetector:
    """Stands for network and windows: gives the known proposals of the case it looks at."""

    def __init__(self, proposals: Sequence[Sequence[Proposals]]) -> None:
        self.proposals = proposals
        self.seen: list[int] = []
        self.broken: set[int] = set()

    def install(self, patch: pytest.MonkeyPatch) -> Self:
        """Puts this in place of networks."""
        nothing = (nn.Identity(), SimpleNamespace(precision="fp32"), None)
        patch.setattr(sweep_module, "propose", self.propose)
        patch.setattr(sweep_module, "load_run", lambda *_, **__: nothing)
        return self

    def propose(
        self,
        detector: object,
        config: DetectConfig,
        image: NDArray[np.float32],
        *,
        device: torch.device,
        num_mirrorings: int,
    ) -> list[Proposals]:
        """In place of `predict.propose`."""
        del detector, config, device
        number = int(image[0, 0, 0, 0])
        if number in self.broken:
            raise RuntimeError("the network's output\nis not finite")
        self.seen.append(number)
        return list(self.proposals[number][: max(num_mirrorings, 1)])


def _noisy_pair(rng: np.random.Generator) -> Proposals:
    boxes, scores, labels = [], [], []
    for label, box in enumerate(OBJECTS):
        for _ in range(4):
            boxes.append(np.array(box) + rng.normal(0, 1.5, 6))
            scores.append(rng.uniform(0.2, 0.9))
            labels.append(label)
    for _ in range(12):
        start = rng.uniform(0, 34, 3)
        boxes.append(np.concatenate([start, start + rng.uniform(0.5, 6, 3)]))
        scores.append(rng.uniform(0.05, 0.8))
        labels.append(int(rng.integers(0, 2)))
    edges = np.array(boxes, dtype=np.float32)
    edges[:, 3:] = np.maximum(edges[:, 3:], edges[:, :3])
    order = np.argsort(-np.array(scores), kind="stable")
    found = Detections(
        boxes=torch.from_numpy(edges[order]),
        scores=torch.tensor(np.array(scores)[order], dtype=torch.float32),
        labels=torch.tensor(np.array(labels)[order]),
    )
    return Proposals(found, torch.from_numpy(rng.uniform(0.5, 1, len(order)).astype(np.float32)))
