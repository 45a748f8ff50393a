"""The architecture that a table of weights shows, held against what a plan says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from voxelbridge.core.arch.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
    Triple,
    UFPNConfig,
)
from voxelbridge.core.config import validate
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.foreign.names import NamedWeights
from voxelbridge.core.safetensors_header import refusal
from voxelbridge.core.wording import by_axis, listed

_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.")
_CONV = re.compile(r"stages\.(\d+)\.convs\.(\d+)\.")


@dataclass(frozen=True)
class SeenEncoder:
    """What shapes tell about an encoder: everything but the strides."""

    kind: str
    features: tuple[int, ...]
    kernels: tuple[Triple, ...]
    blocks: tuple[int, ...]
    conv_bias: bool


def seen_encoder(origin: str, named: NamedWeights) -> SeenEncoder:
    """The encoder that the shapes in `named` show; CheckpointError where they show none."""
    tensors = named.encoder
    residual = any(_BLOCK.match(name) for name in tensors)
    if not tensors or not named.stems:
        missing = "stages" if not tensors else "a first convolution (stem)"
        raise refusal(origin, f"its network has no encoder's {missing}")
    pattern = _BLOCK if residual else _CONV
    depths: dict[int, int] = {}
    for name in tensors:
        if match := pattern.match(name):
            stage, index = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), index + 1)
    stages = range(max(depths) + 1)
    if len(stages) > 12:
        raise refusal(origin, f"an encoder of {len(stages)} stages, at most 12 are read")
    blocks = [depths.get(stage, 0) for stage in stages]
    stem = next(iter(named.stems.values())).get("conv.weight")
    first = [
        tensors.get(
            f"stages.{s}.blocks.0.conv1.conv.weight"
            if residual
            else f"stages.{s}.convs.0.conv.weight"
        )
        for s in stages
    ]
    if not residual:
        blocks[0] += 1
        if blocks[0] == 1:
            first[0] = stem
    features, kernels = [], []
    for stage, weight in zip(stages, first, strict=True):
        if weight is None or weight.ndim != 5:
            found = "is missing" if weight is None else f"is {by_axis(weight.shape)}"
            raise refusal(
                origin,
                f"the first convolution of stage {stage} {found}, expected one in three dimensions",
            )
        features.append(weight.shape[0])
        kernels.append(tuple(weight.shape[2:]))
    bias = any(name.endswith("conv.bias") for name in tensors)
    return SeenEncoder(
        "residual" if residual else "plain",
        tuple(features),
        tuple(kernels),
        tuple(blocks),
        bias or any("conv.bias" in stem for stem in named.stems.values()),
    )


def seen_decoder(origin: str, named: NamedWeights, seen: SeenEncoder) -> AnyDecoderConfig | None:
    """The decoder that the shapes show: a U-Net's, a U-FPN, or None where there are no weights."""
    tensors = named.decoder
    if not tensors:
        return None
    levels = len(seen.features) - 1
    if any(name.startswith("lateral.") for name in tensors):
        return _seen_pyramid(origin, tensors)
    convs = [
        len({m[1] for name in tensors if (m := re.match(rf"stages\.{i}\.convs\.(\d+)\.", name))})
        for i in range(levels)
    ]
    bias = any(name.startswith("upsample.") and name.endswith(".bias") for name in tensors)
    tree = {"convs_per_stage": [max(1, count) for count in convs], "conv_bias": bias}
    try:
        return validate(DecoderConfig, tree, where="decoder")
    except ConfigError as error:
        raise refusal(origin, f"its decoder is not understood: {error}") from error


def seen_strides(named: NamedWeights, stages: int) -> tuple[Triple, ...] | None:
    """Strides as the decoder's upsampling shows them: its kernels are the strides it undoes.

    The first stage is taken to keep the image's resolution, as all these networks do.
    """
    weights = [named.decoder.get(f"upsample.{level}.weight") for level in range(stages - 1)]
    found = [(w.shape[2], w.shape[3], w.shape[4]) for w in weights if w is not None and w.ndim == 5]
    return ((1, 1, 1), *found) if len(found) == stages - 1 else None


def agreed_encoder(
    origin: str,
    seen: SeenEncoder,
    *,
    strides: tuple[Triple, ...] | None,
    planned: EncoderConfig | None,
    plan: str,
) -> EncoderConfig:
    """The encoder that weights and plan agree on; CheckpointError with both where they do not."""
    if planned is not None:
        rows = [
            (field, getattr(planned, field), getattr(seen, field))
            for field in ("kind", "features", "kernels", "blocks", "conv_bias")
        ]
        if strides is not None:
            rows.append(("strides", planned.strides, strides))
        wrong = [f"{f}: plan {_words(p)}, weights {_words(w)}" for f, p, w in rows if p != w]
        if wrong:
            raise refusal(origin, f"its weights are not those of {plan}: {'; '.join(wrong)}")
        return planned
    if strides is None:
        raise refusal(
            origin,
            "nothing tells the strides of its encoder, which no weight shows; give the plan with "
            "--plan or the architecture with --arch",
        )
    try:
        return validate(EncoderConfig, {**vars(seen), "strides": strides}, where="architecture")
    except ConfigError as error:
        raise refusal(origin, str(error)) from error


def _words(value: object) -> str:
    return f"({listed(value)})" if isinstance(value, tuple) else str(value)


def _seen_pyramid(origin: str, tensors: Mapping[str, Tensor]) -> UFPNConfig:
    widths: list[int] = []
    while (weight := tensors.get(f"lateral.{len(widths)}.weight")) is not None:
        widths.append(weight.shape[0])
    widest = widths[-1] if widths else 1
    first = next(level for level, width in enumerate(widths) if width == widest)
    out = tensors.get("out.0.weight")
    kernel = tuple(out.shape[2:]) if out is not None and out.ndim == 5 else (3, 3, 3)
    halved = [max(1, widest >> (first - level)) for level in range(first)]
    smallest = min([8, *widths]) if halved == widths[:first] else min(widths)
    try:
        return validate(
            UFPNConfig,
            {
                "out_channels": widest,
                "first_level": first,
                "min_channels": smallest,
                "kernel": kernel,
                "upsample_bias": "upsample.0.bias" in tensors,
            },
            where="decoder",
        )
    except ConfigError as error:
        raise refusal(origin, f"its pyramid is not understood: {error}") from error
