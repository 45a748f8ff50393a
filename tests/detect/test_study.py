"""A study: what its file means, in which order its jobs are done, what a rerun does again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.main import get_command

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_SMALL
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Stem,
    collect_tensors,
    write_checkpoint,
)
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.cli import app
from voxelbridge.detect.evaluate.metrics import evaluate_files
from voxelbridge.detect.evaluate.tables import (
    BoxTable,
    write_cases,
    write_ground_truth,
    write_predictions,
)
from voxelbridge.detect.study import launch, perform, steps
from voxelbridge.detect.study.command import report, run, status
from voxelbridge.detect.study.config import read_study, shipped_studies
from voxelbridge.detect.study.jobs import Plan, plan_jobs
from voxelbridge.detect.study.launch import LocalLauncher, open_launcher
from voxelbridge.detect.study.markers import DONE, Markers, locked
from voxelbridge.detect.study.run import Outcome, report_outcome, work_off
from voxelbridge.detect.study.slurm import submit
from voxelbridge.detect.study.status import study_status
from voxelbridge.detect.study.tasks import Evaluate, Task, Train

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
schema = 1
folder = "work"
tta = 0
baseline = "none-fixed"
settings = ["schedule.steps=40"]

[plans.fixed]
rule = "fixed"
spacing_mm = [2.0, 2.0, 2.0]

[datasets.A]
name = "first"
raw = "raw"

[datasets.B]
raw = "raw"
test = "held-out"

[architectures.retunet]
preset = "resenc_retunet_small"

[architectures.defdetr]
preset = "resenc_defdetr_small"

[initialisations.none-fixed]

[initialisations.MAE]
checkpoint = "mae.safetensors"
stem = "random"
"""
FOREVER = [sys.executable, "-c", "import time; time.sleep(60)"]


class Here:
    """A launcher that does the jobs in this process, one at a time."""

    slots: int | None = 1

    def start(self, folder: Path) -> "Future[int]":
        future: Future[int] = Future()
        future.set_result(perform.do_job(folder))
        return future

    def terminate(self) -> None:
        """Nothing runs meanwhile."""

    def kill(self) -> None:
        """Nothing runs meanwhile."""


class FakeSteps:
    """In place of `steps.do`: writes little, remembers what it was asked for, fails where told."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.broken: Callable[[Task], bool] = lambda task: False

    @property
    def kinds(self) -> list[str]:
        return [task.kind for task in self.tasks]

    def do(self, task: Task, *, device: str, workers: int) -> bool:
        self.tasks.append(task)
        if self.broken(task):
            raise DataError("the disk\nis full")
        match task:
            case Train():
                Path(task.run).mkdir(parents=True, exist_ok=True)
                text = json.dumps({"step": 3, "loss": 1.0})
                (Path(task.run) / "metrics.jsonl").write_text(f"{text}\n")
            case Evaluate():
                _write_result(Path(task.out), quality=0.9 if "MAE" in task.out else 0.5)
            case _:
                pass
        return True


def _write_result(out: Path, *, quality: float) -> None:
    rng = np.random.default_rng(3)
    cases = [f"c{number}" for number in range(12)]
    starts = rng.uniform(0, 20, (len(cases), 3))
    boxes = np.concatenate([starts, starts + 8], axis=1)
    found = [box + (0 if rng.uniform() < quality else 30) for box in boxes]
    labels = [np.zeros(1, dtype=np.int64)] * len(cases)
    truth = BoxTable.from_cases([box[None] for box in boxes], labels)
    scores = [rng.uniform(size=1) for _ in cases]
    predictions = BoxTable.from_cases([box[None] for box in found], labels, scores=scores)
    out.mkdir(parents=True, exist_ok=True)
    write_cases(out / "cases.csv", cases)
    write_ground_truth(out / "ground_truth.csv", truth, cases=cases)
    write_predictions(out / "predictions.csv", predictions, cases=cases)
    evaluate_files(out / "ground_truth.csv", out / "predictions.csv", output=out / "metrics.json")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSteps:
    fake = FakeSteps()
    monkeypatch.setattr(steps, "do", fake.do)
    return fake


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """STUDY.toml with the files that it names."""
    (tmp_path / "raw" / "imagesTr").mkdir(parents=True)
    (tmp_path / "raw" / "dataset.json").write_text("{}")
    (tmp_path / "raw" / "imagesTr" / "a_0000.nii.gz").write_bytes(b"volume")
    (tmp_path / "mae.safetensors").write_bytes(b"weights")
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def plan_of(path: Path) -> Plan:
    return plan_jobs(read_study(str(path)))


def work(path: Path, launcher: Any = None) -> Outcome:  # Any: `Here`, or another launcher
    return work_off(plan_of(path), launcher or Here(), device="cpu", workers=0, threads=None)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("tta = 0", "tte = 0", "tte: no such setting; did you mean tta?"),
        ('raw = "raw"\n\n[datasets.B]', 'tset = "x"\n\n[datasets.B]', "datasets.A.tset"),
        ('name = "first"\nraw = "raw"', 'name = "first"', "datasets.A: "),
        ('"resenc_defdetr_small"', '"resenc_deftr"', "architectures.defdetr.preset: "),
        ('stem = "random"', 'plan = "thick"', "initialisations.MAE.plan: got 'thick'"),
        ("schedule.steps=40", "schedule.step=4", "did you mean schedule.steps?"),
        ('checkpoint = "mae.safetensors"\n', "", "initialisations.MAE: stem and parts need"),
        ("[datasets.A]", '[datasets."A/B"]', "datasets: got 'A/B', expected letters"),
        ('stem = "random"', 'architectures = ["retnet"]', "MAE.architectures: got 'retnet'"),
        ('baseline = "none-fixed"', 'baseline = "fixed"', "baseline: got 'fixed'"),
    ],
)
def test_mistake_in_the_file_is_one_line_with_the_key(
    study: Path, old: str, new: str, told: str
) -> None:
    change(study, old, new)
    with pytest.raises(ConfigError) as error:
        plan_of(study)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert "study.toml" in str(error.value)


def test_rules_exclude_and_change_cells_and_the_last_one_wins(study: Path) -> None:
    with study.open("a") as file:
        file.write("""
