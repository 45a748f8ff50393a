"""Pre-training from start to finished checkpoint, top to bottom; and the export of a run."""

from pathlib import Path
from typing import Any

import torch

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.train.distributed import DeviceChoice, World, join_world
from voxelbridge.core.train.loop import open_training, report_stop
from voxelbridge.core.train.metrics import Meter
from voxelbridge.core.train.optim import build_optimizer
from voxelbridge.core.train.resume import stop_on_signals
from voxelbridge.core.train.schedule import due
from voxelbridge.core.train.settings import patches_per_pass
from voxelbridge.core.train.steps import autocast, move, place
from voxelbridge.pretrain_ssl.batches import (
    MIN_PATIENTS_TO_SPLIT,
    PatchSampler,
    channel_count,
    patients_of,
    split_cases,
    validation_batch,
    validation_sampler,
)
from voxelbridge.pretrain_ssl.config import KIND, PretrainConfig
from voxelbridge.pretrain_ssl.export import FINAL_CHECKPOINT, write_pretrained
from voxelbridge.pretrain_ssl.methods.mae import MAEObjective


def train(
    config: PretrainConfig,
    *,
    store: Path,
    run: Path,
    device: DeviceChoice = "auto",
    workers: int = 0,
    tensorboard: bool = False,
    dry_run: bool = False,
) -> Path | None:
    """Pre-trains on the case store `store`, in the run directory `run`.

    Returns the path of the finished checkpoint; None when a signal ended the training early (the
    same call goes on) or after a dry run. Raises KeyboardInterrupt after Ctrl-C.
    """
    cases = CaseStore.open(store)
    channels = channel_count(cases)
    training_cases, validation_cases = split_cases(patients_of(cases), seed=config.seed)
    facts = data_facts(cases, store, channels, validation_cases)
    with join_world(device) as world, stop_on_signals() as stop:
        objective = build_objective(config, channels)
        place(objective, world.device, config.precision)
        optimizer = build_optimizer(config.optim, objective)
        per_pass = patches_per_pass(config, ranks=world.size)
        sampler = PatchSampler(cases, training_cases, config.patch_size, per_pass, config.method)
        if world.is_main:
            _describe(config, objective, training_cases, validation_cases, world)
        with open_training(
            run, config, kind=KIND, world=world, stop=stop, objective=objective,
            optimizer=optimizer, facts=facts, tensorboard=tensorboard, dry_run=dry_run,
            arguments={"store": str(store), "workers": workers},
        ) as training:  # fmt: skip
            batches = step_batches(
                sampler,
                seed=config.seed,
                first_step=training.first_pass,
                steps=training.passes,
                workers=workers,
                rank=world.rank,
            )
            held_out = validation_sampler(sampler, validation_cases)
            for result in training.steps(batches):
                if validation_cases and due(config.validate_every_steps, result.step):
                    training.log(validate(objective, held_out, config, world))
            output = run / "checkpoints" / FINAL_CHECKPOINT
            if training.is_finished and world.is_main:
                write_pretrained(
                    output, config, objective, facts=facts, steps=config.schedule.steps
                )
                print(f"finished: {output}")
        report_stop(training)
        if dry_run and world.is_main:
            print(f"dry run: one step done, nothing written to {run}")
        return output if training.is_finished else None


def build_objective(config: PretrainConfig, channels: int) -> MAEObjective:
    """The network of a config with its initial weights, which `seed` decides."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(ENCODER_PRESETS[config.encoder], in_channels=channels)
    objective = config.method.build(encoder)
    initialize(objective, config.init)
    return objective


@torch.no_grad()
def validate(
    objective: MAEObjective, sampler: PatchSampler, config: PretrainConfig, world: World
) -> dict[str, float]:
    """Mean losses over the fixed validation patches, as `val_loss` and `val_<part>`."""
    objective.eval()
    meter = Meter()
    for index in range(world.rank, config.validation_patches, world.size):
        batch = move(validation_batch(sampler, index, seed=config.seed), world.device)
        with autocast(world.device, config.precision):
            meter.add(objective(batch))
    objective.train()
    means = meter.means(world)
    return {"val_loss" if name == "total" else f"val_{name}": v for name, v in means.items()}


def data_facts(
    cases: CaseStore, store: Path, channels: int, validation_cases: list[str]
) -> dict[str, Any]:  # Any: JSON values
    """What identifies the data of a run, and what its checkpoint says about them."""
    spacings = {record.spacing_mm for record in cases.cases}
    details = cases.details(cases.cases[0].case_id)
    return {
        "schema": 1,
        "store_sha256": cases.digest,
        "dataset": store.resolve().name,
        "num_cases": len(cases.cases),
        "channels": channels,
        "spacing_mm": list(spacings.pop()) if len(spacings) == 1 else None,  # None: it varies
        "normalization": details.extra.get("normalization"),
        "validation_cases": validation_cases,
    }


def _describe(
    config: PretrainConfig,
    objective: MAEObjective,
    training_cases: list[str],
    validation_cases: list[str],
    world: World,
) -> None:
    parameters = sum(p.numel() for p in objective.parameters())
    print(
        f"{config.method.name}: {config.encoder}, {parameters:,} parameters, "
        f"{len(training_cases)} training cases, {world.size} x {world.device.type}"
    )
    if not validation_cases:
        print(f"no validation: the store has fewer than {MIN_PATIENTS_TO_SPLIT} patients")
