"""What a detector takes over from a pre-trained checkpoint, and the record of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from voxelbridge.core.arch.config import UFPNConfig
from voxelbridge.core.checkpoint import Checkpoint, read_checkpoint
from voxelbridge.core.transfer import TransferReport, transfer_decoder, transfer_encoder
from voxelbridge.detect.build import Detector
from voxelbridge.detect.config import InitParts
from voxelbridge.detect.retina_unet import RetinaUNet


def take_over(
    detector: Detector, init: Path | None, *, stem: str, parts: InitParts
) -> dict[str, Any]:
    """Copies the weights of the checkpoint `init` (None: nothing), prints and returns the report.

    `stem` as in `transfer_encoder`. Every difference is a CheckpointError, but for the pyramid's
    levels that differ in width because the head of one of the two networks begins at another level.
    """
    # Any: JSON values
    if init is None:
        return {"schema": 1, "checkpoint": None}
    checkpoint = read_checkpoint(init)
    report = transfer_encoder(checkpoint, detector.encoder, stem=stem)
    decoder = None
    if parts == "encoder+decoder":
        assert isinstance(detector, RetinaUNet)  # told to the user before anything was built
        allow = _finer_levels(checkpoint, detector)
        decoder = transfer_decoder(checkpoint, detector.neck, allow=allow)
        others = tuple(name for name in report.unused if not name.startswith("decoder."))
        report = replace(report, unused=others)  # the decoder's report tells about the rest
    print(report.describe())
    if decoder is not None:
        print(decoder.describe())
    return {
        "schema": 1,
        "checkpoint": init.name,
        "metadata": checkpoint.metadata.model_dump(mode="json", by_alias=True),
        **_fates(report),
        "decoder": None if decoder is None else _fates(decoder),
    }


def _finer_levels(checkpoint: Checkpoint, detector: RetinaUNet) -> list[str]:
    """Parts of the pyramid above the coarser of the two first head levels; none where equal."""
    ours, theirs = detector.head_levels[0], checkpoint.metadata.decoder
    if not isinstance(theirs, UFPNConfig) or theirs.first_level == ours:
        return []
    finer = range(max(ours, theirs.first_level))
    return [f"{part}.{level}" for part in ("lateral", "upsample", "out") for level in finer]


def _fates(report: TransferReport) -> dict[str, list[str]]:
    return {
        "loaded": list(report.loaded),
        "left_at_init": list(report.left_at_init),
        "unused": list(report.unused),
        "shape_mismatched": [mismatch.describe() for mismatch in report.shape_mismatched],
    }
