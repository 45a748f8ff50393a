"""A checkpoint in nnssl's layout, with the adaptation plan that tells nnU-Net how to fine-tune."""

from typing import Any

from voxelbridge.core.arch.config import EncoderConfig
from voxelbridge.core.checkpoint import Checkpoint, CheckpointMetadata
from voxelbridge.core.foreign.export_layout import (
    PeerWeights,
    arch_kwargs,
    class_name,
    usual_decoder,
)
from voxelbridge.core.foreign.export_plan import (
    METADATA_KEY,
    dataset_name,
    normalization_schemes,
    numbers,
    reduced_metadata,
    resampling,
    uses_mask,
)

_UNKNOWN_DATASET = "Dataset000_unknown"


def nnssl_file(checkpoint: Checkpoint, weights: PeerWeights) -> dict[str, Any]:
    """The published form: weights, `nnssl_adaptation_plan` and citations (plain values alone).

    Its readers take the encoder by the prefixes in the plan, so that a decoder may be missing.
    """
    metadata = checkpoint.metadata
    trained_decoder = weights.decoder is not None and "decoder" not in weights.fresh
    return {
        "network_weights": weights.state,
        "nnssl_adaptation_plan": adaptation_plan(metadata, weights),
        "citations": _citations(metadata),
        "license": metadata.license,
        METADATA_KEY: reduced_metadata(metadata, weights.stem, decoder=trained_decoder),
    }


def adaptation_plan(metadata: CheckpointMetadata, weights: PeerWeights) -> dict[str, Any]:
    """Architecture, pre-training plan, and where encoder and stem are among the weights."""
    arch = metadata.arch
    configuration, settings = _configuration(metadata, weights.stem)
    return {
        "architecture_plans": {
            "arch_class_name": class_name(arch),
            "arch_kwargs": arch_kwargs(arch, weights.decoder or usual_decoder(arch)),
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"],
        },
        "pretrain_plan": {
            "dataset_name": dataset_name(metadata, weights.stem) or _UNKNOWN_DATASET,
            "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": numbers(metadata.spacing_mm),
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {configuration: settings},
            "experiment_planner_used": "ExperimentPlanner",
        },
        "pretrain_num_input_channels": metadata.stems[weights.stem].channels,
        "recommended_downstream_patchsize": numbers(metadata.patch_size),
        **_keys(arch),
    }


def _configuration(metadata: CheckpointMetadata, stem: str) -> tuple[str, dict[str, Any]]:
    if metadata.spacing_mm is None:
        name = "noresample"
    else:
        name = "onemmiso" if set(metadata.spacing_mm) == {1.0} else "median"
    schemes = normalization_schemes(metadata, stem)
    return name, {
        "data_identifier": f"nnsslPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": name,
        "normalization_schemes": schemes,
        "use_mask_for_norm": uses_mask(metadata, stem),
        **resampling("mask"),
        "spacing": numbers(metadata.spacing_mm),
        "patch_size": numbers(metadata.patch_size),
    }


def _keys(arch: EncoderConfig) -> dict[str, Any]:
    if arch.kind == "plain":
        stem, first = "encoder.stages.0", "encoder.stages.0.0.convs.0"
    else:
        stem, first = "encoder.stem", "encoder.stem.convs.0"
    return {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": stem,
        "keys_to_in_proj": [f"{first}.conv", f"{first}.all_modules.0"],
        "key_to_lpe": None,
    }


def _citations(metadata: CheckpointMetadata) -> list[dict[str, Any]]:
    if not metadata.citations:
        return []
    apa = list(metadata.citations)
    return [{"type": "Pretraining", "name": metadata.method, "apa_citations": apa}]
