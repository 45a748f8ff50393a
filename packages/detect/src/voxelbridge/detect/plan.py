"""The plan: what the data decide before training (fingerprint -> plan.json).

`default` follows nnDetection (arXiv 2106.00817): median spacing, and a patch and stages that fit
the images and a GPU's memory. `fixed` is what the paper found better: 1 mm, 128^3, the stages of
its table 5 (arXiv 2509.15947). Both fit anchors and the number of queries to the objects.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from voxelbridge.core.arch.config import EncoderConfig, Triple, cumulative_strides
from voxelbridge.core.arch.presets import PLAIN, RESENC_L
from voxelbridge.core.config import Config, validate
from voxelbridge.core.data.normalize import Normalization, normalization_of
from voxelbridge.core.data.resample import Resampling
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import atomic_write, read_json
from voxelbridge.detect.anchor_planning import (
    AnchorSizes,
    mean_best_overlap,
    plan_anchor_sizes,
    typical_sizes,
)
from voxelbridge.detect.architecture_planning import (
    FIXED_TOPOLOGY,
    Topology,
    fit_topology,
    plan_features,
    plan_head_levels,
    plan_topology,
)
from voxelbridge.detect.fingerprint import CaseFingerprint, data_digest
from voxelbridge.detect.memory_model import NetworkShape, training_memory
from voxelbridge.detect.plan_request import PlanRequest, Spacing, check_patch

FILE_NAME = "plan.json"
SCHEMA = 2
GIB = 2**30
FIXED_SPACING_MM = (1.0, 1.0, 1.0)
ANISOTROPY = 3.0  # an axis coarser than 3 x the others is resampled to its 10th percentile
BATCH_SIZE = 4  # nnDetection's, and the paper's
SIZES_PER_AXIS = 3  # 27 anchors per cell
MIN_QUERIES = 12  # nnDetection v2
QUERIES_PER_OBJECT = 3
CROWDED_PERCENTILE = 95.0
LARGE_PERCENTILE = 99.5
MAX_STORED_OBJECTS = 2000
SEED = 12345
ROWS_AT_ONCE = 512  # of the table of distances between the objects of a case

EncoderKind = Literal["plain", "residual"]


class Plan(Config):
    """Frozen decisions of planning; written to the store and copied into each run."""

    schema_version: Literal[2] = Field(default=2, alias="schema")
    rule: Literal["default", "fixed"]
    gpu_memory_gib: float  # the budget that the default rule kept to
    overrides: tuple[str, ...]  # what `--set` said
    num_cases: int
    num_objects_per_class: tuple[int, ...]
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]
    spacing_mm: Spacing
    median_shape: Triple  # voxels of the stored grid
    resampling: Resampling
    normalization: tuple[Normalization, ...]  # per channel
    patch_size: Triple
    batch_size: PositiveInt
    encoder: EncoderKind  # that the patch was fitted for
    features: tuple[PositiveInt, ...]  # per stage, finest first
    strides: tuple[Triple, ...]  # per stage, relative to the stage before
    kernels: tuple[Triple, ...]
    head_levels: tuple[int, ...]  # stages whose maps carry anchors
    anchor_sizes: AnchorSizes  # per head level, edge lengths on each axis
    anchor_overlap: float | None  # mean best overlap with the objects; None without objects
    objects_per_patch: float | None  # 95th percentile around an object
    num_queries: PositiveInt
    memory_gib: dict[EncoderKind, float]  # of a training step in bf16
    notes: tuple[str, ...]
    fingerprint_sha256: str
    # Voxels of the stored grid, a sample: anchors of other strides are fitted to them.
    object_sizes: tuple[tuple[float, float, float], ...]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Plan":
        stages = len(self.strides)
        if not stages == len(self.kernels) == len(self.features):
            raise ValueError("strides, kernels and features must have one entry per stage")
        if len(self.anchor_sizes) != len(self.head_levels):
            raise ValueError("anchor_sizes must have one entry per head level")
        if len(self.normalization) != len(self.channel_names):
            raise ValueError("normalization must have one scheme per channel")
        check_patch(self.patch_size, self.strides, self.kernels)
        return self

    @property
    def head_strides(self) -> tuple[Triple, ...]:
        """Voxels per cell of the maps that carry anchors, finest first."""
        total = cumulative_strides(self.strides)
        return tuple(total[level] for level in self.head_levels)


def make_plan(
    cases: Sequence[CaseFingerprint],
    request: PlanRequest,
    *,
    channel_names: Sequence[str],
    class_names: Sequence[str],
) -> Plan:
    """The plan for the training cases; it does not depend on their order."""
    if not cases:
        raise DataError("planning: no readable training case is left")
    cases = sorted(cases, key=lambda case: case.case_id)
    given = request.overrides
    spacing = given.spacing_mm or _target_spacing(cases, request.rule)
    sizes = np.concatenate([case.sizes_mm for case in cases]) / np.array(spacing)
    median_shape = _median_shape(cases, spacing)
    kind = given.encoder or "plain"
    wanted = _NetworkRequest(
        kind, given.batch_size or BATCH_SIZE, len(channel_names), len(class_names)
    )
    topology = _topology(request, spacing, median_shape, wanted)
    stages = len(topology.strides)
    features = given.features or plan_features(stages)
    head_levels = given.head_levels or plan_head_levels(stages)
    if len(features) != stages or not set(head_levels) <= set(range(stages)):
        raise ConfigError(
            f"--set: {stages} stages are planned, but features has {len(features)} entries and "
            f"head_levels names {list(head_levels)}; set strides and kernels with them"
        )
    total = cumulative_strides(topology.strides)
    anchors = given.anchor_sizes or plan_anchor_sizes(
        sizes, [total[level] for level in head_levels], sizes_per_axis=SIZES_PER_AXIS
    )
    if len(anchors) != len(head_levels):
        raise ConfigError(
            f"--set anchor_sizes: got {len(anchors)} levels, expected {len(head_levels)} "
            f"(head_levels {list(head_levels)})"
        )
    kinds: tuple[EncoderKind, ...] = ("plain", "residual")
    memory: dict[EncoderKind, float] = {
        name: _bytes(replace(wanted, kind=name), topology, features, head_levels) / GIB
        for name in kinds
    }
    crowd = _objects_per_patch(cases, np.array(topology.patch_size) * np.array(spacing))
    labels = np.concatenate([case.labels for case in cases])
    return Plan(
        rule=request.rule,
        gpu_memory_gib=round(request.gpu_memory / GIB, 3),
        overrides=request.texts,
        num_cases=len(cases),
        num_objects_per_class=tuple(
            int(count) for count in np.bincount(labels, minlength=len(class_names))
        ),
        channel_names=tuple(channel_names),
        class_names=tuple(class_names),
        spacing_mm=spacing,
        median_shape=median_shape,
        resampling=request.resampling,
        normalization=given.normalization or _normalizations(cases, channel_names),
        patch_size=topology.patch_size,
        batch_size=wanted.batch_size,
        encoder=kind,
        features=features,
        strides=topology.strides,
        kernels=topology.kernels,
        head_levels=head_levels,
        anchor_sizes=anchors,
        anchor_overlap=_overlap(sizes, anchors),
        objects_per_patch=crowd,
        num_queries=given.num_queries or _num_queries(crowd),
        memory_gib={name: round(value, 2) for name, value in memory.items()},
        notes=_notes(sizes, topology, memory, kind, request, cases),
        fingerprint_sha256=data_digest(cases),
        object_sizes=_sample_rows(sizes),
    )


def median_spacing(cases: Sequence[CaseFingerprint]) -> Spacing:
    """nnDetection's target spacing: the median per axis, a very coarse axis at its 10th percentile.

    An axis counts as much coarser when its spacing is above three times the others' and its size
    is below a third of theirs; it never gets finer than the finest other axis.
    """
    spacings = np.array([case.spacing_mm for case in cases])
    target = np.median(spacings, axis=0)
    size = np.median(np.array([case.shape for case in cases]), axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPY * target[others].min()
    short = size[worst] * ANISOTROPY < size[others].min()
    if coarse and short:
        finer = float(np.percentile(spacings[:, worst], 10))
        target[worst] = max(finer, float(target[others].min()) + 1e-5)
    return (float(target[0]), float(target[1]), float(target[2]))


def write_plan(folder: Path, plan: Plan) -> None:
    """Writes `plan.json` into a store or run directory, atomically; lists of numbers on a line."""
    text = json.dumps(plan.model_dump(mode="json", by_alias=True), indent=2, allow_nan=False)
    flat = re.compile(r"\[\s*([^\[\]{}\"]*?)\s*\]")  # a list without lists, objects or text
    text = flat.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    nested = re.compile(r"\[\s+(\[[^\[\]{}\"]*\](?:,\s+\[[^\[\]{}\"]*\])*)\s+\]")
    text = nested.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    with atomic_write(folder / FILE_NAME) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_plan(folder: Path) -> Plan:
    """The plan of a store or run directory; a damaged file is named in the error."""
    path = folder / FILE_NAME
    content: Any = read_json(path)  # Any: JSON
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        raise DataError(
            f"{path}: schema {schema}, this version reads {SCHEMA}; prepare an empty store again"
        )
    return validate(Plan, content, where=str(path))


@dataclass(frozen=True)
class _NetworkRequest:
    """What the memory of a step depends on beside the topology."""

    kind: EncoderKind
    batch_size: int
    in_channels: int
    num_classes: int


def blocks_for(kind: EncoderKind, num_stages: int) -> tuple[int, ...]:
    """Blocks per stage as the paper's encoders have; deeper stages repeat the last number."""
    known = PLAIN.blocks if kind == "plain" else RESENC_L.blocks
    return tuple(known[min(stage, len(known) - 1)] for stage in range(num_stages))


