"""A model card (README.md of a hub repository) from what a checkpoint says about itself."""

import json
import re
from collections.abc import Iterable, Mapping
from textwrap import dedent

from pydantic import JsonValue

from voxelbridge.core.arch.config import DecoderConfig, EncoderConfig, UFPNConfig
from voxelbridge.core.checkpoint import Checkpoint, CheckpointMetadata

UNKNOWN = "not stated"
# Names by which the hub knows licences; others are given as they are under `license_name`.
_HUB_LICENSES = frozenset(
    {
        "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
        "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0",
    }
)  # fmt: skip
_METHODS = {
    "mae": "masked autoencoding",
    "s3d": "masked autoencoding with sparse convolutions (S3D, SparK)",
    "models_genesis": "restoring corrupted images (Models Genesis)",
    "voco": "contrasting positions (VoCo)",
    "multitalent": "supervised segmentation of several data sets (MultiTalent)",
}
_MOST_ROWS = 50  # stems in the table; a model of 65 data sets is still readable


def model_card(checkpoint: Checkpoint, *, title: str, file_name: str) -> str:
    """Markdown with the hub's front matter; what the checkpoint does not say is said as unknown.

    `file_name` is what the checkpoint is called beside the card. The card speaks of data sets and
    never of cases, as the metadata do.
    """
    metadata = checkpoint.metadata
    sections = [
        _front_matter(metadata),
        f"# {_line(title)}",
        _summary(checkpoint),
        "## Intended use",
        _intended_use(metadata),
        "## How to load it",
        _how_to_load(metadata, file_name),
        "## Training",
        _table(_training_facts(metadata)),
        *_stem_sections(metadata),
        "## Architecture",
        _table(_architecture_facts(checkpoint)),
        "## Limits",
        _limits(metadata),
        "## Licence and citation",
        _licence_and_citation(metadata),
        "## Identity",
        _table(
            {
                "SHA-256 of the weights": metadata.tensors_sha256 or UNKNOWN,
                "written by": metadata.created_by,
            }
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(metadata: CheckpointMetadata) -> str:
    modalities = {stem.modality for stem in metadata.stems.values() if stem.modality}
    tags = [
        "medical", "medical-imaging", "3d", "pretrained-encoder", metadata.method,
        "resenc" if metadata.arch.kind == "residual" else "plain-cnn", *sorted(modalities),
    ]  # fmt: skip
    lines = ["---"]
    name = (metadata.license or "").strip()
    if name.lower() in _HUB_LICENSES:
        lines.append(f"license: {name.lower()}")
    elif name:
        lines += ["license: other", f"license_name: {_yaml(name)}"]
    else:
        lines.append("license: unknown")
    lines += [
        "library_name: voxelbridge",
        "pipeline_tag: feature-extraction",
        "tags:",
        *(f"- {_yaml(tag)}" for tag in dict.fromkeys(tags)),
        "---",
    ]
    return "\n".join(lines)


def _summary(checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    parts = {"encoder": 0, "decoder": 0}
    for name, tensor in checkpoint.tensors.items():
        parts[name.partition(".")[0]] += tensor.numel()
    kind = "residual" if metadata.arch.kind == "residual" else "plain"
    stems = len(metadata.stems)
    words = [
        f"A {kind} 3D convolutional encoder of {len(metadata.arch.features)} stages "
        f"({parts['encoder']:,} parameters"
        + (f" with {stems} input stems" if stems > 1 else "")
        + ")"
    ]
    match metadata.decoder:
        case DecoderConfig():
            words.append(f"with its U-Net decoder ({parts['decoder']:,} parameters)")
        case UFPNConfig():
            words.append(f"with its feature pyramid, a U-FPN ({parts['decoder']:,} parameters)")
        case None:
            pass
    return f"{' '.join(words)}, pre-trained by {_method(metadata)}."


def _intended_use(metadata: CheckpointMetadata) -> str:
    decoder = " The decoder can be taken over too." if metadata.decoder is not None else ""
    return (
        "A starting point for fine-tuning networks on 3D medical images: detection, segmentation, "
        f"classification, or as a feature extractor.{decoder} Output layers are not included. "
        "For research; the weights are no medical device and must not guide the care of patients."
    )


def _how_to_load(metadata: CheckpointMetadata, file_name: str) -> str:
    several = metadata.stem_unless_named is None
    argument = f', stem="{next(iter(metadata.stems))}"' if several else ""
    name = metadata.stem_unless_named or next(iter(metadata.stems))
    edges = metadata.patch_size or (64, 64, 64)
    shape = ", ".join(str(edge) for edge in (1, metadata.stems[name].channels, *edges))
    block = f"""\
        ```python
        import torch
        from voxelbridge.core.transfer import load_encoder

        encoder = load_encoder({json.dumps(file_name)}{argument})  # stage outputs, finest first
        image = torch.zeros({shape})  # batch, channels, z, y, x
        features = encoder(image)
        ```"""
    return (
        f"With `voxelbridge-core` installed:\n\n{dedent(block)}\n\n"
        f"Fine-tune a detector with `vb-detect train ... --init {file_name}`, or write a file for "
        f"nnU-Net with `vb-core export {file_name} --to nnunet -o pretrained.pth`."
    )


def _training_facts(metadata: CheckpointMetadata) -> dict[str, str]:
    steps = metadata.source.steps
    return {
        "method": _method(metadata),
        "data sets": ", ".join(metadata.source.datasets) or UNKNOWN,
        "optimiser steps": f"{steps:,}" if steps is not None else UNKNOWN,
        "patch (voxels, z y x)": _sizes(metadata.patch_size),
        "spacing (mm, z y x)": _sizes(metadata.spacing_mm, unknown="not stated, or native grids"),
        "axis order": "z, y, x",
        "normalisation": _normalization(
            metadata.normalization_of(metadata.stem_unless_named)
            if metadata.stem_unless_named
            else metadata.normalization
        ),
        "initialisation": metadata.init or UNKNOWN,
        "configuration hash": metadata.source.config_hash or UNKNOWN,
        "data hash": metadata.source.data_sha256 or UNKNOWN,
    }


def _stem_sections(metadata: CheckpointMetadata) -> list[str]:
    rows = [
        f"| {name}{' (default)' if name == metadata.default_stem else ''} | {stem.channels} "
        f"| {_cell(stem.modality)} | {_cell(stem.dataset)} "
        f"| {_normalization(metadata.normalization_of(name))} |"
        for name, stem in metadata.stems.items()
    ]
    if len(rows) > _MOST_ROWS:
        more = len(rows) - _MOST_ROWS
        rows = [*rows[:_MOST_ROWS], f"| and {more} more (`vb-core inspect`) | | | | |"]
    head = ["| stem | channels | modality | data set | normalisation |", "|---|---|---|---|---|"]
    return ["## Input stems", "\n".join([*head, *rows])]


def _architecture_facts(checkpoint: Checkpoint) -> dict[str, str]:
    arch: EncoderConfig = checkpoint.metadata.arch
    unit = "residual blocks" if arch.kind == "residual" else "convolutions"
    match checkpoint.metadata.decoder:
        case None:
            decoder = "none in the file"
        case DecoderConfig(convs_per_stage=convs):
            decoder = f"U-Net, convolutions per level {list(convs)}"
        case UFPNConfig(out_channels=channels):
            decoder = f"U-FPN, {channels} channels"
    return {
        "features per stage": str(list(arch.features)),
        f"{unit} per stage": str(list(arch.blocks)),
        "strides (z, y, x)": ", ".join(_by(stride) for stride in arch.strides),
        "kernels (z, y, x)": ", ".join(_by(kernel) for kernel in arch.kernels),
        "norm, activation": "instance norm (affine), LeakyReLU 0.01",
        "decoder": decoder,
    }


def _limits(metadata: CheckpointMetadata) -> str:
    spacing = _sizes(metadata.spacing_mm, unknown="those of its training data (not stated)")
    unknown = [
        words
        for words, value in {
            "the training data": metadata.source.datasets or None,
            "the voxel spacing (or the grids were left native)": metadata.spacing_mm,
            "the normalisation": metadata.normalization
            or next((s.normalization for s in metadata.stems.values() if s.normalization), None),
            "the licence": metadata.license,
            "what to cite": metadata.citations or None,
        }.items()
        if value is None
    ]
    lines = [
        f"- Images should be brought to the spacing ({spacing}) and the normalisation of the "
        "training; other scanners, body parts, age groups and modalities than those of the "
        "training data are untested.",
        "- The weights alone carry no measure of accuracy; measure on data of your own before "
        "relying on what is built on them.",
        "- Biases of the training data (who was scanned, and why) are carried into what is built "
        "on the weights.",
    ]
    if unknown:
        lines.append(f"- The file does not say: {'; '.join(unknown)}.")
    return "\n".join(lines)


def _licence_and_citation(metadata: CheckpointMetadata) -> str:
    if metadata.license:
        text = f"Licence of the weights: {_line(metadata.license)}."
    else:
        text = "Licence of the weights: not stated; ask its authors before using them."
    if not metadata.citations:
        return f"{text}\n\nWhat to cite: {UNKNOWN}."
    cited = "\n".join(f"- {_line(citation)}" for citation in metadata.citations)
    return f"{text}\n\nPlease cite:\n{cited}"


def _method(metadata: CheckpointMetadata) -> str:
    words = _METHODS.get(metadata.method)
    return f"{words} (`{metadata.method}`)" if words else f"`{_line(metadata.method)}`"


def _normalization(schemes: Iterable[Mapping[str, JsonValue]] | None) -> str:
    if schemes is None:
        return UNKNOWN
    words = []
    for scheme in schemes:
        figures = [f"{key} {value}" for key, value in scheme.items() if key != "name"]
        name = str(scheme.get("name", "unnamed"))
        words.append(f"{name} ({', '.join(figures)})" if figures else name)
    return _cell("; ".join(dict.fromkeys(words)))


def _sizes(values: tuple[float, ...] | None, *, unknown: str = UNKNOWN) -> str:
    return unknown if values is None else " x ".join(f"{value:g}" for value in values)


def _by(edges: tuple[int, ...]) -> str:
    return "x".join(str(edge) for edge in edges)


def _table(facts: Mapping[str, str]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(text: str | None) -> str:
    return UNKNOWN if text is None else _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """One line, whatever an origin put into its texts."""
    return " ".join(text.split())


def _yaml(text: str) -> str:
    """`text` as a YAML scalar: plain where that is safe, else quoted as JSON."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9 ._-]*[A-Za-z0-9]", text)
    return (
        text
        if plain and text.lower() not in {"null", "true", "false", "yes", "no"}
        else (json.dumps(_line(text)))
    )
