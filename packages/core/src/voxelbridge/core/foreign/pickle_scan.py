"""A look at a pickle without running it: what it names, what storages it refers to, where it ends.

Only the operations that torch's restricted reader knows are let through, so that a refusal comes
before anything is built, and says which name is in the way.
"""

import pickletools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MAX_OPERATIONS = 20_000_000
MAX_TEXTS = 100_000
_MAX_TEXT = 1 << 20  # bytes; longer ones are not looked at
MAX_CONTAINERS = 2_000_000  # lists, tuples, dicts: a byte each in the file, 50 to 200 in memory

# Bytes per element of the storages that a state dict can hold.
STORAGE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "torch.DoubleStorage": 8,
        "torch.FloatStorage": 4,
        "torch.HalfStorage": 2,
        "torch.BFloat16Storage": 2,
        "torch.LongStorage": 8,
        "torch.IntStorage": 4,
        "torch.ShortStorage": 2,
        "torch.CharStorage": 1,
        "torch.ByteStorage": 1,
        "torch.BoolStorage": 1,
    }
)

_KNOWN = frozenset(
    {"PROTO", "STOP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "APPEND", "APPENDS"}
    | {"SETITEM", "SETITEMS", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"}
    | {"EMPTY_SET", "BINPERSID", "BININT", "BININT1", "BININT2"}
    | {
        "BINFLOAT",
        "BINGET",
        "LONG_BINGET",
        "BINPUT",
        "LONG_BINPUT",
        "BINUNICODE",
        "SHORT_BINSTRING",
        "LONG1",
    }
)
_CONTAINERS = frozenset(
    {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "REDUCE", "NEWOBJ"}
)
_OPERATIONS: Mapping[int, tuple[str, int]] = MappingProxyType(
    {
        ord(opcode.code): (opcode.name, 0 if opcode.arg is None else opcode.arg.n)
        for opcode in pickletools.opcodes
    }
)
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_NOTHING = object()


@dataclass(frozen=True)
class StorageReference:
    """A storage as the pickle declares it; `count` elements of the class `kind`."""

    kind: str
    count: int

    @property
    def num_bytes(self) -> int:
        return self.count * STORAGE_BYTES[self.kind]


@dataclass(frozen=True)
class PickleFacts:
    """What a pickle refers to; `end` is the position behind its last byte."""

    names: frozenset[str]  # "module.name" of every global
    storages: Mapping[str, StorageReference]
    texts: tuple[str, ...]  # the first ones, in order
    end: int


class PickleError(ValueError):
    """A pickle that cannot be read safely; the message is the reason."""


def scan_pickle(data: memoryview, start: int = 0) -> PickleFacts:
    """Facts about the pickle that begins at `start`; PickleError where it is not understood."""
    try:
        return _Scan(data, start).run()
    except (IndexError, struct.error) as error:
        raise PickleError("its pickle is truncated") from error
    except UnicodeDecodeError as error:
        raise PickleError("its pickle holds a text that is not UTF-8") from error


class _Scan:
    """Follows the literals on the stack as far as storage references need it."""

    def __init__(self, data: memoryview, start: int) -> None:
        self.data = data
        self.at = start
        self.names: set[str] = set()
        self.storages: dict[str, StorageReference] = {}
        self.texts: list[str] = []
        self.memo: dict[int, object] = {}
        self.recent: list[object] = []  # what was pushed last
        self.tuple: tuple[object, ...] | None = None  # if a tuple was made last
        self.operations = 0
        self.containers = 0

    def run(self) -> PickleFacts:
        while True:
            code = self.data[self.at]
            name, width = _OPERATIONS.get(code, ("", 0))
            if name not in _KNOWN:
                shown = name or f"byte {code:#04x}"
                raise PickleError(
                    f"its pickle uses {shown}, which a file of torch.save with its usual protocol "
                    "(2) does not"
                )
            self.at += 1
            self._count(name)
            if name == "STOP":
                break
            self._step(name, width)
        return PickleFacts(frozenset(self.names), self.storages, tuple(self.texts), self.at)

    def _count(self, name: str) -> None:
        self.operations += 1
        self.containers += name in _CONTAINERS
        if self.operations > MAX_OPERATIONS or self.containers > MAX_CONTAINERS:
            raise PickleError(
                f"its pickle holds more than {MAX_CONTAINERS:,} lists and tables or "
                f"{MAX_OPERATIONS:,} values, too much for a checkpoint"
            )

    def _step(self, name: str, width: int) -> None:
        match name:
            case "GLOBAL":
                module, attribute = self._line(), self._line()
                named = f"{_OLD_NAMES.get(module, module)}.{attribute}"
                self.names.add(named)
                self._push(("global", named))
            case "BINUNICODE" | "SHORT_BINSTRING" | "LONG1":
                self._push(self._sized(name))
            case "BININT" | "BININT1" | "BININT2":
                form = {"BININT": "<i", "BININT1": "<B", "BININT2": "<H"}[name]
                self._push(struct.unpack_from(form, self.data, self.at)[0])
                self.at += width
            case "BINGET" | "LONG_BINGET" | "BINPUT" | "LONG_BINPUT":
                self._memo(name, width)
            case "TUPLE":
                self.tuple = tuple(self.recent[-6:])
                self.recent = []
            case "BINPERSID":
                self._refer()
            case "PROTO":
                if self.data[self.at] != 2:
                    raise PickleError(
                        f"its pickle has protocol {self.data[self.at]}; save it again with "
                        "torch.save and its usual protocol (2)"
                    )
                self.at += 1
            case _:
                self._jump(width)
                self._push(None if name == "NONE" else _NOTHING)

    def _push(self, value: object) -> None:
        self.tuple = None
        self.recent.append(value)
        if len(self.recent) > 64:
            del self.recent[:-6]

    def _memo(self, name: str, width: int) -> None:
        index = self.data[self.at] if width == 1 else self._unsigned()
        self._jump(width)
        if name.endswith("PUT"):
            if self.tuple is None and self.recent and self.recent[-1] is not _NOTHING:
                self.memo[index] = self.recent[-1]
            else:
                self.memo.pop(index, None)
        else:
            self._push(self.memo.get(index, _NOTHING))

    def _refer(self) -> None:
        match (self.tuple or ())[-6:]:
            case [_, "storage", ("global", str(kind)), str(key), str(), int(count)]:
                pass
            case ["storage", ("global", str(kind)), str(key), str(), int(count), None]:
                pass
            case ["storage", ("global", str(kind)), str(key), str(), int(count)]:
                pass
            case _:
                raise PickleError("its pickle refers to a tensor's data in an unusual way")
        if kind not in STORAGE_BYTES:
            raise PickleError(f"it holds tensors of a kind that is no weight ({kind})")
        reference = StorageReference(kind, count)
        if count < 0 or self.storages.setdefault(key, reference) != reference:
            raise PickleError(f"its pickle contradicts itself on the size of the data {key!r}")
        self._push(_NOTHING)

    def _sized(self, name: str) -> object:
        if name == "BINUNICODE":
            size = self._unsigned()
            self.at += 4
        else:
            size = self.data[self.at]
            self.at += 1
        start = self.at
        self._jump(size)
        raw = bytes(self.data[start : self.at]) if size <= _MAX_TEXT or name == "LONG1" else None
        if name == "LONG1":
            return int.from_bytes(raw or b"", "little", signed=True)
        if raw is None:
            return _NOTHING
        text = raw.decode("utf-8" if name == "BINUNICODE" else "latin-1", errors="strict")
        if len(self.texts) < MAX_TEXTS:
            self.texts.append(text)
        return text

    def _line(self) -> str:
        end = self.at
        while self.data[end] != 10:
            end += 1
            if end - self.at > 500:
                raise PickleError("its pickle holds a global with an endless name")
        text = bytes(self.data[self.at : end]).decode("utf-8")
        self.at = end + 1
        return text

    def _unsigned(self) -> int:
        return struct.unpack_from("<I", self.data, self.at)[0]

    def _jump(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError(self.at)
