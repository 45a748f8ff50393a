"""Plans of nnU-Net v2 and nnssl: what the network looks like and which images it was trained on.

Taken over are the architecture, voxel size, patch size, normalisation, axis order, names of data
sets, citations and licence. Everything else (lists of images and patients, paths, settings of the
training) is not even looked at.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig, Triple
from voxelbridge.core.arch.presets import RESENC_L
from voxelbridge.core.config import validate
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.foreign.stand_ins import Table
from voxelbridge.core.safetensors_header import quoted, refusal

NNSSL_KEY = "nnssl_adaptation_plan"
_MAX_PLAN_BYTES = 16 * 1024 * 1024
_MAX_TEXT = 5000
_NOT_CONVOLUTIONAL = ("Primus", "Eva", "ViT", "SwinUNETR", "MedNeXt")
_Scheme = dict[str, JsonValue]


@dataclass(frozen=True)
class PlanFacts:
    """What a plan says; None where it says nothing. Triples are in the plan's own axis order."""

    where: str  # in words, for messages
    encoder: EncoderConfig | None = None
    decoder: DecoderConfig | None = None
    has_skips: bool = True
    patch_size: Triple | None = None
    spacing_mm: tuple[float, float, float] | None = None
    normalization: tuple[_Scheme, ...] | None = None
    transpose: Triple = (0, 1, 2)  # axis of the image (z, y, x) that is the network's first, ...
    datasets: tuple[str, ...] = ()
    citations: tuple[str, ...] = ()
    license: str | None = None
    notes: tuple[str, ...] = ()


def read_plan_file(path: Path) -> Mapping[str, Any]:
    """The JSON object in a plan file; CheckpointError where it is none."""
    try:
        if path.stat().st_size > _MAX_PLAN_BYTES:
            raise refusal(path, f"more than {_MAX_PLAN_BYTES} bytes, too much for a plan")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise refusal(path, f"no plan in JSON ({error})") from error
    if not isinstance(tree, dict):
        raise refusal(path, "no plan: expected a JSON object")
    return tree


def is_nnssl_plan(tree: Mapping[Any, Any]) -> bool:
    """Whether `tree` is an nnssl adaptation plan."""
    return isinstance(tree.get("architecture_plans"), Mapping)


def is_nnunet_plan(tree: Mapping[Any, Any]) -> bool:
    """Whether `tree` is a plans file of nnU-Net v2."""
    return isinstance(tree.get("configurations"), Mapping)


def nnssl_facts(where: str, tree: Mapping[Any, Any]) -> PlanFacts:
    """What an nnssl adaptation plan says."""
    pretraining = _table(tree.get("pretrain_plan"))
    configurations = _table(pretraining.get("configurations"))
    settings = _table(next(iter(configurations.values()), None))
    architecture = _table(tree.get("architecture_plans"))
    name = str(architecture.get("arch_class_name"))
    facts = _image_facts(where, pretraining, settings)
    patch = _positive(_triple(tree.get("pretrain_patch_size"), int)) or facts.patch_size
    facts = replace(
        facts,
        patch_size=patch or _positive(_triple(tree.get("recommended_downstream_patchsize"), int)),
        citations=read_citations(tree.get("citations")),
        license=read_text(tree.get("license")),
        has_skips=not name.startswith("NoSkip"),
    )
    return _with_network(facts, name, architecture.get("arch_kwargs"))


def nnunet_facts(where: str, tree: Mapping[Any, Any], configuration: str | None) -> PlanFacts:
    """What a plans file of nnU-Net v2 says about one of its configurations."""
    known = _table(tree.get("configurations"))
    if configuration is None:
        volumes = [name for name in known if str(name).startswith("3d")]
        configuration = "3d_fullres" if "3d_fullres" in volumes else next(iter(volumes), None)
    if configuration not in known:
        names = ", ".join(quoted(str(name)) for name in list(known)[:8])
        raise refusal(where, f"has no configuration {quoted(configuration)}, only: {names}")
    settings = _inherited(where, known, str(configuration))
    facts = _image_facts(where, tree, settings)
    architecture = _table(settings.get("architecture"))
    if architecture:
        name = str(architecture.get("network_class_name")).rpartition(".")[2]
        return _with_network(facts, name, architecture.get("arch_kwargs"))
    if "UNet_class_name" in settings:
        return _with_network(facts, str(settings["UNet_class_name"]), _old_arguments(settings))
    return facts


