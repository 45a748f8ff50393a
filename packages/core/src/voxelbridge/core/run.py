"""The run directory: what a training was started with, where it writes, who is writing.

    config.json       resolved config, with `schema` and `kind`
    data.json         facts of the data that must not change between starts
    environment.json  versions, commit of the code, device and arguments of every start
    metrics.jsonl     one object per logged step
    checkpoints/      training state and the finished checkpoint

Opening an existing directory continues it; a different config or different data is an error that
lists the differing keys. One process owns the directory at a time.
"""

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from voxelbridge.core.config import Config, differing_keys, flatten, validate
from voxelbridge.core.errors import ConfigError, DataError, VoxelbridgeError
from voxelbridge.core.files import read_json, remove_partial_files, write_json

CONFIG_SCHEMA = 1
ENVIRONMENT_SCHEMA = 1
CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
LOCK_FILE = ".lock"
_VERSIONS_OF = (
    "voxelbridge-core", "voxelbridge-pretrain-ssl", "voxelbridge-pretrain-sup",
    "voxelbridge-detect", "torch", "numpy", "scipy", "SimpleITK", "blosc2", "safetensors",
    "pydantic",
)  # fmt: skip
_GIT_SECONDS = 10.0  # a repository on a disk that hangs must not hang a training

C = TypeVar("C", bound=Config)
Facts = Mapping[str, Any]  # Any: JSON values


class RunLockedError(VoxelbridgeError):
    """Another process is writing to the run directory."""


class RunDirectory:
    """A run directory owned by this process until `close`; use it as a context manager."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open_or_create(cls, path: Path, config: Config, *, kind: str) -> "RunDirectory":
        """The directory for `config`, new or continued.

        `kind` names the part that trains ("pretrain_ssl", "detect"). Raises ConfigError for a
        directory of another kind, with another config, or with foreign content, and
        RunLockedError while another process owns it.
        """
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, _take_lock(path))
        try:
            remove_partial_files(path)
            if (path / CONFIG_FILE).exists():
                check_same_config(path, config, kind=kind)
            else:
                _refuse_foreign_content(path)
                values = config.model_dump(mode="json")
                write_json(path / CONFIG_FILE, {"schema": CONFIG_SCHEMA, "kind": kind, **values})
            run.checkpoints.mkdir(exist_ok=True)
        except BaseException:
            run.close()
            raise
        return run

    @property
    def checkpoints(self) -> Path:
        """Folder of the training state and of finished checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The `metrics.jsonl` file."""
        return self.path / "metrics.jsonl"

    def keep(self, name: str, facts: Facts) -> None:
        """Writes the JSON file `name` once; later starts must come with the same facts."""
        path = self.path / name
        if not path.exists():
            write_json(path, facts)
            return
        before, now = flatten(dict(read_json(path))), flatten(dict(facts))
        keys = [key for key in before | now if before.get(key) != now.get(key)]
        if keys:
            listed = "; ".join(f"{k}: {before.get(k)} -> {now.get(k)}" for k in keys[:5])
            raise DataError(
                f"{path}: the run was started with other data ({listed}); "
                "take the same store, or another run directory"
            )

    def record_start(self, *, device: str, arguments: Facts) -> None:
        """Adds this start to `environment.json`: versions, machine, threads, CLI arguments."""
        path = self.path / ENVIRONMENT_FILE
        starts = read_json(path)["starts"] if path.exists() else []
        start = {**environment(), "device": device, "arguments": dict(arguments)}
        write_json(path, {"schema": ENVIRONMENT_SCHEMA, "starts": [*starts, start]})

    def close(self) -> None:
        """Gives the directory free for other processes."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_run_config(path: Path, model: type[C], *, kind: str) -> C:
    """The config of an existing run of `kind`; ConfigError if it is something else."""
    tree = _read_config_tree(path)
    if tree.pop("schema", None) != CONFIG_SCHEMA:
        raise ConfigError(f"{path / CONFIG_FILE}: expected schema {CONFIG_SCHEMA}")
    found = tree.pop("kind", None)
    if found != kind:
        raise ConfigError(f"{path}: a run of kind {found}, expected {kind}")
    return validate(model, tree, where=str(path / CONFIG_FILE))


def check_same_config(path: Path, config: Config, *, kind: str) -> None:
    """ConfigError listing the differing keys unless the run at `path` has this very config."""
    before = read_run_config(path, type(config), kind=kind)
    different = differing_keys(before, config)
    if different:
        raise ConfigError(
            f"{path}: the run was started with another config ({'; '.join(different)}); "
            "use the same settings, or another run directory"
        )


def environment() -> dict[str, Any]:  # Any: JSON values
    """Versions and machine of this process; a package that is not installed has version null.

    `code` is the commit of the code that runs, `COMMIT-dirty` where files of it were changed since;
    null where it was not installed from a repository.
    """
    import torch

    versions = {name: _version(name) for name in _VERSIONS_OF}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "code": code_version(Path(__file__).parent),
        "gpus": gpus,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def _read_config_tree(path: Path) -> dict[str, Any]:  # Any: JSON values
    file = path / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"{path}: not a run directory ({CONFIG_FILE} is missing)")
    tree = read_json(file)
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a table of settings, got {type(tree).__name__}")
    return tree


def _refuse_foreign_content(path: Path) -> None:
    foreign = sorted(item.name for item in path.iterdir() if item.name != LOCK_FILE)
    if foreign:
        raise ConfigError(
            f"{path}: holds {foreign[0]} but no {CONFIG_FILE}; "
            "expected an empty folder or a run directory"
        )


def _take_lock(path: Path) -> int:
    """Descriptor of the locked lock file; the lock ends with the process, however it ends."""
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # A record lock, not flock: forked data workers do not inherit it, so a killed training
        # frees its run at once although its workers live on for seconds.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        os.close(descriptor)
        if isinstance(error, BlockingIOError | PermissionError):
            raise RunLockedError(
                f"{path}: {owner} is training here; wait for it, stop it, or take another folder"
            ) from None
        raise DataError(f"{path / LOCK_FILE}: cannot be locked ({error.strerror})") from error
    return descriptor


def code_version(folder: Path) -> str | None:
    """The commit of the repository that tracks `folder`, else that which pip installed from."""
    if _git(folder, "ls-files", "--error-unmatch", ".") is not None:  # else somebody's own one
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        origin = metadata.distribution("voxelbridge-core").read_text("direct_url.json")
        commit = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return commit if isinstance(commit, str) else None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints there; None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, check=False, timeout=_GIT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
