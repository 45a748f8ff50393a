"""The canonical checkpoint: one safetensors file that carries its architecture and its hashes.

The layout is on the page docs/formats/checkpoint.md. Reading runs nothing that the file holds,
takes memory for the tensors once, and checks every byte before anything is returned.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, JsonValue, StringConstraints, model_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from voxelbridge.core.arch.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
    UFPNConfig,
)
from voxelbridge.core.arch.decoder import build_any_decoder
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.init import InitMethod
from voxelbridge.core.config import Config, validate
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import atomic_write
from voxelbridge.core.safetensors_header import (
    COPY_AGAIN,
    EXPECTED,
    TensorEntry,
    parse_object,
    quoted,
    read_header,
    refusal,
)

SCHEMA = 1
METADATA_KEY = "voxelbridge"
DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Words of the transfer policies, which must not be mistaken for a stem.
RESERVED_STEM_NAMES = frozenset({"checkpoint", "random", "replicate"})

_NO_HASH = "0" * 64
_STEM = "encoder.stem."
_STEMS = "encoder.stems."
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_STEM_NAME = r"^[A-Za-z0-9_-]{1,64}$"
_StemName = Annotated[str, StringConstraints(pattern=_STEM_NAME)]
_Edge = Annotated[int, Field(ge=1)]
_Millimetre = Annotated[float, Field(gt=0)]


_Normalization = tuple[dict[str, JsonValue], ...]  # one scheme per channel


class Stem(Config):
    """One input convolution: the channels it takes and the images it was trained on."""

    channels: int = Field(ge=1, le=65_536)
    modality: str | None = None  # such as "CT" or "MR"
    dataset: str | None = None
    normalization: _Normalization | None = None

    @model_validator(mode="after")
    def _one_scheme_per_channel(self) -> "Stem":
        if self.normalization is not None and len(self.normalization) != self.channels:
            raise ValueError(
                f"normalization has {len(self.normalization)} schemes for {self.channels} channels"
            )
        return self


class Source(Config):
    """What the weights were trained on, and for how long."""

    datasets: tuple[str, ...] = ()
    steps: int | None = None  # optimizer steps
    config_hash: str | None = None  # `config.config_hash` of the training config
    data_sha256: _Sha256 | None = None  # which data: identity of the store trained on


def _this_program() -> str:
    return f"voxelbridge-core {version('voxelbridge-core')}"


class CheckpointMetadata(Config):
    """Everything a user of the weights must know; None where the origin did not say.

    The two hashes are filled in by `write_checkpoint`.
    """

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    created_by: str = Field(default_factory=_this_program)
    method: str  # "mae", "multitalent", ...
    arch: EncoderConfig
    decoder: AnyDecoderConfig | None = None  # given exactly when there are `decoder.*` tensors
    # Channels of the output layers that a U-Net decoder was trained with, which are not stored.
    decoder_outputs: Annotated[int, Field(ge=1, le=65_536)] | None = None
    stems: dict[_StemName, Stem] = Field(min_length=1, max_length=1000)
    default_stem: _StemName | None = None  # taken where nobody names one of several
    patch_size: tuple[_Edge, _Edge, _Edge] | None = None  # voxels, z y x
    spacing_mm: tuple[_Millimetre, _Millimetre, _Millimetre] | None = None  # z y x
    axis_order: Literal["zyx"] = "zyx"
    normalization: _Normalization | None = None  # of the default (or only) stem's images
    init: InitMethod | None = None  # before training
    source: Source = Source()
    citations: tuple[str, ...] = ()
    license: str | None = None
    tensors_sha256: _Sha256 | None = None
    metadata_sha256: _Sha256 | None = None

    @model_validator(mode="after")
    def _parts_agree(self) -> "CheckpointMetadata":
        taken = sorted(RESERVED_STEM_NAMES & self.stems.keys())
        if taken:
            raise ValueError(f"a stem cannot be called {taken[0]}, which is a transfer policy")
        if self.default_stem is not None and self.default_stem not in self.stems:
            raise ValueError(f"default_stem {self.default_stem} is not among the stems")
        name = self.stem_unless_named
        own = None if name is None else self.stems[name].normalization
        if own is not None and self.normalization not in (None, own):
            raise ValueError(f"normalization differs from that of the stem {name}")
        levels = len(self.arch.features) - 1
        match self.decoder:
            case DecoderConfig(convs_per_stage=convs) if len(convs) != levels:
                raise ValueError(
                    f"decoder.convs_per_stage needs {levels} entries, one fewer than the encoder's "
                    f"stages, got {len(convs)}"
                )
            case UFPNConfig(first_level=first) if first > levels:
                raise ValueError(f"decoder.first_level must be at most {levels}, got {first}")
            case _:
                pass
        return self

    @property
    def stem_unless_named(self) -> str | None:
        """The default stem, else the only one, else None: one of several has to be named."""
        if self.default_stem is None and len(self.stems) == 1:
            return next(iter(self.stems))
        return self.default_stem

    def normalization_of(self, stem: str) -> tuple[dict[str, JsonValue], ...] | None:
        """One scheme per channel of the images that `stem` was trained on; None if unknown."""
        own = self.stems[stem].normalization
        return self.normalization if own is None and stem == self.stem_unless_named else own


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Metadata and tensors (`encoder.*`, `decoder.*`); `origin` names the file in errors."""

    metadata: CheckpointMetadata
    tensors: Mapping[str, Tensor]
    origin: str = "checkpoint"

    def stem_prefix(self, name: str) -> str:
        """What the tensor names of the stem `name` start with, up to and including a dot."""
        return _stem_prefix(name, named=_has_named_stems(self.tensors))


