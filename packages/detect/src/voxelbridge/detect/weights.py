"""The files of a detector's weights: those after the last step, and the best on validation.

    checkpoints/detector.safetensors   last (their average where averaging is on), when finished
    checkpoints/best.safetensors       the best so far by `best_metric`

Beside each lies a JSON file of the same name: `schema`, `sha256`, `step` (from 0, as in
metrics.jsonl), `attempt` (restarts before it), `metric` and `value` (null for the last), and
`previous`: the same of the file that this one replaced. It is written first, so that a process
killed in between leaves weights that are the previous ones, whole and known. Low-rank updates are
added to the weights they belong to: the names in a file are those of the plain detector. The header
names the sine rule of Deformable DETR: weights trained with another one would load and be wrong.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, assert_never

from torch import nn

from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.files import atomic_write, read_json, sha256_of, write_json
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.low_rank import merged_state
from voxelbridge.detect.sine_encoding import POSITION_RULE

Which = Literal["last", "best"]

WEIGHTS_FILE = "detector.safetensors"
BEST_FILE = "best.safetensors"
POSITION_KEY = "position_encoding"


@dataclass(frozen=True)
class StoredWeights:
    """What a file of weights is; `step`, `metric` and `value` where they are known."""

    sha256: str
    step: int | None = None
    attempt: int = 0
    metric: str | None = None
    value: float | None = None

    def describe(self) -> str:
        """Step and figure, for people."""
        figure = "" if self.value is None else f", {self.metric} {self.value:.4g}"
        attempt = f" of attempt {self.attempt}" if self.attempt else ""
        return f"step {self.step}{attempt}{figure}"


def file_of(run: Path, weights: Which) -> Path:
    """Where a run keeps its last or its best weights."""
    match weights:
        case "last":
            return run / "checkpoints" / WEIGHTS_FILE
        case "best":
            return run / "checkpoints" / BEST_FILE
        case _:
            assert_never(weights)


def write_weights(
    run: Path,
    detector: nn.Module,
    *,
    weights: Which = "last",
    step: int | None = None,
    attempt: int = 0,
    metric: tuple[str, float] | None = None,
) -> StoredWeights:
    """The detector's tensors as safetensors, with what they are beside the file."""
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in merged_state(detector).items()
    }
    path = file_of(run, weights)
    name, value = metric or (None, None)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=_meaning_of(detector))
        stored = StoredWeights(sha256_of(temporary), step, attempt, name, value)
        previous = _identify(path) if path.is_file() else None
        content = {"schema": 1, **asdict(stored)}
        content["previous"] = None if previous is None else asdict(previous)
        write_json(path.with_suffix(".json"), content)
    return stored


def stored_weights(run: Path, weights: Which) -> StoredWeights | None:
    """What the run's last or best weights are, None without any; a changed file is refused."""
    path = file_of(run, weights)
    if not path.is_file():
        return None
    stored = _identify(path)
    if stored is None:
        raise CheckpointError(f"{path}: changed or damaged since it was written")
    return stored


def read_weights(run: Path, detector: nn.Module, *, weights: Which = "last") -> None:
    """Fills the detector from the run; a file that is missing, changed or foreign is refused."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    path = file_of(run, weights)
    if stored_weights(run, weights) is None:
        raise CheckpointError(_missing(run, weights))
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


def _identify(path: Path) -> StoredWeights | None:
    """Which of the two that its JSON file knows `path` is; None if neither."""
    facts = path.with_suffix(".json")
    if not facts.is_file():
        return None
    content = read_json(facts)
    known = [content, content.get("previous")] if isinstance(content, dict) else []
    digest = sha256_of(path)
    for entry in known:
        if isinstance(entry, dict) and entry.get("sha256") == digest:
            return _parse(entry)
    return None


def _parse(entry: dict[str, Any]) -> StoredWeights:  # Any: JSON values
    known = {field.name for field in fields(StoredWeights)}
    return StoredWeights(**{name: value for name, value in entry.items() if name in known})


def _missing(run: Path, weights: Which) -> str:
    other: Which = "best" if weights == "last" else "last"
    there = stored_weights(run, other)
    match weights:
        case "last":
            problem = f"{run}: no {WEIGHTS_FILE}; the training has not finished"
            offer = "" if there is None else f"; take --weights best ({there.describe()})"
        case "best":
            problem = f"{run}: no {BEST_FILE}; nothing was validated yet (see validation_batches)"
            offer = "" if there is None else "; take --weights last"
        case _:
            assert_never(weights)
    return problem + offer


def _meaning_of(detector: nn.Module) -> dict[str, str] | None:
    """What the weights mean beyond their names."""
    return {POSITION_KEY: POSITION_RULE} if isinstance(detector, DeformableDETR) else None
