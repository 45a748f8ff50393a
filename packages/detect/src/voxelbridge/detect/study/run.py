"""Working a study off: what is done is skipped, what failed is tried again, the rest goes on."""

import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import write_json
from voxelbridge.core.train.distributed import DeviceChoice
from voxelbridge.detect.study.job_file import write_job
from voxelbridge.detect.study.jobs import Job, Plan
from voxelbridge.detect.study.launch import Launcher
from voxelbridge.detect.study.markers import (
    EXIT_STOPPED,
    FAILED,
    LOG,
    SCHEMA,
    STOP,
    Markers,
    is_locked,
    locked,
)

POLL_S = 0.2
FINISHING_FIRST = ("evaluate", "predict", "sweep", "prepare", "truth", "train")


@dataclass(frozen=True)
class Outcome:
    """What a call of `work_off` came to, by job."""

    done: tuple[str, ...]  # by this call
    skipped: tuple[str, ...]  # done before
    failed: dict[str, str] = field(default_factory=dict)  # with the error
    blocked: tuple[str, ...] = ()  # wait for a failed one
    stopped_by: str | None = None  # name of the signal


def work_off(
    plan: Plan,
    launcher: Launcher,
    *,
    device: DeviceChoice,
    workers: int,
    threads: int | None,
) -> Outcome:
    """Does every job that is not done; returns when nothing more can be done.

    One call at a time works on a folder: another one is a DataError. SIGTERM and Ctrl-C let the
    running jobs save and end; a second Ctrl-C ends them at once.
    """
    folder = plan.study.folder
    with locked(folder, f"{folder}: another `study run` works here; wait for it, or stop it"):
        (folder / STOP).unlink(missing_ok=True)
        markers = Markers(plan)
        before = tuple(name for name in plan.jobs if markers.done(name) is not None)
        print(f"{len(plan.jobs)} jobs, {len(before)} done before", flush=True)
        with _signals(folder, launcher) as stop:
            loop = _Loop(plan, markers, launcher, device, workers, threads, stop)
            loop.done.update(before)
            loop.run()
        blocked = tuple(name for name in plan.jobs if loop.is_blocked(name))
        done = tuple(name for name in plan.jobs if name in loop.done and name not in before)
        (folder / STOP).unlink(missing_ok=True)
        return Outcome(done, before, loop.failed, blocked, stop.signal)


def report_outcome(plan: Plan, outcome: Outcome) -> None:
    """Tells what a call came to; DataError where jobs failed, KeyboardInterrupt after Ctrl-C."""
    total, done = len(plan.jobs), len(outcome.done) + len(outcome.skipped)
    print(f"{done} of {total} jobs are done, {len(outcome.done)} of them by this call")
    if outcome.stopped_by:
        print(f"stopped by {outcome.stopped_by}; the same command goes on from here")
    if outcome.failed:
        print("failed:")
        markers = Markers(plan)
        for name, error in outcome.failed.items():
            print(f"  {name}: {error}\n    log: {markers.folder(name) / LOG}")
    if outcome.blocked:
        print(f"blocked by them: {len(outcome.blocked)} jobs")
    if outcome.stopped_by == signal.SIGINT.name:
        raise KeyboardInterrupt
    if outcome.failed:
        first = next(iter(outcome.failed))
        raise DataError(
            f"{len(outcome.failed)} of {total} jobs failed ({first}: {outcome.failed[first]}) and "
            f"{len(outcome.blocked)} wait for them; the same command tries them again"
        )


@dataclass
class _Stop:
    """Which signal has come, and how often."""

    signal: str | None = None
    times: int = 0


@dataclass
class _Loop:
    plan: Plan
    markers: Markers
    launcher: Launcher
    device: DeviceChoice
    workers: int
    threads: int | None
    stop: _Stop
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[Future[int], str] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Until nothing runs and nothing can be started."""
        while True:
            if self.stop.signal is None:
                self._start_ready()
            if not self.running:
                return
            finished, _ = wait(self.running, timeout=POLL_S, return_when=FIRST_COMPLETED)
            for future in finished:
                self._take(self.running.pop(future), future)

    def is_blocked(self, name: str) -> bool:
        """Whether a job waits, directly or not, for a failed one."""
        if name in self.failed or name in self.done:
            return False
        after = self.plan.jobs[name].after
        return any(other in self.failed or self.is_blocked(other) for other in after)

    def _start_ready(self) -> None:
        slots = self.launcher.slots
        for job in self._ready():
            if slots is not None and len(self.running) >= slots:
                return
            folder = write_job(
                self.plan.study.folder, job, device=self.device, workers=self.workers,
                threads=self.threads,
            )  # fmt: skip
            (folder / FAILED).unlink(missing_ok=True)
            self._tell(job.id, "starts")
            self.running[self.launcher.start(folder)] = job.id

    def _ready(self) -> list[Job]:
        """What can be started, first what finishes a cell."""
        busy = {*self.running.values(), *self.done, *self.failed, *self.stopped}
        ready = [
            job
            for job in self.plan.jobs.values()
            if job.id not in busy and all(name in self.done for name in job.after)
        ]
        return sorted(ready, key=lambda job: FINISHING_FIRST.index(job.kind))

    def _take(self, name: str, future: "Future[int]") -> None:
        folder = self.markers.folder(name)
        lost = future.exception()
        status = 1 if lost is not None else future.result()
        if status == 0:
            self.done.add(name)
            self._tell(name, "done")
            return
        if status == EXIT_STOPPED or (self.stop.signal and status < 0):
            self.stopped.add(name)
            if self.stop.signal is None:
                self.failed[name] = "stopped from outside; it goes on with the next `study run`"
            self._tell(name, "stopped")
            return
        error = self.markers.error(name) or _reason(status, lost)
        if not (folder / FAILED).exists():  # it could not tell itself
            write_json(folder / FAILED, {"schema": SCHEMA, "job": name, "error": error})
        self.failed[name] = error
        self._tell(name, f"FAILED: {error}")

    def _tell(self, name: str, what: str) -> None:
        left = len(self.plan.jobs) - len(self.done)
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} {name}: {what} ({left} left)", flush=True)


def _reason(status: int, lost: BaseException | None) -> str:
    if lost is not None:
        return f"its worker was lost ({type(lost).__name__}: {' '.join(str(lost).split())})"
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps for want of memory" if -status == signal.SIGKILL else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with status {status}; see its log"


@contextmanager
def _signals(folder: Path, launcher: Launcher) -> Iterator[_Stop]:
    """While it is open, SIGTERM and SIGINT stop the study instead of this process."""
    stop = _Stop()

    def handle(signum: int, frame: FrameType | None) -> None:
        del frame
        stop.times += 1
        stop.signal = stop.signal or signal.Signals(signum).name
        (folder / STOP).touch()
        if stop.times == 1:
            launcher.terminate()
        elif signum == signal.SIGINT:
            launcher.kill()

    names: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, handle) for name in names}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def running_elsewhere(plan: Plan) -> bool:
    """Whether a `study run` works on the folder."""
    return is_locked(plan.study.folder)
