"""Files that this program exported: the metadata that no peer's layout can say travel beside it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from voxelbridge.core.checkpoint import CheckpointMetadata
from voxelbridge.core.config import validate
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.foreign.export_plan import METADATA_KEY
from voxelbridge.core.safetensors_header import parse_object, refusal


def with_own_metadata(
    path: Path,
    tree: Mapping[object, object],
    found: CheckpointMetadata,
    tensors: Mapping[str, Tensor],
) -> tuple[CheckpointMetadata, dict[str, Tensor]]:
    """Metadata and tensors as they were before the export that wrote the file with this `tree`.

    `found` is what its weights and plan say. A decoder that the export drew anew is left out.
    CheckpointError where the two disagree on the architecture; unchanged for files of others.
    """
    text = tree.get(METADATA_KEY)
    if not isinstance(text, str):
        return found, dict(tensors)
    try:
        stated = validate(
            CheckpointMetadata, parse_object(path, text, "metadata"), where="its metadata"
        )
    except (ConfigError, RecursionError) as error:
        raise refusal(path, str(error)) from error
    channels = [sorted(stem.channels for stem in m.stems.values()) for m in (stated, found)]
    same_decoder = stated.decoder is None or stated.decoder == found.decoder
    if stated.arch != found.arch or channels[0] != channels[1] or not same_decoder:
        raise refusal(
            path,
            "its weights are not those that its metadata describe; export it anew, or delete the "
            f"entry {METADATA_KEY!r}",
        )
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if stated.decoder is not None or not name.startswith("decoder.")
    }
    return stated.model_copy(update={"tensors_sha256": None, "metadata_sha256": None}), kept