def read_citations(value: object) -> tuple[str, ...]:
    """Every citation of a published file as one text, in its order, none twice."""
    found: list[str] = []
    for entry in value if isinstance(value, list | tuple) else [value]:
        if isinstance(entry, str):
            found.append(entry)
        for key in ("apa_citations", "bibtex_citations"):
            texts = _table(entry).get(key)
            listed = [texts] if isinstance(texts, str) else texts
            taken = [t for t in listed if isinstance(t, str)] if isinstance(listed, list) else []
            found += taken
            if taken:
                break  # the same works in another form
    cleaned = (read_text(text) for text in found[:100])
    return tuple(dict.fromkeys(text for text in cleaned if text is not None))


def read_text(value: object) -> str | None:
    """A text of a foreign file on one line, without control characters; None if there is none."""
    if not isinstance(value, str):
        return None
    line = " ".join(value[: 4 * _MAX_TEXT].split())
    return "".join(c for c in line if c.isprintable())[:_MAX_TEXT].strip() or None


def _image_facts(where: str, plan: Mapping[Any, Any], settings: Mapping[Any, Any]) -> PlanFacts:
    notes: list[str] = []
    order = plan.get("transpose_forward")
    transpose = _triple(order, int) or (0, 1, 2)
    if sorted(transpose) != [0, 1, 2]:
        raise refusal(
            where, f"transpose_forward is {', '.join(map(str, transpose))}, no axis order"
        )
    dataset = read_text(plan.get("dataset_name"))
    return PlanFacts(
        where,
        patch_size=_positive(_triple(settings.get("patch_size"), int)),
        spacing_mm=_positive(_triple(settings.get("spacing"), float)),
        normalization=_normalization(plan, settings, notes),
        transpose=transpose,
        datasets=() if dataset is None else (dataset,),
        notes=tuple(notes),
    )


def _normalization(
    plan: Mapping[Any, Any], settings: Mapping[Any, Any], notes: list[str]
) -> tuple[_Scheme, ...] | None:
    names = settings.get("normalization_schemes")
    if not isinstance(names, list | tuple) or not 0 < len(names) <= 1000:
        return None
    masked = settings.get("use_mask_for_norm")
    statistics = _table(plan.get("foreground_intensity_properties_per_channel"))
    schemes: list[_Scheme] = []
    for channel, name in enumerate(names):
        inside = isinstance(masked, list | tuple) and channel < len(masked) and masked[channel]
        match name:
            case "ZScoreNormalization":
                schemes.append({"name": "zscore", "nonzero_only": bool(inside)})
            case "CTNormalization":
                given = _table(statistics.get(str(channel)))
                keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
                values = [_number(given.get(key)) for key in keys]
                if None in values:
                    notes.append(f"{name} without its statistics: the normalisation is not kept")
                    return None
                names_of_ours = ("lower", "upper", "mean", "std")
                schemes.append(
                    {"name": "ct_percentile", **dict(zip(names_of_ours, values, strict=True))}
                )
            case str() if re.fullmatch(r"\w{1,64}", name):
                schemes.append({"name": name})
            case _:
                return None
    return tuple(schemes)


def _with_network(facts: PlanFacts, name: str, arguments: object) -> PlanFacts:
    """Adds the architecture; a network that is no encoder of ours is refused."""
    short = name.removeprefix("NoSkip")
    if any(word in name for word in _NOT_CONVOLUTIONAL):
        raise refusal(
            facts.where,
            f"the network is a {quoted(name)}, only residual and plain convolutional encoders "
            "can be imported",
        )
    given = _table(arguments)
    if not given:
        if short != "ResEncL":
            return facts
        decoder = DecoderConfig(convs_per_stage=(1,) * 5, conv_bias=True)
        return replace(facts, encoder=RESENC_L, decoder=decoder)
    _require_known_layers(facts.where, given)
    residual = "n_blocks_per_stage" in given
    depths = given.get("n_blocks_per_stage" if residual else "n_conv_per_stage")
    stages = given.get("n_stages")
    tree = {
        "kind": "residual" if residual else "plain",
        "features": _per_stage(given.get("features_per_stage"), stages),
        "strides": _per_stage(given.get("strides"), stages, triples=True),
        "kernels": _per_stage(given.get("kernel_sizes"), stages, triples=True),
        "blocks": _per_stage(depths, stages),
        "conv_bias": given.get("conv_bias"),
    }
    levels = stages - 1 if isinstance(stages, int) else None
    convs = _per_stage(given.get("n_conv_per_stage_decoder"), levels)
    try:
        encoder = validate(EncoderConfig, tree, where="architecture")
        decoder = None
        if convs:
            reversed_ = {"convs_per_stage": convs[::-1], "conv_bias": given.get("conv_bias")}
            decoder = validate(DecoderConfig, reversed_, where="architecture")
    except (ConfigError, RecursionError) as error:
        raise refusal(facts.where, f"an architecture that is not understood: {error}") from error
    return replace(facts, encoder=encoder, decoder=decoder)


