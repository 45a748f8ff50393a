"""A checkpoint written for nnU-Net or nnssl: which layout, what it lacks, one atomic file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import torch

from voxelbridge.core.checkpoint import Checkpoint
from voxelbridge.core.files import atomic_write
from voxelbridge.core.foreign.export_layout import chosen_stem_name, peer_weights
from voxelbridge.core.foreign.export_nnssl import nnssl_file
from voxelbridge.core.foreign.export_nnunet import nnunet_file
from voxelbridge.core.foreign.export_plan import normalization_schemes

Peer = Literal["nnunet", "nnssl"]


@dataclass(frozen=True, eq=False)
class ExportedCheckpoint:
    """What `torch.save` writes (plain tensors, numbers and text), and sentences for the user."""

    content: dict[str, Any]
    notes: tuple[str, ...]


def export_checkpoint(
    checkpoint: Checkpoint,
    *,
    to: Peer,
    stem: str | None = None,
    outputs: int | None = None,
    fresh_decoder: bool = False,
) -> ExportedCheckpoint:
    """`checkpoint` in the layout of `to`, with every copy of a tensor that its networks make.

    `stem` chooses among several. `outputs`: channels of the new output layers; None: as many as the
    decoder was trained with where that is known, else 2 for nnU-Net (background and one class) and
    the input's channels for nnssl. `fresh_decoder`: draw a decoder where there is none, which
    nnU-Net's `-pretrained_weights` needs; without it the encoder is exported alone.
    """
    name = chosen_stem_name(checkpoint, stem)
    metadata = checkpoint.metadata
    if outputs is None:
        usual = 2 if to == "nnunet" else metadata.stems[name].channels
        outputs = metadata.decoder_outputs or usual
    weights = peer_weights(checkpoint, stem=name, outputs=outputs, fresh_decoder=fresh_decoder)
    match to:
        case "nnunet":
            content = nnunet_file(checkpoint, weights)
        case "nnssl":
            content = nnssl_file(checkpoint, weights)
        case _:
            assert_never(to)
    notes = list(weights.notes)
    if weights.decoder is None and to == "nnunet":
        notes.append(
            "nnU-Net's -pretrained_weights refuses a file without a decoder; --fresh-decoder "
            "adds a new one"
        )
    unknown = {
        "spacing": metadata.spacing_mm,
        "patch size": metadata.patch_size,
        "normalisation": normalization_schemes(metadata, name),
    }
    missing = [what for what, value in unknown.items() if value is None]
    if missing:
        notes.append(f"not stated in the checkpoint, null in the plan: {', '.join(missing)}")
    return ExportedCheckpoint(content, tuple(notes))


def write_exported(path: Path, exported: ExportedCheckpoint) -> None:
    """Writes the file atomically; `torch.load(path, weights_only=True)` reads it."""
    with atomic_write(path) as temporary:
        torch.save(exported.content, temporary)
