"""What is known of a job from its folder: STUDY/jobs/KIND/...

job.json       what the process that does the job is given
started.json   facts, dependencies, process and time of the last start
done.json      the same, with the duration; written when everything else of the job is
failed.json    the error of the last attempt
log.txt        what it printed, all attempts
.lock          held by the process that does the job
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json
from voxelbridge.detect.study.inputs import Description, identity, is_unchanged
from voxelbridge.detect.study.jobs import Job, Plan
from voxelbridge.detect.study.tasks import facts_of

JOBS = "jobs"
JOB_FILE, STARTED, DONE, FAILED = "job.json", "started.json", "done.json", "failed.json"
LOG, LOCK, STOP = "log.txt", ".lock", "stop"
SCHEMA = 1
EXIT_STOPPED = 75  # ended early, resumable (EX_TEMPFAIL)

State = Literal["waiting", "running", "done", "failed", "blocked"]
Marker = dict[str, Any]  # Any: JSON values


def job_folder(study_folder: Path, job_id: str) -> Path:
    """Where the markers of a job are."""
    return study_folder / JOBS / job_id


def result_key(
    facts: str, inputs: Mapping[str, Description | None], after: Mapping[str, str]
) -> str:
    """What tells two results of a job apart: facts, inputs and the keys of its dependencies."""
    content = {"facts": facts, "inputs": identity(inputs), "after": dict(after)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Markers:
    """The states of all jobs of a study, each looked up once."""

    plan: Plan
    _done: dict[str, Marker | None] = field(default_factory=dict)
    _states: dict[str, State] = field(default_factory=dict)

    def folder(self, job_id: str) -> Path:
        """Where the markers of a job are."""
        return job_folder(self.plan.study.folder, job_id)

    def done(self, job_id: str) -> Marker | None:
        """The done marker of a job, if it is of the job as the study states it now."""
        if job_id not in self._done:
            self._done[job_id] = self._valid(self.plan.jobs[job_id])
        return self._done[job_id]

    def state(self, job_id: str) -> State:
        """`failed` and `running` are those of the last attempt; blocked: by a failed job."""
        if job_id not in self._states:
            self._states[job_id] = self._state(self.plan.jobs[job_id])
        return self._states[job_id]

    def error(self, job_id: str) -> str | None:
        """The error of the last attempt."""
        marker = _read(self.folder(job_id) / FAILED)
        return None if marker is None else str(marker.get("error"))

    def started(self, job_id: str) -> Marker | None:
        """What the last attempt wrote when it began."""
        return _read(self.folder(job_id) / STARTED)

    def _valid(self, job: Job) -> Marker | None:
        marker = _read(self.folder(job.id) / DONE)
        if marker is None or marker.get("facts") != facts_of(job.task):
            return None
        before = {name: self.done(name) for name in job.after}
        for name, own in before.items():
            if own is None or own["key"] != marker["after"].get(name):
                return None
        recorded = marker["inputs"]
        if len(recorded) != len(job.inputs):
            return None
        pairs = zip(recorded.values(), job.inputs, strict=True)
        return marker if all(is_unchanged(old, source) for old, source in pairs) else None

    def _state(self, job: Job) -> State:
        if self.done(job.id) is not None:
            return "done"
        if is_locked(self.folder(job.id)):
            return "running"
        if any(self.state(name) in ("failed", "blocked") for name in job.after):
            return "blocked"
        return "failed" if (self.folder(job.id) / FAILED).exists() else "waiting"


@contextmanager
def locked(folder: Path, what: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """`folder` for this process alone; DataError `what` where another one holds it too long."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    end = time.monotonic() + patience_s
    try:
        while True:
            try:
                # A record lock: it ends with this process however that ends, and forked workers
                # do not inherit it.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= end:
                    raise DataError(what) from None
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process holds `folder`, as far as the file system tells."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _read(path: Path) -> Marker | None:
    if not path.is_file():
        return None
    content = read_json(path)
    return content if isinstance(content, dict) and content.get("schema") == SCHEMA else None
