"""Further data sets for an existing run: a new run that begins with all that the old one learnt.

Data sets that the old run knows keep their stems, heads and channels; those that it does not know
get new ones behind them. Trunk and decoder must be the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import sha256_of
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.grow import grow
from voxelbridge.pretrain_sup.label_space import JOINT_LAYER, LabelSpace
from voxelbridge.pretrain_sup.model import SegmentationNetwork
from voxelbridge.pretrain_sup.plan import StorePlan
from voxelbridge.pretrain_sup.weights import read_run, saved_weights


@dataclass(frozen=True)
class Extension:
    """An earlier run, and what its labels and plan become together with those of a store."""

    run: Path
    before: LabelSpace
    space: LabelSpace
    plan: StorePlan
    identity: str  # SHA-256 of what the run says about its data

    def take_over(self, network: SegmentationNetwork) -> dict[str, Any]:  # Any: JSON values
        """Copies the run's last saved weights, all of them, into `network`; what became of them."""
        saved = saved_weights(self.run)
        growth = grow(network, saved.tensors, outputs=self._outputs())
        return {
            "schema": 1,
            "run": self.run.resolve().name,
            "steps": saved.steps,
            "datasets": [dataset.name for dataset in self.before.datasets],
            "kept_tensors": len(saved.tensors),
            "stems": list(growth.stems),
            "heads": list(growth.heads),
            "widened": list(growth.widened),
        }

    def _outputs(self) -> dict[str, Sequence[int]]:
        """Where the old outputs stand in layers that got more of them."""
        before, now = self.before.output_layers, self.space.output_layers
        match self.space.layout:
            case "joint" if before[JOINT_LAYER] < now[JOINT_LAYER]:
                return {JOINT_LAYER: range(before[JOINT_LAYER])}
            case _:
                return {}


def read_extension(
    run: Path, config: MultiTalentConfig, space: LabelSpace, plan: StorePlan
) -> Extension:
    """The run `run`, whose network is to learn the data sets of `space` as well.

    Raises ConfigError where network, labels or plan of the two cannot be one.
    """
    old_config, old_space, old_plan = read_run(run)
    for key in ("encoder", "decoder"):
        ours, theirs = getattr(config, key), getattr(old_config, key)
        if ours != theirs:
            raise ConfigError(
                f"--extend {run}: the run has {key} {theirs}, this one {ours}; take the same preset"
            )
    return Extension(
        run,
        old_space,
        joined_space(old_space, space, where=f"--extend {run}"),
        joined_plan(old_plan, plan, where=f"--extend {run}"),
        sha256_of(run / "data.json"),
    )


def joined_space(before: LabelSpace, store: LabelSpace, *, where: str) -> LabelSpace:
    """The data sets of `before` in their places, then those that `store` alone has.

    A data set that both have must have the same channels and heads; else a ConfigError that begins
    with `where`.
    """
    if before.layout != store.layout:
        raise ConfigError(
            f"{where}: its labels have the layout {before.layout}, the store's {store.layout}; "
            "prepare the store with the same"
        )
    known = {dataset.name: dataset for dataset in before.datasets}
    for dataset in store.datasets:
        if dataset.name not in known:
            continue
        for what, ours, theirs in (
            ("channels", dataset.channels, known[dataset.name].channels),
            ("targets", store.heads_of(dataset.name), before.heads_of(dataset.name)),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"{where}: data set {dataset.name} has other {what} in the store; prepare it "
                    "as it was, or under another name"
                )
    now = {dataset.name: dataset for dataset in store.datasets}
    added = [dataset for dataset in store.datasets if dataset.name not in known]
    heads = [head for head in store.heads if head.dataset not in known]
    datasets = (*(now.get(name, dataset) for name, dataset in known.items()), *added)
    return LabelSpace(store.layout, datasets, (*before.heads, *heads), store.max_targets)


def joined_plan(before: StorePlan, store: StorePlan, *, where: str) -> StorePlan:
    """The plan of all data sets of both; what the store has counts where both have one."""
    for key in ("spacing_mm", "normalization", "resampling"):
        theirs, ours = getattr(before, key), getattr(store, key)
        if theirs != ours:
            raise ConfigError(
                f"{where}: its data were prepared with {key} {theirs}, the store's with {ours}; "
                "prepare the store with the same"
            )
    return store.model_copy(update={"datasets": {**before.datasets, **store.datasets}})
