"""The process that does one job: `python -m voxelbridge.detect.study.perform FOLDER`.

Exit status 0: done, or done before; 1 and 2: failed, as the commands do; 75: ended early with what
was reached saved, by SIGTERM, SIGINT, the death of the process that started it, or the study's stop
file.
"""

import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, assert_never

from voxelbridge.core.errors import DataError, VoxelbridgeError
from voxelbridge.core.files import read_json, write_json
from voxelbridge.detect.post_processing_file import FILE_NAME as POST_PROCESSING_FILE
from voxelbridge.detect.study.inputs import describe_input
from voxelbridge.detect.study.job_file import JobFile, read_job
from voxelbridge.detect.study.markers import (
    DONE,
    EXIT_STOPPED,
    FAILED,
    SCHEMA,
    STARTED,
    STOP,
    Marker,
    job_folder,
    locked,
    result_key,
)
from voxelbridge.detect.study.tasks import (
    Evaluate,
    Predict,
    Prepare,
    Sweep,
    Train,
    Truth,
    facts_of,
)
from voxelbridge.detect.study_cells import METRICS_FILE

PATIENCE_S = 60.0  # for an earlier process of the same job that is about to end
WATCH_S = 0.5


class Stopped(BaseException):
    """The job was ended early; no Exception, so that nothing on the way takes it for a failure."""


def perform(folder: Path) -> int:
    """Does the job of a folder and listens to signals; returns the exit status."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    study = Path(read_job(folder).study)
    threading.Thread(target=_watch, args=(study, os.getppid()), daemon=True).start()
    return do_job(folder)


def do_job(folder: Path) -> int:
    """Does the job of a folder; returns the exit status. An error is kept in failed.json."""
    job = read_job(folder)
    try:
        with locked(folder, f"{job.id}: another process does this job", patience_s=PATIENCE_S):
            return _perform(folder, job)
    except Stopped:
        print(f"{job.id}: stopped; the same command goes on from here", flush=True)
        return EXIT_STOPPED
    except Exception as error:  # told in one line and kept: nobody sees this process
        return _failed(folder, job, error)


def _perform(folder: Path, job: JobFile) -> int:
    from voxelbridge.detect.study.steps import do, reached_steps

    marker = _marker(job)
    before = _read_marker(folder / DONE)
    if before is not None and before["key"] == marker["key"]:
        print(f"{job.id}: done before", flush=True)
        return 0
    (folder / FAILED).unlink(missing_ok=True)
    begun = _read_marker(folder / STARTED)
    is_new = begun is None or begun["key"] != marker["key"]
    start = time.time()
    steps = reached_steps(job.task)
    write_json(folder / STARTED, {**marker, "started": _now(start), "steps": steps})
    print(f"== {job.id} on {socket.gethostname()}, {_now(start)}", flush=True)
    if job.threads:
        import torch

        torch.set_num_threads(job.threads)
    if is_new:
        _remove_stale(job)
    if not do(job.task, device=job.device, workers=job.workers):
        raise Stopped
    end = time.time()
    reached = reached_steps(job.task)
    durations = {
        "finished": _now(end),
        "seconds": round(end - start, 3),  # of the last attempt
        "steps": None if reached is None else reached - (steps or 0),  # of the last attempt
    }
    write_json(folder / DONE, {**marker, **durations})
    return 0


def _marker(job: JobFile) -> Marker:
    """What the job depends on, as it is now."""
    after: dict[str, str] = {}
    for name in job.after:
        other = _read_marker(job_folder(Path(job.study), name) / DONE)
        if other is None:
            raise DataError(f"{job.id}: needs {name}, which is not done")
        after[name] = other["key"]
    inputs: dict[str, Any] = {  # Any: JSON values; no paths, so that a study can be moved
        f"{number} {source.kind}": describe_input(source)
        for number, source in enumerate(job.sources)
    }
    facts = facts_of(job.task)
    return {
        "schema": SCHEMA,
        "job": job.id,
        "key": result_key(facts, inputs, after),
        "facts": facts,
        "inputs": inputs,
        "after": after,
        "host": socket.gethostname(),
        "process": os.getpid(),
    }


def _remove_stale(job: JobFile) -> None:
    """Takes away what the job left when the study stated it otherwise; trainings and stores are
    not touched: they refuse other settings themselves."""
    match job.task:
        case Predict() | Truth() as task:
            shutil.rmtree(Path(task.out), ignore_errors=True)
        case Evaluate() as task:
            (Path(task.out) / METRICS_FILE).unlink(missing_ok=True)
        case Sweep() as task:
            (Path(task.run) / POST_PROCESSING_FILE).unlink(missing_ok=True)
        case Prepare() | Train():
            pass
        case _:
            assert_never(job.task)


def _failed(folder: Path, job: JobFile, error: Exception) -> int:
    if not isinstance(error, VoxelbridgeError):
        traceback.print_exc()
    text = " ".join(str(error).split()) or "no message"
    if not isinstance(error, VoxelbridgeError):
        text = f"{type(error).__name__}: {text}"
    print(f"error: {text}", file=sys.stderr, flush=True)
    write_json(
        folder / FAILED, {"schema": SCHEMA, "job": job.id, "error": text, "at": _now(time.time())}
    )
    return error.exit_code if isinstance(error, VoxelbridgeError) else 1


def _watch(study: Path, parent: int) -> None:
    """Ends this process as SIGTERM does when nobody waits for it any more, or all are to stop."""
    while os.getppid() == parent and not (study / STOP).exists():
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    for name in (signal.SIGTERM, signal.SIGINT):  # several senders tell the same
        signal.signal(name, signal.SIG_IGN)
    raise Stopped


def _read_marker(path: Path) -> Marker | None:
    return read_json(path) if path.is_file() else None


def _now(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(perform(Path(sys.argv[1])))
