"""The table of weights inside a foreign file: where it is, and that its tensors are tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from voxelbridge.core.foreign.safe_torch import MAX_TENSORS, ForeignFile
from voxelbridge.core.safetensors_header import quoted, refusal

# Where programs keep their weights, in the order of looking.
TABLES = ("network_weights", "state_dict", "model_state_dict", "model_state", "model", "weights")
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_MAX_NAME = 300


def find_weights(file: ForeignFile) -> dict[str, Tensor]:
    """Name -> tensor of the file's network; CheckpointError where there is none, or no sound one.

    Prefixes of wrappers (`module.` of DDP, `_orig_mod.` of torch.compile) are gone.
    """
    table = _table(file)
    if len(table) > MAX_TENSORS:
        raise refusal(file.path, f"{len(table)} tensors, at most {MAX_TENSORS} are read")
    weights: dict[str, Tensor] = {}
    for name, value in table.items():
        if not isinstance(name, str) or len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            shown = name if isinstance(name, str) else str(type(name))
            raise refusal(file.path, f"a tensor has the name {quoted(shown)}, which no network has")
        if type(value) not in (Tensor, nn.Parameter):
            raise refusal(file.path, f"{quoted(name)} is a {type(value).__name__}, no tensor")
        weights[name] = value.detach()
    _check_storages(file, weights)
    return _without_wrappers(file, weights)


def require_usable(file: ForeignFile, name: str, tensor: Tensor) -> Tensor:
    """`tensor` as it can be stored: floating-point, finite, float64 rounded to float32."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise refusal(file.path, f"tensor {name} has type {kind}, weights are floating-point")
    if not torch.isfinite(tensor).all():
        raise refusal(file.path, f"tensor {name} holds NaN or infinite weights, take another")
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise refusal(file.path, f"tensor {name} holds weights too large for float32")
    return tensor.contiguous()


def _table(file: ForeignFile) -> Mapping[Any, Any]:
    for key in TABLES:
        inner = file.tree.get(key)
        if isinstance(inner, Mapping):
            return _filled(file, inner, key)
    if any(isinstance(value, Tensor) for value in file.tree.values()):
        return _filled(file, file.tree, "the file")
    seen = ", ".join(quoted(str(key)) for key in list(file.tree)[:8]) or "nothing"
    raise refusal(file.path, f"no table of weights among its entries ({seen}); {_WANTED}")


_WANTED = f"expected one of {', '.join(TABLES)}, or a plain state dict"


def _filled(file: ForeignFile, table: Mapping[Any, Any], where: str) -> Mapping[Any, Any]:
    if not table:
        raise refusal(file.path, f"{where} holds no tensors")
    return table


def _check_storages(file: ForeignFile, weights: Mapping[str, Tensor]) -> None:
    """Refuses tensors that reach beyond their data, repeat it, or share a part of it."""
    ranges: dict[int, set[tuple[int, int, str]]] = {}
    for name, tensor in weights.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_complex():
            raise refusal(file.path, f"tensor {name} is sparse, quantised, complex or elsewhere")
        if not _is_dense(tensor):
            raise refusal(file.path, f"tensor {name} overlaps itself or has gaps")
        size = tensor.element_size()
        start = int(tensor.storage_offset()) * size
        end = start + tensor.numel() * size
        storage = tensor.untyped_storage()
        if end > storage.nbytes():
            raise refusal(file.path, f"tensor {name} reaches beyond its data")
        if end > start:
            ranges.setdefault(storage.data_ptr(), set()).add((start, end, name))
    for taken in ranges.values():
        last = (0, 0, "")
        for start, end, name in sorted(taken):
            if start < last[1] and (start, end) != last[:2]:
                raise refusal(file.path, f"tensors {last[2]} and {name} overlap")
            last = (start, end, name)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _without_wrappers(file: ForeignFile, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    stripped = {name: _unwrap(name) for name in weights}
    if len(set(stripped.values())) < len(stripped):
        doubled = _first_double(stripped.values())
        raise refusal(file.path, f"two tensors are called {doubled} but for a wrapper's prefix")
    return {stripped[name]: tensor for name, tensor in weights.items()}


def _unwrap(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _first_double(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))