def _bytes(
    wanted: _NetworkRequest,
    topology: Topology,
    features: tuple[int, ...],
    head_levels: tuple[int, ...],
) -> int:
    encoder = EncoderConfig(
        kind=wanted.kind,
        features=features,
        strides=topology.strides,
        kernels=topology.kernels,
        blocks=blocks_for(wanted.kind, len(features)),
        conv_bias=wanted.kind == "residual",
    )
    network = NetworkShape(encoder, head_levels, wanted.in_channels, wanted.num_classes)
    return training_memory(
        network, patch_size=topology.patch_size, batch_size=wanted.batch_size
    ).total


def _topology(
    request: PlanRequest, spacing: Spacing, median_shape: Triple, wanted: _NetworkRequest
) -> Topology:
    given = request.overrides
    topology = _planned_topology(request, spacing, median_shape, wanted)
    if given.strides is not None:
        kernels = given.kernels or ((3, 3, 3),) * len(given.strides)
        topology = replace(topology, strides=given.strides, kernels=kernels)
    elif given.kernels is not None:
        topology = replace(topology, kernels=given.kernels)
    if given.patch_size is not None:
        topology = replace(topology, patch_size=given.patch_size)
    try:
        check_patch(topology.patch_size, topology.strides, topology.kernels)
    except ValueError as error:
        raise ConfigError(f"--set: {error}") from None
    return topology


