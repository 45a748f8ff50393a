"""What `compare` says of two checkpoints."""

from typing import Any

import pytest
import torch
from torch import Tensor

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig
from voxelbridge.core.arch.decoder import build_any_decoder
from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.checkpoint import Checkpoint, CheckpointMetadata, Stem, collect_tensors
from voxelbridge.core.compare import compare_checkpoints
from voxelbridge.core.errors import CheckpointError

ARCH = EncoderConfig(
    kind="residual",
    features=(2, 3, 4),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((3, 3, 3),) * 3,
    blocks=(1, 1, 1),
    conv_bias=True,
)


def make(
    *, seed: int = 0, arch: EncoderConfig = ARCH, stem: str = "ct", **facts: Any
) -> Checkpoint:
    torch.manual_seed(seed)
    encoder = build_encoder(arch, in_channels=1)
    decoder = facts.get("decoder")
    module = None if decoder is None else build_any_decoder(decoder, arch)
    metadata = CheckpointMetadata.model_validate(
        {"method": "mae", "arch": arch, "stems": {stem: Stem(channels=1)}} | facts
    )
    return Checkpoint(metadata, collect_tensors(encoder, module), origin=f"seed {seed}")


def altered(checkpoint: Checkpoint, name: str, value: Tensor) -> Checkpoint:
    return Checkpoint(checkpoint.metadata, {**checkpoint.tensors, name: value})


def test_equal_files_are_identical_and_their_stages_too() -> None:
    found = compare_checkpoints(make(), make())
    assert found.verdict == "identical"
    assert found.stages is not None
    assert [stage.max_abs for stage in found.stages] == [0.0, 0.0, 0.0]
    assert found.input_size == (16, 16, 16)


def test_a_change_shows_in_its_tensor_and_from_its_stage_on() -> None:
    first = make()
    name = "encoder.stages.1.blocks.0.conv2.norm.bias"
    found = compare_checkpoints(first, altered(first, name, first.tensors[name] + 0.25))
    assert found.verdict == "same architecture, different weights"
    assert found.tensors.keys() == {name}
    assert found.tensors[name].max_abs == 0.25
    assert found.stages is not None
    assert found.stages[0].max_abs == 0.0
    assert found.stages[1].max_abs > 0
    assert found.stages[2].max_abs > 0
    assert found.stages[1].shape == (1, 3, 16, 8, 8)


def test_relative_differences_are_measured_against_the_first() -> None:
    first = make()
    name = "encoder.stem.conv.weight"
    found = compare_checkpoints(first, altered(first, name, first.tensors[name] * 1.5))
    assert found.tensors[name].relative == pytest.approx(0.5, rel=1e-5)


def test_another_type_is_a_difference() -> None:
    first = make()
    name = "encoder.stem.norm.weight"  # ones, which half precision holds exactly
    found = compare_checkpoints(first, altered(first, name, first.tensors[name].half()))
    assert found.tensors[name].describe().startswith("other type, largest difference 0")


def test_different_architectures_are_told_apart_with_both_shapes() -> None:
    wider = ARCH.model_copy(update={"features": (2, 3, 5)})
    deeper = ARCH.model_copy(update={"blocks": (1, 2, 1)})
    found = compare_checkpoints(make(), make(arch=wider))
    assert found.verdict == "different architecture"
    assert found.stages is None
    assert found.lines()[-2] == "stages: not compared (the encoders differ)"
    difference = found.tensors["encoder.stages.2.blocks.0.conv2.norm.bias"]
    assert difference.describe() == "shape (4,) and (5,)"
    found = compare_checkpoints(make(), make(arch=deeper))
    only = {d.kind for n, d in found.tensors.items() if n.startswith("encoder.stages.1.blocks.1.")}
    assert only == {"only in B"}


def test_a_decoder_in_one_file_alone_is_another_architecture_but_stages_are_compared() -> None:
    decoder = DecoderConfig(convs_per_stage=(1, 1), conv_bias=True)
    found = compare_checkpoints(make(decoder=decoder), make())
    assert found.verdict == "different architecture"
    assert {difference.kind for difference in found.tensors.values()} == {"only in A"}
    assert found.stages is not None
    assert found.stages[2].max_abs == 0.0


def test_metadata_alone_may_differ() -> None:
    found = compare_checkpoints(make(license="MIT"), make(license="CC0-1.0"))
    assert found.verdict == "identical weights, different metadata"
    assert found.metadata == ("license: MIT -> CC0-1.0",)


def test_a_single_stem_may_have_another_name() -> None:
    first, second = make(stem="ct"), make(stem="mr")
    named = {n.replace("encoder.stem.", "encoder.stems.mr."): t for n, t in second.tensors.items()}
    found = compare_checkpoints(first, Checkpoint(second.metadata, named))
    assert found.same_architecture
    assert found.tensors == {}
    assert found.stem == "ct of A and mr of B"


def test_stems_of_other_channels_are_not_given_the_same_images() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ARCH, in_channels=4)
    metadata = CheckpointMetadata(method="mae", arch=ARCH, stems={"ct": Stem(channels=4)})
    found = compare_checkpoints(make(), Checkpoint(metadata, collect_tensors(encoder)))
    assert found.verdict == "different architecture"
    assert found.why_no_stages == "no stem of theirs takes the same channels"


def test_an_unknown_stem_is_refused() -> None:
    with pytest.raises(CheckpointError, match="seed 0: has no stem 'x', has: ct"):
        compare_checkpoints(make(), make(), stem="x")
