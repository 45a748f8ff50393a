"""Further data sets for an existing run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from voxelbridge.core.config import load_config, preset_path
from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import read_json
from voxelbridge.core.train.resume import load_state
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.extend import joined_plan, joined_space
from voxelbridge.pretrain_sup.label_space import Layout, build_label_space
from voxelbridge.pretrain_sup.plan import StorePlan
from voxelbridge.pretrain_sup.train import train
from voxelbridge.pretrain_sup.weights import read_network, saved_weights

WriteStore = Callable[..., Path]
SETTINGS = (
    "patch_size=[16,16,16]",
    "batch_size=2",
    "schedule.steps=3",
    "validation_patches=0",
    "log_every_steps=1",
)
ORGANS = DatasetLabels("organs", ("CT",), tuple(Target(n, (ord(n),)) for n in "abc"), None, 3)
LUNG = DatasetLabels("lung", ("CT",), (Target("lung", (2,)),), None, 1)


def small(*overrides: str, preset: str = "multitalent_small") -> MultiTalentConfig:
    path = preset_path("voxelbridge.pretrain_sup", preset)
    return load_config(MultiTalentConfig, path, [*SETTINGS, *overrides]).config


def new_parts(name: str) -> bool:
    return name.startswith(("encoder.stems.lung.", "heads.lung."))


@pytest.mark.parametrize(
    ("layout", "alone"), [("per_dataset", False), ("per_dataset", True), ("joint", False)]
)
def test_a_run_grows_by_a_data_set_and_keeps_the_rest_bit_for_bit(
    write_store: WriteStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    alone: bool,
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    store = write_store(tmp_path / "a", ("organs", "glioma"), layout=layout)
    train(small(), store=store, run=old, device="cpu")
    names = ("lung",) if alone else ("lung", "organs", "glioma")
    further = write_store(tmp_path / "b", names, layout=layout)
    begun: dict[str, torch.Tensor] = {}

    def remember(network: torch.nn.Module, *_: object, **__: object) -> None:
        begun.update({name: t.clone() for name, t in network.state_dict().items()})

    monkeypatch.setattr("voxelbridge.pretrain_sup.train.place_objective", remember)
    train(small(), store=further, run=new, extend=old, device="cpu")
    before = read_network(old)
    kept = before.network.state_dict()
    for name, tensor in kept.items():
        start = begun[f"network.{name}"]
        if layout == "joint" and name.startswith("heads."):  # 3 + 2 outputs, then one more
            assert (len(tensor), len(start)) == (5, 6)
            start = start[:5]
        assert torch.equal(start, tensor), name
    fresh = {name.removeprefix("network.") for name in begun} - set(kept)
    assert fresh
    assert all(new_parts(name) for name in fresh)
    _, space, plan, _ = read_network(new)
    assert [dataset.name for dataset in space.datasets] == ["organs", "glioma", "lung"]
    assert set(plan.datasets) == {"organs", "glioma", "lung"}
    report = read_json(new / "extension.json")
    assert report["run"] == "old"
    assert report["steps"] == 3
    assert report["stems"] == ["lung"]
    assert report["heads"] == (["lung"] if layout == "per_dataset" else [])
    assert report["widened"] == ([] if layout == "per_dataset" else ["joint"])
    assert report["kept_tensors"] == len(kept)
    assert "extends old after 3 steps" in capsys.readouterr().out
    if alone:  # what no sample uses stays as it was to the end of the run
        after = read_network(new).network.state_dict()
        for name, tensor in kept.items():
            if name.startswith(("encoder.stems.", "heads.organs", "heads.glioma")):
                assert torch.equal(after[name], tensor), name


def test_an_extended_run_goes_on_without_taking_over_again(
    write_store: WriteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    train(small(), store=write_store(tmp_path / "a", ("lung",), layout="per_dataset"), run=old,
          device="cpu")  # fmt: skip
    further = write_store(tmp_path / "b", ("lung", "glioma"), layout="per_dataset")
    train(small(), store=further, run=new, extend=old, device="cpu")
    state = load_state(new / "checkpoints")
    for path in (old / "checkpoints").iterdir():
        path.unlink()  # is not needed any more
    assert train(small(), store=further, run=new, extend=old, device="cpu") is not None
    again = load_state(new / "checkpoints")
    assert state is not None
    assert again is not None
    assert all(torch.equal(tensor, again.model[name]) for name, tensor in state.model.items())
    with pytest.raises(Exception, match="the run was started with other data"):
        train(small(), store=further, run=new, device="cpu")


def test_what_is_shared_can_be_frozen_at_first(write_store: WriteStore, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    store = write_store(tmp_path / "a", ("lung",), layout="per_dataset")
    train(small(), store=store, run=old, device="cpu")
    further = write_store(tmp_path / "b", ("lung", "glioma"), layout="per_dataset")
    parts = '["network.encoder.stages", "network.decoder"]'
    config = small(
        f'schedule.frozen={{"steps": 2, "parts": {parts}}}', "optim.weight_decay=0.1",
        "checkpoint_every_steps=2", "keep_checkpoints=2",
    )  # fmt: skip
    train(config, store=further, run=new, extend=old, device="cpu")
    (new / "checkpoints" / "state-00000003.pt").unlink()
    before, after = saved_weights(old).tensors, saved_weights(new)
    assert after.steps == 2
    changed = [name for name in before if not torch.equal(before[name], after.tensors[name])]
    assert changed
    assert all(name.startswith(("encoder.stems.", "heads.")) for name in changed)


def test_another_network_or_the_run_itself_is_refused(
    write_store: WriteStore, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    store = write_store(tmp_path / "a", ("lung",), layout="per_dataset")
    train(small(), store=store, run=run, device="cpu")
    other = small(preset="multitalent_retina_unet_small")
    with pytest.raises(ConfigError, match=r"--extend .* has encoder resenc_small, this one plain"):
        train(other, store=store, run=tmp_path / "new", extend=run, device="cpu")
    with pytest.raises(ConfigError, match="is the run itself; give --run a new folder"):
        train(small(), store=store, run=run, extend=run, device="cpu")
    with pytest.raises(ConfigError, match="not a run directory"):
        train(small(), store=store, run=tmp_path / "new", extend=store, device="cpu")
    assert not (tmp_path / "new").exists()


def test_data_sets_that_changed_are_refused() -> None:
    before = build_label_space([ORGANS, LUNG], layout="per_dataset", max_targets=2)
    more = replace(ORGANS, num_cases=9)
    grown = joined_space(
        before, build_label_space([more], layout="per_dataset", max_targets=2), where="x"
    )
    assert grown.heads == before.heads
    assert grown.dataset("organs").num_cases == 9
    for labels, message in (
        (replace(ORGANS, channels=("MR",)), "organs has other channels in the store"),
        (replace(ORGANS, targets=ORGANS.targets[:2]), "organs has other targets in the store"),
        (replace(ORGANS, ignore=9), "organs has other targets in the store"),
    ):
        changed = build_label_space([labels], layout="per_dataset", max_targets=2)
        with pytest.raises(ConfigError, match=message):
            joined_space(before, changed, where="x")
    with pytest.raises(ConfigError, match="layout per_dataset, the store's joint"):
        joined_space(before, build_label_space([LUNG], layout="joint"), where="x")


def test_a_data_set_split_otherwise_is_refused() -> None:
    before = build_label_space([ORGANS], layout="per_dataset", max_targets=2)
    with pytest.raises(ConfigError, match="other targets"):
        joined_space(before, build_label_space([ORGANS], layout="per_dataset"), where="x")


def test_another_grid_is_refused() -> None:
    before = StorePlan(spacing_mm=(1.0, 1.0, 2.0))
    with pytest.raises(ConfigError, match="x: its data were prepared with spacing_mm"):
        joined_plan(before, StorePlan(), where="x")