def _planned_topology(
    request: PlanRequest, spacing: Spacing, median_shape: Triple, wanted: _NetworkRequest
) -> Topology:
    match request.rule:
        case "fixed":
            return FIXED_TOPOLOGY
        case "default":
            given = request.overrides
            if given.patch_size is not None:
                return plan_topology(spacing, given.patch_size)

            def bytes_of(topology: Topology) -> int:
                stages = len(topology.strides)
                return _bytes(wanted, topology, plan_features(stages), plan_head_levels(stages))

            return fit_topology(spacing, median_shape, bytes_of=bytes_of, budget=request.gpu_memory)
        case _:
            assert_never(request.rule)


def _target_spacing(cases: Sequence[CaseFingerprint], rule: str) -> Spacing:
    return FIXED_SPACING_MM if rule == "fixed" else median_spacing(cases)


def _median_shape(cases: Sequence[CaseFingerprint], spacing: Spacing) -> Triple:
    extents = np.array([case.shape for case in cases]) * np.array(
        [case.spacing_mm for case in cases]
    )
    z, y, x = (max(round(float(n)), 1) for n in np.median(extents / np.array(spacing), axis=0))
    return (z, y, x)


def _normalizations(
    cases: Sequence[CaseFingerprint], channel_names: Sequence[str]
) -> tuple[Normalization, ...]:
    """A scheme per channel; cases without objects count only where no case has any.

    They would pull the figures of CT to air.
    """
    kept = float(np.median([case.kept_by_crop for case in cases]))
    sampled = [case for case in cases if len(case.labels)] or cases
    return tuple(
        normalization_of(
            name, np.concatenate([case.samples[channel] for case in sampled]), kept_by_crop=kept
        )
        for channel, name in enumerate(channel_names)
    )


