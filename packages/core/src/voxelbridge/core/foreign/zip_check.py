"""The zip archive that torch.save writes, judged before torch opens it.

Torch checks no checksum, follows what the directory says and unpacks what is packed. Here every
entry must lie whole inside the file, stored as it is, apart from the others, and match its CRC.
"""

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from voxelbridge.core.safetensors_header import COPY_AGAIN, quoted, refusal

MAX_ENTRIES = 100_000
MAX_PICKLE_BYTES = 256 * 1024 * 1024
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_END_BYTES = 22  # of the record that closes an archive, without a comment
_CHUNK = 1 << 20


def check_zip(path: Path) -> tuple[zipfile.ZipFile, str]:
    """The open archive and the name of its one folder; CheckpointError unless it is sound."""
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged directory fails with many kinds of exceptions
        raise refusal(path, f"no sound zip archive ({_reason(error)}); {COPY_AGAIN}") from error
    try:
        entries = archive.infolist()
        root = _check_names(path, entries)
        _check_sizes(path, entries, size)
        _check_places(path, entries, size, archive.start_dir)
        _check_end(path, archive, size)
        _check_sums(path, archive)
        _check_kind(path, archive, root)
    except BaseException:
        archive.close()
        raise
    return archive, root


def _check_names(path: Path, entries: Sequence[zipfile.ZipInfo]) -> str:
    if not entries:
        raise refusal(path, f"an empty zip archive; {COPY_AGAIN}")
    if len(entries) > MAX_ENTRIES:
        raise refusal(path, f"{len(entries)} entries, at most {MAX_ENTRIES} are read")
    seen: set[str] = set()
    for entry in entries:
        name = entry.orig_filename
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
            raise refusal(path, f"entry {quoted(name)} points outside the archive")
        if not name.isprintable() or len(name) > 1000 or entry.is_dir() or len(parts) < 2:
            raise refusal(path, f"entry {quoted(name)} is none that torch.save writes")
        if name in seen:
            raise refusal(path, f"entry {quoted(name)} is there twice")
        seen.add(name)
    roots = {PurePosixPath(name).parts[0] for name in seen}
    if len(roots) > 1:
        raise refusal(path, f"{len(roots)} folders in one archive, torch.save writes one")
    return roots.pop()


def _check_sizes(path: Path, entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise refusal(
            path, f"{size} bytes that would unpack to {total}; torch.save does not compress"
        )
    for entry in entries:
        packed = entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
        if packed or entry.flag_bits & 1:
            how = "encrypted" if entry.flag_bits & 1 else "compressed"
            raise refusal(
                path,
                f"entry {quoted(entry.orig_filename)} is {how}, torch.save stores plainly",
            )


def _check_places(
    path: Path, entries: Sequence[zipfile.ZipInfo], size: int, directory: int
) -> None:
    """Every entry has its own bytes, before the directory, with the name the directory gives it."""
    end = 0
    with path.open("rb") as stream:
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            if entry.header_offset < end or entry.header_offset + _LOCAL_HEADER.size > size:
                raise refusal(
                    path, f"entry {quoted(entry.orig_filename)} overlaps another one or the end"
                )
            stream.seek(entry.header_offset)
            magic, name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
            start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            end = start + entry.file_size
            if magic != b"PK\x03\x04" or end > directory:
                raise refusal(
                    path, f"entry {quoted(entry.orig_filename)} is not where the directory says"
                )
    if min(entry.header_offset for entry in entries) != 0:
        raise refusal(path, "something stands before the zip archive")


def _check_end(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    with path.open("rb") as stream:
        stream.seek(max(0, size - _END_BYTES))
        if archive.comment or stream.read(4) != b"PK\x05\x06":
            raise refusal(path, f"something stands behind the zip archive; {COPY_AGAIN}")


def _check_sums(path: Path, archive: zipfile.ZipFile) -> None:
    for entry in archive.infolist():
        try:
            with archive.open(entry) as stream:
                while stream.read(_CHUNK):
                    pass
        except Exception as error:  # see `check_zip`
            reason = _reason(error)
            raise refusal(
                path, f"damaged: entry {quoted(entry.filename)} ({reason}); {COPY_AGAIN}"
            ) from error


def _check_kind(path: Path, archive: zipfile.ZipFile, root: str) -> None:
    names = {entry.filename.removeprefix(f"{root}/") for entry in archive.infolist()}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise refusal(path, "a TorchScript program; save its state_dict() with torch.save instead")
    if "data.pkl" not in names:
        raise refusal(path, "a zip archive without data.pkl, not a file of torch.save")
    pickle_size = archive.getinfo(f"{root}/data.pkl").file_size
    if pickle_size > MAX_PICKLE_BYTES:
        raise refusal(path, f"a pickle of {pickle_size} bytes, at most {MAX_PICKLE_BYTES} are read")
    if "byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
        raise refusal(path, "its numbers are not little-endian, as this program reads them")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
