"""Supervised pre-training from start to finished checkpoint, top to bottom."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from voxelbridge.core.config import config_hash
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patient_split import MIN_PATIENTS_TO_SPLIT
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import write_json
from voxelbridge.core.train.distributed import DeviceChoice, World, join_world
from voxelbridge.core.train.loop import open_training, report_stop
from voxelbridge.core.train.optim import build_optimizer
from voxelbridge.core.train.placement import place_objective
from voxelbridge.core.train.resume import stop_on_signals, stored_states
from voxelbridge.core.train.schedule import due
from voxelbridge.core.train.settings import patches_per_pass
from voxelbridge.pretrain_sup.batches import MultiDatasetSampler
from voxelbridge.pretrain_sup.config import KIND, MultiTalentConfig
from voxelbridge.pretrain_sup.export import FINAL_CHECKPOINT, write_pretrained
from voxelbridge.pretrain_sup.extend import Extension, read_extension
from voxelbridge.pretrain_sup.label_space import FILE_NAME as LABEL_SPACE_FILE
from voxelbridge.pretrain_sup.label_space import (
    LabelSpace,
    read_label_space,
    write_label_space,
)
from voxelbridge.pretrain_sup.objective import MultiTalentObjective
from voxelbridge.pretrain_sup.plan import FILE_NAME as PLAN_FILE
from voxelbridge.pretrain_sup.plan import StorePlan, read_plan, write_plan
from voxelbridge.pretrain_sup.sampling import dataset_of, split_datasets
from voxelbridge.pretrain_sup.validation import validate
from voxelbridge.pretrain_sup.weights import TrainedNetwork, new_network, write_weights

EXTENSION_FILE = "extension.json"


def train(
    config: MultiTalentConfig,
    *,
    store: Path,
    run: Path,
    extend: Path | None = None,
    device: DeviceChoice = "auto",
    workers: int = 0,
    tensorboard: bool = False,
    dry_run: bool = False,
) -> Path | None:
    """Trains on all data sets of the case store `store`, in the run directory `run`.

    `extend`: an earlier run whose whole network is taken over; data sets of the store that it does
    not know get new stems and heads. Returns the path of the finished checkpoint; None when a
    signal ended the training early (the same call goes on) or after a dry run. Raises
    KeyboardInterrupt after Ctrl-C.
    """
    cases = CaseStore.open(store)
    space, plan = store_labels(store)
    if extend is not None and extend.resolve() == run.resolve():
        raise ConfigError(f"--extend {extend}: is the run itself; give --run a new folder")
    extension = None if extend is None else read_extension(extend, config, space, plan)
    if extension is not None:
        space, plan = extension.space, extension.plan
    training_cases, validation_cases = split_datasets(cases, seed=config.seed)
    facts = data_facts(cases, space, plan, validation_cases, extension)
    with join_world(device) as world, stop_on_signals() as stop:
        objective = build_objective(config, space, ranks=world.size)
        taken_over = None
        if extension is not None and not stored_states(run / "checkpoints"):
            taken_over = extension.take_over(objective.network)
        place_objective(objective, config, world.device)
        optimizer = build_optimizer(config.optim, objective)
        sampler = MultiDatasetSampler.build(
            cases,
            space,
            training_cases,
            patch_size=config.patch_size,
            num_patches=patches_per_pass(config, ranks=world.size),
            seed=config.seed,
            sampling=config.sampling,
            augmentation=config.augmentation,
            rank=world.rank,
            ranks=world.size,
        )
        held_out = validation_sampler(sampler, validation_cases, config)
        if world.is_main:
            _describe(config, objective, sampler, validation_cases, world, taken_over)
        with open_training(
            run, config, kind=KIND, world=world, stop=stop, objective=objective,
            optimizer=optimizer, facts=facts, tensorboard=tensorboard, dry_run=dry_run,
            arguments={
                "store": str(store), "workers": workers, "extend": extend and str(extend)
            },
        ) as training:  # fmt: skip
            if world.is_main and not dry_run:
                write_labels(run, space, plan, taken_over)
            batches = step_batches(
                sampler,
                seed=config.seed,
                first_step=training.first_pass,
                steps=training.passes,
                workers=workers,
                rank=world.rank,
            )
            for result in training.steps(batches):
                if held_out and due(config.validate_every_steps, result.step):
                    training.log(validate(objective, held_out, config, world))
            output = run / "checkpoints" / FINAL_CHECKPOINT
            if training.is_finished and world.is_main:
                write_weights(run, objective.network)
                trained = TrainedNetwork(objective.network, space, plan, config)
                write_pretrained(
                    output, trained, steps=config.schedule.steps, data_sha256=cases.digest
                )
                print(f"finished: {output}")
        report_stop(training)
        if dry_run and world.is_main:
            print(f"dry run: nothing written to {run}")
        return output if training.is_finished else None


def store_labels(store: Path) -> tuple[LabelSpace, StorePlan]:
    """Label space and plan of a store; DataError where `vb-sup prepare` did not make it."""
    path, plan = store / LABEL_SPACE_FILE, read_plan(store)
    if plan is None or not path.exists():
        missing = PLAN_FILE if plan is None else LABEL_SPACE_FILE
        raise DataError(f"{store}: {missing} is missing; prepare the store with `vb-sup prepare`")
    return read_label_space(path), plan


def build_objective(
    config: MultiTalentConfig, space: LabelSpace, *, ranks: int = 1
) -> MultiTalentObjective:
    """The network for all data sets of `space`, its initial weights decided by `seed`, and loss."""
    torch.manual_seed(config.seed)
    return MultiTalentObjective(
        new_network(config, space),
        space,
        reduction=config.reduction,
        deep_supervision=config.deep_supervision,
        supervise_coarsest=config.supervise_coarsest,
        ranks=ranks,
        accumulation_steps=config.accumulation_steps,
    )


def validation_sampler(
    training: MultiDatasetSampler, case_ids: list[str], config: MultiTalentConfig
) -> MultiDatasetSampler | None:
    """The sampler of the fixed validation patches; None where there are none."""
    if not case_ids or not config.validation_patches:
        return None
    return training.for_validation(case_ids)


def write_labels(
    run: Path, space: LabelSpace, plan: StorePlan, taken_over: Mapping[str, Any] | None
) -> None:
    """What the run directory needs besides weights: heads, plan, and what was taken over."""
    write_label_space(run / LABEL_SPACE_FILE, space)
    write_plan(run, plan)
    if taken_over is not None:
        write_json(run / EXTENSION_FILE, taken_over)


def data_facts(
    cases: CaseStore,
    space: LabelSpace,
    plan: StorePlan,
    validation_cases: list[str],
    extension: Extension | None,
) -> dict[str, Any]:  # Any: JSON values
    """What identifies the data of a run; it must be the same at every start."""
    counts = {dataset.name: 0 for dataset in space.datasets}
    for record in cases.cases:
        counts[dataset_of(record)] = counts.get(dataset_of(record), 0) + 1
    return {
        "schema": 1,
        "store_sha256": cases.digest,
        "label_space_sha256": _hash_of(space),
        "plan_sha256": config_hash(plan),
        "extends": None if extension is None else extension.identity,
        "cases_per_dataset": counts,
        "validation_cases": validation_cases,
    }


def _hash_of(space: LabelSpace) -> str:
    return hashlib.sha256(json.dumps(asdict(space), sort_keys=True).encode()).hexdigest()


def _describe(
    config: MultiTalentConfig,
    objective: MultiTalentObjective,
    sampler: MultiDatasetSampler,
    validation_cases: list[str],
    world: World,
    taken_over: Mapping[str, Any] | None,
) -> None:
    parameters = sum(p.numel() for p in objective.parameters())
    space, order = sampler.space, sampler.order
    cases = sum(len(stratum.groups) for stratum in order.strata)
    print(
        f"multitalent ({space.layout}): {config.encoder} with {config.decoder.kind}, "
        f"{parameters:,} parameters, {len(space.datasets)} data sets, {len(space.heads)} heads, "
        f"{cases} training cases, {world.size} x {world.device.type}"
    )
    shares = ", ".join(
        f"{stratum.name} {share:.1%}"
        for stratum, share in zip(order.strata, order.shares, strict=True)
    )
    print(f"share of the samples: {shares}")
    if not validation_cases:
        print(f"no validation: no data set has {MIN_PATIENTS_TO_SPLIT} patients")
    if taken_over is not None:
        print(
            f"extends {taken_over['run']} after {taken_over['steps']} steps: "
            f"{taken_over['kept_tensors']} tensors kept; new stems "
            f"{', '.join(taken_over['stems']) or 'none'}; new heads "
            f"{', '.join(taken_over['heads']) or 'none'}"
            + ("; more outputs in the joint layer" if taken_over["widened"] else "")
        )
