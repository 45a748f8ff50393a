"""Hostile and broken files: one line, exit status 1, nothing run, nothing written."""

import io
import os
import pickle  # noqa: TID251 - to forge what must be refused
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.checkpoint import collect_tensors
from voxelbridge.core.cli import app
from voxelbridge.core.command_line import run_app
from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.foreign.import_file import import_checkpoint
from voxelbridge.core.foreign.pickle_scan import MAX_CONTAINERS
from voxelbridge.core.safetensors_header import MAX_HEADER_BYTES

TINY = EncoderConfig(
    kind="residual",
    features=(2, 3),
    strides=((1, 1, 1), (2, 2, 2)),
    kernels=((3, 3, 3), (1, 1, 1)),
    blocks=(1, 1),
    conv_bias=True,
)
NAME = "encoder.stem.conv.weight"


def weights() -> dict[str, Tensor]:
    tensors = collect_tensors(build_encoder(TINY, in_channels=1))
    for index, tensor in enumerate(tensors.values()):
        tensor.copy_(torch.sin(torch.arange(tensor.numel()) + index).reshape(tensor.shape))
    return {name: tensor.clone() for name, tensor in tensors.items()}


def torch_bytes(content: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def changed(**tensors: Any) -> dict[str, Any]:
    return weights() | {NAME: tensors["value"]}


class Runs:
    """Unpickling this naively calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def rezipped(
    change: Callable[[str, bytes], list[tuple[str, bytes]]], *, packed: bool = False
) -> bytes:
    source, target = zipfile.ZipFile(io.BytesIO(torch_bytes(weights()))), io.BytesIO()
    with zipfile.ZipFile(
        target, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    ) as archive:
        for name in source.namelist():
            for new_name, content in change(name, source.read(name)):
                archive.writestr(new_name, content)
    return target.getvalue()


def added(entry: str, content: bytes = b"", *, packed: bool = False) -> bytes:
    """A valid file with one more entry."""
    return rezipped(
        lambda n, b: [(n, b), (entry, content)] if n.endswith("/data.pkl") else [(n, b)],
        packed=packed,
    )


def with_pickle(content: bytes) -> bytes:
    return rezipped(lambda n, b: [(n, content if n.endswith("/data.pkl") else b)])


def raw(*operations: bytes) -> bytes:
    return with_pickle(b"\x80\x02" + b"".join(operations) + b".")


def doubled_entry(name: str, content: bytes) -> list[tuple[str, bytes]]:
    return [(name, content)] * (1 + name.endswith("/data/0"))


def edited_pickle(old: bytes, new: bytes) -> bytes:
    content = zipfile.ZipFile(io.BytesIO(torch_bytes(weights())))
    name = next(n for n in content.namelist() if n.endswith("/data.pkl"))
    assert old in content.read(name)
    return with_pickle(content.read(name).replace(old, new, 1))


def directory_lie(**fields: int) -> bytes:
    """A valid file whose directory says something else about its largest entry."""
    data = bytearray(torch_bytes(weights()))
    archive = zipfile.ZipFile(io.BytesIO(bytes(data)))
    entry = max(archive.infolist(), key=lambda e: e.file_size * ("/data/" in e.filename))
    at = data.rindex(entry.filename.encode()) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    offsets = {"crc": 16, "packed": 20, "size": 24, "header": 42}
    for key, value in fields.items():
        struct.pack_into("<I", data, at + offsets[key], value)
    return bytes(data)


def safetensors_header(header: bytes, payload: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + payload


def legacy(**changes: Any) -> bytes:
    return torch_bytes(changes.get("content", weights()), _use_new_zipfile_serialization=False)


def corpus() -> dict[str, Callable[[Path], bytes]]:
    """Name -> the file's bytes, given the path of a file that must not come into being."""
    valid, old = torch_bytes(weights()), legacy()
    safe = safetensors_bytes(weights())
    entry = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    end = valid.rindex(b"PK\x05\x06")
    start = valid.index(b"PK\x01\x02")
    files: dict[str, Callable[[Path], bytes]] = {
        "empty": lambda _: b"",
        "text": lambda _: b"hello, weights",
        "gzip": lambda _: b"\x1f\x8b" + bytes(100),
        "7z": lambda _: b"7z\xbc\xaf\x27\x1c" + bytes(100),
        "tar": lambda _: bytes(257) + b"ustar" + bytes(300),
        "numpy": lambda _: b"\x93NUMPY" + bytes(100),
        "system": lambda c: torch_bytes({"a": Runs(os.system, f"touch {c}")}),
        "system legacy": lambda c: legacy(content={"a": Runs(os.system, f"touch {c}")}),
        "eval": lambda c: torch_bytes({"a": Runs(eval, f"open({str(c)!r},'w')")}),
        "exec": lambda c: torch_bytes({"a": Runs(exec, f"open({str(c)!r},'w')")}),
        "open": lambda c: torch_bytes({"a": Runs(open, str(c), "w")}),
        "getattr": lambda _: raw(b"cbuiltins\ngetattr\n"),
        "resolve_name": lambda _: raw(b"cpkgutil\nresolve_name\nX\x08\0\0\0os:system\x85R"),
        "subprocess": lambda _: raw(b"csubprocess\nPopen\n)R"),
        "torch hub": lambda _: raw(b"ctorch.hub\nload\n)R"),
        "torch load": lambda _: raw(b"ctorch.serialization\nload\n)R"),
        "numpy loader": lambda _: raw(b"cnumpy\nload\n)R"),
        "object array": lambda _: torch_bytes({"a": np.array([Runs(os.getpid)], dtype=object)}),
        "tensor subclass": lambda _: torch_bytes({NAME: torch.nn.Buffer(torch.ones(2))}),
        "module": lambda _: torch_bytes(torch.nn.Linear(2, 2)),
        "bare pickle": lambda c: pickle.dumps(Runs(os.system, f"touch {c}"), protocol=2),
        "protocol 4": lambda _: pickle.dumps(weights(), protocol=4),
        "protocol 4 in zip": lambda _: torch_bytes(weights(), pickle_protocol=4),
        "instance operation": lambda _: raw(b"(cos\nsystem\nX\x02\0\0\0idi"),
        "unknown operation": lambda _: raw(b"\xff"),
        "truncated pickle": lambda _: with_pickle(b"\x80\x02}q"),
        "endless text": lambda _: with_pickle(b"\x80\x02X\xff\xff\xff\x7fabc"),
        "bytes behind": lambda _: with_pickle(pickle.dumps({}, protocol=2) + b"more"),
        "list bomb": lambda _: with_pickle(b"\x80\x02" + b"]" * (MAX_CONTAINERS + 1) + b"."),
        "not a table": lambda _: torch_bytes([torch.ones(2)]),
        "no tensors": lambda _: torch_bytes({"epoch": 3}),
        "no weights": lambda _: torch_bytes({"network_weights": {}}),
        "key of a number": lambda _: torch_bytes({1: torch.ones(2)}),
        "path as key": lambda _: torch_bytes({"../../x": torch.ones(2)}),
        "absolute key": lambda _: torch_bytes({"/etc/x": torch.ones(2)}),
        "newline in key": lambda _: torch_bytes({"a\nb": torch.ones(2)}),
        "endless key": lambda _: torch_bytes({"a" * 100_000: torch.ones(2)}),
        "value of text": lambda _: torch_bytes(changed(value="x")),
        "NaN": lambda _: torch_bytes(changed(value=torch.full((2, 1, 3, 3, 3), torch.nan))),
        "infinite": lambda _: torch_bytes(changed(value=torch.full((2, 1, 3, 3, 3), torch.inf))),
        "integers": lambda _: torch_bytes(changed(value=torch.ones(2, 1, 3, 3, 3).long())),
        "complex": lambda _: torch_bytes(changed(value=torch.ones(2, 1, 3, 3, 3) * 1j)),
        "sparse": lambda _: torch_bytes(changed(value=torch.ones(2, 1).to_sparse())),
        "meta": lambda _: torch_bytes(changed(value=torch.empty(2, 1, 3, 3, 3, device="meta"))),
        "wrong shape": lambda _: torch_bytes(changed(value=torch.ones(2, 1, 3, 3, 5))),
        "two dimensions": lambda _: torch_bytes(changed(value=torch.ones(2, 1, 3, 3))),
        "no elements": lambda _: torch_bytes(changed(value=torch.ones(0, 1, 3, 3, 3))),
        "expanded": lambda _: torch_bytes(changed(value=torch.ones(1).expand(2, 1, 3, 3, 3))),
        "huge expanded": lambda _: torch_bytes(changed(value=torch.ones(1).expand(10**6, 10**6))),
        "overlapping": lambda _: overlapping_views(),
        "beyond its storage": lambda _: edited_pickle(b"K\x36", b"K\x37"),
        "unknown storage": lambda _: edited_pickle(b"X\x01\0\0\x001", b"X\x01\0\0\0x"),
        "zip cut in data": lambda _: valid[: len(valid) // 2],
        "zip cut in directory": lambda _: valid[: (start + end) // 2],
        "zip cut at end": lambda _: valid[:-1],
        "zip with a tail": lambda _: valid + b"tail",
        "zip with a head": lambda _: b"PK\x03\x04" + bytes(26) + valid,
        "zip end only": lambda _: valid[end:],
        "zip compressed": lambda _: rezipped(lambda n, b: [(n, b)], packed=True),
        "zip bomb": lambda _: added("archive/z", bytes(10**7), packed=True),
        "zip double": lambda _: doubled_zip(),
        "zip parent": lambda _: added("archive/../../x"),
        "zip absolute": lambda _: added("/x/y"),
        "zip two folders": lambda _: added("other/data.pkl"),
        "zip other": lambda _: rezipped(lambda n, b: [(n.replace("data.pkl", "d.txt"), b)]),
        "zip big-endian": lambda _: rezipped(
            lambda n, b: [(n, b"big" if n.endswith("byteorder") else b)]
        ),
        "zip checksum": lambda _: directory_lie(crc=zlib.crc32(b"other")),
        "zip size": lambda _: directory_lie(size=10**9, packed=10**9),
        "zip place": lambda _: directory_lie(header=0),
        "legacy cut": lambda _: old[:-5],
        "legacy cut in pickle": lambda _: old[:60],
        "legacy tail": lambda _: old + b"tail",
        "legacy length": lambda _: old.replace(struct.pack("<q", 54), struct.pack("<q", 2**40)),
        "safetensors cut": lambda _: safe[:-4],
        "safetensors cut header": lambda _: safe[:40],
        "safetensors tail": lambda _: safe + b"tail",
        "safetensors huge": lambda _: safetensors_header(b"{}", length=2**63),
        "safetensors huge header": lambda _: safetensors_header(
            b"{" + b" " * MAX_HEADER_BYTES + b"}"
        ),
        "safetensors double": lambda _: safetensors_header(
            entry + b"," + entry[1:] + b"}", bytes(4)
        ),
        "safetensors overlap": lambda _: safetensors_header(
            entry + b"," + entry[1:].replace(b'"w"', b'"v"') + b"}", bytes(4)
        ),
        "safetensors range": lambda _: safetensors_header(
            entry.replace(b"[0,4]", b"[0,400]") + b"}", bytes(4)
        ),
        "safetensors deep": lambda _: safetensors_header(b'{"a":' + b"[" * 100_000),
        "safetensors NaN": lambda _: safetensors_bytes(
            changed(value=torch.full((2, 1, 3, 3, 3), torch.nan))
        ),
        "safetensors integers": lambda _: safetensors_bytes(
            changed(value=torch.ones(2, 1, 3, 3, 3).int())
        ),
    }
    return files


def overlapping_views() -> bytes:
    data = torch.zeros(200)
    return torch_bytes(
        changed(value=data[:54].reshape(2, 1, 3, 3, 3)) | {"encoder.stem.conv.bias": data[53:55]}
    )


def doubled_zip() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rezipped(doubled_entry)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "list bomb")) for n in corpus()],
)
def test_every_hostile_file_is_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    path = tmp_path / "weights.pth"
    path.write_bytes(corpus()[name](canary))
    (tmp_path / "arch.json").write_text(TINY.model_dump_json())
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out.safetensors"
    arguments = ["import", str(path), "-o", str(out), "--arch", str(tmp_path / "arch.json")]
    with pytest.raises(SystemExit) as ended:
        run_app(app, arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path}: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 1000
    assert sorted(tmp_path.rglob("*")) == before


