"""What surrounds the steps of every training: run directory, resume, log, save, signals.

A part's `train()` reads like a lab protocol. Everything below that is not the part's own (data,
network, validation) is in `core`, and what would have to be fixed twice lives here:

    with join_world(device) as world, stop_on_signals() as stop:
        torch.manual_seed(config.seed)                            # the initial weights
        objective = build_objective(config)                       # forward(batch) -> named losses
        place_objective(objective, config, world.device)          # layout, recomputation, compiler
        optimizer = build_optimizer(config.optim, objective)
        with open_training(
            run, config, kind="detect", world=world, stop=stop, objective=objective,
            optimizer=optimizer, facts={"store": digest}, arguments={"store": str(store)},
            dry_run=dry_run,
        ) as training:
            batches = step_batches(make_batch, first_step=training.first_pass, ...)
            for result in training.steps(batches):
                if due(config.validate_every_steps, result.step):
                    with training.averaged():
                        training.log(validate(...))               # {"val_loss": ...}
            if training.is_finished and world.is_main:
                with training.averaged():
                    write_checkpoint(...)
    return report_stop(training)

`training.steps` runs `train_steps` with the settings of the config, adds the losses to the meter,
and after the loop's body writes the record of the step and saves the state where due. Values given
to `training.log` become part of the step's record, which is then written whatever
`log_every_steps` says, so that a step has one record. `training.averaged()` matters where weights
are averaged (`averaging`), and a training that may restart (`restart`) gives `training.steps` a
function `batches(first_pass, passes)` instead of the batches: see there. States are written by a
thread; a body that ends the run early finds the last one on the disk behind `open_training`.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from signal import SIGINT
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.progress import LINE_EVERY_SECONDS, track
from voxelbridge.core.run import CONFIG_FILE, Facts, check_same_config
from voxelbridge.core.train.averaging import EMA, Averager, NoAveraging, WeightAveraging
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.estimate import (
    Estimate,
    StepClock,
    peak_memory,
    reset_peak_memory,
    state_size,
)
from voxelbridge.core.train.metrics import Meter
from voxelbridge.core.train.restart import (
    RestartRule,
    RestartWatch,
    StartingPoint,
    scheme_of,
    verdict,
)
from voxelbridge.core.train.resume import (
    StopRequest,
    TrainingState,
    load_state,
)
from voxelbridge.core.train.run_files import RunFiles, restore
from voxelbridge.core.train.schedule import Scheme, due
from voxelbridge.core.train.settings import TrainingSettings
from voxelbridge.core.train.steps import GRADIENT_NORM, StepResult, train_steps

DRY_STEPS = 2  # the first one warms up (memory, cuDNN's search, compiler), the second is measured
LONG_STEP = 20.0  # seconds; a dry run on a CPU, which warms up little, leaves it at one such step

# The batches of the passes from the first to before the second number. Any: the objective's batch
MakeBatches = Callable[[int, int], Iterable[Any]]


class Training:
    """One training between its start (or resume) and its end; made by `open_training`."""

    def __init__(
        self,
        settings: TrainingSettings,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        world: World,
        stop: StopRequest,
        averaging: NoAveraging | EMA | WeightAveraging,
        restart: RestartRule | None,
        files: RunFiles | None,
        dry_run: bool = False,
    ) -> None:
        self.first_step = 0  # of this process and attempt
        self.next_step = 0
        self.attempt = 0  # restarts so far; steps count from the last one
        self.stopped_by: str | None = None  # the signal that ended the training early
        self.is_main = world.is_main
        self._settings = settings
        self._objective = objective
        self._optimizer = optimizer
        self._world = world
        self._stop = stop
        self.is_dry_run = dry_run
        self._averaging = averaging
        self._averager = Averager(averaging, objective, steps=settings.schedule.steps)
        self._rule = None if dry_run else restart
        self._watch = RestartWatch(restart) if restart else None
        self._start = StartingPoint(objective, optimizer) if self._rule else None
        self._again = False  # the attempt under way has failed
        self._meter = Meter()
        self._files = files
        self._extra: dict[str, float] = {}
        self._last_line = self._last_save = time.monotonic()
        self._clock = StepClock(world.device)
        self.estimate: Estimate | None = None  # after the steps of a dry run

    @property
    def scheme(self) -> Scheme:
        """Schedule and learning rates of the attempt under way."""
        return scheme_of(
            self._settings.schedule,
            lr=self._settings.optim.lr,
            averaging=self._averaging,
            restart=self._rule,
            attempt=self.attempt,
        )

    @property
    def first_pass(self) -> int:
        """Number of the first batch needed: the first step times `accumulation_steps`."""
        return self.first_step * self._settings.accumulation_steps

    @property
    def passes(self) -> int:
        """Number of the last batch needed, plus one."""
        return self._end * self._settings.accumulation_steps

    @property
    def is_finished(self) -> bool:
        """Whether the last step of the schedule is done (never in a dry run)."""
        return self.next_step == self.scheme.schedule.steps and not self.is_dry_run

    @property
    def _end(self) -> int:
        steps = self.scheme.schedule.steps
        return min(DRY_STEPS, steps) if self.is_dry_run else steps

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the network has the averaged weights, where weights are averaged.

        Whoever validates or writes the network does it in there.
        """
        return self._averager.applied()

    def resume(self, state: TrainingState, run: Path) -> None:
        """Goes on from `state`; raises what `restore` raises."""
        restore(state, self._objective, self._optimizer, self._meter, self._world, run)
        self.first_step = self.next_step = state.step
        self.attempt = state.attempt
        if self.attempt:
            self._averager.restart(steps=self.scheme.schedule.steps)
        try:
            self._averager.load_state(state.averaging)
        except ValueError as error:
            raise CheckpointError(f"{run}: the saved state does not fit ({error})") from error
        if self._watch and state.watches:
            self._watch.load_state(state.watches[self._world.rank])

    def log(self, values: Mapping[str, float]) -> None:
        """Adds values (validation: names with `val`) to the record of the step in progress."""
        self._extra |= values

    def add_picture(self, name: str, pixels: NDArray[np.uint8]) -> None:
        """Adds a picture (H, W, 3) of the step in progress to TensorBoard, if that is written."""
        if self._files:
            self._files.add_picture(name, pixels, self.next_step)

    def steps(self, batches: Iterable[Any] | MakeBatches) -> Iterator[StepResult]:  # Any: batches
        """Trains on `batches` to the end of the schedule or to a signal; yields after each step.

        With a restart rule `batches` is a function: an attempt needs its batches from the first on.
        """
        if self._rule and not callable(batches):
            raise ValueError("a restart needs batches from the first on: give a function")
        results = self._results(batches)
        if self.is_dry_run:
            yield from self._measured(results)
            return
        start, done = time.monotonic(), 0
        while True:
            for result in self._shown(results):
                self._meter.add({**result.losses, GRADIENT_NORM: result.gradient_norm})
                self._averager.after_steps(result.step + 1)
                yield result
                done += 1
                self.next_step = result.step + 1
                if self._after(result):
                    break
            if not self._again or self.stopped_by:
                break
            self._again = False
            results = self._results(batches)
        if self._world.is_main and done:
            seconds = time.monotonic() - start
            share = self._clock.waited / max(seconds, 1e-9)
            print(f"waited for batches in {share:.1%} of {seconds:.0f} s", flush=True)

    def _results(self, batches: Iterable[Any] | MakeBatches) -> Iterator[StepResult]:
        """The steps of this attempt, as `train_steps` gives them."""
        scheme, settings = self.scheme, self._settings
        stream = batches(self.first_pass, self.passes) if callable(batches) else batches
        return train_steps(
            self._objective,
            self._clock.timed(stream),
            self._optimizer,
            world=self._world,
            learning_rate=scheme.learning_rate,
            first_step=self.first_step,
            steps=self._end,
            precision=settings.precision,
            clip_norm=settings.clip_norm,
            accumulation_steps=settings.accumulation_steps,
            seed=settings.seed,
            frozen_parts=scheme.frozen_parts,
        )

    def _measured(self, results: Iterator[StepResult]) -> Iterator[StepResult]:
        """The steps of a dry run; prints what they say about the whole run."""
        device, settings = self._world.device, self._settings
        reset_peak_memory(device)
        for result, computed, waited in self._clock.measured(results):
            self._meter.add({**result.losses, GRADIENT_NORM: result.gradient_norm})
            yield result
            self.next_step = result.step + 1
            result.require_finite()
            self._write_record(result)
            own = (computed, waited, peak_memory(device))
            slowest, longest_wait, peak = (
                max(values) for values in zip(*self._world.gather(own), strict=True)
            )
            self.estimate = Estimate(
                slowest,
                longest_wait,
                settings.schedule.steps,
                int(peak),
                state_size(self._objective, self._optimizer) + self._averager.nbytes,
                settings.keep_checkpoints,
            )
            if self._world.any(self._stop.is_set):
                self.stopped_by = self._stopping_signal()
                break
            if device.type == "cpu" and slowest > LONG_STEP:
                break
        if self._world.is_main and self.estimate:
            print(self.estimate.describe(), flush=True)

    def _after(self, result: StepResult) -> bool:
        """Logs and saves what is due; true if the steps of this attempt end here before their end.

        Either a signal ends the training, or the attempt has failed and the next one is to begin.
        """
        is_last = self.next_step == self._end
        self._judge(result)
        if self._extra or is_last or due(self._settings.log_every_steps, result.step):
            result.require_finite()
            self._write_record(result)
        if self._again:
            self._begin_again()
        if self._files:
            self._files.states.raise_if_failed()
        stopping, time_is_up = self._world.any_of([self._stop.is_set, self._save_is_overdue()])
        saving = time_is_up or due(self._settings.checkpoint_every_steps, result.step)
        if stopping or is_last or saving or self._again:
            result.require_finite()
            self._save()
        if self._files and (stopping or is_last or self._again):
            self._files.states.wait()  # who sees the end, or a new attempt, may rely on the state
        if stopping and not is_last:
            self.stopped_by = self._stopping_signal()
        return self.stopped_by is not None or self._again

    def _judge(self, result: StepResult) -> None:
        """Lets the restart rule see the step, and decide whether the attempt has failed."""
        if self._rule is None or self._watch is None:
            return
        self._watch.add(result.step, result.losses["total"], self._extra)
        if not self._watch.is_due(result.step):
            return
        result.require_finite()
        judgement = self._watch.judge(self._world)
        failed = judgement is not None and not judgement.sufficient
        self._again = failed and self.attempt < self._rule.max_restarts
        if judgement is not None:
            self._extra["improvement"] = judgement.improvement
        if self._again:
            self._extra["restart"] = self.attempt + 1
        if self._world.is_main:
            print(verdict(self._rule, judgement, result.step, self.attempt), flush=True)

    def _begin_again(self) -> None:
        """The weights of the start, a fresh optimizer, step 0 of the next attempt."""
        assert self._start is not None
        assert self._watch is not None
        self._start.restore(self._objective, self._optimizer)
        self.attempt += 1
        self.first_step = self.next_step = 0
        self._meter.reset()
        self._watch.restart()
        self._averager.restart(steps=self.scheme.schedule.steps)

    def _write_record(self, result: StepResult) -> None:
        means = self._meter.means(self._world)
        self._meter.reset()
        total = means.pop("total")
        rate = {"learning_rate": result.learning_rate}
        attempt = {"attempt": self.attempt} if self.attempt else {}
        step = {"step": result.step, **attempt}
        record = {**step, "loss": total, **means, **rate, **self._extra}
        self._extra = {}
        if self._files:
            self._files.write(record)
        if self._world.is_main:
            self._print(record)

    def _stopping_signal(self) -> str:
        return self._stop.signal.name if self._stop.signal else "another rank"

    def _save_is_overdue(self) -> bool:
        minutes = self._settings.checkpoint_every_minutes
        if minutes is None or not self._world.is_main:  # one clock decides for all ranks
            return False
        return time.monotonic() - self._last_save >= 60 * minutes

    def _save(self) -> None:
        self._last_save = time.monotonic()
        meters = self._world.gather(self._meter.state())
        watches = self._world.gather(self._watch.state()) if self._watch else []
        if self._files:
            state = TrainingState(
                self.next_step, self._objective.state_dict(), self._optimizer.state_dict(), meters,
                self.attempt, self._averager.state(), watches,
            )  # fmt: skip
            self._files.states.save(state)

    def _print(self, record: Mapping[str, float]) -> None:
        is_last = self.next_step == self._end
        if is_last or time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            values = ", ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "step")
            print(f"step {record['step']}: {values}", flush=True)

    def _shown(self, results: Iterator[StepResult]) -> Iterator[StepResult]:
        total = self._end - self.first_step
        if not self._world.is_main or total == 0:
            return results
        return track(results, description="training", total=total)


