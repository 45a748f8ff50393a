"""The voxels of an image file as bytes: of the declared length, undamaged, from its own folder.

SimpleITK fills a truncated NIfTI file with zeros without a word, ignores gzip checksums, crashes on
strange headers and lets a detached header name any file of the machine. Hence voxels are unpacked
here, in one pass, and every byte is accounted for: too few, too many, a wrong checksum or anything
behind the end is a DataError.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from voxelbridge.core.data.file_tree import broken_link
from voxelbridge.core.errors import DataError

Compression = Literal["none", "gzip", "zlib"]

MAX_DEFLATE_RATIO = 1032  # the largest expansion that deflate can reach, bytes out per byte in
READ_BYTES = 1 << 18  # compressed bytes taken from the file at once
PIECE_BYTES = 1 << 22  # at most so many come out at once: a bomb fills nothing
GZIP_MAGIC = b"\x1f\x8b"


class PayloadReader:
    """Reads the bytes of one payload in order, unpacking them; `finish` checks its end."""

    def __init__(self, path: Path, stream: BinaryIO, *, compression: Compression) -> None:
        self._path = path  # the image that errors name
        self._stream = stream
        self._compression: Compression = compression
        self._decoder = _decoder(compression)
        self._packed = b""  # read ahead from the file
        self._piece = memoryview(b"")  # unpacked, not yet handed out

    def fill(self, target: memoryview) -> int:
        """Fills `target` as far as the payload goes; returns the number of bytes."""
        done = 0
        while done < len(target):
            if self._compression == "none":
                count = self._stream.readinto(target[done:])  # type: ignore[attr-defined]  # of open()
                if not count:
                    break
                done += count
                continue
            if not self._piece:
                self._piece = memoryview(self._next_piece())
                if not self._piece:
                    break
            part = self._piece[: len(target) - done]
            target[done : done + len(part)] = part
            self._piece = self._piece[len(part) :]
            done += len(part)
        return done

    def skip(self, count: int) -> None:
        """Passes over `count` bytes."""
        while count and (done := self.fill(memoryview(bytearray(min(count, PIECE_BYTES))))):
            count -= done
        if count:
            raise DataError(f"{self._path}: truncated: it ends before its voxels begin")

    def finish(self) -> None:
        """Checks that nothing follows, and the checksum and length at the end of a packed file."""
        if self.fill(memoryview(bytearray(1))):
            raise DataError(
                f"{self._path}: more bytes of voxels than its header declares; sizes, type or file "
                "are wrong: save the image again"
            )

    def _next_piece(self) -> bytes:
        """The next unpacked bytes; nothing only at the proper end of the last member."""
        try:
            while True:
                if self._decoder.eof:
                    if not self._begin_member():
                        return b""
                    continue
                packed = self._packed or self._decoder.unconsumed_tail
                packed = packed or self._stream.read(READ_BYTES)
                self._packed = b""
                piece = self._decoder.decompress(packed, PIECE_BYTES)
                if piece:
                    return piece
                if not packed and not self._decoder.eof:
                    raise DataError(
                        f"{self._path}: truncated: the compressed voxels end too early; copy the "
                        "file again"
                    )
        except zlib.error as error:
            raise DataError(
                f"{self._path}: damaged compressed voxels ({error}); copy the file again"
            ) from error

    def _begin_member(self) -> bool:
        """Begins the next gzip member behind the last one; zeros may pad the end of the file."""
        rest = self._decoder.unused_data
        while not rest.strip(b"\0"):
            more = self._stream.read(READ_BYTES)
            if not more:
                return False
            rest = more
        if self._compression == "gzip" and len(rest) < 2:
            rest += self._stream.read(READ_BYTES)
        if self._compression != "gzip" or not rest.startswith(GZIP_MAGIC):
            raise DataError(
                f"{self._path}: foreign bytes behind the compressed voxels; copy the file again"
            )
        self._decoder = _decoder("gzip")
        self._packed = rest
        return True


def check_size(path: Path, available: int, expected: int, *, compression: Compression) -> None:
    """Refuses `expected` bytes of voxels that `available` bytes of file cannot or do not hold."""
    if compression == "none" and available > expected:
        raise DataError(
            f"{path}: {available} bytes of voxels, the header declares {expected}; sizes, type or "
            "file are wrong: save the image again"
        )
    possible = available if compression == "none" else available * MAX_DEFLATE_RATIO
    if expected > possible:
        packed = "" if compression == "none" else " packed"
        raise DataError(
            f"{path}: truncated: the header declares {expected} bytes of voxels, "
            f"{max(available, 0)}{packed} bytes cannot hold them; copy the file again"
        )


@contextmanager
def open_payload(
    path: Path, payload: Path, *, offset: int, compression: Compression
) -> Iterator[PayloadReader]:
    """The bytes of the file `payload` from `offset` on, unpacked; errors name the image `path`."""
    try:
        with payload.open("rb", buffering=0) as stream:
            stream.seek(offset)
            yield PayloadReader(path, stream, compression=compression)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def truncated(path: Path, got: int, expected: int) -> DataError:
    """The error for a payload that ends too early."""
    return DataError(
        f"{path}: truncated: {got} bytes of voxels, the header declares {expected}; "
        "copy the file again"
    )


def payload_in_own_folder(header: Path, name: str) -> Path:
    """The file that a detached header names, which must lie beside it, also behind links."""
    payload = header.parent / name
    plain = name and Path(name).name == name and not name.upper().startswith("LIST")
    if not plain or "%" in name or "\0" in name or not payload.is_file():
        raise DataError(
            f"{header}: its voxels are in {name!r}; expected one existing file in the same folder"
        )
    real = payload.resolve()
    if real.parent not in (header.resolve().parent, header.parent.resolve()):
        raise DataError(f"{header}: {name!r} links to another folder; copy the file beside it")
    if real == header.resolve():
        raise DataError(f"{header}: names itself as the file of its voxels; save the image again")
    return payload


def check_regular_file(path: Path) -> int:
    """The size of a file; DataError for what is none: a folder, a pipe, a device, a link loop."""
    try:
        found = os.stat(path)  # noqa: PTH116 - Path.stat differs between versions on link loops
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "does not exist" if missing else f"cannot be read ({error})"
        raise DataError(f"{path}: {broken_link(path) or reason}") from error
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise DataError(f"{path}: is not a file")
    return found.st_size


def _decoder(compression: Compression) -> "zlib._Decompress":
    return zlib.decompressobj(31 if compression == "gzip" else 47)  # 47: zlib or gzip, by header
