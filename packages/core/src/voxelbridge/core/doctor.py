"""What this machine and this installation offer, for bug reports and before long runs."""

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "voxelbridge-core",
    "voxelbridge-pretrain-ssl",
    "voxelbridge-pretrain-sup",
    "voxelbridge-detect",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "pydantic",
    "typer",
    "SimpleITK",
    "blosc2",
    "scipy",
    "acvl-utils",
    "batchgenerators",
)
# Older ones can be made to run code or corrupt memory by a file they read.
FLOORS = {"torch": (2, 10), "blosc2": (4, 14, 1)}
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY_GIB = 1.0  # a container's default of 64 MB ends the loader's workers
MIN_FREE_DISK_GIB = 10.0
GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_gib: float
    capability: str


@dataclass(frozen=True)
class Examination:
    """Versions (None: not installed) and resources; `problems` are what will go wrong."""

    versions: dict[str, str | None]
    python: str
    system: str
    gpus: tuple[Gpu, ...]
    cuda: str | None  # the toolkit that torch was built for
    cpu_threads: int  # that this process may use
    torch_threads: int
    memory_gib: float
    free_disk_gib: float  # of the current folder
    free_shared_memory_gib: float | None
    problems: tuple[str, ...]
    verdict: str

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def examine() -> Examination:
    """Looks at the installation and the machine; starts nothing and writes nothing."""
    versions = {name: _installed(name) for name in PACKAGES}
    gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
    free_disk = shutil.disk_usage(Path.cwd()).free / GIB
    shared = shutil.disk_usage(SHARED_MEMORY).free / GIB if SHARED_MEMORY.is_dir() else None
    problems = _problems(versions, free_disk, shared)
    device = ", ".join(gpu.name for gpu in gpus) if gpus else "no GPU, computes on the CPU"
    state = "ready" if not problems else f"{len(problems)} problems"
    return Examination(
        versions=versions,
        python=platform.python_version(),
        system=platform.platform(),
        gpus=gpus,
        cuda=torch.version.cuda,
        cpu_threads=_usable_threads(),
        torch_threads=torch.get_num_threads(),
        memory_gib=round(_memory_bytes() / GIB, 1),
        free_disk_gib=round(free_disk, 1),
        free_shared_memory_gib=None if shared is None else round(shared, 1),
        problems=problems,
        verdict=f"{state}: {device}; {'; '.join(problems) or 'nothing is missing'}",
    )


def _problems(
    versions: dict[str, str | None], free_disk: float, shared: float | None
) -> tuple[str, ...]:
    problems = []
    for name, floor in FLOORS.items():
        found = versions[name]
        if found is not None and _numbers(found) < floor:
            wanted = ".".join(map(str, floor))
            problems.append(f"{name} {found} is unsafe on foreign files, install {wanted} or newer")
    if free_disk < MIN_FREE_DISK_GIB:
        problems.append(f"only {free_disk:.1f} GiB of disk free here")
    if shared is not None and shared < MIN_SHARED_MEMORY_GIB:
        problems.append(
            f"only {shared:.2f} GiB of shared memory, start the container with --shm-size=8g"
        )
    return tuple(problems)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """(2, 10, 1) of "2.10.1+cu128"; stops at the first part that is no number."""
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        name=properties.name,
        memory_gib=round(properties.total_memory / GIB, 1),
        capability=f"{properties.major}.{properties.minor}",
    )


def _usable_threads() -> int:
    if hasattr(os, "sched_getaffinity"):  # absent on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such figure on this system
        return 0
