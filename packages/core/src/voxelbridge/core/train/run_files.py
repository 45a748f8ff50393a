"""What rank 0 of a training has open in the run directory, and how every rank goes on from it."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.run import RunDirectory
from voxelbridge.core.train.distributed import World
from voxelbridge.core.train.metrics import Meter, MetricsFile, TensorBoard
from voxelbridge.core.train.resume import TrainingState, remove_leftovers, stored_states
from voxelbridge.core.train.settings import TrainingSettings
from voxelbridge.core.train.state_writer import StateWriter


class RunFiles:
    """Directory, records and states of one run; closed by the given stack, the states first."""

    def __init__(
        self,
        stack: ExitStack,
        path: Path,
        settings: TrainingSettings,
        *,
        kind: str,
        tensorboard: bool,
    ) -> None:
        self.run = stack.enter_context(RunDirectory.open_or_create(path, settings, kind=kind))
        remove_leftovers(self.run.checkpoints)
        self.metrics = MetricsFile(self.run.metrics)
        stack.callback(self.metrics.close)
        self.states = stack.enter_context(
            StateWriter(
                self.run.checkpoints,
                keep=settings.keep_checkpoints,
                before=self.metrics.flush_to_disk,
            )
        )
        self._board = TensorBoard(path / "tensorboard") if tensorboard else None
        if self._board:
            stack.callback(self._board.close)

    def write(self, record: Mapping[str, float]) -> None:
        """Adds one record to `metrics.jsonl` and to TensorBoard."""
        self.metrics.write(record)
        if self._board:
            self._board.write(record)

    def add_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Adds a picture (H, W, 3) to TensorBoard, where that is asked for."""
        if self._board:
            self._board.add_picture(name, pixels, step)


def restore(
    state: TrainingState,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    world: World,
    run: Path,
) -> None:
    """Puts a loaded state into the network, the optimizer and this rank's meter.

    ConfigError for another number of ranks, CheckpointError for another network.
    """
    if len(state.meters) != world.size:
        raise ConfigError(
            f"{run}: the run was started with {len(state.meters)} ranks, now there are "
            f"{world.size}; use torchrun --nproc-per-node as before, or another run directory"
        )
    try:
        objective.load_state_dict(state.model)
        optimizer.load_state_dict(state.optimizer)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{run}: the saved state does not fit the network ({first_line}); the code or the data "
            "changed since: take another run directory"
        ) from error
    meter.load_state(state.meters[world.rank])
    if world.is_main:
        newest = stored_states(run / "checkpoints")[0]
        if (newest.attempt, newest.step) != (state.attempt, state.step):
            print(f"{run}: {newest.file} is missing; an older state is taken")
        restarted = f" of restart {state.attempt}" if state.attempt else ""
        where = f"after step {state.step - 1}" if state.step else "at the begin"
        print(f"resuming {run} {where}{restarted}")
