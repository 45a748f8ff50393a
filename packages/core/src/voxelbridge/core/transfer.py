"""Weights from a checkpoint into an encoder or a decoder; nothing differs silently."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from voxelbridge.core.adapt import Difference, adapt_weights, difference_table
from voxelbridge.core.arch.decoder import Decoder, decoder_kind
from voxelbridge.core.arch.encoder import Encoder, build_encoder
from voxelbridge.core.checkpoint import Checkpoint, read_checkpoint
from voxelbridge.core.errors import CheckpointError, ConfigError

STRIDES = "strides"  # what `allow` calls the one difference that no tensor shows
_SHOWN = 6  # differences spelled out in an error
_DECODERS = {"unet": "U-Net decoder", "ufpn": "U-FPN"}

Part = Literal["encoder", "decoder"]
_EXAMPLES: Mapping[Part, str] = {
    "encoder": "'stages.5' or 'stem.conv.weight'",
    "decoder": "'lateral.0' or 'stages.4'",
}


@dataclass(frozen=True)
class ShapeMismatch:
    """A tensor that both sides have, in two shapes."""

    name: str
    checkpoint_shape: tuple[int, ...]
    own_shape: tuple[int, ...]  # in the encoder or decoder that the weights were for
    part: Part = "encoder"

    def describe(self) -> str:
        return f"{self.name}: checkpoint {self.checkpoint_shape}, {self.part} {self.own_shape}"


@dataclass(frozen=True)
class TransferReport:
    """What became of every tensor.

    `loaded` and `left_at_init` are names of the encoder or decoder (without `encoder.` or
    `decoder.`) and together all of them; `unused` are names of the file.
    """

    stem: str | None  # what was done with the stem, in words; None for a decoder
    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...]
    unused: tuple[str, ...]
    shape_mismatched: tuple[ShapeMismatch, ...]
    adapted: tuple[Difference, ...] = ()  # what `adapt` reconciled, and how

    def describe(self) -> str:
        """A text table: counts, and every name that was not simply loaded."""
        groups = {
            "left at init": self.left_at_init,
            "unused": self.unused,
            "shape-mismatched": [mismatch.describe() for mismatch in self.shape_mismatched],
        }
        first = "decoder" if self.stem is None else f"{'stem':<17} {self.stem}"
        lines = [first, f"{'loaded':<17} {len(self.loaded)} tensors"]
        for title, rows in groups.items():
            lines += [f"{title:<17} {len(rows)} tensors", *(f"  {row}" for row in rows)]
        if self.adapted:
            table = difference_table(self.adapted).splitlines()
            lines += [f"{'adapted':<17} {len(self.adapted)} places", *(f"  {r}" for r in table)]
        return "\n".join(lines)


def load_encoder(path: Path | str, stem: str | None = None) -> Encoder:
    """The encoder of the checkpoint at `path`, in eval mode, float32, on the CPU.

    `stem` chooses among several stems; None takes the checkpoint's default, or the only one. An
    unknown name, and none where one is needed, raise CheckpointError, which lists the stems.
    """
    checkpoint = read_checkpoint(path)
    name = _unnamed_stem(checkpoint) if stem is None else _known_stem(checkpoint, stem)
    # On the meta device nothing is drawn, so that loading leaves the random streams alone.
    with torch.device("meta"):
        encoder = build_encoder(
            checkpoint.metadata.arch, in_channels=checkpoint.metadata.stems[name].channels
        )
    encoder.to_empty(device="cpu")
    transfer_encoder(checkpoint, encoder, stem=name)
    return encoder.eval()


def transfer_encoder(
    checkpoint: Checkpoint,
    encoder: Encoder,
    *,
    stem: str = "checkpoint",
    allow: Sequence[str] = (),
    adapt: bool = False,
) -> TransferReport:
    """Copies the encoder weights of `checkpoint` into `encoder` and reports on every tensor.

    `stem`: "checkpoint" takes the default stem, or the only one, or the only one with the encoder's
    channels, which it must have in any case; a name takes that one of several stems; "replicate"
    repeats a one-channel weight (of the default stem, or the only one, or the only one of one
    channel) over all input channels, divided by their number; "random" leaves the encoder's stem as
    it is.
    `allow` holds names of tensors, or their beginnings up to a dot ("stages.5"), that may stay at
    init, be unused or differ in shape, and "strides" if the strides may differ. Every other
    difference is a CheckpointError with both shapes, and then nothing has been copied.
    `adapt` reconciles what can be (`adapt.adapt_weights`: depth, kernels of 1 and 3, biases,
    strides) and reports each such place; what cannot, such as other widths, stays an error.
    Decoder weights and other stems are reported as unused, never refused.
    """
    sources = _stem_sources(checkpoint, encoder, stem) | {
        name.removeprefix("encoder."): _Source(name, tensor)
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("encoder.stages.")
    }
    differences: dict[str, str] = {}
    reconciled: tuple[Difference, ...] = ()
    if adapt:
        found = adapt_weights(
            {name: source.tensor for name, source in sources.items()},
            {
                n: t
                for n, t in encoder.state_dict().items()
                if stem != "random" or _own(n, "stages")
            },
            theirs=checkpoint.metadata.arch,
            ours=encoder.config,
        )
        sources = {
            name: _Source(sources[name].name if name in sources else name, tensor)
            for name, tensor in found.weights.items()
        }
        reconciled = tuple(d for d in found.differences if d.remedy is not None)
        allow = [*allow, *found.allow]
    theirs, ours = checkpoint.metadata.arch.strides, encoder.config.strides
    if checkpoint.metadata.arch.kind != encoder.config.kind:
        kinds = checkpoint.metadata.arch.kind, encoder.config.kind
        differences["kind"] = f"kind: checkpoint {kinds[0]}, encoder {kinds[1]}"
    if theirs != ours:
        differences[STRIDES] = f"strides: checkpoint {theirs}, encoder {ours}"
    copied = _copy(
        checkpoint,
        sources,
        encoder.state_dict(),
        part="encoder",
        differences=differences,
        allow=[*allow, "stem"] if stem == "random" else allow,
    )
    return TransferReport(
        stem=_stem_words(checkpoint, encoder, stem),
        loaded=copied.loaded,
        left_at_init=copied.left_at_init,
        unused=tuple(name for name in checkpoint.tensors if name not in copied.used),
        shape_mismatched=copied.mismatched,
        adapted=reconciled,
    )


def encoder_differences(checkpoint: Checkpoint, encoder: Encoder) -> tuple[Difference, ...]:
    """Every place where the stages of `checkpoint` and `encoder` differ, before anything is copied.

    `adapt.difference_table` shows them with both sides and what adapting would do.
    """
    weights = {
        name.removeprefix("encoder."): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("encoder.stages.")
    }
    targets = {name: t for name, t in encoder.state_dict().items() if _own(name, "stages")}
    theirs, ours = checkpoint.metadata.arch, encoder.config
    return adapt_weights(weights, targets, theirs=theirs, ours=ours).differences


def chosen_stem(checkpoint: Checkpoint, policy: str, *, in_channels: int) -> str | None:
    """The stem whose weights `transfer_encoder` takes into an encoder of so many channels.

    None for the policy "random". CheckpointError, which lists the stems, where it cannot be told.
    """
    match policy:
        case "random":
            return None
        case "checkpoint" | "replicate":
            channels = in_channels if policy == "checkpoint" else 1
            return _only_stem_with(checkpoint, channels) or _unnamed_stem(checkpoint)
        case _:
            return _known_stem(checkpoint, policy)


def transfer_decoder(
    checkpoint: Checkpoint, decoder: Decoder, *, allow: Sequence[str] = ()
) -> TransferReport:
    """Copies the decoder weights of `checkpoint` into a U-Net decoder or a U-FPN of the same kind.

    `allow` as in `transfer_encoder`, with names such as "lateral.0" or "stages.4". A checkpoint
    without a decoder, or with one of the other kind, is a CheckpointError. The encoder's weights
    are no part of the report.
    """
    config = checkpoint.metadata.decoder
    wanted = decoder_kind(decoder)
    if config is None or config.kind != wanted:
        held = "no decoder" if config is None else f"a {_DECODERS[config.kind]}"
        raise CheckpointError(
            f"{checkpoint.origin}: holds {held}, needed is a {_DECODERS[wanted]}; transfer the "
            "encoder alone"
        )
    sources = {
        name.removeprefix("decoder."): _Source(name, tensor)
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("decoder.")
    }
    copied = _copy(
        checkpoint, sources, decoder.state_dict(), part="decoder", differences={}, allow=allow
    )
    return TransferReport(
        stem=None,
        loaded=copied.loaded,
        left_at_init=copied.left_at_init,
        unused=tuple(s.name for s in sources.values() if s.name not in copied.used),
        shape_mismatched=copied.mismatched,
    )


class _Source(NamedTuple):
    name: str  # in the file
    tensor: Tensor


@dataclass(frozen=True)
class _Copied:
    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...]
    used: frozenset[str]  # names in the file
    mismatched: tuple[ShapeMismatch, ...]


def _copy(
    checkpoint: Checkpoint,
    sources: Mapping[str, _Source],
    targets: Mapping[str, Tensor],
    *,
    part: Part,
    differences: Mapping[str, str],
    allow: Sequence[str],
) -> _Copied:
    """Copies what agrees into `targets`, unless a difference is not allowed: then nothing."""
    _check_allowances(allow, [*targets, *sources], part=part)
    mismatched = [
        ShapeMismatch(name, tuple(source.tensor.shape), tuple(targets[name].shape), part)
        for name, source in sources.items()
        if name in targets and source.tensor.shape != targets[name].shape
    ]
    refused = {mismatch.name for mismatch in mismatched}
    told = {**differences, **{mismatch.name: mismatch.describe() for mismatch in mismatched}}
    for name in targets.keys() - sources.keys():
        told[name] = f"{name}: {part} {tuple(targets[name].shape)}, checkpoint none"
    for name in sources.keys() - targets.keys():
        told[name] = f"{name}: checkpoint {tuple(sources[name].tensor.shape)}, {part} none"
    _refuse_differences(checkpoint, told, allow, part=part)

    loaded = [name for name in targets if name in sources and name not in refused]
    with torch.no_grad():
        for name in loaded:
            targets[name].copy_(sources[name].tensor)
    return _Copied(
        loaded=tuple(loaded),
        left_at_init=tuple(name for name in targets if name not in set(loaded)),
        used=frozenset(sources[name].name for name in loaded),
        mismatched=tuple(mismatched),
    )


def _stem_sources(checkpoint: Checkpoint, encoder: Encoder, policy: str) -> dict[str, _Source]:
    name = chosen_stem(checkpoint, policy, in_channels=encoder.in_channels)
    if name is None:
        return {}
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


def _only_stem_with(checkpoint: Checkpoint, channels: int) -> str | None:
    """Where no stem is the default: the one that has `channels`, if there is just one."""
    if checkpoint.metadata.stem_unless_named is not None:
        return None
    fitting = [n for n, stem in checkpoint.metadata.stems.items() if stem.channels == channels]
    return fitting[0] if len(fitting) == 1 else None


def _unnamed_stem(checkpoint: Checkpoint) -> str:
    name = checkpoint.metadata.stem_unless_named
    if name is None:
        raise CheckpointError(
            f"{checkpoint.origin}: has several stems, name one of them: {_stem_list(checkpoint)}"
        )
    return name


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
    name = chosen_stem(checkpoint, policy, in_channels=encoder.in_channels)
    match policy:
        case "random":
            return f"random: left at init ({_channels(encoder.in_channels)})"
        case "replicate":
            return (
                f"replicate: {name}, 1 -> {_channels(encoder.in_channels)}, divided by their number"
            )
        case "checkpoint":
            return f"checkpoint: {name} ({_channels(encoder.in_channels)})"
        case _:
            return f"{policy} ({_channels(encoder.in_channels)})"


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"


def _check_allowances(allow: Sequence[str], names: Iterable[str], *, part: Part) -> None:
    known = list(names)
    for allowance in allow:
        if (part, allowance) != ("encoder", STRIDES) and not any(
            _covers(allowance, name) for name in known
        ):
            raise ConfigError(
                f"allow={allowance!r} names no tensor of the {part} or the checkpoint; expected "
                f"a name such as {_EXAMPLES[part]}"
            )


def _own(name: str, part: str) -> bool:
    return name.startswith(f"{part}.")


def _covers(allowance: str, name: str) -> bool:
    return name == allowance or name.startswith(f"{allowance}.")


def _refuse_differences(
    checkpoint: Checkpoint, differences: Mapping[str, str], allow: Sequence[str], *, part: Part
) -> None:
    refused = [
        text
        for name, text in sorted(differences.items())
        if not any(_covers(allowance, name) for allowance in allow)
    ]
    if refused:
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise CheckpointError(
            f"{checkpoint.origin}: does not fit the {part} in {len(refused)} places, allow them "
            f"by name or build the checkpoint's architecture: {'; '.join(refused[:_SHOWN])}{more}"
        )
