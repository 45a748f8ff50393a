"""Training states written while the training goes on.

`save` copies the state (a snapshot: later steps do not change it) and returns; a thread writes it
with `save_state`. At most one is on its way: the next `save` and `wait` wait for it. What the
thread could not write is a DataError at the next call of any method, and the state before it stays
the valid one.

The copy goes to memory of its own on the host, taken once and used again: one training state's
worth. From a GPU it is made by the device in the order of its work, so the next step is not kept
waiting; the thread waits for it instead.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from voxelbridge.core.errors import DataError
from voxelbridge.core.train.resume import TrainingState, save_state


class StateWriter:
    """Writes the training states of one run in the background; use it as a context manager.

    `before` is called in the thread ahead of each state (the records of the steps in it are
    flushed to the disk there, so that a state never outruns them).
    """

    def __init__(
        self, folder: Path, *, keep: int = 1, before: Callable[[], None] = lambda: None
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._before = before
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self._host: dict[str, Tensor] = {}  # by the place in the state

    def save(self, state: TrainingState) -> None:
        """Copies `state` and writes it in the background, after the previous one is written."""
        self.wait()
        snapshot, copied = self._snapshot(state)
        self._thread = Thread(target=self._write, args=(snapshot, copied), name="state writer")
        self._thread.start()

    def raise_if_failed(self) -> None:
        """Raises what stopped the last write, once; does not wait for one that is on its way."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when the last state is on the disk; raises what stopped it, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        match error:
            case None:
                return
            case OSError():
                raise DataError(
                    f"{self._folder}: the training state cannot be written "
                    f"({error.strerror or error})"
                ) from error
            case _:
                raise error

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            # The error that ends the run is the one to raise; this one must not go unseen.
            print(f"the last training state was not saved: {failure}", flush=True)

    def _write(self, snapshot: TrainingState, copied: "torch.cuda.Event | None") -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self._before()
            save_state(self._folder, snapshot, keep=self._keep)
        except Exception as error:  # raised in the training's own thread by `wait`
            self._error = error

    def _snapshot(self, state: TrainingState) -> tuple[TrainingState, "torch.cuda.Event | None"]:
        used: dict[str, Tensor] = {}
        on_gpu = False

        def copied(value: Any, place: str) -> Any:  # Any: a tree of dicts, sequences and leaves
            nonlocal on_gpu
            match value:
                case Tensor():
                    on_gpu = on_gpu or value.is_cuda
                    used[place] = self._on_host(value.detach(), place)
                    return used[place]
                case Mapping():
                    tree: Any = copy.copy(value)  # keeps `_metadata` of a module's state dict
                    for name, item in value.items():
                        tree[name] = copied(item, f"{place}/{name}")
                    return tree
                case list() | tuple():
                    return type(value)(copied(v, f"{place}/{i}") for i, v in enumerate(value))
                case _:
                    return value

        tree = {name: copied(value, name) for name, value in vars(state).items()}
        self._host = used
        event = None
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
        return TrainingState(**tree), event

    def _on_host(self, tensor: Tensor, place: str) -> Tensor:
        host = self._host.get(place)
        fits = host is not None and (host.shape, host.dtype, host.stride()) == (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        )
        if host is None or not fits:
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True)
