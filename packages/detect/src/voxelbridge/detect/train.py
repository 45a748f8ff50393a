"""Fine-tuning a detector: from a prepared store and an optional checkpoint to a run directory.

A run directory can predict on its own: besides config, metrics and training state it holds the
plan (spacing, normalisation, classes), the anchors or the number of queries (`detector.json`), the
report of what was transferred (`transfer.json`) and the weights
(`checkpoints/detector.safetensors`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from pydantic import Field
from torch import Tensor

from voxelbridge.core.arch.config import Triple
from voxelbridge.core.config import Config, preset_path, validate
from voxelbridge.core.data.augment import SpatialAugmentation
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import read_json, sha256_of, write_json
from voxelbridge.core.train.distributed import DeviceChoice, World, join_world
from voxelbridge.core.train.loop import open_training, report_stop
from voxelbridge.core.train.optim import build_optimizer
from voxelbridge.core.train.placement import place_objective
from voxelbridge.core.train.resume import stop_on_signals
from voxelbridge.core.train.schedule import due
from voxelbridge.core.train.settings import patches_per_pass
from voxelbridge.core.train.steps import autocast, move
from voxelbridge.detect.anchor_planning import AnchorSizes, plan_anchor_sizes
from voxelbridge.detect.batches import PatchSampler, case_objects
from voxelbridge.detect.build import (
    Detector,
    build_detector,
    build_objective,
    head_strides,
    load_detect_config,
)
from voxelbridge.detect.config import (
    DeformableDETRConfig,
    DetectConfig,
    InitParts,
    RetinaUNetConfig,
)
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.objective import Objective
from voxelbridge.detect.plan import Plan, read_plan, write_plan
from voxelbridge.detect.sine_encoding import POSITION_RULE
from voxelbridge.detect.splits import read_splits
from voxelbridge.detect.take_over import take_over
from voxelbridge.detect.weights import check_position_rule, read_weights, write_weights

KIND = "detect"
DETECTOR_FILE = "detector.json"
TRANSFER_FILE = "transfer.json"
VALIDATION_STREAM = 7  # keeps validation patches apart from training patches


class DetectorFacts(Config):
    """What the network needs beside the config: written to the run as `detector.json`."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    in_channels: int
    num_classes: int
    anchor_sizes: AnchorSizes | None = None  # Retina U-Net
    queries: int | None = None  # Deformable DETR
    position_encoding: str | None = None  # Deformable DETR: the rule of `sine_encoding`
    init_checkpoint_sha256: str | None  # None: trained from scratch
    stem: str | None
    init_parts: Literal["encoder+decoder"] | None = None  # None: the encoder, or from scratch


def train(
    preset: str,
    *,
    store: Path,
    run: Path,
    overrides: Sequence[str] = (),
    init: Path | None = None,
    stem: str = "checkpoint",
    init_parts: InitParts = "encoder",
    fold: int = 0,
    device: DeviceChoice = "auto",
    workers: int = 2,
    dry_run: bool = False,
    tensorboard: bool = False,
) -> Path:
    """Trains (or goes on training) the detector of `preset`; returns the run directory."""
    preset_path("voxelbridge.detect", preset)  # a mistyped name is told before the store is read
    cases = CaseStore.open(store)
    plan = read_plan(store)
    config = load_detect_config(preset, overrides, plan=plan)
    split = _fold_of(store, fold)
    facts = _detector_facts(config, plan, init=init, stem=stem, init_parts=init_parts)
    with join_world(device) as world, stop_on_signals() as stop:
        torch.manual_seed(config.seed)
        detector = _build(config, facts)
        report = take_over(detector, init, stem=stem, parts=init_parts)
        objective = build_objective(detector, config)
        place_objective(objective, config, world.device)
        optimizer = build_optimizer(config.optim, objective)
        sampler = _sampler(cases, split["train"], config, ranks=world.size)
        data = {
            "store": cases.digest,
            "fold": fold,
            "train": split["train"],
            "val": split["val"],
            "detector": facts.model_dump(mode="json", by_alias=True),
        }
        arguments = {"store": str(store), "init": str(init) if init else None, "workers": workers}
        with open_training(
            run, config, kind=KIND, world=world, stop=stop, objective=objective,
            optimizer=optimizer, facts=data, arguments=arguments, tensorboard=tensorboard,
            dry_run=dry_run,
        ) as training:  # fmt: skip
            if world.is_main and not dry_run:
                _write_what_prediction_needs(run, plan, facts, report)
            batches = step_batches(
                sampler,
                seed=config.seed,
                first_step=training.first_pass,
                steps=training.passes,
                workers=workers,
                rank=world.rank,
            )
            for result in training.steps(batches):
                if _validates(config, split["val"], result.step):
                    training.log(_validate(objective, cases, split["val"], config, world))
            if training.is_finished and world.is_main:
                write_weights(run, detector)
    report_stop(training)
    return run