def read_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint at `path`, on the CPU, with hashes, names, shapes and values checked.

    Raises CheckpointError (one line that names the file) for anything else than a whole,
    unaltered checkpoint of ours with finite floating-point weights that fit its architecture.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe or a device would hang or never end
            state = "is a folder" if path.is_dir() else "is no file"
            raise refusal(path, f"{state if path.exists() else 'does not exist'}; {EXPECTED}")
        with path.open("rb") as stream:
            return _read(path, stream)
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror or error})") from error


def write_checkpoint(path: Path | str, checkpoint: Checkpoint) -> CheckpointMetadata:
    """Writes `checkpoint` atomically and returns its metadata with the hashes filled in.

    Refuses, as reading does, tensors that do not fit the architecture or are not finite.
    """
    path = Path(path)
    tensors = {
        name: tensor.detach().to("cpu").contiguous() for name, tensor in checkpoint.tensors.items()
    }
    _check_fit(
        path,
        checkpoint.metadata,
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
    )
    _check_finite(path, tensors)
    metadata = checkpoint.metadata.model_copy(
        update={"tensors_sha256": tensors_sha256(tensors), "metadata_sha256": _NO_HASH}
    )
    text = metadata.model_dump_json(by_alias=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    text = text.replace(f'"metadata_sha256":"{_NO_HASH}"', f'"metadata_sha256":"{digest}"')
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: text})
        except (SafetensorError, RuntimeError) as error:
            raise refusal(path, f"cannot be written ({error})") from error
    return metadata.model_copy(update={"metadata_sha256": digest})


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """CheckpointError unless the tensors are finite weights that fit the architecture."""
    path = Path(checkpoint.origin)
    _check_fit(
        path,
        checkpoint.metadata,
        {name: (t.dtype, tuple(t.shape)) for name, t in checkpoint.tensors.items()},
    )
    _check_finite(path, checkpoint.tensors)


def is_stem_name(name: str) -> bool:
    """Whether a checkpoint can hold a stem of this name."""
    return re.fullmatch(_STEM_NAME, name) is not None and name not in RESERVED_STEM_NAMES


