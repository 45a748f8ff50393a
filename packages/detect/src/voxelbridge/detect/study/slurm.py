"""A study as SLURM jobs: one batch script per job, each after those that it needs.

STUDY/slurm/KIND/....sh are the scripts; submit.sh beside them submits all of them by hand. A job
that a queue still holds from an earlier call is not submitted again.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import atomic_write, read_json, write_json
from voxelbridge.core.train.distributed import DeviceChoice
from voxelbridge.detect.study.config import SlurmSettings
from voxelbridge.detect.study.job_file import write_job
from voxelbridge.detect.study.jobs import Job, Plan
from voxelbridge.detect.study.launch import PERFORM
from voxelbridge.detect.study.markers import (
    EXIT_STOPPED,
    FAILED,
    LOG,
    SCHEMA,
    STOP,
    Markers,
    job_folder,
    locked,
)
from voxelbridge.detect.study.tasks import Kind

SCRIPTS = "slurm"
SUBMITTED = "submitted.json"
_SECONDS = 60.0  # for an answer of sbatch or squeue


@dataclass(frozen=True)
class Submitted:
    """What a call did: SLURM's numbers by job."""

    new: Mapping[str, str]
    queued: Mapping[str, str]  # by an earlier call
    scripts: Path


def submit(plan: Plan, *, device: DeviceChoice, workers: int) -> Submitted:
    """Writes the scripts of all jobs that are not done and gives them to `sbatch`."""
    settings = _settings(plan)
    folder = plan.study.folder
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--executor slurm: there is no sbatch on this machine; --dry-run writes the scripts "
            f"and {SCRIPTS}/submit.sh alone"
        )
    with locked(folder, f"{folder}: another `study run` works here; wait for it, or stop it"):
        (folder / STOP).unlink(missing_ok=True)
        waiting = write_scripts(plan, settings, device=device, workers=workers)
        queued = _still_queued(plan, waiting)
        new: dict[str, str] = {}
        for job in waiting:
            if job.id in queued:
                continue
            known = {**queued, **new}
            after = [known[name] for name in job.after if name in known]
            own = job_folder(folder, job.id)
            (own / FAILED).unlink(missing_ok=True)
            new[job.id] = _sbatch(_script(folder, job), after)
            write_json(own / SUBMITTED, {"schema": SCHEMA, "slurm": new[job.id]})
    return Submitted(new, queued, folder / SCRIPTS)


def write_scripts(
    plan: Plan, settings: SlurmSettings | None = None, *, device: DeviceChoice, workers: int
) -> list[Job]:
    """Writes the scripts, and submit.sh, of the jobs that are not done; returns these jobs."""
    settings = settings or _settings(plan)
    folder = plan.study.folder
    markers = Markers(plan)
    waiting = [job for job in plan.jobs.values() if markers.done(job.id) is None]
    for job in waiting:
        own = write_job(folder, job, device=device, workers=workers, threads=None)
        _write(_script(folder, job), _text(settings, job, own))
    numbers = {job.id: number for number, job in enumerate(waiting)}
    lines = ["#!/bin/bash", "set -e"]
    for job in waiting:
        after = "".join(f":${{job_{numbers[name]}}}" for name in job.after if name in numbers)
        dependency = f" --dependency=afterok{after} --kill-on-invalid-dep=yes" if after else ""
        script = shlex.quote(str(_script(folder, job)))
        lines.append(f"job_{numbers[job.id]}=$(sbatch --parsable{dependency} {script})")
        lines.append(f"job_{numbers[job.id]}=${{job_{numbers[job.id]}%%;*}}")
    _write(folder / SCRIPTS / "submit.sh", "\n".join(lines) + "\n")
    return waiting


def _settings(plan: Plan) -> SlurmSettings:
    if plan.study.config.slurm is None:
        raise ConfigError(
            f"{plan.study.source}: slurm: missing; --executor slurm needs a table [slurm] with "
            'the options of your cluster, such as options = ["--partition=gpu"]'
        )
    return plan.study.config.slurm


def _script(folder: Path, job: Job) -> Path:
    return folder / SCRIPTS / f"{job.id}.sh"


def _text(settings: SlurmSettings, job: Job, own: Path) -> str:
    # bash hands no signal on to what it waits for: the notice before the time limit is for python.
    command = shlex.join([sys.executable, "-m", PERFORM, str(own)])
    options = [
        f"--job-name={job.id}", f"--output={own / LOG}", "--open-mode=append",
        *settings.options, *_own_options(settings, job.kind),
    ]  # fmt: skip
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in options),
        *settings.setup,
        f"{command} &",
        "child=$!",
        "trap 'kill -TERM \"$child\" 2>/dev/null' TERM USR1 INT",
        'wait "$child"; status=$?',
        'while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done',
    ]
    if settings.requeue:
        lines.append(
            f'if [ "$status" -eq {EXIT_STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi'
        )
    return "\n".join([*lines, 'exit "$status"']) + "\n"


def _own_options(settings: SlurmSettings, kind: Kind) -> Sequence[str]:
    match kind:
        case "train":
            return settings.train
        case "prepare" | "truth":
            return settings.prepare
        case "sweep":
            return settings.sweep
        case "predict":
            return settings.predict
        case "evaluate":
            return settings.evaluate


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def _sbatch(script: Path, after: Sequence[str]) -> str:
    options = ["--parsable"]
    if after:
        options += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    done = subprocess.run(
        ["sbatch", *options, str(script)],
        capture_output=True, text=True, check=False, timeout=_SECONDS,
    )  # fmt: skip
    number = done.stdout.strip().split(";")[0]
    if done.returncode or not number:
        reason = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise DataError(f"sbatch {script}: {reason}; the jobs before it are submitted")
    return number


def _still_queued(plan: Plan, waiting: Sequence[Job]) -> dict[str, str]:
    """Jobs that an earlier call submitted and `squeue` still knows."""
    known = {}
    for job in waiting:
        path = job_folder(plan.study.folder, job.id) / SUBMITTED
        if path.is_file():
            known[job.id] = str(read_json(path)["slurm"])
    if not known or shutil.which("squeue") is None:
        return {}
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%i"],
        capture_output=True, text=True, check=False, timeout=_SECONDS,
    )  # fmt: skip
    if done.returncode:
        reason = " ".join(done.stderr.split())
        raise DataError(f"squeue: {reason}; without it jobs could be submitted twice")
    queue = set(done.stdout.split())
    return {name: number for name, number in known.items() if number in queue}
