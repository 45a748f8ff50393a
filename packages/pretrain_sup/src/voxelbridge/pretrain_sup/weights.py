"""The network of a run directory: what was trained, and everything needed to use it.

config.json                        MultiTalentConfig
label_space.json                   heads and their targets, as in the store
prepare.json                       spacing and normalisation per data set, as in the store
checkpoints/network.safetensors    all stems, trunk, decoder and heads, at the end of the run
checkpoints/network.json           its hash
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.errors import CheckpointError, DataError
from voxelbridge.core.files import atomic_write, read_json, sha256_of, write_json
from voxelbridge.core.run import read_run_config
from voxelbridge.core.train.resume import load_state
from voxelbridge.pretrain_sup.config import KIND, MultiTalentConfig
from voxelbridge.pretrain_sup.label_space import FILE_NAME as LABEL_SPACE_FILE
from voxelbridge.pretrain_sup.label_space import LabelSpace, read_label_space
from voxelbridge.pretrain_sup.model import SegmentationNetwork, build_network
from voxelbridge.pretrain_sup.plan import FILE_NAME as PLAN_FILE
from voxelbridge.pretrain_sup.plan import StorePlan, read_plan

NETWORK_FILE = "network.safetensors"
NETWORK = "network"  # the network's name in the objective, whose state a training saves


class TrainedNetwork(NamedTuple):
    """A finished run: `network` is in eval mode, on the CPU."""

    network: SegmentationNetwork
    space: LabelSpace
    plan: StorePlan
    config: MultiTalentConfig


class SavedWeights(NamedTuple):
    """Tensors of a run's network by name, and the optimizer steps they were trained."""

    tensors: dict[str, Tensor]
    steps: int


def new_network(config: MultiTalentConfig, space: LabelSpace) -> SegmentationNetwork:
    """The network of `config` for all data sets of `space`, with initial weights.

    One stem per data set, named by it; one head per output layer. Draws from torch's generator.
    """
    return build_network(
        ENCODER_PRESETS[config.encoder],
        config.decoder,
        stems={dataset.name: len(dataset.channels) for dataset in space.datasets},
        heads=space.output_layers,
        init=config.init,
    )


def write_weights(run: Path, network: SegmentationNetwork) -> None:
    """The network's tensors as safetensors, with their hash beside the file."""
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    path = run / "checkpoints" / NETWORK_FILE
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)
    write_json(path.with_suffix(".json"), {"schema": 1, "sha256": sha256_of(path)})


def read_network(run: Path) -> TrainedNetwork:
    """The network of the finished run `run` with its label space, plan and config.

    Raises ConfigError for what is no run of this kind, CheckpointError where the weights are
    missing, changed or foreign, DataError for damaged files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, space, plan = read_run(run)
    path = run / "checkpoints" / NETWORK_FILE
    if not path.is_file():
        raise CheckpointError(f"{run}: no {NETWORK_FILE}; the training has not finished")
    if sha256_of(path) != read_json(path.with_suffix(".json"))["sha256"]:
        raise CheckpointError(f"{path}: changed or damaged since it was written")
    network = _empty_network(config, space)
    try:
        fill(network, load_file(path), where=path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    return TrainedNetwork(network.eval(), space, plan, config)


def read_run(run: Path) -> tuple[MultiTalentConfig, LabelSpace, StorePlan]:
    """What a run, finished or not, was started with."""
    config = read_run_config(run, MultiTalentConfig, kind=KIND)
    space = read_label_space(run / LABEL_SPACE_FILE)
    plan = read_plan(run)
    if plan is None:
        raise DataError(f"{run}: {PLAN_FILE} is missing")
    return config, space, plan


def saved_weights(run: Path) -> SavedWeights:
    """The weights of the run's last saved state, finished or not; CheckpointError without one."""
    state = load_state(run / "checkpoints")
    if state is None:
        raise CheckpointError(f"{run}: no training state yet; train before using its weights")
    start = f"{NETWORK}."
    tensors = {name.removeprefix(start): tensor for name, tensor in state.model.items()}
    return SavedWeights(tensors, state.step)


def saved_network(run: Path) -> tuple[TrainedNetwork, int]:
    """The network of the run's last saved state, finished or not, and its optimizer steps."""
    config, space, plan = read_run(run)
    network, saved = _empty_network(config, space), saved_weights(run)
    fill(network, saved.tensors, where=run)
    return TrainedNetwork(network.eval(), space, plan, config), saved.steps


def fill(network: SegmentationNetwork, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Copies `tensors` into the network; CheckpointError naming `where` unless they all fit."""
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        first_line = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{where}: does not fit its run's config ({first_line})") from error


def _empty_network(config: MultiTalentConfig, space: LabelSpace) -> SegmentationNetwork:
    with torch.random.fork_rng(devices=()):  # the initial weights are replaced at once
        return new_network(config, space)
