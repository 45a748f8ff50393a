"""Weights from a checkpoint into an encoder; nothing differs silently."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from voxelbridge.core.arch.encoder import Encoder, build_encoder
from voxelbridge.core.checkpoint import Checkpoint, read_checkpoint
from voxelbridge.core.errors import CheckpointError, ConfigError

STRIDES = "strides"  # what `allow` calls the one difference that no tensor shows
_SHOWN = 6  # differences spelled out in an error


@dataclass(frozen=True)
class ShapeMismatch:
    """A tensor that both sides have, in two shapes."""

    name: str
    checkpoint_shape: tuple[int, ...]
    encoder_shape: tuple[int, ...]

    def describe(self) -> str:
        return f"{self.name}: checkpoint {self.checkpoint_shape}, encoder {self.encoder_shape}"


@dataclass(frozen=True)
class TransferReport:
    """What became of every tensor.

    `loaded` and `left_at_init` are names of the encoder (without `encoder.`) and together all of
    them; `unused` are names of the file.
    """

    stem: str  # what was done with the stem, in words
    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...]
    unused: tuple[str, ...]
    shape_mismatched: tuple[ShapeMismatch, ...]

    def describe(self) -> str:
        """A text table: counts, and every name that was not simply loaded."""
        groups = {
            "left at init": self.left_at_init,
            "unused": self.unused,
            "shape-mismatched": [mismatch.describe() for mismatch in self.shape_mismatched],
        }
        lines = [f"{'stem':<17} {self.stem}", f"{'loaded':<17} {len(self.loaded)} tensors"]
        for title, rows in groups.items():
            lines += [f"{title:<17} {len(rows)} tensors", *(f"  {row}" for row in rows)]
        return "\n".join(lines)


def load_encoder(path: Path | str, stem: str | None = None) -> Encoder:
    """The encoder of the checkpoint at `path`, in eval mode, float32, on the CPU.

    `stem` chooses among several stems; an unknown name raises CheckpointError and lists them.
    """
    checkpoint = read_checkpoint(path)
    name = _only_stem(checkpoint) if stem is None else _known_stem(checkpoint, stem)
    # On the meta device nothing is drawn, so that loading leaves the random streams alone.
    with torch.device("meta"):
        encoder = build_encoder(
            checkpoint.metadata.arch, in_channels=checkpoint.metadata.stems[name].channels
        )
    encoder.to_empty(device="cpu")
    transfer_encoder(checkpoint, encoder, stem=name)
    return encoder.eval()


def transfer_encoder(
    checkpoint: Checkpoint, encoder: Encoder, *, stem: str = "checkpoint", allow: Sequence[str] = ()
) -> TransferReport:
    """Copies the encoder weights of `checkpoint` into `encoder` and reports on every tensor.

    `stem`: "checkpoint" takes the only stem, which must have the encoder's channels; a name takes
    that one of several stems; "replicate" repeats a one-channel weight over all input channels,
    divided by their number; "random" leaves the encoder's stem as it is.
    `allow` holds names of tensors, or their beginnings up to a dot ("stages.5"), that may stay at
    init, be unused or differ in shape, and "strides" if the strides may differ. Every other
    difference is a CheckpointError with both shapes, and then nothing has been copied.
    Decoder weights and other stems are reported as unused, never refused.
    """
    sources = _stem_sources(checkpoint, encoder, stem) | {
        name.removeprefix("encoder."): _Source(name, tensor)
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("encoder.stages.")
    }
    targets = encoder.state_dict()
    _check_allowances(allow, [*targets, *sources])
    mismatched = [
        ShapeMismatch(name, tuple(source.tensor.shape), tuple(targets[name].shape))
        for name, source in sources.items()
        if name in targets and source.tensor.shape != targets[name].shape
    ]
    refused = {mismatch.name for mismatch in mismatched}
    differences = {mismatch.name: mismatch.describe() for mismatch in mismatched}
    for name in targets.keys() - sources.keys():
        if not (stem == "random" and name.startswith("stem.")):
            differences[name] = f"{name}: encoder {tuple(targets[name].shape)}, checkpoint none"
    for name in sources.keys() - targets.keys():
        shape = tuple(sources[name].tensor.shape)
        differences[name] = f"{name}: checkpoint {shape}, encoder none"
    theirs, ours = checkpoint.metadata.arch.strides, encoder.config.strides
    if theirs != ours:
        differences[STRIDES] = f"strides: checkpoint {theirs}, encoder {ours}"
    _refuse_differences(checkpoint, differences, allow)

    loaded = [name for name in targets if name in sources and name not in refused]
    with torch.no_grad():
        for name in loaded:
            targets[name].copy_(sources[name].tensor)
    used = {sources[name].name for name in loaded}
    return TransferReport(
        stem=_stem_words(checkpoint, encoder, stem),
        loaded=tuple(loaded),
        left_at_init=tuple(name for name in targets if name not in set(loaded)),
        unused=tuple(name for name in checkpoint.tensors if name not in used),
        shape_mismatched=tuple(mismatched),
    )


class _Source(NamedTuple):
    name: str  # in the file
    tensor: Tensor


def _stem_sources(checkpoint: Checkpoint, encoder: Encoder, policy: str) -> dict[str, _Source]:
    if policy == "random":
        return {}
    name = (
        _only_stem(checkpoint)
        if policy in ("checkpoint", "replicate")
        else _known_stem(checkpoint, policy)
    )
    channels = checkpoint.metadata.stems[name].channels
    prefix = checkpoint.stem_prefix(name)
    sources = {
        f"stem.{key.removeprefix(prefix)}": _Source(key, tensor)
        for key, tensor in checkpoint.tensors.items()
        if key.startswith(prefix)
    }
    if policy == "replicate":
        if channels != 1:
            raise CheckpointError(
                f"{checkpoint.origin}: stem {name} has {channels} channels, only a stem of one "
                "channel can be replicated; use the stem 'random' or data with its channels"
            )
        weight = sources["stem.conv.weight"]
        repeated = weight.tensor.repeat(1, encoder.in_channels, 1, 1, 1) / encoder.in_channels
        sources["stem.conv.weight"] = _Source(weight.name, repeated)
    elif channels != encoder.in_channels:
        raise CheckpointError(
            f"{checkpoint.origin}: stem {name} takes {_channels(channels)}, the encoder "
            f"{_channels(encoder.in_channels)}; use the stem 'random'"
            f"{', or replicate' if channels == 1 else ''}"
            f"{_stems_with(checkpoint, encoder.in_channels)}"
        )
    return sources


def _only_stem(checkpoint: Checkpoint) -> str:
    names = list(checkpoint.metadata.stems)
    if len(names) > 1:
        raise CheckpointError(
            f"{checkpoint.origin}: has several stems, name one of them: {_stem_list(checkpoint)}"
        )
    return names[0]


def _known_stem(checkpoint: Checkpoint, name: str) -> str:
    if name not in checkpoint.metadata.stems:
        raise CheckpointError(
            f"{checkpoint.origin}: has no stem {name!r}, expected one of: {_stem_list(checkpoint)}"
        )
    return name


def _stem_list(checkpoint: Checkpoint) -> str:
    return ", ".join(
        f"{name} ({_channels(stem.channels)}{f', {stem.modality}' if stem.modality else ''})"
        for name, stem in checkpoint.metadata.stems.items()
    )


def _stems_with(checkpoint: Checkpoint, channels: int) -> str:
    fitting = [
        name for name, stem in checkpoint.metadata.stems.items() if stem.channels == channels
    ]
    return f", or one of the stems with its channels: {', '.join(fitting)}" if fitting else ""


def _stem_words(checkpoint: Checkpoint, encoder: Encoder, policy: str) -> str:
    match policy:
        case "random":
            return f"random: left at init ({_channels(encoder.in_channels)})"
        case "replicate":
            return f"replicate: 1 -> {_channels(encoder.in_channels)}, divided by their number"
        case "checkpoint":
            return f"checkpoint: {_only_stem(checkpoint)} ({_channels(encoder.in_channels)})"
        case _:
            return f"{policy} ({_channels(encoder.in_channels)})"


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"


def _check_allowances(allow: Sequence[str], names: Iterable[str]) -> None:
    known = list(names)
    for allowance in allow:
        if allowance != STRIDES and not any(_covers(allowance, name) for name in known):
            raise ConfigError(
                f"allow={allowance!r} names no tensor of the encoder or the checkpoint; expected "
                "a name such as 'stages.5' or 'stem.conv.weight'"
            )


def _covers(allowance: str, name: str) -> bool:
    return name == allowance or name.startswith(f"{allowance}.")


def _refuse_differences(
    checkpoint: Checkpoint, differences: Mapping[str, str], allow: Sequence[str]
) -> None:
    refused = [
        text
        for name, text in sorted(differences.items())
        if not any(_covers(allowance, name) for allowance in allow)
    ]
    if refused:
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise CheckpointError(
            f"{checkpoint.origin}: does not fit the encoder in {len(refused)} places, allow them "
            f"by name or build the checkpoint's architecture: {'; '.join(refused[:_SHOWN])}{more}"
        )
