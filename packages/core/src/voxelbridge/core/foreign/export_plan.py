"""What both nnU-Net's plan and nnssl's adaptation plan say in the same words."""

from typing import Any

from voxelbridge.core.checkpoint import CheckpointMetadata

METADATA_KEY = "voxelbridge"  # of the text that lets this program read its own exports unchanged

_IMAGE_RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
_MASK_RESAMPLING = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
_SCHEMES = {"zscore": "ZScoreNormalization", "ct_percentile": "CTNormalization"}


def normalization_schemes(metadata: CheckpointMetadata, stem: str) -> list[str] | None:
    """The peers' class names, one per channel; None where the checkpoint does not say."""
    schemes = metadata.normalization_of(stem)
    if schemes is None:
        return None
    names = [_SCHEMES.get(str(scheme.get("name"))) for scheme in schemes]
    return None if None in names else [name for name in names if name is not None]


def uses_mask(metadata: CheckpointMetadata, stem: str) -> list[bool] | None:
    """Per channel, whether only voxels that are not 0 are normalised; None where unknown."""
    schemes = metadata.normalization_of(stem)
    return None if schemes is None else [scheme.get("nonzero_only") is True for scheme in schemes]


def intensity_properties(metadata: CheckpointMetadata, stem: str) -> dict[str, dict[str, Any]]:
    """nnU-Net's foreground statistics of the channels whose normalisation needs them (CT)."""
    found: dict[str, dict[str, Any]] = {}
    for channel, scheme in enumerate(metadata.normalization_of(stem) or ()):
        if scheme.get("name") == "ct_percentile":
            found[str(channel)] = {
                "mean": scheme.get("mean"),
                "std": scheme.get("std"),
                "percentile_00_5": scheme.get("lower"),
                "percentile_99_5": scheme.get("upper"),
            }
    return found


def numbers(values: tuple[float, ...] | None) -> list[float] | None:
    """A list for a plan; None stays None (unknown, or native grids)."""
    return None if values is None else list(values)


def resampling(mask: str) -> dict[str, Any]:
    """How both resample images and masks; `mask` is what they call the latter ("seg", "mask")."""
    name = "resample_data_or_seg_to_shape"
    return {
        "resampling_fn_data": name,
        "resampling_fn_data_kwargs": dict(_IMAGE_RESAMPLING),
        f"resampling_fn_{mask}": name,
        f"resampling_fn_{mask}_kwargs": dict(_MASK_RESAMPLING),
    }


def dataset_name(metadata: CheckpointMetadata, stem: str) -> str | None:
    """What the weights were trained on, in one name; None if unknown."""
    own = metadata.stems[stem].dataset
    return own or ("+".join(metadata.source.datasets) or None)


def reduced_metadata(metadata: CheckpointMetadata, stem: str, *, decoder: bool) -> str:
    """The metadata of the part that is exported, as JSON text without hashes."""
    part = metadata.model_copy(
        update={
            "stems": {stem: metadata.stems[stem]},
            "default_stem": stem if metadata.default_stem == stem else None,
            "normalization": metadata.normalization_of(stem),
            "decoder": metadata.decoder if decoder else None,
            "tensors_sha256": None,
            "metadata_sha256": None,
        }
    )
    return part.model_dump_json(by_alias=True)
