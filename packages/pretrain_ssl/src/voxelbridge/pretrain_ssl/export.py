"""The encoder (and decoder) of a pre-training run as a canonical checkpoint; heads stay behind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.checkpoint import (
    Checkpoint,
    CheckpointMetadata,
    Source,
    Stem,
    collect_tensors,
    write_checkpoint,
)
from voxelbridge.core.config import config_hash
from voxelbridge.core.errors import CheckpointError
from voxelbridge.core.files import read_json
from voxelbridge.core.run import read_run_config
from voxelbridge.core.train.resume import load_state
from voxelbridge.pretrain_ssl.config import KIND, PretrainConfig
from voxelbridge.pretrain_ssl.method import Objective

FINAL_CHECKPOINT = "final.safetensors"
STEM = "main"  # the name of the only stem

Facts = Mapping[str, Any]  # Any: JSON values of data.json


def export(run: Path, output: Path, *, license_name: str | None = None) -> CheckpointMetadata:
    """Writes the weights of the run's saved state, finished or not, to `output`.

    `source.steps` in the metadata says how far they were trained; `license_name` is what the
    weights may be used under, an SPDX identifier such as CC-BY-4.0.
    """
    from voxelbridge.pretrain_ssl.train import as_objective, build_objective

    config = read_run_config(run, PretrainConfig, kind=KIND)
    state = load_state(run / "checkpoints")
    if state is None:
        raise CheckpointError(f"{run}: no training state yet; train before exporting")
    facts = read_json(run / "data.json")
    module = build_objective(config, int(facts["channels"]))
    try:
        module.load_state_dict(state.model)
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{run}: the state does not fit its config ({first_line})") from error
    return write_pretrained(
        output, config, as_objective(module), facts=facts, steps=state.step,
        license_name=license_name,
    )  # fmt: skip


def write_pretrained(
    output: Path,
    config: PretrainConfig,
    objective: Objective,
    *,
    facts: Facts,
    steps: int,
    license_name: str | None = None,
) -> CheckpointMetadata:
    """Writes encoder and decoder (where there is one) of `objective` with complete metadata.

    Nothing about patients goes into the file: data sets by name, the data by their hash.
    """
    normalization = facts["normalization"]
    datasets = tuple(facts["datasets"])
    metadata = CheckpointMetadata(
        method=config.method.name,
        arch=ENCODER_PRESETS[config.encoder],
        decoder=objective.decoder_config,
        stems={STEM: Stem(channels=facts["channels"], dataset=_joined(datasets))},
        patch_size=config.method.network_input(config.patch_size),
        spacing_mm=tuple(facts["spacing_mm"]) if facts["spacing_mm"] else None,
        normalization=tuple(normalization) if normalization else None,
        init=config.init,
        source=Source(
            datasets=datasets,
            steps=steps,
            config_hash=config_hash(config),
            data_sha256=facts["store_sha256"],
        ),
        citations=config.method.citations,
        license=license_name,
    )
    tensors = collect_tensors(objective.encoder, objective.decoder)
    return write_checkpoint(output, Checkpoint(metadata, tensors))


def _joined(datasets: tuple[str, ...]) -> str:
    return datasets[0] if len(datasets) == 1 else f"{len(datasets)} data sets"