def load_run(run: Path) -> tuple[Detector, DetectConfig, Plan]:
    """The trained detector of a run in eval mode, its config and its plan."""
    from voxelbridge.core.run import read_run_config

    config = read_run_config(run, DetectConfig, kind=KIND)
    path = run / DETECTOR_FILE
    facts = validate(DetectorFacts, read_json(path), where=str(path))
    detector = _build(config, facts)
    if isinstance(detector, DeformableDETR):
        check_position_rule(path, facts.position_encoding)
    read_weights(run, detector)
    return detector.eval(), config, read_plan(run)


def _build(config: DetectConfig, facts: DetectorFacts) -> Detector:
    return build_detector(
        config,
        in_channels=facts.in_channels,
        num_classes=facts.num_classes,
        anchor_sizes=facts.anchor_sizes,
        queries=facts.queries,
    )


def _fold_of(store: Path, fold: int) -> dict[str, list[str]]:
    splits = read_splits(store)
    if not 0 <= fold < len(splits):
        raise ConfigError(f"--fold {fold}: {store} has folds 0 to {len(splits) - 1}")
    return splits[fold]


def _detector_facts(
    config: DetectConfig, plan: Plan, *, init: Path | None, stem: str, init_parts: InitParts
) -> DetectorFacts:
    with_decoder = init_parts == "encoder+decoder"
    if with_decoder and init is None:
        raise ConfigError("--init-parts encoder+decoder: needs a checkpoint; give it with --init")
    if with_decoder and not isinstance(config.detector, RetinaUNetConfig):
        raise ConfigError(
            f"--init-parts encoder+decoder: a {config.detector.name} has no decoder that a "
            "checkpoint could hold; take --init-parts encoder"
        )
    facts = DetectorFacts(
        in_channels=len(plan.channel_names),
        num_classes=len(plan.class_names),
        init_checkpoint_sha256=sha256_of(init) if init else None,
        stem=stem if init else None,
        init_parts="encoder+decoder" if with_decoder else None,
    )
    match config.detector:
        case RetinaUNetConfig() as detector:
            sizes = _anchor_sizes(head_strides(config), detector.sizes_per_axis, plan)
            return facts.model_copy(update={"anchor_sizes": sizes})
        case DeformableDETRConfig() as detector:
            queries = detector.queries or plan.num_queries
            own = {"queries": queries, "position_encoding": POSITION_RULE}
            return facts.model_copy(update=own)
        case _:
            assert_never(config.detector)


def _anchor_sizes(strides: tuple[Triple, ...], count: int, plan: Plan) -> AnchorSizes:
    """The plan's anchors where the network has its head levels, else others fitted like them."""
    planned = {len(axis) for level in plan.anchor_sizes for axis in level}
    if strides == plan.head_strides and planned == {count}:
        return plan.anchor_sizes
    import numpy as np

    sizes = np.array(plan.object_sizes, dtype=np.float64).reshape(-1, 3)
    return plan_anchor_sizes(sizes, strides, sizes_per_axis=count)


def _sampler(
    store: CaseStore, case_ids: Sequence[str], config: DetectConfig, *, ranks: int
) -> PatchSampler:
    return PatchSampler(
        store=store,
        cases=case_objects(store, case_ids),
        patch_size=config.patch_size,
        batch_size=patches_per_pass(config, ranks=ranks),
        object_fraction=config.object_fraction,
        augmentation=config.augmentation,
        box_masks=config.box_masks,
    )


def _write_what_prediction_needs(
    run: Path, plan: Plan, facts: DetectorFacts, report: dict[str, Any]
) -> None:
    write_plan(run, plan)
    write_json(run / DETECTOR_FILE, facts.model_dump(mode="json", by_alias=True))
    write_json(run / TRANSFER_FILE, report)


def _validates(config: DetectConfig, cases: Sequence[str], step: int) -> bool:
    return bool(config.validation_batches and cases) and due(config.validate_every_steps, step)


@torch.no_grad()
def _validate(
    objective: Objective,
    store: CaseStore,
    case_ids: Sequence[str],
    config: DetectConfig,
    world: World,
) -> dict[str, float]:
    """Mean losses over the same patches at every validation, as `val_*`."""
    sampler = _sampler(store, case_ids, config, ranks=1)
    batches = step_batches(
        replace(sampler, augmentation=SpatialAugmentation.none()),
        seed=config.seed + VALIDATION_STREAM,
        first_step=0,
        steps=config.validation_batches,
        workers=0,
    )
    objective.eval()
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with autocast(world.device, config.precision):
            losses = objective(move(batch, world.device))
        for name, loss in losses.items():
            sums[name] = sums.get(name, torch.zeros((), device=world.device)) + loss.float()
    objective.train()
    count = config.validation_batches
    return {f"val_{name}": float(value) / count for name, value in sums.items()}
