"""Tensors of a checkpoint under the names of nnU-Net's and nnssl's networks.

Both build their networks with dynamic-network-architectures (0.4), which registers every
convolution and norm twice and the whole encoder a second time under the decoder. The copies here
share memory, so that a file written by torch holds each weight once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from voxelbridge.core.arch.blocks import NORM_EPS
from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig, UFPNConfig
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.unet import build_decoder
from voxelbridge.core.checkpoint import Checkpoint
from voxelbridge.core.errors import CheckpointError

FRESH_SEED = 0  # of the weights that no training gave
_ALIASES = {"conv": "all_modules.0", "norm": "all_modules.1"}


@dataclass(frozen=True, eq=False)
class PeerWeights:
    """A state dict in the peers' layout, and what it was made of.

    `decoder` is None where the state holds an encoder alone; then there are no output layers
    either. `fresh` names what no training gave; `notes` are sentences for the user.
    """

    state: dict[str, Tensor]
    stem: str
    decoder: DecoderConfig | None
    outputs: int | None  # channels of the output layers
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def peer_weights(
    checkpoint: Checkpoint, *, stem: str | None, outputs: int, fresh_decoder: bool
) -> PeerWeights:
    """State dict of the peers' network for `checkpoint`, with all copies that its classes make.

    `stem`: which of several; None takes the default or the only one. `outputs`: channels of the
    output layers, which no checkpoint holds and which are therefore drawn anew. `fresh_decoder`:
    where the checkpoint holds no decoder that the peers could take, one is drawn anew (nnU-Net's
    initialisation); otherwise the encoder is exported alone.
    """
    name = chosen_stem_name(checkpoint, stem)
    encoder = {key: _own_storage(value) for key, value in _encoder_tensors(checkpoint, name)}
    state = {f"encoder.{key}": tensor for key, tensor in _with_aliases(encoder)}
    config, reason = _exportable_decoder(checkpoint)
    decoder = {
        key.removeprefix("decoder."): _own_storage(tensor)
        for key, tensor in checkpoint.tensors.items()
        if config is not None and key.startswith("decoder.")
    }
    fresh: tuple[str, ...] = ("output layers",)
    notes = [] if reason is None else [reason]
    arch = checkpoint.metadata.arch
    like = checkpoint.tensors[f"{checkpoint.stem_prefix(name)}conv.weight"]
    generator = torch.Generator().manual_seed(FRESH_SEED)
    if config is None and not fresh_decoder:
        notes.append("encoder alone: no decoder and no output layers in the file")
        return PeerWeights(state, name, None, None, (), tuple(notes))
    if config is None:
        config = usual_decoder(arch)
        with torch.device("meta"):
            module = build_decoder(config, arch)
        decoder = _drawn(module, like=like, generator=generator)
        fresh = ("decoder", "output layers")
        notes.append("the decoder is new (nnU-Net's initialisation); the encoder alone is trained")
    state |= {f"decoder.encoder.{key}": tensor for key, tensor in _with_aliases(encoder)}
    state |= {
        f"decoder.{key}": tensor
        for key, tensor in _with_aliases(_decoder_tensors(decoder, len(arch.features) - 1))
    }
    for index, features in enumerate(arch.features[-2::-1]):  # coarsest first
        layer = nn.Conv3d(features, outputs, 1, device="meta")
        for part, tensor in _drawn(layer, like=like, generator=generator).items():
            state[f"decoder.seg_layers.{index}.{part}"] = tensor
    channels = f"{outputs} channel{'s' * (outputs != 1)}"
    notes.append(f"the output layers ({channels}) are new: a checkpoint holds none")
    return PeerWeights(state, name, config, outputs, fresh, tuple(notes))


def chosen_stem_name(checkpoint: Checkpoint, stem: str | None) -> str:
    """`stem` if the checkpoint has it, else (None) its default or only one; CheckpointError."""
    name = checkpoint.metadata.stem_unless_named if stem is None else stem
    stems = checkpoint.metadata.stems
    if name is None or name not in stems:
        known = ", ".join(f"{key} ({value.channels} ch.)" for key, value in stems.items())
        problem = "has several stems, name one with --stem" if name is None else f"no stem {name!r}"
        raise CheckpointError(f"{checkpoint.origin}: {problem}: {known}")
    return name


def usual_decoder(arch: EncoderConfig) -> DecoderConfig:
    """What nnU-Net puts behind such an encoder: one convolution per level, or two behind a plain
    one.
    """
    convs = 1 if arch.kind == "residual" else 2
    return DecoderConfig(
        convs_per_stage=(convs,) * (len(arch.features) - 1), conv_bias=arch.conv_bias
    )


def class_name(arch: EncoderConfig) -> str:
    """The class of dynamic-network-architectures that has such an encoder."""
    match arch.kind:
        case "residual":
            return "ResidualEncoderUNet"
        case "plain":
            return "PlainConvUNet"
        case _:
            assert_never(arch.kind)


def arch_kwargs(arch: EncoderConfig, decoder: DecoderConfig) -> dict[str, Any]:  # Any: JSON
    """Arguments of that class as both programs write them into plans (classes as text)."""
    blocks = "n_blocks_per_stage" if arch.kind == "residual" else "n_conv_per_stage"
    return {
        "n_stages": len(arch.features),
        "features_per_stage": list(arch.features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(kernel) for kernel in arch.kernels],
        "strides": [list(stride) for stride in arch.strides],
        blocks: list(arch.blocks),
        "n_conv_per_stage_decoder": list(decoder.convs_per_stage[::-1]),  # theirs: coarsest first
        "conv_bias": arch.conv_bias,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": NORM_EPS, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _exportable_decoder(checkpoint: Checkpoint) -> tuple[DecoderConfig | None, str | None]:
    """The decoder, if the peers' classes can hold it; else None and why, if there is one at all."""
    match checkpoint.metadata.decoder:
        case None:
            return None, None
        case UFPNConfig():
            return None, "its decoder is the pyramid of a Retina U-Net, which no U-Net can take"
        case DecoderConfig() as config if config.conv_bias != checkpoint.metadata.arch.conv_bias:
            return None, (
                "its decoder is left out: convolutions with a bias in one of encoder and decoder "
                "alone have no place in the peers' networks"
            )
        case DecoderConfig() as config:
            return config, None


