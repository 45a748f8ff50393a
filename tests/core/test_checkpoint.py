"""The canonical checkpoint: what is written is read, and everything else is refused in one line."""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig, UFPNConfig
from voxelbridge.core.arch.decoder import build_any_decoder
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import RESENC_L
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Source,
    Stem,
    collect_tensors,
    expected_shapes,
    is_stem_name,
    read_checkpoint,
    tensors_sha256,
    write_checkpoint,
)
from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.safetensors_header import MAX_HEADER_BYTES

TINY = EncoderConfig(
    kind="residual",
    features=(2, 3),
    strides=((1, 1, 1), (2, 2, 2)),
    kernels=((3, 3, 3), (1, 1, 1)),
    blocks=(1, 1),
    conv_bias=True,
)
Tensors = dict[str, Tensor]


def tiny_metadata(**changes: object) -> CheckpointMetadata:
    metadata = CheckpointMetadata(
        method="mae",
        arch=TINY,
        stems={"ct": Stem(channels=1, modality="CT", dataset="phantoms")},
        patch_size=(16, 16, 32),
        spacing_mm=(1.0, 0.75, 0.75),
        normalization=({"name": "zscore"},),
        init="kaiming",
        source=Source(datasets=("phantoms",), steps=12, config_hash="ab" * 32),
        citations=("Müller et al., “A study”, 2024",),
        license="CC-BY-4.0",
    )
    return metadata.model_copy(update=changes)


def tiny_checkpoint(**changes: object) -> Checkpoint:
    encoder = build_encoder(TINY, in_channels=1)
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_(torch.sin(ramp + index).reshape(parameter.shape))
    return Checkpoint(tiny_metadata(**changes), collect_tensors(encoder))


def several_stems() -> Checkpoint:
    one = tiny_checkpoint()
    tensors = {k: v for k, v in one.tensors.items() if not k.startswith("encoder.stem.")}
    for index, name in enumerate(("4", "40")):
        for key, tensor in one.tensors.items():
            if key.startswith("encoder.stem."):
                key = key.replace("stem.", f"stems.{name}.")
                value = (
                    tensor.repeat(1, 4, 1, 1, 1) if name == "40" and tensor.ndim == 5 else tensor
                )
                tensors[key] = value + index
    stems = {"4": Stem(channels=1), "40": Stem(channels=4)}
    return Checkpoint(tiny_metadata(stems=stems), tensors)


def forge(path: Path, tensors: Tensors, metadata: CheckpointMetadata, **changes: object) -> None:
    """A file with right hashes whose content our writer would refuse."""
    names = {torch.float32: "F32", torch.int64: "I64", torch.float64: "F64"}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        entry = [name, names[tensor.dtype], list(tensor.shape)]
        digest.update(json.dumps(entry).encode() + b"\n" + tensor.numpy().tobytes())
    tree = json.loads(metadata.model_dump_json(by_alias=True)) | changes
    tree |= {"tensors_sha256": digest.hexdigest(), "metadata_sha256": "0" * 64}
    text = json.dumps(tree)
    text = text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest())
    save_file(tensors, path, metadata={"voxelbridge": text})


