"""Pre-training from start to finished checkpoint, top to bottom."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.init import initialize
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.data.batches import step_batches
from voxelbridge.core.data.case_store import CaseStore
from voxelbridge.core.data.patient_split import MIN_PATIENTS_TO_SPLIT, patients_of, split_cases
from voxelbridge.core.errors import DataError
from voxelbridge.core.train.distributed import DeviceChoice, World, join_world
from voxelbridge.core.train.loop import open_training, report_stop
from voxelbridge.core.train.metrics import Meter
from voxelbridge.core.train.optim import build_optimizer
from voxelbridge.core.train.placement import place_objective
from voxelbridge.core.train.resume import stop_on_signals
from voxelbridge.core.train.schedule import due
from voxelbridge.core.train.settings import patches_per_pass
from voxelbridge.core.train.steps import autocast, evaluating, move
from voxelbridge.pretrain_ssl.batches import (
    Batch,
    NothingReadableError,
    PatchSampler,
    on_device,
)
from voxelbridge.pretrain_ssl.cases import Sampling, case_order, channel_count, check_masks
from voxelbridge.pretrain_ssl.config import KIND, PretrainConfig
from voxelbridge.pretrain_ssl.export import FINAL_CHECKPOINT, write_pretrained
from voxelbridge.pretrain_ssl.failures import FAILED, FailureWatch
from voxelbridge.pretrain_ssl.method import Objective
from voxelbridge.pretrain_ssl.panels import Picture
from voxelbridge.pretrain_ssl.pictures import draw_picture, picture_path, write_picture


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
    wanted = (config.sampling.centre_mask, *config.method.used_masks)
    check_masks(cases, [name for name in wanted if name is not None])
    training_cases, validation_cases = split_cases(patients_of(cases), seed=config.seed)
    with join_world(device) as world, stop_on_signals() as stop:
        failures = FailureWatch(
            len(cases.cases), max_share=config.max_failed_share, speaks=world.is_main
        )
        facts = data_facts(cases, store, channels, validation_cases, failures)
        module = build_objective(config, channels)
        objective = as_objective(module)
        place_objective(module, config, world.device)
        optimizer = build_optimizer(config.optim, module)
        sampler = PatchSampler(
            cases,
            case_order(cases, training_cases, config.sampling, seed=config.seed),
            config.patch_size,
            patches_per_pass(config, ranks=world.size),
            config.method,
            seed=config.seed,
            augmentation=config.augmentation,
            centre_mask=config.sampling.centre_mask,
            max_empty=config.sampling.max_empty,
            rank=world.rank,
            ranks=world.size,
            defer=world.device.type == "cuda",
        )
        held_out = validation_sampler(sampler, validation_cases, config)
        if world.is_main:
            _describe(config, module, training_cases, validation_cases, world)
        with open_training(
            run, config, kind=KIND, world=world, stop=stop, objective=module,
            optimizer=optimizer, facts=facts, tensorboard=tensorboard, dry_run=dry_run,
            arguments={"store": str(store), "workers": workers},
        ) as training:  # fmt: skip
            raw = step_batches(
                sampler,
                seed=config.seed,
                first_step=training.first_pass,
                steps=training.passes,
                workers=workers,
                rank=world.rank,
            )
            batches = on_device(failures.watch(raw), world.device)
            for result in training.steps(batches):
                if held_out and due(config.validate_every_steps, result.step):
                    training.log(validate(module, held_out, config, world, failures))
                    if world.is_main and not dry_run:
                        for index, picture in pictures_of(module, held_out, config):
                            write_picture(picture_path(run, result.step, index), picture)
                            training.add_picture(f"patch {index}", draw_picture(picture))
                is_last = result.step + 1 == config.schedule.steps
                logging = is_last or due(config.log_every_steps, result.step)
                if logging and (failed := failures.agree(world)):
                    training.log({"failed_cases": failed})
            output = run / "checkpoints" / FINAL_CHECKPOINT
            if training.is_finished and world.is_main:
                write_pretrained(
                    output, config, objective, facts=facts, steps=config.schedule.steps
                )
                print(f"finished: {output}")
        report_stop(training)
        if dry_run and world.is_main:
            print(f"dry run: nothing written to {run}")
        return output if training.is_finished else None


def build_objective(config: PretrainConfig, channels: int) -> nn.Module:
    """The network of a config with its initial weights, which `seed` decides."""
    torch.manual_seed(config.seed)
    encoder = build_encoder(ENCODER_PRESETS[config.encoder], in_channels=channels)
    initialize(encoder, config.init)
    module = config.method.build(encoder)  # after it: a teacher starts as a copy of the encoder
    if (decoder := as_objective(module).decoder) is not None:
        initialize(decoder, config.init)
    return module


def as_objective(module: nn.Module) -> Objective:
    """`module` with what the training asks of it besides being a module."""
    assert isinstance(module, Objective)
    return module


def validation_sampler(
    training: PatchSampler, case_ids: list[str], config: PretrainConfig
) -> PatchSampler | None:
    """The sampler of the fixed validation patches; None where there are none."""
    if not case_ids or not config.validation_patches:
        return None
    order = case_order(training.store, case_ids, Sampling(), seed=config.seed)
    return training.for_validation(order)


@torch.no_grad()
def validate(
    module: nn.Module,
    sampler: PatchSampler,
    config: PretrainConfig,
    world: World,
    failures: FailureWatch,
) -> dict[str, float]:
    """Mean losses over the fixed validation patches, and what the trivial predictor has there.

    Named `val_loss`, `val_trivial` and `val_<part>`; nothing where no held-out case can be read.
    """
    meter = Meter()
    objective = as_objective(module)
    with evaluating(module):
        for index in range(world.rank, config.validation_patches, world.size):
            batch = validation_batch(sampler, index, world.device, failures)
            if not batch:
                continue
            with autocast(world.device, config.precision):
                meter.add({**module(batch), "trivial": objective.trivial(batch)})
    means = meter.means(world)
    return {"val_loss" if name == "total" else f"val_{name}": v for name, v in means.items()}


@torch.no_grad()
def pictures_of(
    module: nn.Module, sampler: PatchSampler, config: PretrainConfig
) -> Iterator[tuple[int, Picture]]:
    """What the network makes of the first validation patches, with their numbers."""
    device = next(module.parameters()).device
    for index in range(min(config.pictures, config.validation_patches)):
        batch = validation_batch(sampler, index, device)
        if not batch:
            continue
        with evaluating(module), autocast(device, config.precision):
            yield index, as_objective(module).pictures(batch)


def validation_batch(
    sampler: PatchSampler, index: int, device: torch.device, failures: FailureWatch | None = None
) -> Batch:
    """Validation patch `index` on `device`, empty where no held-out case can be read.

    What could not be read goes to `failures`, if given.
    """
    try:
        batch = sampler.validation_batch(index)
    except NothingReadableError as error:  # the held-out cases are few: training goes on
        batch = {FAILED: error.failures}
    if failures:
        failures.take(batch)
    else:
        del batch[FAILED]
    return move(batch, device)


def data_facts(
    cases: CaseStore,
    store: Path,
    channels: int,
    validation_cases: list[str],
    failures: FailureWatch,
) -> dict[str, Any]:  # Any: JSON values
    """What identifies the data of a run, and what its checkpoint says about them.

    Cases whose details cannot be read go to `failures`.
    """
    spacings = {record.spacing_mm for record in cases.cases}
    datasets = sorted({r.provenance.dataset for r in cases.cases if r.provenance.dataset})
    return {
        "schema": 1,
        "store_sha256": cases.digest,
        "datasets": datasets or [store.resolve().name],
        "num_cases": len(cases.cases),
        "channels": channels,
        "spacing_mm": list(spacings.pop()) if len(spacings) == 1 else None,  # None: it varies
        "normalization": _normalization(cases, failures),
        "validation_cases": validation_cases,
    }


def _normalization(cases: CaseStore, failures: FailureWatch) -> Any:  # Any: JSON values
    """What the first case that can be read was normalized with; one store has one for all."""
    for record in cases.cases:
        try:
            return cases.details(record.case_id).extra.get("normalization")
        except DataError as error:
            failures.take({FAILED: [(record.case_id, str(error))]})
    raise DataError(f"{cases.root}: no case can be read; prepare the store again")


def _describe(
    config: PretrainConfig,
    module: nn.Module,
    training_cases: list[str],
    validation_cases: list[str],
    world: World,
) -> None:
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    print(
        f"{config.method.name}: {config.encoder}, {parameters:,} parameters, "
        f"{len(training_cases)} training cases, {world.size} x {world.device.type}"
    )
    if not validation_cases:
        print(f"no validation: the store has fewer than {MIN_PATIENTS_TO_SPLIT} patients")
