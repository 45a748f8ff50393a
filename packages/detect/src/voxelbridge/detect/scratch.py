"""Arrays in files that live as long as a case: larger than memory, handed over by name.

The pages of a mapped file belong to the file system: under pressure they are written out, and a
process that says so stops holding them. A preprocessed volume of gigabytes thus costs neither its
size in memory nor a copy through a pipe.
"""

import math
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import TEMPORARY_PREFIX

RELEASE_BYTES = 64 << 20  # so much is read or written before the pages are let go
COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class ScratchFile:
    """Name, shape and type of an array in a file; small, so it can be sent to another process."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class ScratchArray:
    """A scratch file opened for reading: slices are copies, so it may be closed at any time."""

    def __init__(self, file: ScratchFile) -> None:
        self.shape, self.dtype = file.shape, np.dtype(file.dtype)
        try:
            with file.path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{file.path}: cannot be read ({error})") from error
        self._array = np.frombuffer(self._map, dtype=self.dtype).reshape(self.shape)
        self._touched = 0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any, /) -> NDArray[Any]:  # Any: integers and slices
        part = np.array(self._array[index])
        self._touched += part.nbytes
        if self._touched >= RELEASE_BYTES:
            self._touched = 0
            release(self._map)
        return part

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._array
        self._map.close()


@dataclass
class FileWorkspace:
    """A `Workspace` whose volumes are files in `folder`, all beginning with `prefix`.

    Raises DataError where the disk has no room for one.
    """

    folder: Path
    prefix: str
    _maps: list[mmap.mmap] = field(default_factory=list)
    _written: int = 0

    def empty(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """A volume that is gone when its last reference is; its file has no name."""
        path = self.folder / f"{self.prefix}temporary"
        array = self._create(path, shape)
        path.unlink()
        return array

    def named(self, name: str, shape: Sequence[int]) -> tuple[ScratchFile, NDArray[np.float32]]:
        """A float32 array that another process can open, and the way to it."""
        path = self.folder / f"{self.prefix}{name}"
        return ScratchFile(path, tuple(shape), "<f4"), self._create(path, shape)

    def copy_of(self, name: str, array: NDArray[Any]) -> ScratchFile:
        """`array` (D, H, W), of any type and layout, written to a file slice by slice."""
        path = self.folder / f"{self.prefix}{name}"
        native = array.dtype.newbyteorder("=")
        step = max(1, COPY_BYTES // max(1, array[0].nbytes))
        try:
            with path.open("wb") as stream:
                for start in range(0, len(array), step):
                    part = np.ascontiguousarray(array[start : start + step], dtype=native)
                    stream.write(part.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise _no_room(path, array.nbytes, error) from error
        return ScratchFile(path, array.shape, native.str)

    def wrote(self, num_bytes: int) -> None:
        self._written += num_bytes
        if self._written >= RELEASE_BYTES:
            self._written = 0
            for mapped in self._maps:
                release(mapped)

    def _create(self, path: Path, shape: Sequence[int]) -> NDArray[np.float32]:
        size = 4 * math.prod(shape)
        try:
            with path.open("w+b") as stream:
                if hasattr(os, "posix_fallocate"):  # or a full disk would end the process
                    os.posix_fallocate(stream.fileno(), 0, size)
                else:
                    stream.truncate(size)
                mapped = mmap.mmap(stream.fileno(), size)
        except OSError as error:
            raise _no_room(path, size, error) from error
        self._maps.append(mapped)
        return np.frombuffer(mapped, dtype="<f4").reshape(tuple(shape))


def release(mapped: mmap.mmap) -> None:
    """Lets go of the pages of a mapped file; they are read again when they are asked for."""
    if hasattr(mmap, "MADV_DONTNEED"):  # for a shared mapping nothing is lost by it
        mapped.madvise(mmap.MADV_DONTNEED)


def scratch_prefix(case_id: str) -> str:
    """How the names of a case's scratch files begin; they count as unfinished files."""
    return f"{TEMPORARY_PREFIX}{case_id}."


def remove_scratch(folder: Path, case_id: str) -> None:
    """Deletes the scratch files of a case, which may never have been begun."""
    prefix = scratch_prefix(case_id)
    for path in list(folder.iterdir()):
        # names are without a dot: a case may be called as another one and more
        if path.name.startswith(prefix) and "." not in path.name[len(prefix) :]:
            with suppress(FileNotFoundError):
                path.unlink()


def _no_room(path: Path, size: int, error: OSError) -> DataError:
    return DataError(
        f"{path.parent}: {size / (1 << 30):.3g} GiB of scratch space cannot be had "
        f"({error.strerror or error}); make room or take another folder for --out"
    )