def collect_tensors(encoder: nn.Module, decoder: nn.Module | None = None) -> dict[str, Tensor]:
    """State of an encoder (one stem or several) and a decoder under the names of a checkpoint."""
    parts = {"encoder": encoder} | ({} if decoder is None else {"decoder": decoder})
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _hash_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def expected_shapes(
    metadata: CheckpointMetadata, *, named_stems: bool
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint with this metadata holds.

    `named_stems`: stems are stored as `encoder.stems.<name>.*` instead of `encoder.stem.*`.
    """
    with torch.device("meta"):
        encoder = build_encoder(metadata.arch, in_channels=1)
        decoder = metadata.decoder and build_any_decoder(metadata.decoder, metadata.arch)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in collect_tensors(encoder, decoder).items():
        shape = tuple(tensor.shape)
        if not name.startswith(_STEM):
            shapes[name] = shape
            continue
        rest = name.removeprefix(_STEM)
        for stem_name, stem in metadata.stems.items():
            if rest == "conv.weight":
                shape = (shape[0], stem.channels, *shape[2:])
            shapes[_stem_prefix(stem_name, named=named_stems) + rest] = shape
    return shapes


def _read(path: Path, stream: BufferedReader) -> Checkpoint:
    header = read_header(path, stream)
    metadata = _parse_metadata(path, header.metadata)
    _check_fit(
        path,
        metadata,
        {
            name: (DTYPES.get(entry.dtype, entry.dtype), entry.shape)
            for name, entry in header.entries.items()
        },
    )
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = {}
    for name in sorted(header.entries):
        tensors[name] = _read_tensor(path, stream, header.entries[name])
        _hash_tensor(digest, name, tensors[name])
    if digest.hexdigest() != metadata.tensors_sha256:
        raise refusal(path, f"its weights were altered (tensors_sha256 differs); {COPY_AGAIN}")
    _check_finite(path, tensors)
    return Checkpoint(metadata, tensors, origin=str(path))


def _parse_metadata(path: Path, texts: Mapping[str, str]) -> CheckpointMetadata:
    text = texts.get(METADATA_KEY)
    if text is None:
        raise refusal(
            path, f"a safetensors file of another program (no {METADATA_KEY!r} entry); {EXPECTED}"
        )
    tree = parse_object(path, text, "metadata")
    if tree.get("schema") != SCHEMA:
        raise refusal(
            path,
            f"checkpoint schema {quoted(tree.get('schema'))}, this version reads {SCHEMA}; "
            "use the version of voxelbridge that wrote it",
        )
    try:
        metadata = validate(CheckpointMetadata, tree, where="metadata")
    except (ConfigError, RecursionError) as error:
        raise refusal(path, str(error)) from error
    claimed = metadata.metadata_sha256
    if claimed is None or metadata.tensors_sha256 is None:
        raise refusal(path, "its metadata lack tensors_sha256 or metadata_sha256; write it anew")
    if hashlib.sha256(text.replace(claimed, _NO_HASH).encode()).hexdigest() != claimed:
        raise refusal(path, f"its metadata were altered (metadata_sha256 differs); {COPY_AGAIN}")
    return metadata


def _read_tensor(path: Path, stream: BufferedReader, entry: TensorEntry) -> Tensor:
    # Into memory of our own: a mapped file could still change after its hash was checked.
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    stream.seek(entry.start)
    if stream.readinto(_bytes_of(tensor)) != entry.end - entry.start:
        raise refusal(path, "became shorter while it was read")
    return tensor


def _check_fit(
    path: Path,
    metadata: CheckpointMetadata,
    tensors: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]],
) -> None:
    """CheckpointError unless names, types and shapes are those of the architecture."""
    named_stems = _has_named_stems(tensors)
    if len(metadata.stems) > 1 and not named_stems:
        raise refusal(path, f"{len(metadata.stems)} stems in its metadata, no {_STEMS}* tensors")
    expected = expected_shapes(metadata, named_stems=named_stems)
    unknown = [name for name in tensors if name not in expected]
    missing = [name for name in expected if name not in tensors]
    if unknown:
        what = f"tensor {quoted(unknown[0])} has no place in its architecture"
        raise refusal(path, f"{what} ({len(unknown)} such tensors)")
    if missing:
        what = f"tensor {quoted(missing[0])} of its architecture is missing"
        raise refusal(path, f"{what} ({len(missing)} such tensors)")
    for name, (dtype, shape) in tensors.items():
        if dtype not in DTYPES.values():
            got = str(dtype).removeprefix("torch.")
            raise refusal(path, f"tensor {name} has type {got}, expected {', '.join(DTYPES)}")
        if shape != expected[name]:
            raise refusal(
                path, f"tensor {name} has shape {shape}, its architecture says {expected[name]}"
            )


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise refusal(path, f"tensor {name} holds NaN or infinite weights; take an earlier one")


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:  # Any: hashlib names no type
    dtype = next(code for code, known in DTYPES.items() if known is tensor.dtype)
    digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode() + b"\n")
    digest.update(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _has_named_stems(tensors: Mapping[str, object]) -> bool:
    return any(name.startswith(_STEMS) for name in tensors)


def _stem_prefix(name: str, *, named: bool) -> str:
    return f"{_STEMS}{name}." if named else _STEM
