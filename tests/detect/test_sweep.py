"""The greedy choice of post-processing, and the cache of what it is chosen on."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import CheckpointError, ConfigError, DataError
from voxelbridge.detect.build import load_detect_config
from voxelbridge.detect.config import PostProcessing
from voxelbridge.detect.cross_validation import out_of_fold
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import BoxTable
from voxelbridge.detect.post_processing_file import (
    Figures,
    ObjectiveName,
    read_swept,
    with_swept,
)
from voxelbridge.detect.predict import Proposals, merge_proposals
from voxelbridge.detect.sweep import (
    STEPS,
    StepName,
    chosen_steps,
    describe,
    greedy,
    run_sweep,
    sweep,
)

SWEPT: tuple[StepName, ...] = (
    "model_iou",
    "suppression",
    "ensemble_iou",
    "model_min_score",
    "min_size",
)


@given(seed=st.integers(0, 10_000), levels=st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_the_greedy_order_is_that_of_a_plain_loop(seed: int, levels: int) -> None:
    def score(values: tuple[object, ...]) -> float:  # few levels: many ties
        return np.random.default_rng([seed, *json.dumps(values).encode()]).integers(levels) / levels

    calls: list[PostProcessing] = []

    def evaluate(posts: Sequence[PostProcessing]) -> list[Figures]:
        calls.extend(posts)
        return [figures(score(tuple(getattr(post, name) for name in SWEPT))) for post in posts]

    best, tried, _ = greedy(PostProcessing(), list(STEPS.items()), evaluate, objective="map_0.10")

    current: dict[str, object] = {
        "model_iou": 0.1, "suppression": "weighted", "ensemble_iou": 0.5, "model_min_score": 0.0,
        "min_size": 0.01,
    }  # fmt: skip
    grid = (
        ("model_iou", [1e-5, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ("suppression", ["weighted", "plain"]),
        ("ensemble_iou", [1e-5, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ("model_min_score", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        ("min_size", [0.01, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
    )
    rows = []
    for name, values in grid:
        top, top_value = -1.0, None
        for value in values:
            reached = score(tuple({**current, name: value}.values()))
            rows.append((name, value, reached))
            if reached > top:
                top, top_value = reached, value
        current[name] = top_value
    assert [(row.step, row.value, row.figures["map_0.10"]) for row in tried] == rows
    assert {name: getattr(best, name) for name in SWEPT} == current
    assert len(tried) == 28
    assert len(calls) == len(set(calls)) == 24  # a step's start was evaluated in the one before


def test_a_start_beside_the_grid_is_tried_last_and_kept_if_it_is_best() -> None:
    start = PostProcessing(min_size=1.5)
    worse = greedy(
        start, [("min_size", STEPS["min_size"])],
        lambda posts: [figures(float(post.min_size == 1.5)) for post in posts],
        objective="map_range",
    )  # fmt: skip
    assert worse[0] == start
    assert [row.value for row in worse[1]] == [*STEPS["min_size"], 1.5]
    equal = greedy(
        start, [("min_size", STEPS["min_size"])],
        lambda posts: [figures(0.5) for _ in posts], objective="map_range",
    )  # fmt: skip
    assert equal[0].min_size == 0.01
    assert equal[2][start] == figures(0.5)


def test_only_and_skip_name_the_steps() -> None:
    assert chosen_steps(only=[], skip=["min_size"]) == SWEPT[:4]
    assert chosen_steps(only=["ensemble_iou", "model_iou"], skip=[]) == (SWEPT[0], SWEPT[2])
    with pytest.raises(ConfigError, match="--skip size: expected one of model_iou, "):
        chosen_steps(only=[], skip=["size"])
    with pytest.raises(ConfigError, match="give one"):
        chosen_steps(only=["min_size"], skip=["min_size"])


@pytest.mark.parametrize(
    ("objective", "steps", "workers"),
    [("map_range", SWEPT[3:], 0), ("froc_0.30", SWEPT[1:3], 2)],
)
def test_the_figures_are_those_of_merging_as_predict_does(
    store: CaseStore,
    tmp_path: Path,
    stubs,
    monkeypatch: pytest.MonkeyPatch,
    objective: ObjectiveName,
    steps: Sequence[StepName],
    workers: int,
) -> None:
    proposals = stubs.noisy_proposals(3, pairs=4)
    stubs.StubDetector(proposals).install(monkeypatch)
    run = stubs.write_stub_run(tmp_path / "run", store, fold=0, held_out=["c0", "c1", "c2"])
    swept = sweep(
        [run], objective=objective, steps=steps, num_mirrorings=4, device="cpu", workers=workers
    )
    for post, reached in ((swept.start, swept.before), (swept.post_processing, swept.after)):
        assert reached == merged_figures(store, proposals, post)
    assert swept.after[objective] == max(row.figures[objective] for row in swept.tried)
    assert swept.after[objective] > swept.before[objective]
    assert read_swept(run) == swept
    assert (swept.num_cases, swept.num_objects, swept.mirrorings) == (3, 6, 4)
    assert {row.step for row in swept.tried} == set(steps)


def test_a_killed_sweep_goes_on_where_it_was(
    store: CaseStore, tmp_path: Path, stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = stubs.StubDetector(stubs.noisy_proposals(5, pairs=1)).install(monkeypatch)
    run = stubs.write_stub_run(tmp_path / "run", store, fold=0, held_out=["c0", "c1", "c2", "c3"])
    child = os.fork()
    if child == 0:
        plain = stub.propose

        def killed(*arguments: Any, **options: Any) -> list[Proposals]:  # Any: passed through
            if len(stub.seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("voxelbridge.detect.sweep.propose", killed)
            sweep([run], num_mirrorings=1, device="cpu", workers=0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (run / "post_processing.json").exists()
    first = sweep([run], steps=["min_size"], num_mirrorings=1, device="cpu", workers=0)
    assert stub.seen == [2, 3]
    assert sweep([run], steps=["min_size"], num_mirrorings=1, device="cpu", workers=0) == first
    assert stub.seen == [2, 3]


def test_stale_and_damaged_caches_are_predicted_again(
    store: CaseStore,
    tmp_path: Path,
    stubs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = stubs.StubDetector(stubs.noisy_proposals(5, pairs=2)).install(monkeypatch)
    run = stubs.write_stub_run(tmp_path / "run", store, fold=0, held_out=["c1", "c2"])

    def predicted(mirrorings: int = 1) -> list[int]:
        stub.seen.clear()
        capsys.readouterr()
        sweep([run], steps=[], num_mirrorings=mirrorings, device="cpu", workers=0)
        return list(stub.seen)

    assert predicted() == [1, 2]
    assert predicted(2) == [1, 2]
    assert predicted() == []  # the two lie beside each other
    stubs.write_stub_weights(run, 5.0)
    assert predicted() == [1, 2]
    assert "made with other weights; predicting again" in capsys.readouterr().out
    file = run / "validation" / "last_tta1" / "c2.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # one bit of a number: safetensors itself does not see it
    file.write_bytes(bytes(content))
    assert predicted() == [2]
    file.write_bytes(bytes(content[:100]))
    assert predicted() == [2]
    file.write_bytes(file.with_name("c1.safetensors").read_bytes())
    assert predicted() == [2]
    file.with_name("key.json").write_text("{")
    assert predicted() == [1, 2]
    settings = json.loads((run / "config.json").read_text())
    settings["post_processing"]["patch_iou"] = 0.5
    (run / "config.json").write_text(json.dumps(settings))
    assert predicted() == [1, 2]
    settings["post_processing"]["model_iou"] = 0.5  # acts when proposals are merged
    (run / "config.json").write_text(json.dumps(settings))
    assert predicted() == []


def test_a_failing_case_costs_itself_alone(
    store: CaseStore,
    tmp_path: Path,
    stubs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = stubs.StubDetector(stubs.noisy_proposals(5, pairs=1)).install(monkeypatch)
    stub.broken = {1}
    run = stubs.write_stub_run(tmp_path / "run", store, fold=0, held_out=["c0", "c1", "c2"])
    with pytest.raises(DataError, match=r"1 of 3 held-out cases could not be predicted \(c1\)"):
        run_sweep(
            [run], store=None, objective="map_0.10", steps=["min_size"], num_mirrorings=0,
            weights="last", device="cpu", workers=0, as_json=True,
        )  # fmt: skip
    printed = capsys.readouterr()
    assert printed.err == "error: case c1: the network's output is not finite\n"
    assert json.loads(printed.out)["failed_cases"] == ["c1"]
    assert json.loads(printed.out) == json.loads((run / "post_processing.json").read_text())
    stub.broken = {0, 1, 2}
    stubs.write_stub_weights(run, 3.0)
    with pytest.raises(DataError, match="none of the 3 held-out cases"):
        sweep([run], num_mirrorings=0, device="cpu", workers=0)


def test_swept_settings_belong_to_their_weights(
    store: CaseStore, tmp_path: Path, stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs.StubDetector(stubs.noisy_proposals(5, pairs=1)).install(monkeypatch)
    run = stubs.write_stub_run(tmp_path / "run", store, fold=0, held_out=["c0", "c1"])
    config = load_detect_config("retunet_small")
    assert with_swept(run, config, weights="last") == config
    swept = sweep([run], steps=["min_size"], num_mirrorings=1, device="cpu", workers=0)
    assert swept.post_processing != config.post_processing
    assert with_swept(run, config, weights="last").post_processing == swept.post_processing
    stubs.write_stub_weights(run, 7.0)
    with pytest.raises(CheckpointError, match=r"post_processing\.json: made for other weights"):
        with_swept(run, config, weights="last")
    again = sweep(
        [run], steps=SWEPT[:1], num_mirrorings=1, device="cpu", workers=0
    )  # starts from the preset's
    assert again.start == config.post_processing
    assert with_swept(run, config, weights="last").post_processing == again.post_processing


def test_the_store_is_the_one_of_the_training(
    store: CaseStore, tmp_path: Path, stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs.StubDetector(stubs.noisy_proposals(5, pairs=1)).install(monkeypatch)
    run = stubs.write_stub_run(tmp_path / "run", store, fold=0, held_out=["c0"])
    other = stubs.write_stub_store(tmp_path / "other", num_cases=2)
    with pytest.raises(DataError, match=r"not the store that .*run was trained on"):
        sweep([run], store=other.root, device="cpu", workers=0)
    moved = store.root.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="is not here; name the store with --store"):
        sweep([run], device="cpu", workers=0)
    assert sweep([run], store=moved, steps=[], device="cpu", workers=0).num_cases == 1


def test_runs_that_cannot_be_swept_are_refused(
    store: CaseStore, tmp_path: Path, stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs.StubDetector(stubs.noisy_proposals(5, pairs=1)).install(monkeypatch)

    def refused(runs: Sequence[Path], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            sweep(runs, device="cpu", workers=0)

    first = stubs.write_stub_run(tmp_path / "first", store, fold=0, held_out=["c0", "c1"])
    refused([first, first], "has the same weights as")
    overlapping = stubs.write_stub_run(tmp_path / "overlap", store, fold=1, held_out=["c1", "c2"])
    refused([first, overlapping], "case c1 is held out by 2 runs .* case c0 by 1; take runs on")
    refused(
        [stubs.write_stub_run(tmp_path / "none", store, fold=2, held_out=[])], "held out no case"
    )
    other_start = stubs.write_stub_run(
        tmp_path / "start", store, fold=3, held_out=["c3"],
        overrides=["post_processing.boxes_per_patch=50"],
    )  # fmt: skip
    refused([first, other_start], "another post_processing")
    data = json.loads((first / "data.json").read_text())
    (first / "data.json").write_text(json.dumps({**data, "train": ["c0", "c2"]}))
    with pytest.raises(ConfigError, match="was trained on its held-out case c0"):
        out_of_fold([first], tmp_path / "out", device="cpu")
    swept = sweep([first], steps=[], num_mirrorings=1, device="cpu", workers=0)
    assert swept.seen_in_training == ("c0",)
    assert "careful: training saw c0 " in describe(swept)
    (first / "checkpoints" / "detector.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no detector\.safetensors; train the run first"):
        sweep([first], device="cpu", workers=0)


def test_two_runs_on_one_fold_are_swept_as_an_ensemble(
    store: CaseStore, tmp_path: Path, stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposals = stubs.noisy_proposals(2, pairs=2)
    stubs.StubDetector(proposals).install(monkeypatch)
    runs = [
        stubs.write_stub_run(tmp_path / f"seed{n}", store, fold=0, held_out=["c0", "c1"], weight=n)
        for n in range(2)
    ]
    swept = sweep(runs, steps=[], num_mirrorings=2, device="cpu", workers=0)
    assert [part.fold for part in swept.runs] == [0, 0]
    assert read_swept(runs[0]) == read_swept(runs[1]) == swept
    both = [[*own, *own] for own in proposals]  # two networks of equal minds
    assert swept.before == merged_figures(store, both, swept.start)


@pytest.fixture
def store(stubs, tmp_path: Path) -> CaseStore:
    return stubs.write_stub_store(tmp_path / "store", num_cases=5)


def merged_figures(
    store: CaseStore, proposals: Sequence[Sequence[Proposals]], post: PostProcessing
) -> Figures:
    """What evaluation says about the first cases of the store, merged as `predict` merges."""
    records = store.cases[: len(proposals)]
    found = [merge_proposals(own, (40, 40, 40), post) for own in proposals]
    truth = BoxTable.from_cases([r.boxes for r in records], [r.labels for r in records])
    table = BoxTable.from_cases(
        [f.boxes for f in found], [f.labels for f in found], scores=[f.scores for f in found]
    )
    metrics = compute_metrics([r.case_id for r in records], truth, table, num_classes=2)
    ap, froc = metrics["ap"], metrics["froc"]
    return {
        "map_range": ap["0.10:0.50:0.05"]["map"],
        "map_0.10": ap["0.10"]["map"],
        "map_0.30": ap["0.30"]["map"],
        "map_0.50": ap["0.50"]["map"],
        "froc_0.10": froc["0.10"]["pooled"]["mean"],
        "froc_0.30": froc["0.30"]["pooled"]["mean"],
    }


def figures(value: float) -> Figures:
    return {
        "map_range": value, "map_0.10": value, "map_0.30": value, "map_0.50": value,
        "froc_0.10": value, "froc_0.30": value,
    }  # fmt: skip