[[rules]]
architectures = ["defdetr"]
datasets = ["B"]
exclude = true

[[rules]]
initialisations = ["MAE"]
datasets = ["A"]
stem = "replicate"
settings = ["optim.lr=0.5"]

[[rules]]
initialisations = ["MAE"]
architectures = ["defdetr"]
settings = ["optim.lr=0.25"]
""")
    cells = {
        (cell.key.dataset, cell.key.architecture, cell.key.initialisation): cell
        for cell in plan_of(study).cells
    }
    assert len(cells) == 6
    assert ("B", "defdetr", "MAE") not in cells
    assert cells["A", "retunet", "MAE"].stem == "replicate"
    assert cells["B", "retunet", "MAE"].stem == "random"
    assert cells["A", "defdetr", "MAE"].settings == (
        "schedule.steps=40", "optim.lr=0.5", "optim.lr=0.25", "seed=0",
    )  # fmt: skip
    assert cells["A", "retunet", "none-fixed"].init is None
    assert cells["A", "retunet", "MAE"].init == study.parent / "mae.safetensors"


def test_jobs_stand_behind_what_they_need_and_are_done_once(study: Path, fake: FakeSteps) -> None:
    plan = plan_of(study)
    names = list(plan.jobs)
    assert len(names) == 2 + 1 + 8 * 4  # stores of A and B, tables of A's imagesTs, the cells
    for job in plan.jobs.values():
        assert all(names.index(other) < names.index(job.id) for other in job.after)
    outcome = work(study)
    assert len(outcome.done) == len(names) == len(fake.tasks)
    before = {path: path.stat().st_mtime_ns for path in study.parent.rglob("*.json")}
    again = work(study)
    assert (len(again.done), len(again.skipped)) == (0, len(names))
    assert len(fake.tasks) == len(names)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_failed_job_blocks_what_needs_it_alone_and_is_tried_again(
    study: Path, fake: FakeSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.broken = lambda task: isinstance(task, Train) and "A/retunet/MAE" in task.run
    outcome = work(study)
    failed = "train/A/retunet/MAE/fold_0_seed_0"
    assert outcome.failed == {failed: "the disk is full"}
    assert len(outcome.blocked) == 3
    plan = plan_of(study)
    capsys.readouterr()
    with pytest.raises(DataError, match="1 of 35 jobs failed"):
        report_outcome(plan, outcome)
    assert str(Markers(plan).folder(failed) / "log.txt") in capsys.readouterr().out
    states = {cell.key: cell.state for cell in study_status(plan).cells}
    assert sorted(states.values()) == ["done"] * 7 + ["failed"]
    fake.broken = lambda task: False
    fake.tasks.clear()
    assert len(work(study).done) == 4
    assert fake.kinds == ["train", "sweep", "predict", "evaluate"]


def test_only_what_depends_on_a_change_is_done_again(study: Path, fake: FakeSteps) -> None:
    work(study)
    fake.tasks.clear()
    change(study, 'folder = "work"', 'folder = "work"\nevaluation = { bootstrap = 5 }')
    work(study)
    assert fake.kinds == ["evaluate"] * 8
    fake.tasks.clear()
    checkpoint = study.parent / "mae.safetensors"
    checkpoint.touch()
    work(study)
    assert fake.tasks == []
    checkpoint.write_bytes(b"other weights")
    work(study)
    assert fake.kinds.count("train") == 4  # of MAE
    assert "prepare" not in fake.kinds
    fake.tasks.clear()
    checkpoint.unlink()  # away, not changed
    assert work(study).done == ()


def test_moved_study_is_still_done(study: Path, fake: FakeSteps, tmp_path: Path) -> None:
    work(study)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("work", "raw", "mae.safetensors", "study.toml"):
        (tmp_path / name).rename(moved / name)
    assert work(moved / "study.toml").done == ()


def test_second_run_on_a_folder_is_refused(study: Path, fake: FakeSteps) -> None:
    work(study)
    script = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1] + '/.lock', 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(study.parent / "work")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            with pytest.raises(DataError, match="another `study run` works here"):
                work(study)
        finally:
            other.kill()
    with locked(study.parent / "work", "still taken"):
        pass


def test_process_that_is_killed_is_a_failure_with_the_signal_named(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(launch, "_command", lambda folder: command)
    with open_launcher("local", jobs=2) as launcher:
        outcome = work(study, launcher)
    assert set(outcome.failed) == {"prepare/A/fixed", "truth/A", "prepare/B/fixed"}
    assert "SIGKILL, perhaps for want of memory" in outcome.failed["truth/A"]
    assert len(outcome.blocked) == 32


def test_sigterm_ends_the_running_jobs_and_nothing_is_failed(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_command", lambda folder: FOREVER)
    with open_launcher("local", jobs=2) as launcher:
        assert isinstance(launcher, LocalLauncher)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        outcome = work(study, launcher)
    assert outcome.stopped_by == "SIGTERM"
    assert outcome.failed == {}
    assert outcome.blocked == ()


def test_status_tells_steps_states_and_time(
    study: Path, fake: FakeSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.broken = lambda task: task.kind == "sweep" and "A/defdetr/MAE" in task.run
    work(study)
    capsys.readouterr()
    status(str(study), json=True)
    content = json.loads(capsys.readouterr().out)
    cell = next(c for c in content["cells"] if c["state"] == "failed")
    assert (cell["dataset"], cell["architecture"], cell["steps"]) == ("A", "defdetr", 40)
    assert cell["jobs"] == {
        "prepare": "done", "truth": "done", "train": "done", "sweep": "failed",
        "predict": "blocked", "evaluate": "blocked",
    }  # fmt: skip
    assert content["jobs"] == {"done": 32, "failed": 1, "blocked": 2}
    assert content["seconds_left"] is not None
    status(str(study), json=False)
    text = capsys.readouterr().out
    assert "failed: sweep" in text
    assert "8 cells: 7 done, 0 running, 0 waiting, 1 failed, 0 blocked" in text


@pytest.mark.slow
def test_report_has_tables_ranks_and_names_what_is_missing(
    study: Path, fake: FakeSteps, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no cell is finished"):
        report(str(study), None, compare=None, samples=20)
    fake.broken = lambda task: isinstance(task, Train) and "B/defdetr/MAE" in task.run
    work(study)
    capsys.readouterr()
    out = tmp_path / "report"
    report(str(study), out, compare="paper", samples=20)
    printed = capsys.readouterr().out
    assert "B/defdetr/MAE" in printed
    assert "7 of 8 cells" in printed
    for name in ("table.md", "table.csv", "table.tex", "table.html", "ranking.csv",
                 "ranks_map_0.10.png", "comparison.md", "index.html"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    assert "first" in (out / "table.md").read_text()


@pytest.mark.slow
def test_dask_workers_do_the_jobs(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(launch, "_command", lambda folder: ["test", "-f", f"{folder}/job.json"])
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False}
    with (
        distributed.LocalCluster(**options, dashboard_address=None) as cluster,
        open_launcher(f"dask:{cluster.scheduler_address}", jobs=1) as launcher,
    ):
        outcome = work(study, launcher)
    assert len(outcome.done) == 35
    assert outcome.failed == {}


@pytest.mark.slow
def test_dry_run_lists_every_job_with_gpu_hours(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(str(study), jobs=1, device="cpu", executor="local", gpus=None, workers=0, dry_run=True)
    text = capsys.readouterr().out
    assert all(name in text for name in plan_of(study).jobs)
    assert "8 cells, 35 jobs" in text
    assert "TFLOP/s" in text
    assert not (study.parent / "work").exists()
    totals = [line for line in text.splitlines() if line.startswith("together")]
    assert float(totals[0].split()[3].replace(",", "")) >= 0


def test_slurm_jobs_wait_for_those_they_need(
    study: Path, fake: FakeSteps, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with study.open("a") as file:
        file.write('[slurm]\noptions = ["--partition=gpu"]\ntrain = ["--gres=gpu:1"]\n')
    tools = tmp_path / "tools"
    tools.mkdir()
    calls = tmp_path / "calls.txt"
    _script(tools / "sbatch", f'echo "$@" >> {calls}\nwc -l < {calls}')
    _script(tools / "squeue", f"seq 1 $(wc -l < {calls})")
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    plan = plan_of(study)
    submitted = submit(plan, device="cuda", workers=0)
    assert list(submitted.new) == list(plan.jobs)
    lines = calls.read_text().splitlines()
    numbers = {name: str(number) for number, name in enumerate(plan.jobs, start=1)}
    assert numbers == submitted.new
    for line, job in zip(lines, plan.jobs.values(), strict=True):
        wanted = ":".join(numbers[name] for name in job.after)
        assert ("--dependency" in line) == bool(job.after)
        assert not wanted or f"afterok:{wanted} " in line
    scripts = study.parent / "work" / "slurm"
    text = (scripts / "train/A/retunet/MAE/fold_0_seed_0.sh").read_text()
    assert "#SBATCH --gres=gpu:1" in text
    assert "--gres" not in (scripts / "truth/A.sh").read_text()
    again = submit(plan, device="cuda", workers=0)
    assert again.new == {}
    assert len(again.queued) == len(lines)


@pytest.mark.slow
def test_slurm_script_does_its_job_and_leaves_the_marker(
    raw_dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = raw_dataset.parent / "study.toml"
    study.write_text(f"{STUDY}\n[slurm]\n")
    (tmp_path / "mae.safetensors").write_bytes(b"weights")
    plan = plan_of(study)
    tools = tmp_path / "tools"
    tools.mkdir()
    # Only the job without dependencies is done; the others get numbers alone.
    _script(tools / "sbatch", 'case "$*" in *truth/A.sh) bash "${@: -1}" >&2 ;; esac; echo 7')
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    submit(plan, device="cpu", workers=0)
    assert Markers(plan_of(study)).state("truth/A") == "done"
    assert (study.parent / "work" / "truth" / "A" / "images.json").is_file()
    assert "truth/A" in (study.parent / "work/jobs/truth/A" / DONE).read_text()


def test_shipped_studies_are_those_of_the_repository() -> None:
    shipped = shipped_studies()
    assert {"missing_piece", "missing_piece_ablations"} <= set(shipped)
    for path in shipped.values():
        assert path.read_bytes() == (ROOT / "studies" / path.name).read_bytes()


def test_missing_piece_has_the_cells_of_table_3() -> None:
    from voxelbridge.detect.paper_comparison import PAPER_ARCHITECTURES, PAPER_INITIALISATIONS
    from voxelbridge.detect.paper_results import load_paper

    plan = plan_of(Path("missing_piece"))
    printed = load_paper().table3
    rows = {(row.architecture, row.initialisation) for row in printed}
    assert len(printed) == len(rows) == 20
    assert len(plan.cells) == 20 * 8
    for dataset in load_paper().datasets:
        own = {
            (
                PAPER_ARCHITECTURES[cell.key.architecture.lower().replace("-", "")],
                PAPER_INITIALISATIONS[cell.key.initialisation.lower().replace("-", "")],
            )
            for cell in plan.cells
            if cell.key.dataset == dataset
        }
        assert own == rows
    assert all(cell.init is None for cell in plan.cells if "none" in cell.key.initialisation)
    stems = {(c.key.dataset, c.stem) for c in plan.cells if c.key.initialisation == "MAE"}
    assert ("D05", "random") in stems
    assert ("D01", None) in stems


def test_ablations_have_the_cells_of_table_2() -> None:
    from voxelbridge.detect.paper_results import load_paper

    printed = load_paper().table2
    stems = sum(len(row.stem) for row in printed)
    cells = plan_of(Path("missing_piece_ablations")).cells
    assert sum(cell.key.dataset == "D05" for cell in cells) == stems == 12
    assert len(cells) == 4 * len(printed) + stems == 52
    assert all(cell.init is not None for cell in cells)


def test_commands_have_their_documented_options() -> None:
    group: Any = get_command(app)
    found = {
        name: {text for parameter in command.params for text in parameter.opts}
        for name, command in group.commands["study"].commands.items()
    }
    assert set(found) == {"run", "status", "report"}
    assert {"--jobs", "--device", "--executor", "--gpus", "--workers", "--dry-run"} <= found["run"]
    assert "--json" in found["status"]
    assert {"-o", "--compare", "--bootstrap"} <= found["report"]


def test_miniature_has_16_cells_on_data_sets_that_its_script_writes() -> None:
    plan = plan_of(ROOT / "studies" / "miniature.toml")
    assert len(plan.cells) == 16
    script = (ROOT / "tools" / "miniature_study.py").read_text()
    assert all(f'"{part.raw}"' in script for part in plan.study.config.datasets.values())
    assert all(text in script for text in plan.study.config.settings)  # it replaces the steps


@pytest.mark.slow
@pytest.mark.long
def test_killed_study_goes_on_without_redoing_what_is_finished(
    raw_dataset: Path, tmp_path: Path
) -> None:
    path = _real_study(tmp_path, datasets=("A", "B"), seeds=(0, 1))
    program = [sys.executable, "-m", "voxelbridge.detect.cli", "study", "run", str(path)]
    command = [*program, "--device", "cpu", "--workers", "0", "--jobs", "2"]
    work_folder = path.parent / "work"
    total = len(plan_of(path).jobs)
    with subprocess.Popen(command, process_group=0, stdout=subprocess.DEVNULL) as first:
        _wait_for(lambda: len(_done(work_folder)) >= total // 2, seconds=1800)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    time.sleep(2)
    before = _finished(work_folder)
    assert total // 2 <= len(before) < total
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: _finished(work_folder)[name] for name in before} == before
    assert len(_done(work_folder)) == total
    out = tmp_path / "report"
    report(str(path), out, compare=None, samples=50)
    for name in ("table.md", "table.csv", "table.tex", "table.html", "ranking.csv",
                 "ranks_map_0.10.png", "ranks_per_dataset_map_0.10.png", "index.html"):  # fmt: skip
        assert (out / name).is_file(), name


def _real_study(folder: Path, *, datasets: Sequence[str], seeds: Sequence[int]) -> Path:
    """A study of real trainings of three steps, on the raw data set in `folder`."""
    torch.manual_seed(7)
    checkpoint = folder / "mae.safetensors"
    facts = CheckpointMetadata(method="mae", arch=RESENC_SMALL, stems={"main": Stem(channels=1)})
    tensors = collect_tensors(build_encoder(RESENC_SMALL, in_channels=1))
    write_checkpoint(checkpoint, Checkpoint(facts, tensors, origin=str(checkpoint)))
    text = STUDY[: STUDY.index("[datasets.A]")] + STUDY[STUDY.index("[architectures.retunet]") :]
    text = text.replace('stem = "random"\n', "").replace(
        'settings = ["schedule.steps=40"]',
        'settings = ["schedule.steps=3", "schedule.warmup_steps=1", "patch_size=[16,16,16]", '
        f'"log_every_steps=1", "checkpoint_every_steps=1"]\nseeds = {list(seeds)}',
    )
    for name in datasets:
        test = 'test = "held-out"\n' if name == "B" else ""
        text += f'\n[datasets.{name}]\nraw = "raw"\n{test}'
    path = folder / "study.toml"
    path.write_text(text)
    return path


def _done(work_folder: Path) -> list[Path]:
    return list((work_folder / "jobs").rglob(DONE))


def _finished(work_folder: Path) -> dict[Path, tuple[int, int]]:
    """The markers, weights and results of finished jobs, with their times and sizes."""
    files = [
        *_done(work_folder),
        *work_folder.glob("runs/*/*/*/*/checkpoints/detector.safetensors"),
        *work_folder.glob("results/*/*/*/*/metrics.json"),
    ]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def _wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.2)


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
