"""The file of a finished detector's weights, and the rule that its positions follow.

Beside the tensors the header names the sine rule of Deformable DETR: weights trained with another
one would load and be wrong.
"""

from pathlib import Path

from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.files import atomic_write, read_json, sha256_of, write_json
from voxelbridge.detect.build import Detector
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.sine_encoding import POSITION_RULE

WEIGHTS_FILE = "detector.safetensors"
POSITION_KEY = "position_encoding"


def write_weights(run: Path, detector: Detector) -> None:
    """The detector's tensors as safetensors, with their hash beside the file."""
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in detector.state_dict().items()}
    path = run / "checkpoints" / WEIGHTS_FILE
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=_meaning_of(detector))
    write_json(path.with_suffix(".json"), {"schema": 1, "sha256": sha256_of(path)})


def read_weights(run: Path, detector: Detector) -> None:
    """Fills the detector from the run; a file that is missing, changed or foreign is refused."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    path = run / "checkpoints" / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{run}: no {WEIGHTS_FILE}; the training has not finished")
    if sha256_of(path) != read_json(path.with_suffix(".json"))["sha256"]:
        raise CheckpointError(f"{path}: changed or damaged since it was written")
    try:
        with safe_open(path, framework="pt") as archive:
            stored = archive.metadata() or {}
        if isinstance(detector, DeformableDETR):
            check_position_rule(path, stored.get(POSITION_KEY))
        detector.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: does not fit its run's config ({first_line})") from error


def check_position_rule(path: Path, stored: str | None) -> None:
    """CheckpointError unless the rule that `path` states is the one of this version."""
    if stored != POSITION_RULE:
        raise CheckpointError(
            f"{path}: {POSITION_KEY}: got {stored}, expected {POSITION_RULE}; the weights were "
            "trained with positions that this version cannot compute"
        )


def _meaning_of(detector: Detector) -> dict[str, str] | None:
    """What the weights mean beyond their names."""
    return {POSITION_KEY: POSITION_RULE} if isinstance(detector, DeformableDETR) else None
