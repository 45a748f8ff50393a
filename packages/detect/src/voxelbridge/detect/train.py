"""Fine-tuning a detector: from a prepared store and an optional checkpoint to a run directory.

A run directory can predict on its own: besides config, metrics and training state it holds the
plan (spacing, normalisation, classes), the anchors or the number of queries (`detector.json`), the
report of what was transferred (`transfer.json`) and the weights
(`checkpoints/detector.safetensors`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from pydantic import Field

from voxelbridge.core.arch.config import Triple
from voxelbridge.core.config import Config, validate
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patient_split import patients_of
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import read_json, sha256_of, write_json
from voxelbridge.core.train.distributed import DeviceChoice, World, join_world
from voxelbridge.core.train.loop import open_training, report_stop
from voxelbridge.core.train.optim import build_optimizer
from voxelbridge.core.train.placement import place_objective
from voxelbridge.core.train.resume import stop_on_signals
from voxelbridge.core.train.settings import patches_per_pass
from voxelbridge.detect.anchor_planning import AnchorSizes, plan_anchor_sizes
from voxelbridge.detect.batches import DetectionBatch, PatchSampler, case_objects, on_device
from voxelbridge.detect.best import BestWeights
from voxelbridge.detect.build import (
    Detector,
    build_detector,
    build_objective,
    head_strides,
    resolve_detect_config,
    with_arguments,
)
from voxelbridge.detect.config import (
    DeformableDETRConfig,
    DetectConfig,
    InitParts,
    RetinaUNetConfig,
    TuneName,
)
from voxelbridge.detect.deformable_detr import DeformableDETR
from voxelbridge.detect.fractions import CaseShare, share_of_cases
from voxelbridge.detect.origins import write_origins
from voxelbridge.detect.plan import Plan, read_plan, write_plan
from voxelbridge.detect.post_processing_file import with_swept
from voxelbridge.detect.sine_encoding import POSITION_RULE
from voxelbridge.detect.splits import read_splits
from voxelbridge.detect.take_over import take_over
from voxelbridge.detect.tune import apply_tuning, describe_tuning
from voxelbridge.detect.validation import Validation
from voxelbridge.detect.weights import Which, check_position_rule, read_weights, write_weights

KIND = "detect"
DETECTOR_FILE = "detector.json"
TRANSFER_FILE = "transfer.json"


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
    stem: str | None = None,
    init_parts: InitParts | None = None,
    tune: TuneName | None = None,
    fold: int = 0,
    device: DeviceChoice = "auto",
    workers: int = 2,
    dry_run: bool = False,
    tensorboard: bool = False,
) -> Path:
    """Trains (or goes on training) the detector of `preset`; returns the run directory.

    `stem`, `init_parts` and `tune` stand for the settings `transfer.stem`, `transfer.parts` and
    `tune.name`; None leaves what the preset says.
    """
    overrides = with_arguments(preset, overrides, stem=stem, init_parts=init_parts, tune=tune)
    cases = CaseStore.open(store)
    plan = read_plan(store)
    resolved = resolve_detect_config(preset, overrides, plan=plan, init=init)
    config = resolved.config
    _check_rule(config, plan, store)
    split = _fold_of(store, fold)
    share = _share(cases, split["train"], config)
    facts = _detector_facts(config, plan, init=init)
    with join_world(device) as world, stop_on_signals() as stop:
        torch.manual_seed(config.seed)
        detector = _build(config, facts)
        taken = take_over(detector, init, config=config, plan=plan)
        apply_tuning(detector, config.tune, left_at_init=taken.left_at_init)
        if world.is_main:
            print(*taken.lines, describe_tuning(detector, config.tune), sep="\n")
        objective = build_objective(detector, config)
        place_objective(objective, config, world.device)
        optimizer = build_optimizer(config.optim, objective)
        sampler = _sampler(cases, share.case_ids, config, world)
        data = {
            "store": cases.digest,
            "fold": fold,
            "train": share.case_ids,
            "val": split["val"],
            "detector": facts.model_dump(mode="json", by_alias=True),
        }
        if config.data_fraction < 1:
            data |= {"train_patients": share.num_patients, "of_patients": share.of_patients}
        arguments = {"store": str(store), "init": str(init) if init else None, "workers": workers}
        with open_training(
            run, config, kind=KIND, world=world, stop=stop, objective=objective,
            optimizer=optimizer, facts=data, arguments=arguments, tensorboard=tensorboard,
            dry_run=dry_run, averaging=config.averaging, restart=config.restart,
        ) as training:  # fmt: skip
            if world.is_main and not dry_run:
                _write_what_prediction_needs(run, plan, facts, taken.report)
                write_origins(run, preset, overrides, resolved)

            def batches(first: int, passes: int) -> Iterator[DetectionBatch]:
                # One stream for all ranks: the sampler takes its rank's part of the job's batch.
                loaded = step_batches(
                    sampler.load, seed=config.seed, first_step=first, steps=passes, workers=workers
                )
                return on_device(loaded, world.device)

            validation = Validation(
                cases, split["val"], config, num_classes=facts.num_classes, world=world
            )
            writes = world.is_main and not dry_run
            best = BestWeights(run, validation.deciding) if writes else None
            for result in training.steps(batches):
                wanted = validation.due(result.step, steps=training.scheme.schedule.steps)
                if wanted:
                    result.require_finite()
                    with training.averaged():
                        values = validation.measure(objective, wanted)
                        if best is not None:
                            step, attempt = result.step, training.attempt
                            best.offer(detector, values, step=step, attempt=attempt)
                    training.log(values)
            if training.is_finished and world.is_main:
                with training.averaged():
                    step, attempt = training.next_step - 1, training.attempt
                    write_weights(run, detector, step=step, attempt=attempt)
    report_stop(training)
    return run


def load_run(
    run: Path, *, weights: Which = "last", swept: bool = True
) -> tuple[Detector, DetectConfig, Plan]:
    """The trained detector of a run in eval mode, its config and its plan.

    `weights`: those after the last step, or the best on validation, which a run has before its end.
    With `swept` the config has the post-processing that a sweep chose for these weights, if any.
    """
    from voxelbridge.core.run import read_run_config

    config = read_run_config(run, DetectConfig, kind=KIND)
    path = run / DETECTOR_FILE
    facts = validate(DetectorFacts, read_json(path), where=str(path))
    detector = _build(config, facts)
    if isinstance(detector, DeformableDETR):
        check_position_rule(path, facts.position_encoding)
    read_weights(run, detector, weights=weights)
    config = with_swept(run, config, weights=weights) if swept else config
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


def _check_rule(config: DetectConfig, plan: Plan, store: Path) -> None:
    if config.store_plan not in (None, plan.rule):
        raise ConfigError(
            f"store_plan: {store} was prepared with --plan {plan.rule}, the preset asks for "
            f"{config.store_plan}; prepare a store with --plan {config.store_plan}"
        )


def _share(store: CaseStore, case_ids: Sequence[str], config: DetectConfig) -> CaseShare:
    return share_of_cases(
        case_ids,
        patients_of(store),
        fraction=config.data_fraction,
        seed=config.data_fraction_seed,
        with_objects={case_id for case_id in case_ids if len(store.record(case_id).boxes)},
    )


def _detector_facts(config: DetectConfig, plan: Plan, *, init: Path | None) -> DetectorFacts:
    with_decoder = config.transfer.parts == "encoder+decoder"
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
        stem=config.transfer.stem if init else None,
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
    store: CaseStore, case_ids: Sequence[str], config: DetectConfig, world: World
) -> PatchSampler:
    return PatchSampler(
        store=store,
        cases=case_objects(store, case_ids),
        patch_size=config.patch_size,
        batch_size=patches_per_pass(config, ranks=world.size),
        object_fraction=config.object_fraction,
        augmentation=config.augmentation,
        box_masks=config.box_masks,
        intensity=config.intensity,
        defer=world.device.type == "cuda",
        rank=world.rank,
        ranks=world.size,
        parts=config.accumulation_steps,
    )


def _write_what_prediction_needs(
    run: Path, plan: Plan, facts: DetectorFacts, report: dict[str, Any]
) -> None:
    write_plan(run, plan)
    write_json(run / DETECTOR_FILE, facts.model_dump(mode="json", by_alias=True))
    write_json(run / TRANSFER_FILE, report)
