"""A checkpoint as nnU-Net v2 reads it: for `-pretrained_weights`, and with plans inside.

nnU-Net's loader wants every tensor of its network but the output layers, in equal shapes; what it
does not know in the file it leaves alone.
"""

from typing import Any

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
    intensity_properties,
    normalization_schemes,
    numbers,
    reduced_metadata,
    resampling,
    uses_mask,
)

CONFIGURATION = "3d_fullres"
TRAINER = "nnUNetTrainer"
_NETWORKS = "dynamic_network_architectures.architectures.unet"
_UNKNOWN_DATASET = "Dataset000_unknown"


def nnunet_file(checkpoint: Checkpoint, weights: PeerWeights) -> dict[str, Any]:
    """What nnU-Net v2 would have saved, as far as the checkpoint knows it (plain values alone).

    `init_args` holds plans and dataset.json; null stands where the checkpoint does not say.
    """
    metadata = checkpoint.metadata
    trained_decoder = weights.decoder is not None and "decoder" not in weights.fresh
    return {
        "network_weights": weights.state,
        "init_args": {
            "plans": nnunet_plans(metadata, weights),
            "configuration": CONFIGURATION,
            "fold": "all",
            "dataset_json": dataset_json(metadata, weights),
        },
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": [0, 1, 2],
        "citations": list(metadata.citations),
        "license": metadata.license,
        METADATA_KEY: reduced_metadata(metadata, weights.stem, decoder=trained_decoder),
    }


def nnunet_plans(metadata: CheckpointMetadata, weights: PeerWeights) -> dict[str, Any]:
    """nnU-Net's plans.json with one configuration, `3d_fullres`."""
    arch = metadata.arch
    schemes = normalization_schemes(metadata, weights.stem)
    properties = intensity_properties(metadata, weights.stem)
    name = class_name(arch)
    return {
        "dataset_name": dataset_name(metadata, weights.stem) or _UNKNOWN_DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": numbers(metadata.spacing_mm),
        "original_median_shape_after_transp": None,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            CONFIGURATION: {
                "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": numbers(metadata.patch_size),
                "median_image_size_in_voxels": None,
                "spacing": numbers(metadata.spacing_mm),
                "normalization_schemes": schemes,
                "use_mask_for_norm": uses_mask(metadata, weights.stem),
                **resampling("seg"),
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": {
                    "is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None,
                },
                "architecture": {
                    "network_class_name": f"{_NETWORKS}.{name}",
                    "arch_kwargs": arch_kwargs(arch, weights.decoder or usual_decoder(arch)),
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
                "batch_dice": False,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": properties,
    }  # fmt: skip


def dataset_json(metadata: CheckpointMetadata, weights: PeerWeights) -> dict[str, Any]:
    """nnU-Net's dataset.json; class names are not known and therefore numbered."""
    stem = metadata.stems[weights.stem]
    schemes = metadata.normalization_of(weights.stem) or ()
    names = {}
    for channel in range(stem.channels):
        ct = channel < len(schemes) and schemes[channel].get("name") == "ct_percentile"
        # The name "CT" would choose nnU-Net's CT normalisation for images that had another.
        names[str(channel)] = "CT" if ct else f"channel_{channel}"
    labels = {"background": 0} | {f"class_{i}": i for i in range(1, weights.outputs or 2)}
    return {"channel_names": names, "labels": labels, "numTraining": 0, "file_ending": ".nii.gz"}
