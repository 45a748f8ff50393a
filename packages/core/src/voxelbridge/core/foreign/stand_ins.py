"""What the names in a foreign pickle become: values of our own, never the classes they name.

Nothing here keeps or runs anything of the file; a stand-in takes what it is given and, where it is
a number or a small table of numbers, remembers that.
"""

import struct
from collections.abc import Callable
from math import prod
from typing import Any

_MAX_NUMBERS = 1000
_CODES = {
    "f4": "f", "f8": "d", "f2": "e",
    "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?",
}  # fmt: skip

# Programs whose classes occur in training files beside the weights.
_INERT_MODULES = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "nndet")
_INERT = frozenset({"pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath"})
_PLAIN = frozenset(
    {
        "collections.OrderedDict",
        "_codecs.encode",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        "torch.device",
        *(f"torch.{name}" for name in ["float64", "float32", "float16", "bfloat16"]),
        *(f"torch.{name}" for name in ["int64", "int32", "int16", "int8", "uint8", "bool"]),
    }
)


class Inert:
    """Stands for an object of another program; forgets everything about it."""

    def __new__(cls, *_: object) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class NumberType:
    """Stands for numpy.dtype: the code of a number's type and its byte order."""

    def __init__(self, code: object = "", *_: object) -> None:
        self.form = _CODES.get(code) if isinstance(code, str) else None
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"

    def numbers(self, raw: object) -> list[Any] | None:  # Any: int, float or bool
        """The numbers in `raw` bytes; None where they are something else."""
        if isinstance(raw, str):
            raw = raw.encode("latin-1", errors="ignore")
        if self.form is None or not isinstance(raw, bytes):
            return None
        count, rest = divmod(len(raw), struct.calcsize(self.form))
        if rest or count > _MAX_NUMBERS:
            return None
        return list(struct.unpack(f"{self.order}{count}{self.form}", raw))


def scalar(kind: object = None, raw: object = None, *_: object) -> object:
    """Stands for numpy's scalar: a Python number, or None where it was none."""
    found = kind.numbers(raw) if isinstance(kind, NumberType) else None
    return found[0] if found is not None and len(found) == 1 else None


class Table:
    """Stands for a numpy array: keeps up to a thousand numbers as nested lists in `values`."""

    def __init__(self, *_: object) -> None:
        self.values: object = None

    def __setstate__(self, state: object) -> None:
        match state:
            case (_, tuple(shape), NumberType() as kind, bool(fortran), raw):
                found = kind.numbers(raw)
                sized = all(isinstance(n, int) and n >= 0 for n in shape)
                simple = sized and (not fortran or len(shape) < 2)
                if found is not None and simple and prod(shape) == len(found):
                    self.values = _nested(found, shape)
            case _:
                pass


def stand_in(name: str) -> Callable[..., object] | None:
    """What stands for the global `name`; None where torch's own reading of it is wanted."""
    module, _, attribute = name.rpartition(".")
    if name in _INERT or module.partition(".")[0] in _INERT_MODULES:
        return Inert
    if module.partition(".")[0] != "numpy":
        return None
    if attribute == "scalar":
        return scalar
    if attribute == "dtype" or module == "numpy.dtypes":
        return NumberType
    return Table if attribute in ("_reconstruct", "ndarray") else None


def is_allowed(name: str) -> bool:
    """Whether a pickle may name the global `name` at all."""
    from voxelbridge.core.foreign.pickle_scan import STORAGE_BYTES

    return name in _PLAIN or name in STORAGE_BYTES or stand_in(name) is not None


def _nested(values: list[Any], shape: tuple[int, ...]) -> object:
    if not shape:
        return values[0]
    step = prod(shape[1:])
    return [_nested(values[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]