def _encoder_tensors(checkpoint: Checkpoint, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Name in the peers' encoder (without copies) and tensor."""
    arch = checkpoint.metadata.arch
    plain = arch.kind == "plain"
    first = "stages.0.0.convs.0" if plain else "stem.convs.0"
    prefix = checkpoint.stem_prefix(stem)
    for name, tensor in _in_order(checkpoint, prefix):
        yield f"{first}.{name.removeprefix(prefix)}", tensor
    for index, stride in enumerate(arch.strides):
        stage = f"encoder.stages.{index}."
        for name, tensor in _in_order(checkpoint, stage):
            rest = name.removeprefix(stage)
            if plain:
                _, place, tail = rest.split(".", 2)  # convs.<j>.conv.weight
                shifted = int(place) + (index == 0)  # theirs counts the stem
                yield f"stages.{index}.0.convs.{shifted}.{tail}", tensor
            else:
                pooled = any(step != 1 for step in stride)
                yield f"stages.{index}.{rest.replace('.skip.', f'.skip.{int(pooled)}.', 1)}", tensor


def _decoder_tensors(decoder: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The peers count levels from the coarsest one on."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in decoder.items():
        kind, level, rest = name.split(".", 2)
        theirs = "transpconvs" if kind == "upsample" else kind
        tensors[f"{theirs}.{levels - 1 - int(level)}.{rest}"] = tensor
    return tensors


def _in_order(checkpoint: Checkpoint, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(prefix):
            yield name, tensor


def _with_aliases(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, and convolutions and norms of blocks a second time; memory is shared."""
    for name, tensor in tensors.items():
        yield name, tensor
        block, _, part = name.rpartition(".")
        block, _, kind = block.rpartition(".")
        if kind in _ALIASES:
            yield f"{block}.{_ALIASES[kind]}.{part}", tensor


def _drawn(module: nn.Module, *, like: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """State of a module from the meta device, drawn as nnU-Net does, in the type of `like`."""
    module.to_empty(device="cpu")
    initialize(module, "kaiming", generator=generator)
    return {name: tensor.to(like.dtype) for name, tensor in module.state_dict().items()}


def _own_storage(tensor: Tensor) -> Tensor:
    # torch.save writes the whole storage behind a view.
    tensor = tensor.detach().cpu()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone().contiguous()