def test_the_corpus_differs_from_a_good_file(tmp_path: Path) -> None:
    """What the corpus is made from is itself read, in all three formats."""
    for name, content in (
        ("a.pth", torch_bytes(weights())),
        ("b.pth", legacy()),
        ("c.safetensors", safetensors_bytes(weights())),
        ("d.pth", rezipped(lambda n, b: [(n, b)])),
        ("e.pth", torch_bytes({"state_dict": OrderedDict(weights()), "a": np.float64(1)})),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        found = import_checkpoint(path, arch=TINY).checkpoint.tensors
        assert all(torch.equal(found[n], t) for n, t in weights().items())
    assert len(corpus()) >= 60


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        import_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        import_checkpoint(tmp_path / "none.pth")


def test_a_refused_name_is_told_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(torch_bytes({"a": Runs(os.system, "true")}))
    with pytest.raises(CheckpointError, match=r"posix\.system.*save its state dict alone"):
        import_checkpoint(path)


def tensors_or_refusal(path: Path) -> Mapping[str, Tensor] | str:
    try:
        return import_checkpoint(path, arch=TINY).checkpoint.tensors
    except CheckpointError as error:
        return str(error)


VALID = torch_bytes({"network_weights": weights(), "epoch": np.float32(3)})


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(1, 255)), min_size=1, max_size=3)
)
def test_flipped_bytes_never_change_a_tensor_silently(flips: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for at, mask in flips:
        data[at] ^= mask
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pth"
        path.write_bytes(data)
        found = tensors_or_refusal(path)
    if isinstance(found, str):
        assert "\n" not in found
        assert found.startswith(str(path))
    else:
        assert found.keys() == weights().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())