@contextmanager
def open_training(
    run: Path,
    settings: TrainingSettings,
    *,
    kind: str,
    world: World,
    stop: StopRequest,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: Facts,
    arguments: Facts,
    averaging: NoAveraging | EMA | WeightAveraging = NoAveraging(),  # noqa: B008 - frozen
    restart: RestartRule | None = None,
    tensorboard: bool = False,
    dry_run: bool = False,
) -> Iterator[Training]:
    """The training of `objective` in the directory `run`, continued where a state is there.

    `facts` go to `data.json` and must be the same at every start; `arguments` (paths, workers) are
    recorded only. A dry run checks the config of an existing directory, trains one or two steps,
    prints what they say about time, memory and disk (`Training.estimate`) and writes nothing.
    Raises what `RunDirectory.open_or_create` and `load_state` raise.
    """
    if dry_run:
        if (run / CONFIG_FILE).exists():
            check_same_config(run, settings, kind=kind)
        yield Training(
            settings, objective, optimizer, world=world, stop=stop, averaging=averaging,
            restart=restart, files=None, dry_run=True,
        )  # fmt: skip
        return
    with ExitStack() as stack:
        files = None
        if world.is_main:
            files = RunFiles(stack, run, settings, kind=kind, tensorboard=tensorboard)
            files.run.keep("data.json", facts)
            files.run.record_start(device=str(world.device), arguments=arguments)
        world.gather(None)  # the other ranks wait until the directory is checked
        training = Training(
            settings, objective, optimizer, world=world, stop=stop, averaging=averaging,
            restart=restart, files=files,
        )  # fmt: skip
        state = load_state(run / "checkpoints")
        if state is not None:
            training.resume(state, run)
        yield training


def report_stop(training: Training) -> None:
    """Says that a signal ended the training early; after Ctrl-C raises KeyboardInterrupt."""
    if training.stopped_by is None:
        return
    if training.is_main and not training.is_dry_run:
        print(
            f"stopped by {training.stopped_by} after step {training.next_step - 1}; "
            "the state is saved: the same command goes on from here"
        )
    if training.stopped_by == SIGINT.name:
        raise KeyboardInterrupt
