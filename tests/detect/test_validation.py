"""Validation during training: the same patches for all, undisturbed training, whole cases."""

from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import torch

from voxelbridge.core.data.case_store import CaseStore, CaseStoreWriter
from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.train.distributed import World
from voxelbridge.detect.build import build_detector, build_objective, load_detect_config
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import BoxTable
from voxelbridge.detect.objective import Objective
from voxelbridge.detect.predict import predict_volume
from voxelbridge.detect.validation import Validation

SETTINGS = (
    "patch_size=[16,16,16]", "schedule.steps=40", "validation_batches=3", "validate_every_steps=5",
    "validate_cases_every_steps=10", "validation_cases=3",
)  # fmt: skip


class Ranks:
    """`World`s of several threads in one process, enough for `gather`."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = Barrier(size)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(60)
        values = list(self.values)
        self.barrier.wait(60)
        return values


class ThreadWorld(World):
    def __init__(self, ranks: Ranks, rank: int) -> None:
        super().__init__(torch.device("cpu"), rank, len(ranks.values))
        self.ranks = ranks

    def gather(self, value: Any) -> list[Any]:
        return self.ranks.gather(self.rank, value)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    """Five cases of 24 x 20 x 28 voxels with up to two objects each."""
    root = tmp_path_factory.mktemp("validation")
    writer = CaseStoreWriter(root)
    rng = np.random.default_rng(0)
    shape = (24, 20, 28)
    grid = Grid.from_parts(shape, (1.0, 1.0, 1.0))
    for number in range(5):
        image = rng.normal(size=(1, *shape)).astype(np.float32)
        instances = np.zeros(shape, dtype=np.int32)
        instances[4:10, 5:12, 3:9] = 1
        image[0, 4:10, 5:12, 3:9] += 5
        boxes = [[4, 5, 3, 10, 12, 9]]
        if number % 2:
            instances[14:20, 8:14, 18:25] = 2
            boxes.append([14, 8, 18, 20, 14, 25])
        writer.write_case(
            f"case{number}", image, grid=grid, boxes=np.array(boxes, dtype=np.float32),
            labels=np.arange(len(boxes)), instances=instances,
        )  # fmt: skip
    writer.finish()
    return CaseStore.open(root)


@pytest.fixture(scope="module")
def config() -> DetectConfig:
    return load_detect_config("retunet_small", SETTINGS)


@pytest.fixture
def objective(config: DetectConfig) -> Objective:
    torch.manual_seed(0)
    return build_objective(build_detector(config, in_channels=1, num_classes=2), config)


def validation_of(store: CaseStore, config: DetectConfig, world: World | None = None) -> Validation:
    names = [record.case_id for record in store.cases]
    world = world or World(torch.device("cpu"))
    return Validation(store, names, config, num_classes=2, world=world)


def test_losses_and_map_are_those_of_the_patches(
    store: CaseStore, config: DetectConfig, objective: Objective
) -> None:
    validation = validation_of(store, config)
    values = validation.measure(objective, {"patches"})
    names = {"total", "classification", "box", "segmentation_ce", "segmentation_dice"}
    assert set(values) == {f"val_{name}" for name in (*names, "map_0.10", "map_range")}
    assert values == validation_of(store, config).measure(objective, {"patches"})
    objective.eval()
    batches = [validation.batch(index) for index in range(3)]
    assert not torch.equal(batches[0].image, batches[1].image)
    with torch.no_grad():
        totals = [float(objective(batch)["total"]) for batch in batches]
    assert values["val_total"] == pytest.approx(np.mean(totals), rel=1e-6)


def test_a_validation_leaves_the_training_as_it_was(
    store: CaseStore, config: DetectConfig, objective: Objective
) -> None:
    objective.train()
    objective.get_submodule("detector.encoder").eval()  # a frozen phase
    modes = [module.training for module in objective.modules()]
    state = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    streams = (torch.get_rng_state(), np.random.get_state(legacy=False))  # noqa: NPY002
    validation_of(store, config).measure(objective, {"patches", "cases"})
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert repr(np.random.get_state(legacy=False)) == repr(streams[1])  # noqa: NPY002
    assert [module.training for module in objective.modules()] == modes
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_ranks_together_measure_what_one_process_does(
    store: CaseStore, config: DetectConfig
) -> None:
    size = 2  # three batches and three cases do not divide

    def fresh(rank: int) -> Objective:
        torch.manual_seed(0)
        built = build_objective(build_detector(config, in_channels=1, num_classes=2), config)
        average = built.get_buffer("criterion.normalizer.average")
        average.fill_(3.0 + rank)  # each rank has counted its own anchors; rank 0's count
        return built

    expected = validation_of(store, config).measure(fresh(0), {"patches", "cases"})
    ranks, results = Ranks(size), {}
    objectives = [fresh(rank) for rank in range(size)]

    def work(rank: int) -> None:
        validation = validation_of(store, config, ThreadWorld(ranks, rank))
        results[rank] = validation.measure(objectives[rank], {"patches", "cases"})

    threads = [Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[rank] for rank in range(size)] == [expected] * size
    for rank, built in enumerate(objectives):
        assert built.get_buffer("criterion.normalizer.average") == 3.0 + rank


def test_whole_cases_give_the_figures_of_predict_and_evaluate(
    store: CaseStore, config: DetectConfig, objective: Objective
) -> None:
    validation = validation_of(store, config)
    assert validation.whole_cases == ["case0", "case2", "case4"]
    values = validation.measure(objective, {"cases"})
    objective.eval()
    cpu = torch.device("cpu")
    found = [
        predict_volume([(objective.detector, config)], store.read_image(name), device=cpu)
        for name in validation.whole_cases
    ]
    records = [store.record(name) for name in validation.whole_cases]
    metrics = compute_metrics(
        validation.whole_cases,
        BoxTable.from_cases([r.boxes for r in records], [r.labels for r in records]),
        BoxTable.from_cases(
            [f.boxes for f in found], [f.labels for f in found], scores=[f.scores for f in found]
        ),
        num_classes=2,
    )
    assert values == {
        "val_case_map_0.10": metrics["ap"]["0.10"]["map"],
        "val_case_map_range": metrics["ap"]["0.10:0.50:0.05"]["map"],
        "val_case_froc_0.10": metrics["froc"]["0.10"]["pooled"]["mean"],
    }


def test_a_broken_case_is_reported_and_left_out(
    store: CaseStore,
    config: DetectConfig,
    objective: Objective,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = CaseStore.read_image

    def broken(self: CaseStore, case_id: str) -> np.ndarray:
        if case_id == "case2":
            raise DataError("case2: damaged")
        return read(self, case_id)

    monkeypatch.setattr(CaseStore, "read_image", broken)
    values = validation_of(store, config).measure(objective, {"cases"})
    assert values["val_case_failed"] == 1
    assert "val_case_map_range" in values
    assert "case2: DataError: case2: damaged; the case is left out" in capsys.readouterr().err


def test_both_kinds_are_due_at_their_steps_and_after_the_last(
    store: CaseStore, config: DetectConfig
) -> None:
    validation = validation_of(store, config)
    due = {step: set(validation.due(step, steps=23)) for step in range(23)}
    assert {step for step, kinds in due.items() if "patches" in kinds} == {4, 9, 14, 19, 22}
    assert {step for step, kinds in due.items() if "cases" in kinds} == {9, 19, 22}
    off = load_detect_config("retunet_small")
    assert not any(validation_of(store, off).due(step, steps=200) for step in range(200))


def test_the_deciding_figure_is_the_most_telling_one_that_exists(
    store: CaseStore, config: DetectConfig
) -> None:
    assert validation_of(store, config).deciding == ("val_case_map_range",)
    patches = config.model_copy(update={"validate_cases_every_steps": 0})
    assert validation_of(store, patches).deciding == ("val_map_range", "val_total")
    chosen = load_detect_config("retunet_small", [*SETTINGS, "best_metric=val_total"])
    assert validation_of(store, chosen).deciding == ("val_total",)
    with pytest.raises(ConfigError, match=r"needs validate_cases_every_steps above 0"):
        load_detect_config("retunet_small", ["best_metric=val_case_map_range"])
