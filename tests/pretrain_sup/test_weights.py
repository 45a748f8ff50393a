from pathlib import Path

import pytest
import torch

from voxelbridge.core.config import load_config, preset_path
from voxelbridge.core.errors import CheckpointError, ConfigError, DataError
from voxelbridge.core.run import RunDirectory
from voxelbridge.pretrain_sup.config import KIND, MultiTalentConfig
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import LabelSpace, build_label_space, write_label_space
from voxelbridge.pretrain_sup.model import SegmentationNetwork
from voxelbridge.pretrain_sup.plan import StorePlan, write_plan
from voxelbridge.pretrain_sup.weights import (
    new_network,
    read_network,
    saved_weights,
    write_weights,
)

CONFIG = load_config(
    MultiTalentConfig, preset_path("voxelbridge.pretrain_sup", "multitalent_small")
).config


def space_of(*names: str) -> LabelSpace:
    targets = tuple(Target(f"t{n}", (n,)) for n in range(1, 24))
    datasets = [DatasetLabels(name, ("A", "B"), targets, None, 2) for name in names]
    return build_label_space(datasets, layout="per_dataset")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run on two data sets of 23 targets, as a training leaves it."""
    folder = tmp_path / "run"
    RunDirectory.open_or_create(folder, CONFIG, kind=KIND).close()
    write_label_space(folder / "label_space.json", space_of("ct", "mr"))
    write_plan(folder, StorePlan(spacing_mm=(1.0, 2.0, 3.0)))
    write_weights(folder, network_of("ct", "mr"))
    return folder


def network_of(*names: str) -> SegmentationNetwork:
    torch.manual_seed(1)
    return new_network(CONFIG, space_of(*names))


def test_a_network_comes_back_with_all_that_it_needs(run: Path) -> None:
    state = torch.random.get_rng_state()
    trained = read_network(run)
    assert torch.equal(torch.random.get_rng_state(), state)
    network, space, plan, config = trained
    assert not network.training
    assert network.head_outputs == {"ct.0": 13, "ct.1": 12, "mr.0": 13, "mr.1": 12}
    assert network.encoder.stem_channels == {"ct": 2, "mr": 2}
    assert space == space_of("ct", "mr")
    assert plan.spacing_mm == (1.0, 2.0, 3.0)
    assert config == CONFIG
    expected = network_of("ct", "mr").state_dict()
    found = network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_further_data_set_leaves_the_initial_trunk_as_it_was() -> None:
    few, more = network_of("ct").state_dict(), network_of("ct", "mr").state_dict()
    for name, tensor in few.items():
        if name.startswith(("encoder.stages.", "decoder.")):
            assert torch.equal(more[name], tensor)


def test_a_changed_missing_or_foreign_network_is_refused(run: Path) -> None:
    path = run / "checkpoints" / "network.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed or damaged since it was written"):
        read_network(run)
    write_weights(run, network_of("ct"))
    with pytest.raises(CheckpointError, match="does not fit its run's config") as caught:
        read_network(run)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError, match="the training has not finished"):
        read_network(run)
    with pytest.raises(CheckpointError, match="no training state yet"):
        saved_weights(run)


def test_a_folder_that_is_no_such_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        read_network(tmp_path)
    (run / "prepare.json").unlink()
    with pytest.raises(DataError, match=r"prepare\.json is missing"):
        read_network(run)
    (run / "label_space.json").write_text("{}")
    with pytest.raises(DataError, match=r"label_space\.json: schema"):
        read_network(run)