def refuse(path: Path) -> str:
    """The message of the refusal, after checking that it is one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    write_checkpoint(path, tiny_checkpoint())
    return path


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    path = tmp_path / "new" / "tiny.safetensors"
    written = write_checkpoint(path, checkpoint)
    again = read_checkpoint(path)
    assert again.metadata == written
    hashes: dict[str, object] = {"tensors_sha256": None, "metadata_sha256": None}
    assert again.metadata.model_copy(update=hashes) == checkpoint.metadata
    assert again.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, checkpoint.tensors[name])
        assert tensor.dtype == checkpoint.tensors[name].dtype
    assert again.origin == str(path)


def test_writing_what_was_read_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    write_checkpoint(copy, read_checkpoint(file))
    assert copy.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        DecoderConfig(convs_per_stage=(2,), conv_bias=False),
        UFPNConfig(out_channels=4, first_level=1, min_channels=2, kernel=(1, 3, 3)),
        UFPNConfig(out_channels=2, first_level=0, upsample_bias=True),
    ],
)
def test_either_kind_of_decoder_survives(
    tmp_path: Path, config: DecoderConfig | UFPNConfig
) -> None:
    path = tmp_path / "full.safetensors"
    checkpoint = tiny_checkpoint(decoder=config)
    tensors = dict(checkpoint.tensors) | {
        f"decoder.{name}": tensor
        for name, tensor in build_any_decoder(config, TINY).state_dict().items()
    }
    write_checkpoint(path, Checkpoint(checkpoint.metadata, tensors))
    read = read_checkpoint(path)
    assert read.tensors.keys() == tensors.keys()
    assert read.metadata.decoder == config


def test_a_decoder_of_another_kind_than_its_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    checkpoint = tiny_checkpoint(decoder=UFPNConfig(first_level=1))
    unet = build_any_decoder(DecoderConfig(convs_per_stage=(1,), conv_bias=True), TINY)
    tensors = dict(checkpoint.tensors) | {
        f"decoder.{name}": tensor for name, tensor in unet.state_dict().items()
    }
    with pytest.raises(CheckpointError, match="has no place in its architecture"):
        write_checkpoint(path, Checkpoint(checkpoint.metadata, tensors))


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"kind": "spline"}, r"decoder\.kind: got \"spline\", expected one of 'unet', 'ufpn'"),
        ({"kind": "ufpn", "first_level": 5}, r"decoder\.first_level must be at most 1, got 5"),
        ({"kind": "ufpn", "kernel": [2, 3, 3]}, "kernel must be odd"),
        ({"kind": "ufpn", "convs_per_stage": [1]}, r"decoder\.convs_per_stage: no such setting"),
        ({"convs_per_stage": [1, 1], "conv_bias": True}, "convs_per_stage needs 1 entries"),
    ],
)
def test_a_decoder_that_cannot_be_is_refused(
    tmp_path: Path, decoder: dict[str, object], message: str
) -> None:
    path = tmp_path / "decoder.safetensors"
    forge(path, dict(tiny_checkpoint().tensors), tiny_metadata(), decoder=decoder)
    assert re.search(message, refuse(path))


def test_files_from_before_there_were_several_decoders_and_defaults_are_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "old.safetensors"
    config = DecoderConfig(convs_per_stage=(2,), conv_bias=False)
    tensors = dict(tiny_checkpoint().tensors) | {
        f"decoder.{name}": tensor
        for name, tensor in build_any_decoder(config, TINY).state_dict().items()
    }
    text = tiny_metadata(decoder=config).model_dump_json(by_alias=True)
    for new in (
        '"kind":"unet",',
        '"default_stem":null,',
        ',"normalization":null}',
        ',"data_sha256":null',
    ):
        assert text.count(new) == 1
        text = text.replace(new, "}" if new.endswith("}") else "")
    text = text.replace('"tensors_sha256":null', f'"tensors_sha256":"{tensors_sha256(tensors)}"')
    text = text.replace('"metadata_sha256":null', f'"metadata_sha256":"{"0" * 64}"')
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, metadata={"voxelbridge": text.replace("0" * 64, digest)})
    metadata = read_checkpoint(path).metadata
    assert metadata.decoder == config
    assert metadata.default_stem is None
    assert metadata.stem_unless_named == "ct"
    assert metadata.normalization_of("ct") == ({"name": "zscore"},)


def test_several_stems_survive(tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    write_checkpoint(path, several_stems())
    read = read_checkpoint(path)
    assert list(read.metadata.stems) == ["4", "40"]
    assert read.stem_prefix("4") == "encoder.stems.4."
    assert read.tensors["encoder.stems.40.conv.weight"].shape == (2, 4, 3, 3, 3)


def several_schemes(**changes: object) -> CheckpointMetadata:
    """Metadata of two stems, checked as when read; `changes` are JSON values."""
    tree = {
        "stems": {
            "ct": {"channels": 1, "normalization": [{"name": "ct_percentile", "std": 2.5}]},
            "mr": {"channels": 2, "normalization": [{"name": "zscore"}, {"name": "zscore"}]},
            "pet": {"channels": 1},
        },
        "default_stem": "ct",
        "normalization": None,
    } | changes
    base = json.loads(tiny_metadata().model_dump_json(by_alias=True))
    return CheckpointMetadata.model_validate_json(json.dumps(base | tree))


def test_every_stem_has_its_own_normalisation() -> None:
    metadata = several_schemes()
    assert metadata.stem_unless_named == "ct"
    assert metadata.normalization_of("ct") == ({"name": "ct_percentile", "std": 2.5},)
    assert metadata.normalization_of("mr") == ({"name": "zscore"}, {"name": "zscore"})
    assert metadata.normalization_of("pet") is None
    assert several_schemes(default_stem=None).stem_unless_named is None


def test_the_normalisation_of_the_file_is_the_default_stems() -> None:
    scheme = [{"name": "zscore"}]
    metadata = several_schemes(default_stem="pet", normalization=scheme)
    assert metadata.normalization_of("pet") == ({"name": "zscore"},)
    unknown = several_schemes(default_stem=None, normalization=scheme)
    assert unknown.normalization_of("pet") is None
    same = [{"name": "ct_percentile", "std": 2.5}]
    assert several_schemes(normalization=same).normalization_of("ct") == tuple(same)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"default_stem": "us"}, "default_stem us is not among the stems"),
        ({"normalization": [{"name": "zscore"}]}, "differs from that of the stem ct"),
        (
            {"stems": {"ct": {"channels": 2, "normalization": [{"name": "zscore"}]}}},
            "1 schemes for 2 channels",
        ),
    ],
)
def test_contradictions_between_stems_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        several_schemes(**changes)


def test_the_identity_of_the_data_survives(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    source = Source(datasets=("a", "b"), data_sha256="0f" * 32)
    write_checkpoint(path, tiny_checkpoint(source=source))
    assert read_checkpoint(path).metadata.source == source
    with pytest.raises(ValidationError):
        Source(data_sha256="0f")


@pytest.mark.parametrize("name", ["random", "a.b", "", "x" * 65, "naïve", "a\n", "a b"])
def test_names_of_stems_follow_one_rule(name: str) -> None:
    assert not is_stem_name(name)
    with pytest.raises(ValidationError):
        several_schemes(stems={name: {"channels": 1}}, default_stem=None)
    assert is_stem_name("Dataset003_Liver-2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    one = tiny_checkpoint()
    tensors = {name: tensor.to(dtype) for name, tensor in one.tensors.items()}
    path = tmp_path / "half.safetensors"
    write_checkpoint(path, Checkpoint(one.metadata, tensors))
    for name, tensor in read_checkpoint(path).tensors.items():
        assert torch.equal(tensor, tensors[name])


@settings(max_examples=20, deadline=None)
@given(
    words=st.lists(st.text(min_size=1, max_size=20), max_size=3),
    spacing=st.tuples(*[st.floats(1e-3, 1e3)] * 3),
    seed=st.integers(0, 2**31),
)
def test_any_metadata_and_weights_survive(
    tmp_path_factory: pytest.TempPathFactory,
    words: list[str],
    spacing: tuple[float, float, float],
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("law") / "any.safetensors"
    generator = torch.Generator().manual_seed(seed)
    checkpoint = tiny_checkpoint(citations=tuple(words), spacing_mm=spacing)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in checkpoint.tensors.items()
    }
    written = write_checkpoint(path, Checkpoint(checkpoint.metadata, tensors))
    read = read_checkpoint(path)
    assert read.metadata == written
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in tensors.items())


def test_the_file_is_plain_safetensors_with_one_json_string(file: Path) -> None:
    assert load_file(file).keys() == tiny_checkpoint().tensors.keys()
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert list(header["__metadata__"]) == ["voxelbridge"]
    facts = json.loads(header["__metadata__"]["voxelbridge"])
    assert facts["schema"] == 1
    documented = (
        "schema created_by method arch stems patch_size spacing_mm axis_order normalization init "
        "source citations license tensors_sha256"
    )
    assert set(documented.split()) <= facts.keys()
    assert facts["tensors_sha256"] == tensors_sha256(tiny_checkpoint().tensors)


def test_hash_depends_on_name_type_shape_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])},
    ]
    assert len({tensors_sha256(tensors) for tensors in [base, *others]}) == 5


def test_full_size_checkpoint_has_the_names_of_the_architecture() -> None:
    metadata = tiny_metadata(arch=RESENC_L)
    shapes = expected_shapes(metadata, named_stems=False)
    assert len(shapes) == 224
    assert shapes["encoder.stem.conv.weight"] == (32, 1, 3, 3, 3)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 90_296_576


def test_every_flipped_payload_bit_is_found(file: Path) -> None:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    for position in rng.integers(start, len(content), 200):
        altered = bytearray(content)
        altered[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(altered)
        assert "altered" in refuse(file)


def test_every_changed_header_byte_is_found(file: Path) -> None:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(1)
    padding = [i for i in range(start - 8, start) if content[i] == ord(" ")]
    positions = [*range(8), *rng.integers(8, start, 250), *padding]
    for position in positions:
        altered = bytearray(content)
        altered[position] ^= int(rng.integers(1, 256))
        file.write_bytes(altered)
        refuse(file)
    for position in padding:
        for white in b"\t\n\r":
            altered = bytearray(content)
            altered[position] = white
            file.write_bytes(altered)
            refuse(file)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_file_is_refused(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert "truncated" in refuse(file)


def test_longer_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 4)
    assert "longer than its header says" in refuse(file)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.txt", "x" * 2000)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "plain safetensors": (
        lambda path: save_file({"a": torch.zeros(3)}, path),
        "another program",
    ),
    "safetensors with other metadata": (
        lambda path: save_file({"a": torch.zeros(3)}, path, metadata={"format": "pt"}),
        "another program",
    ),
    "pth": (lambda path: torch.save({"a": torch.zeros(3)}, path), "PyTorch file"),
    "old pth": (
        lambda path: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
        "pickle",
    ),
    "zip": (write_zip, "zip archive"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" + b"\0\xff" * 50), "gzip"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "seven bytes": (lambda path: path.write_bytes(b"1234567"), "7 bytes"),
    "text": (lambda path: path.write_text("hello, world; hello"), "no safetensors file"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "nothing": (lambda path: None, "does not exist"),
    "pipe": (lambda path: os.mkfifo(path), "is no file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "does not exist"),
    "link to itself": (lambda path: path.symlink_to(path), ""),
    "no JSON": (lambda path: path.write_bytes((16).to_bytes(8, "little") + b"{" * 15 + b"}"), ""),
    "JSON list": (
        lambda path: path.write_bytes((16).to_bytes(8, "little") + b"[1]" + b" " * 13),
        "",
    ),
    "no UTF-8": (
        lambda path: path.write_bytes((7).to_bytes(8, "little") + b'{"\xff":1}'),
        "header",
    ),
    "deep JSON": (
        lambda path: path.write_bytes(
            (200_007).to_bytes(8, "little") + b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b" }"
        ),
        "header is damaged",
    ),
}


@pytest.mark.parametrize("name", list(FOREIGN))
def test_foreign_file_is_refused(tmp_path: Path, name: str) -> None:
    make, expected = FOREIGN[name]
    path = tmp_path / "foreign.safetensors"
    make(path)
    assert expected in refuse(path)


def test_nothing_of_a_pickle_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(marker).encode() * 20)
    refuse(path)
    assert not marker.exists()


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES + 100)
    assert "no safetensors file" in refuse(path)


def test_doubled_header_key_is_refused(file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    entry = re.search(rb'"encoder\.stem\.conv\.bias":\{[^}]*\}', header)
    assert entry is not None
    header = header[:-1] + b"," + entry.group() + b"}"
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert "there twice" in refuse(file)


def test_doubled_metadata_key_is_refused(file: Path) -> None:
    text = read_text(file)
    tensors = load_file(file)
    doubled = text.replace('"license":', '"license":"MIT","license":')
    save_file(tensors, file, metadata={"voxelbridge": doubled})
    assert '"license" is there twice' in refuse(file).replace("\\", "")


def read_text(path: Path) -> str:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header["__metadata__"]["voxelbridge"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema":1', '"schema":999', "schema 999, this version reads 1"),
        ('"schema":1', '"schema":"1"', "schema"),
        ('"schema":1,', "", "schema null"),
        ('"CC-BY-4.0"', '"MIT"', "metadata were altered"),
        ('"steps":12', '"steps":13', "metadata were altered"),
        ('"method":"mae"', '"method":7', "method"),
        ('"method":"mae"', '"methods":"mae"', "method"),
        ('"axis_order":"zyx"', '"axis_order":"xyz"', "axis_order"),
        ('"spacing_mm":[1.0', '"spacing_mm":[-1.0', "spacing_mm"),
        ('"spacing_mm":[1.0', '"spacing_mm":[NaN', "NaN is not JSON"),
        ('"kind":"residual"', '"kind":"transformer"', "arch.kind"),
        ('"features":[2,3]', '"features":[2,999999999]', "arch.features"),
    ],
)
def test_wrong_metadata_is_refused(file: Path, old: str, new: str, message: str) -> None:
    text = read_text(file)
    assert old in text
    save_file(load_file(file), file, metadata={"voxelbridge": text.replace(old, new)})
    assert message in refuse(file)


def test_a_file_saved_again_by_the_safetensors_package_stays_valid(file: Path) -> None:
    text = read_text(file)
    save_file(load_file(file), file, metadata={"voxelbridge": text})
    assert read_checkpoint(file).metadata.method == "mae"


def change(name: str, tensor: Tensor | None) -> Callable[[Tensors], Tensors]:
    def changed(tensors: Tensors) -> Tensors:
        kept = {key: value for key, value in tensors.items() if key != name}
        return kept if tensor is None else kept | {name: tensor}

    return changed


BIAS = "encoder.stem.conv.bias"
UNFIT: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "NaN": (change(BIAS, torch.tensor([0.0, float("nan")])), "NaN or infinite"),
    "infinity": (change(BIAS, torch.tensor([0.0, float("-inf")])), "NaN or infinite"),
    "integers": (change(BIAS, torch.tensor([0, 1])), f"{BIAS} has type I"),
    "doubles": (change(BIAS, torch.zeros(2, dtype=torch.float64)), f"{BIAS} has type F"),
    "wrong shape": (change(BIAS, torch.zeros(3)), "(3,), its architecture says (2,)"),
    "missing": (change(BIAS, None), "is missing"),
    "unknown stage": (
        change("encoder.stages.2.blocks.0.conv1.conv.bias", torch.zeros(3)),
        "has no place in its architecture",
    ),
    "unknown part": (change("head.weight", torch.zeros(3)), "has no place"),
    "hostile name": (change("encoder.\n../../x\x00" + "y" * 3000, torch.zeros(3)), "has no place"),
    "decoder without a config": (
        change("decoder.stages.0.convs.0.conv.weight", torch.zeros(3)),
        "has no place",
    ),
    "unlisted stem": (change("encoder.stems.mr.conv.bias", torch.zeros(2)), "has no place"),
}


@pytest.mark.parametrize("name", list(UNFIT))
def test_unfit_weights_are_refused_when_read(tmp_path: Path, name: str) -> None:
    alter, message = UNFIT[name]
    path = tmp_path / "unfit.safetensors"
    forge(path, alter(dict(tiny_checkpoint().tensors)), tiny_metadata())
    assert message in refuse(path)


@pytest.mark.parametrize("name", list(UNFIT))
def test_unfit_weights_are_refused_when_written_and_nothing_is_left(
    tmp_path: Path, name: str
) -> None:
    alter, message = UNFIT[name]
    path = tmp_path / "unfit.safetensors"
    checkpoint = Checkpoint(tiny_metadata(), alter(dict(tiny_checkpoint().tensors)))
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(path, checkpoint)
    assert message.replace(" I", " int").replace(" F", " float") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_forged_but_fitting_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "forged.safetensors"
    forge(path, dict(tiny_checkpoint().tensors), tiny_metadata())
    assert read_checkpoint(path).metadata.method == "mae"


def test_several_stems_in_the_metadata_need_named_tensors(tmp_path: Path) -> None:
    stems = {"a": Stem(channels=1), "b": Stem(channels=1)}
    with pytest.raises(CheckpointError, match="2 stems in its metadata"):
        write_checkpoint(tmp_path / "x", tiny_checkpoint(stems=stems))


def test_the_same_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = dict(tiny_checkpoint().tensors)
    tensors["encoder.stem.norm.bias"] = tensors["encoder.stem.norm.weight"]
    path = tmp_path / "shared.safetensors"
    with pytest.raises(CheckpointError, match="share"):
        write_checkpoint(path, Checkpoint(tiny_metadata(), tensors))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_file_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("voxelbridge.core.checkpoint.save_file", fail)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(file, tiny_checkpoint(license="other"))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_read_tensors_do_not_follow_later_changes_of_the_file(file: Path) -> None:
    read = read_checkpoint(file)
    before = {name: tensor.clone() for name, tensor in read.tensors.items()}
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["random", "replicate", "checkpoint", "a.b", "", "ü"])
def test_stem_names_that_would_confuse_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        CheckpointMetadata(method="mae", arch=TINY, stems={name: Stem(channels=1)})


def test_decoder_config_must_fit_the_encoder() -> None:
    with pytest.raises(ValidationError, match="convs_per_stage needs 1 entries"):
        CheckpointMetadata(
            method="mae",
            arch=TINY,
            stems={"ct": Stem(channels=1)},
            decoder=DecoderConfig(convs_per_stage=(1, 1), conv_bias=True),
        )
