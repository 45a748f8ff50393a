"""What the benchmarks of networks share: options, the device, a clock that waits for it."""

import time
from typing import Annotated, Literal

import torch
import typer

DeviceName = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch on the CPU.")]


def prepare_device(name: Literal["cpu", "cuda"], *, threads: int) -> torch.device:
    """The device `name`, ready to be measured; a GPU is named in a printed line."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    device = torch.device(name)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    return device


def now(device: torch.device) -> float:
    """Seconds of the wall clock, once all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
