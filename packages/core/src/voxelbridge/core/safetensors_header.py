"""The header of a safetensors file, read with suspicion; no byte of the weights is touched here."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from voxelbridge.core.errors import CheckpointError

MAX_HEADER_BYTES = 8 * 1024 * 1024  # ResEnc-L with its decoder needs 30 kB
EXPECTED = "expected a voxelbridge checkpoint (.safetensors)"
COPY_AGAIN = "copy the file again from its origin"

_FOREIGN_STARTS = {
    b"PK": "a zip archive or a PyTorch file",
    b"\x80\x02": "a pickle, perhaps an old PyTorch file",
    b"\x1f\x8b": "a gzip file",
}
_MAX_MESSAGE = 600


@dataclass(frozen=True)
class TensorEntry:
    """Type, shape and place of a tensor; `start` and `end` are bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Metadata texts and tensor entries; entries cover the rest of the file without a gap."""

    metadata: Mapping[str, str]
    entries: Mapping[str, TensorEntry]


def read_header(path: Path, stream: BufferedReader, *, expected: str = EXPECTED) -> Header:
    """Header of the file open in `stream`; CheckpointError unless the file is sound and whole.

    `expected`: what the message says is wanted where the file is of another kind.
    """
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        kind = _FOREIGN_STARTS.get(start[:2], "no safetensors file, or a truncated one")
        raise refusal(path, f"{kind} ({size} bytes); {expected}")
    raw = stream.read(length)
    if raw.rstrip(b" ")[-1:] != b"}":  # other white space in the padding is an altered byte
        raise refusal(path, f"its header is damaged; {COPY_AGAIN}")
    content = parse_object(path, raw, "header")
    metadata = content.pop("__metadata__", None) or {}
    entries = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in content.items()}
    declared = max((entry.end for entry in entries.values()), default=8 + length)
    if size != declared:
        state = "truncated" if size < declared else "longer than its header says"
        raise refusal(path, f"{state}: {size} bytes, expected {declared}; {COPY_AGAIN}")
    try:
        with safe_open(path, framework="pt"):  # judges types, sizes, overlaps and holes
            pass
    except SafetensorError as error:
        raise refusal(path, f"no sound safetensors file ({error}); {COPY_AGAIN}") from error
    return Header(metadata, entries)


def parse_object(path: Path, raw: bytes | str, what: str) -> dict[str, Any]:
    """JSON object in `raw` (Any: unchecked values); a doubled key, NaN or other JSON is refused."""
    try:
        content = json.loads(
            raw, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"its {what} is damaged or foreign ({error}); {EXPECTED}") from error
    if not isinstance(content, dict):
        raise refusal(path, f"its {what} is no JSON object; {EXPECTED}")
    return content


def refusal(path: Path | str, reason: str) -> CheckpointError:
    """An error of one line, whatever a hostile file put into its names."""
    text = " ".join(f"{path}: {reason}".split())
    return CheckpointError(text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}...")


def quoted(value: object) -> str:
    """`value` as printable JSON, cut to a length that fits a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse_entry(path: Path, name: str, entry: object, payload_start: int) -> TensorEntry:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            return TensorEntry(dtype, tuple(shape), payload_start + start, payload_start + end)
        case _:
            raise refusal(path, f"its header entry {quoted(name)} is damaged; {COPY_AGAIN}")


def _without_doubles(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {quoted(key)} is there twice")
        content[key] = value
    return content


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
