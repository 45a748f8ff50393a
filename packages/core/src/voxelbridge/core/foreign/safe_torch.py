"""Reads a .pth, .pt, .ckpt or .safetensors file of another program without trusting it.

Nothing of the file is executed: its structure is judged first (`zip_check`, `pickle_scan`), then
torch's restricted reader builds tables, numbers and tensors, and stand-ins for a few harmless
things (`stand_ins`). Tensors are mapped from the file or read once, on the CPU.
"""

import mmap
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from voxelbridge.core.foreign.pickle_scan import (
    PickleError,
    PickleFacts,
    StorageReference,
    scan_pickle,
)
from voxelbridge.core.foreign.stand_ins import is_allowed, stand_in
from voxelbridge.core.foreign.zip_check import check_zip
from voxelbridge.core.safetensors_header import COPY_AGAIN, quoted, read_header, refusal

MAX_TENSORS = 100_000
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_LEGACY_PARTS = 5  # pickles: magic number, protocol, system, content, keys of the storages
_EXPECTED = "expected a PyTorch checkpoint (.pth, .pt, .ckpt) or a .safetensors file"
_OTHERS = {b"\x1f\x8b": "a gzip file", b"7z": "a 7-Zip archive", b"\x93N": "a numpy file"}
_TAR_MAGIC = slice(257, 262)


@dataclass(frozen=True, eq=False)
class ForeignFile:
    """Content of a file of another program; tensors lie on the CPU and may be mapped from it."""

    path: Path
    tree: Mapping[Any, Any]  # Any: as stored, nothing but tables, texts, numbers and tensors
    has_checksums: bool
    texts: Mapping[str, str] = field(default_factory=dict)  # metadata of a safetensors file


def read_foreign(path: Path | str) -> ForeignFile:
    """The content of the file at `path`; CheckpointError of one line for whatever is unsound."""
    path = Path(path)
    try:
        if not path.is_file():  # a pipe or a device would hang or never end
            state = "is a folder" if path.is_dir() else "is no file"
            raise refusal(path, f"{state if path.exists() else 'does not exist'}; {_EXPECTED}")
        with path.open("rb") as stream:
            start = stream.read(512)
            stream.seek(0)
            if not start:
                raise refusal(path, f"an empty file; {_EXPECTED}")
            if start[:2] == b"PK":
                return _read_zip(path)
            if start[:2] == b"\x80\x02":
                return _read_legacy(path, stream)
            kind = "a tar archive" if start[_TAR_MAGIC] == b"ustar" else _OTHERS.get(start[:2])
            if start[:1] == b"\x80" and start[1:2] in b"\x00\x01\x03\x04\x05":
                kind = "a pickle, but none of torch.save with its usual protocol (2)"
            if kind is not None:
                raise refusal(path, f"{kind}; {_EXPECTED}")
            return _read_safetensors(path, stream)
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror or error})") from error


def _read_zip(path: Path) -> ForeignFile:
    archive, root = check_zip(path)
    with archive:
        prefix = f"{root}/data/"
        sizes = {
            entry.filename.removeprefix(prefix): entry.file_size
            for entry in archive.infolist()
            if entry.filename.startswith(prefix)
        }
        content = archive.read(f"{root}/data.pkl")
    facts = _scan(path, memoryview(content), 0)
    if facts.end != len(content):
        raise refusal(path, f"{len(content) - facts.end} bytes stand behind the end of its pickle")
    for key, reference in facts.storages.items():
        if sizes.get(key) != reference.num_bytes:
            raise refusal(
                path,
                f"its pickle asks for {reference.num_bytes} bytes of data {quoted(key)}, the "
                f"archive holds {sizes.get(key, 'none')}",
            )
    del content
    return ForeignFile(path, _load(path, facts, mapped=True), has_checksums=True)


def _read_legacy(path: Path, stream: BufferedReader) -> ForeignFile:
    """A file of torch.save before version 1.6: pickles, then storages, each behind its length."""
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            facts = _scan_legacy(path, view)
        finally:
            view.release()
    return ForeignFile(path, _load(path, facts, mapped=False), has_checksums=False)


def _scan_legacy(path: Path, view: memoryview) -> PickleFacts:
    if _LEGACY_MAGIC not in bytes(view[:64]):
        raise refusal(path, f"a pickle, but none of torch.save; {_EXPECTED}")
    storages: dict[str, StorageReference] = {}
    names: set[str] = set()
    keys: Sequence[str] = ()
    end = 0
    for _ in range(_LEGACY_PARTS):
        facts = _scan(path, view, end)
        storages |= facts.storages
        names |= facts.names
        end, keys = facts.end, facts.texts
    if sorted(keys) != sorted(storages):
        raise refusal(path, f"its pickle and its list of data do not agree; {COPY_AGAIN}")
    for key in keys:
        count = struct.unpack_from("<q", view, end)[0] if end + 8 <= len(view) else None
        if count not in (None, storages[key].count):
            raise refusal(path, f"its data {quoted(key)} have another length than it declares")
        end += 8 + storages[key].num_bytes
    if end != len(view):
        state = "truncated" if end > len(view) else "longer than it says"
        raise refusal(path, f"{state}: {len(view)} bytes, expected {end}; {COPY_AGAIN}")
    return PickleFacts(frozenset(names), storages, (), end)


def _read_safetensors(path: Path, stream: BufferedReader) -> ForeignFile:
    header = read_header(path, stream, expected=_EXPECTED)
    if len(header.entries) > MAX_TENSORS:
        raise refusal(path, f"{len(header.entries)} tensors, at most {MAX_TENSORS} are read")
    try:
        with safe_open(path, framework="pt") as opened:
            tree = {name: opened.get_tensor(name) for name in header.entries}
    except (SafetensorError, RuntimeError) as error:
        raise refusal(path, f"no sound safetensors file ({error}); {COPY_AGAIN}") from error
    return ForeignFile(path, tree, has_checksums=False, texts=header.metadata)


def _scan(path: Path, data: memoryview, start: int) -> PickleFacts:
    try:
        facts = scan_pickle(data, start)
    except PickleError as error:
        raise refusal(path, f"{error}; {COPY_AGAIN}") from error
    foreign = sorted(name for name in facts.names if not is_allowed(name))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise refusal(
            path,
            f"its pickle names {quoted(foreign[0])}{more}, which is no weight and is not run; if "
            "you trust the file, save its state dict alone with torch.save and import that",
        )
    if len(facts.storages) > MAX_TENSORS:
        raise refusal(path, f"{len(facts.storages)} tensors, at most {MAX_TENSORS} are read")
    return facts


def _load(path: Path, facts: PickleFacts, *, mapped: bool) -> Mapping[Any, Any]:
    stand_ins = [(made, name) for name in sorted(facts.names) if (made := stand_in(name))]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(stand_ins)):
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)  # noqa: TID251
    except Exception as error:  # torch.load fails with ten kinds of exceptions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise refusal(path, f"cannot be read as a PyTorch file ({reason})") from error
    if not isinstance(tree, Mapping):
        raise refusal(path, f"holds a {type(tree).__name__}, expected a table of tensors")
    return tree