def _require_known_layers(where: str, given: Mapping[Any, Any]) -> None:
    """Layers that no weight shows: another activation or norm would give other outputs."""
    expected = {"conv_op": "Conv3d", "norm_op": "InstanceNorm3d", "nonlin": "LeakyReLU"}
    for key, wanted in expected.items():
        named = given.get(key)
        if isinstance(named, str) and named.rpartition(".")[2] != wanted:
            raise refusal(where, f"{key} is {quoted(named)}, the encoders here have {wanted}")
    epsilon = _number(_table(given.get("norm_op_kwargs")).get("eps", 1e-5))
    slope = _number(_table(given.get("nonlin_kwargs")).get("negative_slope", 0.01))
    for key, value, wanted in (("eps", epsilon, 1e-5), ("negative_slope", slope, 0.01)):
        if value is None or not math.isclose(value, wanted):
            raise refusal(where, f"{key} is {value}, the encoders here have {wanted}")


def _old_arguments(settings: Mapping[Any, Any]) -> dict[str, object]:
    """Arguments as plans have them since nnU-Net 2.4, from those before."""
    strides = settings.get("pool_op_kernel_sizes")
    base, largest = settings.get("UNet_base_num_features"), settings.get("unet_max_num_features")
    if not (isinstance(strides, list) and isinstance(base, int) and isinstance(largest, int)):
        return {}
    depths = settings.get("n_conv_per_stage_encoder")
    residual = str(settings.get("UNet_class_name")).startswith("Residual")
    return {
        "n_stages": len(strides),
        "features_per_stage": [min(base * 2**i, largest) for i in range(len(strides))],
        "strides": strides,
        "kernel_sizes": settings.get("conv_kernel_sizes"),
        "n_blocks_per_stage" if residual else "n_conv_per_stage": depths,
        "n_conv_per_stage_decoder": settings.get("n_conv_per_stage_decoder"),
        "conv_bias": True,
    }


def _inherited(where: str, known: Mapping[Any, Any], name: str) -> dict[Any, Any]:
    chain: list[Mapping[Any, Any]] = []
    wanted: object = name
    while isinstance(wanted, str) and len(chain) < 20:
        settings = _table(known.get(wanted))
        if not settings:
            raise refusal(where, f"has no configuration {quoted(wanted)}")
        chain.append(settings)
        wanted = settings.get("inherits_from")
    merged: dict[Any, Any] = {}
    for settings in reversed(chain):
        merged |= settings
    return merged


def _per_stage(value: object, count: object, *, triples: bool = False) -> list[Any] | None:
    """One entry per stage from a list, or from one number for all of them."""
    value = _plain(value)
    if isinstance(value, int) and isinstance(count, int) and 0 < count <= 64:
        value = [value] * count
    if not isinstance(value, list) or len(value) > 64:
        return None
    whole = [_whole(entry) for entry in value]
    return [[v] * 3 if triples and isinstance(v, int) else v for v in whole]


def _whole(value: object) -> object:
    """`value` with lists for tuples and integers for floats that are whole."""
    value = _plain(value)
    if isinstance(value, list) and len(value) <= 64:
        return [_whole(entry) if isinstance(entry, float) else entry for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _triple(value: object, kind: type) -> Any:  # Any: three of `kind`
    value = _plain(value)
    if not isinstance(value, list) or len(value) != 3:
        return None
    numbers = [_number(entry) for entry in value]
    if any(n is None or n < 0 or n > 1e6 for n in numbers):
        return None
    return tuple(kind(n) for n in numbers if n is not None)


def _positive(triple: Any) -> Any:  # Any: three numbers, or None
    return triple if triple is not None and min(triple) > 0 else None


def _plain(value: object) -> object:
    if isinstance(value, Table):
        value = value.values
    return list(value) if isinstance(value, tuple) else value


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _table(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
