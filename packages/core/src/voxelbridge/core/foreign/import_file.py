"""A published checkpoint of another program -> the canonical checkpoint.

The weights are taken as they are: renamed, aliases removed, axes brought into the order z, y, x.
What becomes of the rest is on the page docs/import.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from voxelbridge.core.arch.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
)
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    CheckpointMetadata,
    Source,
    Stem,
    check_checkpoint,
)
from voxelbridge.core.config import validate
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.foreign.adaptation_plan import (
    NNSSL_KEY,
    PlanFacts,
    is_nnssl_plan,
    is_nnunet_plan,
    nnssl_facts,
    nnunet_facts,
    read_citations,
    read_plan_file,
    read_text,
)
from voxelbridge.core.foreign.architecture import (
    agreed_encoder,
    seen_decoder,
    seen_encoder,
    seen_strides,
)
from voxelbridge.core.foreign.dedup import Deduplicated, remove_aliases
from voxelbridge.core.foreign.names import SINGLE, NamedWeights, sort_names
from voxelbridge.core.foreign.own_export import with_own_metadata
from voxelbridge.core.foreign.recognise import Origin, recognise
from voxelbridge.core.foreign.safe_torch import ForeignFile, read_foreign
from voxelbridge.core.foreign.weights import find_weights, require_usable
from voxelbridge.core.safetensors_header import quoted, refusal
from voxelbridge.core.wording import by_axis, listed, scheme_words

SINGLE_STEM = "default"  # what the only stem of a file without names is called
MULTITALENT_DEFAULT_STEM = "351_0"  # CT; the published MultiTalent files are used with it
_SIDECARS = ("adaptation_plan.json", "plans.json", "../plans.json")
_MAX_CHANNELS = 65_536  # of `Stem`
_OUTPUT = re.compile(r"decoder\.seg_layers\.\d+\.weight")
_METHODS = (  # in names of nnssl's trainers
    ("spark", "s3d"),
    ("s3d", "s3d"),
    ("voco", "voco"),
    ("modelgenesis", "models_genesis"),
    ("modelsgenesis", "models_genesis"),
    ("volumefusion", "volume_fusion"),
    ("simclr", "simclr"),
    ("simmim", "simmim"),
    ("mae", "mae"),
)


@dataclass(frozen=True, eq=False)
class ImportedCheckpoint:
    """A canonical checkpoint and what its user should know about how it came about."""

    checkpoint: Checkpoint
    origin: Origin
    notes: tuple[str, ...]  # what was kept or left out, one sentence each
    warnings: tuple[str, ...]  # what must be known before the weights are trusted

    def lines(self) -> list[str]:
        """What the weights are, for people; the citations last."""
        metadata = self.checkpoint.metadata
        arch, schemes = metadata.arch, metadata.normalization
        channels = {name: stem.channels for name, stem in metadata.stems.items()}
        stems = ", ".join(f"{name} ({n} channel{'s' * (n != 1)})" for name, n in channels.items())
        rows: list[tuple[str, object]] = [
            ("method", metadata.method),
            ("encoder", arch.kind),
            ("features", listed(arch.features)),
            ("blocks", listed(arch.blocks)),
            ("strides", listed(arch.strides)),
            ("decoder", metadata.decoder and metadata.decoder.kind),
            ("stems", stems),
            ("default stem", metadata.stem_unless_named),
            ("spacing (mm)", metadata.spacing_mm and by_axis(metadata.spacing_mm)),
            ("patch", metadata.patch_size and by_axis(metadata.patch_size)),
            ("normalization", schemes and "; ".join(scheme_words(scheme) for scheme in schemes)),
            ("license", metadata.license),
            *(("note", note) for note in self.notes),
            *(("please cite", citation) for citation in metadata.citations),
        ]
        return [f"{key:<16} {'unknown' if value is None else value}" for key, value in rows]


def stated_architecture(text: str) -> EncoderConfig:
    """The encoder that `--arch` names: a preset, or a JSON file with an `EncoderConfig`."""
    if text in ENCODER_PRESETS:
        return ENCODER_PRESETS[text]
    path = Path(text)
    if not path.is_file():
        raise ConfigError(
            f"--arch {text}: neither a preset ({', '.join(ENCODER_PRESETS)}) nor a JSON file"
        )
    return validate(EncoderConfig, dict(read_plan_file(path)), where=str(path))


def import_checkpoint(
    path: Path | str,
    *,
    origin: Origin | Literal["auto"] = "auto",
    plan: Path | None = None,
    stem: str | None = None,
    arch: EncoderConfig | None = None,
) -> ImportedCheckpoint:
    """The canonical form of the checkpoint at `path`; its tensors may be mapped from that file.

    `plan`: an adaptation_plan.json of nnssl or a plans.json of nnU-Net; None takes the one inside
    the file, else one that lies beside it. `stem`: the default one of several. `arch`: the
    architecture of weights that come without a plan. CheckpointError (one line) for a file that is
    unsafe, damaged or not understood, and where weights and plan do not agree.
    """
    file = read_foreign(path)
    if METADATA_KEY in file.texts:
        raise refusal(file.path, "already a voxelbridge checkpoint; use it as it is")
    weights = find_weights(file)
    given = _given_plan(file, plan)
    origin = recognise(file, weights, given[1] if given else None) if origin == "auto" else origin
    unique = remove_aliases(file, weights)
    named = sort_names(file, unique.weights)
    facts = _plan_facts(file, given)
    if arch is not None:
        facts = _with_stated(file, facts, arch)
    named, facts = _in_zyx(named, facts)
    notes = [*facts.notes, *_left_out(file, named, origin)]
    if unique.num_aliases:
        notes.append(f"removed: {unique.num_aliases} second names of weights with the same values")
    warnings = _warnings(file, unique, origin)
    config = agreed_encoder(
        str(file.path),
        seen := seen_encoder(str(file.path), named),
        strides=seen_strides(named, len(seen.features)),
        planned=facts.encoder,
        plan=facts.where,
    )
    decoder = _decoder(file, facts, seen_decoder(str(file.path), named, seen), warnings)
    stems, prefixes = _stems(file, named, facts)
    default = _default_stem(file, stems, stem)
    if default is None:
        notes.append(f"several stems and no default, name one with --stem: {', '.join(stems)}")
    metadata = _metadata(
        file,
        method=_method(file, origin),
        arch=config,
        decoder=decoder,
        decoder_outputs=_outputs(unique.weights, decoder),
        stems=stems,
        default_stem=default if len(stems) > 1 else None,
        patch_size=facts.patch_size,
        spacing_mm=facts.spacing_mm,
        normalization=_normalization(facts, stems, default, notes),
        source=Source(datasets=facts.datasets),
        citations=facts.citations,
        license=facts.license,
    )
    tensors = _canonical(named, prefixes, with_decoder=decoder is not None)
    if plan is None and arch is None:
        metadata, tensors = with_own_metadata(file.path, file.tree, metadata, tensors)
    tensors = {name: require_usable(file, name, tensor) for name, tensor in tensors.items()}
    checkpoint = Checkpoint(metadata, tensors, origin=str(file.path))
    check_checkpoint(checkpoint)
    if not file.has_checksums:
        notes.append("the file's format has no checksums: damage to single weights would not show")
    return ImportedCheckpoint(checkpoint, origin, tuple(notes), tuple(warnings))


def _given_plan(file: ForeignFile, plan: Path | None) -> tuple[str, Mapping[Any, Any]] | None:
    """A plan from a file: the one named, or one beside a checkpoint that holds none."""
    if plan is not None:
        tree = read_plan_file(plan)
        if not is_nnssl_plan(tree) and not is_nnunet_plan(tree):
            raise refusal(plan, "neither an adaptation plan of nnssl nor plans of nnU-Net v2")
        return str(plan), tree
    if _inner_plan(file) is not None:
        return None
    for name in _SIDECARS:
        beside = file.path.parent / name
        if beside.is_file():
            tree = read_plan_file(beside)
            if is_nnssl_plan(tree) or is_nnunet_plan(tree):
                return str(beside), tree
    return None


def _inner_plan(file: ForeignFile) -> Mapping[Any, Any] | None:
    inside = file.tree.get(NNSSL_KEY)
    if isinstance(inside, Mapping) and is_nnssl_plan(inside):
        return inside
    inside = _arguments(file).get("plans")
    return inside if isinstance(inside, Mapping) and is_nnunet_plan(inside) else None


def _arguments(file: ForeignFile) -> Mapping[Any, Any]:
    arguments = file.tree.get("init_args")
    return arguments if isinstance(arguments, Mapping) else {}


def _plan_facts(file: ForeignFile, given: tuple[str, Mapping[Any, Any]] | None) -> PlanFacts:
    where, tree = given or (str(file.path), _inner_plan(file))
    images = _arguments(file).get("plan")  # nnssl's training plan, without an architecture
    if tree is None and isinstance(images, Mapping) and is_nnunet_plan(images):
        tree = images
    if tree is None:
        facts = PlanFacts("no plan")
    elif is_nnssl_plan(tree):
        facts = nnssl_facts(where, tree)
    else:
        facts = nnunet_facts(where, tree, _configuration(file, tree))
    if given is None:
        facts = replace(facts, where="the plan in the file")
    outer = read_citations(file.tree.get("citations"))
    return replace(
        facts,
        citations=tuple(dict.fromkeys((*outer, *facts.citations))),
        license=read_text(file.tree.get("license")) or facts.license,
    )


def _configuration(file: ForeignFile, plan: Mapping[Any, Any]) -> str | None:
    """Which configuration of the plan was trained; None takes the usual one, or the only one."""
    for key in ("configuration", "configuration_name"):
        name = _arguments(file).get(key)
        if isinstance(name, str):
            return name
    names = [name for name in plan["configurations"] if isinstance(name, str)]
    return names[0] if len(names) == 1 else None


def _with_stated(file: ForeignFile, facts: PlanFacts, arch: EncoderConfig) -> PlanFacts:
    if facts.encoder not in (None, arch):
        raise refusal(
            file.path, f"the architecture stated is not that of {facts.where}; give one of them"
        )
    return replace(facts, encoder=arch, where="the architecture stated")


def _in_zyx(named: NamedWeights, facts: PlanFacts) -> tuple[NamedWeights, PlanFacts]:
    """Both with axes in the order z, y, x; nnU-Net may have trained on transposed images."""
    if facts.transpose == (0, 1, 2):
        return named, facts
    order = [facts.transpose.index(axis) for axis in range(3)]

    def turned(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
        axes = (0, 1, *(2 + axis for axis in order))
        return {k: t.permute(axes) if t.ndim == 5 else t for k, t in table.items()}

    def triple(value: Any) -> Any:  # Any: three of a kind, or None
        return None if value is None else tuple(value[axis] for axis in order)

    encoder = facts.encoder
    if encoder is not None:
        changes = {key: tuple(map(triple, getattr(encoder, key))) for key in ("strides", "kernels")}
        encoder = encoder.model_copy(update=changes)
    words = ", ".join("zyx"[axis] for axis in facts.transpose)
    return (
        replace(
            named,
            encoder=turned(named.encoder),
            decoder=turned(named.decoder),
            stems={name: turned(stem) for name, stem in named.stems.items()},
        ),
        replace(
            facts,
            encoder=encoder,
            patch_size=triple(facts.patch_size),
            spacing_mm=triple(facts.spacing_mm),
            notes=(*facts.notes, f"trained with axes in the order {words}, turned to z, y, x"),
        ),
    )


def _left_out(file: ForeignFile, named: NamedWeights, origin: Origin) -> list[str]:
    """Notes on heads and outputs; CheckpointError for tensors that should not be there."""
    if named.unknown or (named.others and origin in ("nnunet", "plain")):
        unexpected = named.unknown or named.others
        raise refusal(
            file.path,
            f"tensor {quoted(unexpected[0])} belongs to no encoder or decoder known here "
            f"({len(unexpected)} such tensors)",
        )
    notes = []
    if named.outputs:
        notes.append(f"left out: {len(named.outputs)} tensors of output layers")
    if named.others:
        parts = sorted({".".join(name.split(".")[:2]) for name in named.others})
        more = ", ..." if len(parts) > 6 else ""
        notes.append(
            f"left out: {len(named.others)} tensors of heads and others "
            f"({', '.join(parts[:6])}{more})"
        )
    return notes


def _warnings(file: ForeignFile, unique: Deduplicated, origin: Origin) -> list[str]:
    warnings = []
    if unique.stale:
        warnings.append(
            f"{len(unique.stale)} weights are stored twice with different values (origin: "
            f"{origin}, method {_method(file, origin)}); took the copies called "
            f"all_modules, which are what was trained, such as for {unique.stale[0]}"
        )
    if origin == "nndetection" and not _is_v2(unique.weights):
        warnings.append(
            "nnDetection v1 trains with ReLU, the encoders here have LeakyReLU (slope 0.01): "
            "outputs differ slightly until the weights are trained further"
        )
    return warnings


def _is_v2(names: Mapping[str, Tensor]) -> bool:
    return any(".backbone." in f".{name}" for name in names)


def _decoder(
    file: ForeignFile,
    facts: PlanFacts,
    seen: AnyDecoderConfig | None,
    warnings: list[str],
) -> AnyDecoderConfig | None:
    if seen is None:
        return None
    if not facts.has_skips:
        warnings.append("the decoder has no skip connections, which none here is like: left out")
        return None
    match facts.decoder, seen:
        case DecoderConfig() as planned, DecoderConfig() if planned != seen:
            raise refusal(
                file.path,
                f"its decoder is not that of {facts.where}: plan {_convs(planned)}; "
                f"weights {_convs(seen)}",
            )
        case _:
            return seen


def _convs(decoder: DecoderConfig) -> str:
    bias = "with" if decoder.conv_bias else "without"
    return f"{listed(decoder.convs_per_stage)} convolutions per level {bias} bias"


def _stems(
    file: ForeignFile, named: NamedWeights, facts: PlanFacts
) -> tuple[dict[str, Stem], dict[str, str]]:
    """Description of every stem, and what its tensors are called by."""
    several = SINGLE not in named.stems
    if not several and len(named.stems) > 1:
        raise refusal(file.path, "has a stem without a name beside named ones")
    stems: dict[str, Stem] = {}
    prefixes: dict[str, str] = {}
    for name, leaves in sorted(named.stems.items()):
        weight = leaves.get("conv.weight")
        if weight is None or weight.ndim != 5 or weight.shape[1] < 1:
            raise refusal(file.path, f"stem {quoted(name)} has no convolution in three dimensions")
        key = name or SINGLE_STEM
        dataset = name if several else ", ".join(facts.datasets) or None
        if weight.shape[1] > _MAX_CHANNELS:
            raise refusal(file.path, f"stem {quoted(name)} has {weight.shape[1]} channels")
        stems[key] = Stem(channels=weight.shape[1], dataset=dataset)
        prefixes[name] = f"encoder.stems.{name}." if several else "encoder.stem."
    return stems, prefixes


def _metadata(file: ForeignFile, **fields: Any) -> CheckpointMetadata:  # Any: its fields
    try:
        return CheckpointMetadata(**fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        reason = f"{place}: {problem['msg']}"
        raise refusal(file.path, f"cannot be described as a checkpoint ({reason})") from error


def _default_stem(file: ForeignFile, stems: Mapping[str, Stem], wanted: str | None) -> str | None:
    if wanted is not None and wanted not in stems:
        raise ConfigError(f"{file.path}: has no stem {quoted(wanted)}, only: {', '.join(stems)}")
    if wanted is None and len(stems) > 1:
        return MULTITALENT_DEFAULT_STEM if MULTITALENT_DEFAULT_STEM in stems else None
    return wanted or next(iter(stems))


def _normalization(
    facts: PlanFacts, stems: Mapping[str, Stem], default: str | None, notes: list[str]
) -> tuple[dict[str, Any], ...] | None:  # Any: JSON
    schemes = facts.normalization
    if schemes is None or default is None:
        return None
    if len(schemes) != stems[default].channels:
        notes.append(
            f"the plan normalises {len(schemes)} channels, the stem {default} has "
            f"{stems[default].channels}: the normalisation is not kept"
        )
        return None
    return schemes


def _outputs(weights: Mapping[str, Tensor], decoder: AnyDecoderConfig | None) -> int | None:
    """Channels of a U-Net's output layers, where all levels have the same."""
    if not isinstance(decoder, DecoderConfig):
        return None
    found = (t for name, t in weights.items() if _OUTPUT.fullmatch(name) and t.ndim == 5)
    counts = {tensor.shape[0] for tensor in found}
    return counts.pop() if len(counts) == 1 else None


def _method(file: ForeignFile, origin: Origin) -> str:
    if origin != "nnssl":
        return origin
    trainer = file.tree.get("trainer_name")
    if "spark_weights" in file.tree:
        return "s3d"
    lower = trainer.lower() if isinstance(trainer, str) else ""
    return next((method for word, method in _METHODS if word in lower), "nnssl")


def _canonical(
    named: NamedWeights, prefixes: Mapping[str, str], *, with_decoder: bool
) -> dict[str, Tensor]:
    tensors = {f"encoder.{name}": tensor for name, tensor in named.encoder.items()}
    for name, leaves in named.stems.items():
        tensors |= {f"{prefixes[name]}{leaf}": tensor for leaf, tensor in leaves.items()}
    if with_decoder:
        tensors |= {f"decoder.{name}": tensor for name, tensor in named.decoder.items()}
    return tensors