def _objects_per_patch(cases: Sequence[CaseFingerprint], patch_mm: NDArray[Any]) -> float | None:
    """95th percentile, over objects, of how many centres lie within half a patch of its own."""
    counts = [_neighbours(case.centres_mm, patch_mm / 2) for case in cases if len(case.labels)]
    if not counts:
        return None
    return float(np.percentile(np.concatenate(counts), CROWDED_PERCENTILE))


def _neighbours(centres: NDArray[np.float64], reach: NDArray[Any]) -> NDArray[np.int64]:
    """For each of (N, 3) centres, how many (itself included) are within `reach` on every axis."""
    counts = [
        (np.abs(centres[row : row + ROWS_AT_ONCE, None] - centres[None]) <= reach).all(2).sum(1)
        for row in range(0, len(centres), ROWS_AT_ONCE)
    ]
    return np.concatenate(counts)


def _num_queries(crowd: float | None) -> int:
    return max(MIN_QUERIES, int(np.ceil(QUERIES_PER_OBJECT * (crowd or 0.0))))


def _overlap(sizes: NDArray[np.float64], anchors: AnchorSizes) -> float | None:
    return round(mean_best_overlap(typical_sizes(sizes), anchors), 4) if len(sizes) else None


def _notes(
    sizes: NDArray[np.float64],
    topology: Topology,
    memory: dict[EncoderKind, float],
    kind: EncoderKind,
    request: PlanRequest,
    cases: Sequence[CaseFingerprint],
) -> tuple[str, ...]:
    notes = []
    budget = request.gpu_memory / GIB
    for name, needed in memory.items():
        if needed > budget:
            advice = "set a smaller batch_size or patch_size, or train with accumulation_steps"
            if name != kind:
                advice = f"plan with --set encoder={name} to train that one"
            notes.append(
                f"a training step with the {name} encoder needs about {needed:.1f} GiB, more than "
                f"the {budget:.1f} GiB of --gpu-memory: {advice}"
            )
    if len(sizes) == 0:
        notes.append("no case has an object: anchors and queries are defaults")
        return tuple(notes)
    large = np.percentile(sizes, LARGE_PERCENTILE, axis=0)
    if (large > np.array(topology.patch_size)).any():
        shown = " x ".join(f"{edge:.0f}" for edge in large)
        notes.append(
            f"objects of {shown} voxels ({LARGE_PERCENTILE} % are smaller) exceed the patch: a "
            "second store at twice the spacing (--spacing) may find them better"
        )
    without = sum(len(case.labels) == 0 for case in cases)
    if without:
        notes.append(f"{without} of {len(cases)} cases have no object")
    return tuple(notes)


def _sample_rows(sizes: NDArray[np.float64]) -> tuple[tuple[float, float, float], ...]:
    if len(sizes) > MAX_STORED_OBJECTS:
        chosen = np.random.default_rng(SEED).choice(len(sizes), MAX_STORED_OBJECTS, replace=False)
        sizes = sizes[np.sort(chosen)]
    return tuple((float(z), float(y), float(x)) for z, y, x in sizes)
