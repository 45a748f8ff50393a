"""What a detector takes over from a pre-trained checkpoint, and the record of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from voxelbridge.core.arch.config import UFPNConfig
from voxelbridge.core.checkpoint import Checkpoint, read_checkpoint
from voxelbridge.core.config import differing_keys
from voxelbridge.core.errors import CheckpointError, ConfigError
from voxelbridge.core.train.schedule import PolySchedule
from voxelbridge.core.transfer import (
    STRIDES,
    TransferReport,
    chosen_stem,
    transfer_decoder,
    transfer_encoder,
)
from voxelbridge.core.wording import by_axis, scheme_words
from voxelbridge.detect.build import Detector
from voxelbridge.detect.config import DetectConfig, LinearTuning, LowRankTuning, Transfer
from voxelbridge.detect.plan import Plan
from voxelbridge.detect.retina_unet import RetinaUNet

SPACING_TOLERANCE = 0.01  # of the larger of two spacings
_ENCODER = "detector.encoder"


@dataclass(frozen=True)
class TakenOver:
    """What became of every tensor (`report`, the content of transfer.json) and what to tell."""

    report: dict[str, Any]  # Any: JSON values
    left_at_init: tuple[str, ...] = ()  # of the encoder; none where nothing was taken over
    lines: tuple[str, ...] = field(default=())  # tables and warnings for the terminal


def take_over(
    detector: Detector, init: Path | None, *, config: DetectConfig, plan: Plan
) -> TakenOver:
    """Copies the weights of the checkpoint `init` (None: nothing) as `config.transfer` says.

    Every difference that it does not allow is a CheckpointError, but for the pyramid's levels that
    differ in width because the head of one of the two networks begins at another level. Warnings
    tell where spacing or normalisation are not those that the weights were trained with.
    """
    if init is None:
        warnings = _warnings_from_scratch(config)
        return TakenOver(
            {"schema": 1, "checkpoint": None, "warnings": warnings}, lines=tuple(warnings)
        )
    checkpoint, transfer = read_checkpoint(init), config.transfer
    allowed = _Allowances.of(transfer, checkpoint, detector)
    try:
        report = transfer_encoder(
            checkpoint,
            detector.encoder,
            stem=transfer.stem,
            allow=allowed.encoder,
            adapt=transfer.adapt,
        )
    except CheckpointError as error:
        if checkpoint.metadata.arch == detector.encoder.config:
            raise
        other = "" if transfer.adapt else ", --set transfer.adapt=true reconciles what can be"
        advice = f"--set architecture=checkpoint builds it{other}"
        raise CheckpointError(f"{error}; {advice}") from error
    decoder = None
    if transfer.parts == "encoder+decoder":
        assert isinstance(detector, RetinaUNet)  # told to the user before anything was built
        allow = [*allowed.decoder, *_finer_levels(checkpoint, detector)]
        decoder = transfer_decoder(checkpoint, detector.neck, allow=allow)
        others = tuple(name for name in report.unused if not name.startswith("decoder."))
        report = replace(report, unused=others)  # the decoder's report tells about the rest
    stem = chosen_stem(checkpoint, transfer.stem, in_channels=detector.encoder.in_channels)
    warnings = [
        *data_differences(checkpoint, plan, stem=stem),
        *_warnings_of_frozen_stem(config, report),
    ]
    tables = [part.describe() for part in (report, decoder) if part is not None]
    return TakenOver(
        {
            "schema": 1,
            "checkpoint": init.name,
            "metadata": checkpoint.metadata.model_dump(mode="json", by_alias=True),
            "stem": {"policy": transfer.stem, "taken": stem},
            **_fates(report),
            "adapted": [difference.describe() for difference in report.adapted],
            "decoder": None if decoder is None else _fates(decoder),
            "warnings": warnings,
        },
        left_at_init=report.left_at_init,
        lines=(*tables, *warnings),
    )


def data_differences(checkpoint: Checkpoint, plan: Plan, *, stem: str | None) -> list[str]:
    """One line each where spacing or normalisation differ between checkpoint and store.

    What the checkpoint does not state is not compared, nor are intensities for a new stem (None).
    """
    lines = []
    theirs, ours = checkpoint.metadata.spacing_mm, plan.spacing_mm
    if theirs is not None and any(
        abs(a - b) > SPACING_TOLERANCE * max(a, b) for a, b in zip(theirs, ours, strict=True)
    ):
        lines.append(
            f"warning: spacing: the checkpoint was trained at {_mm(theirs)}, the store has "
            f"{_mm(ours)} (z y x)"
        )
    schemes = None if stem is None else checkpoint.metadata.normalization_of(stem)
    for index, own in enumerate(plan.normalization):
        if schemes is None:
            break
        scheme = schemes[index if len(schemes) == len(plan.normalization) else 0]
        here = own.model_dump(mode="json")
        if _differ(scheme, here):
            lines.append(
                f"warning: normalisation of channel {plan.channel_names[index]}: the checkpoint's "
                f"stem {stem} was trained with {scheme_words(scheme)}, the store "
                f"has {scheme_words(here)}"
            )
    return lines


@dataclass(frozen=True)
class _Allowances:
    """`transfer.allow` by the part that each entry is about."""

    encoder: list[str]
    decoder: list[str]

    @classmethod
    def of(cls, transfer: Transfer, checkpoint: Checkpoint, detector: Detector) -> "_Allowances":
        names = [
            *detector.encoder.state_dict(),
            *(n.removeprefix("encoder.") for n in checkpoint.tensors if n.startswith("encoder.")),
        ]
        encoder = [
            entry
            for entry in transfer.allow
            if entry == STRIDES or any(n == entry or n.startswith(f"{entry}.") for n in names)
        ]
        decoder = [entry for entry in transfer.allow if entry not in encoder]
        if decoder and transfer.parts == "encoder":
            raise ConfigError(
                f"transfer.allow: {decoder[0]} names no tensor of the encoder or the checkpoint; "
                "expected a name such as 'stages.5' or 'stem.conv.weight'"
            )
        return cls(encoder, decoder)


def _warnings_from_scratch(config: DetectConfig) -> list[str]:
    lines = _warnings_of_random_weights(config)
    unused = differing_keys(Transfer(), config.transfer)
    if unused:
        lines.append(
            f"warning: no --init: transfer.{unused[0].partition(':')[0]} of the preset says how a "
            "checkpoint is taken over; without one it means nothing"
        )
    return lines


def _warnings_of_random_weights(config: DetectConfig) -> list[str]:
    if isinstance(config.tune, LinearTuning | LowRankTuning):
        return [
            f"warning: no --init: --tune {config.tune.name} keeps the encoder's random weights for "
            "the whole run; give a checkpoint, or take --tune full"
        ]
    frozen = frozen_encoder_steps(config.schedule)
    if frozen:
        return [
            f"warning: no --init: the encoder's random weights stay frozen for the first "
            f"{frozen:,} steps, as with a checkpoint; --set schedule.frozen=none trains all "
            "weights from the first step"
        ]
    return []


def _warnings_of_frozen_stem(config: DetectConfig, report: TransferReport) -> list[str]:
    if not (report.left_at_init and isinstance(config.tune, LinearTuning)):
        return []
    return [
        f"warning: --tune linear keeps {len(report.left_at_init)} tensors of the encoder that the "
        f"checkpoint did not give at their random values ({report.left_at_init[0]}, ...); "
        "--tune lora or full trains them"
    ]


def frozen_encoder_steps(schedule: PolySchedule) -> int:
    """Steps at the beginning in which the encoder does not train."""
    if schedule.frozen is None or _ENCODER not in schedule.frozen.parts:
        return 0
    return schedule.frozen.steps


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


def _differ(theirs: Mapping[str, JsonValue], ours: Mapping[str, JsonValue]) -> bool:
    """Another scheme, or other figures of the same one; keys that one side lacks do not count."""
    for key in theirs.keys() & ours.keys():
        a, b = theirs[key], ours[key]
        if isinstance(a, float | int) and isinstance(b, float | int):
            if abs(a - b) > 1e-3 * max(abs(a), abs(b)):
                return True
        elif a != b:
            return True
    return False


def _mm(spacing: Sequence[float]) -> str:
    return f"{by_axis(spacing)} mm"
