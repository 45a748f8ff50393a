"""The plan of a store of many data sets: one grid for all of them, intensities per data set.

Kept in the store as `prepare.json` (docs/multi_dataset_store.md). The network that is trained on
the store is shared, so that spacing and interpolation are one decision; what a data set adds is how
its channels are normalised.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from voxelbridge.core.config import Config, validate
from voxelbridge.core.data.normalize import Normalization, fit_ct, normalization_of
from voxelbridge.core.data.resample import Resampling
from voxelbridge.core.data.survey import Spacing
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json, write_json
from voxelbridge.pretrain_sup.fingerprint import CaseMeasures

FILE_NAME = "prepare.json"
SCHEMA = 1
DEFAULT_SPACING_MM = (1.0, 1.0, 1.0)

NormalizationRule = Literal["zscore", "ct", "auto"]
Millimetres = Annotated[float, Field(gt=0)]
PlanSpacing = tuple[Millimetres, Millimetres, Millimetres]  # z y x


class DatasetPlan(Config):
    """How the cases of one data set are stored, decided when it came into the store."""

    channel_names: tuple[str, ...]
    modality: str
    normalization: tuple[Normalization, ...]  # per channel
    spacing_mm: PlanSpacing  # of the stored arrays
    original_spacing_mm: PlanSpacing  # median over its files, in LPS order
    kept_by_crop: float  # median share of the voxels that the crop leaves

    @model_validator(mode="after")
    def _is_consistent(self) -> "DatasetPlan":
        if len(self.normalization) != len(self.channel_names):
            raise ValueError("normalization must have one scheme per channel")
        return self


class StorePlan(Config):
    """What all data sets of a store share, and what each of them has of its own."""

    spacing_mm: PlanSpacing = DEFAULT_SPACING_MM
    normalization: NormalizationRule = "zscore"
    resampling: Resampling = Resampling()
    datasets: dict[str, DatasetPlan] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_plan(self) -> "StorePlan":
        for name, dataset in self.datasets.items():
            if dataset.spacing_mm != self.spacing_mm:
                raise ValueError(
                    f"data set {name} has spacing {_by(dataset.spacing_mm)} mm, the store "
                    f"{_by(self.spacing_mm)} mm; all data sets of a store need the same plan"
                )
        return self

    def with_dataset(self, name: str, dataset: DatasetPlan) -> "StorePlan":
        """The plan of the store after `name` came in; ValueError if it does not fit."""
        datasets = {**self.datasets, name: dataset}
        return StorePlan(
            spacing_mm=self.spacing_mm,
            normalization=self.normalization,
            resampling=self.resampling,
            datasets=datasets,
        )


def plan_dataset(
    cases: Sequence[CaseMeasures], store: StorePlan, *, channel_names: Sequence[str]
) -> DatasetPlan:
    """The plan of a data set that comes into `store`, from its measured cases (at least one).

    "auto" is nnU-Net's rule: a channel called CT is clipped and scaled with the foreground of the
    data set, others are z-scored one by one; "ct" and "zscore" do the one or the other for all.
    """
    kept = float(np.median([case.kept_by_crop for case in cases]))
    schemes: list[Normalization] = []
    for channel, name in enumerate(channel_names):
        samples = np.concatenate([case.samples[channel] for case in cases])
        match store.normalization:
            case "zscore":
                schemes.append(normalization_of("", samples, kept_by_crop=kept))
            case "ct":
                schemes.append(fit_ct(samples))
            case "auto":
                schemes.append(normalization_of(name, samples, kept_by_crop=kept))
    z, y, x = (float(edge) for edge in np.median([case.spacing_mm for case in cases], axis=0))
    return DatasetPlan(
        channel_names=tuple(channel_names),
        modality="+".join(dict.fromkeys(channel_names)),
        normalization=tuple(schemes),
        spacing_mm=store.spacing_mm,
        original_spacing_mm=(z, y, x),
        kept_by_crop=kept,
    )


def needs_foreground(rule: NormalizationRule, channel_names: Sequence[str]) -> bool:
    """Whether planning looks at the intensities in the labels of a data set."""
    return rule == "ct" or (
        rule == "auto" and any(name.casefold() == "ct" for name in channel_names)
    )


def begin_plan(
    store: Path, *, spacing_mm: Spacing | None, normalization: NormalizationRule | None
) -> StorePlan:
    """The plan of the store, or of a new one; None means: as the store has it, or the default.

    Raises ConfigError where the store was begun with something else.
    """
    before = read_plan(store)
    if before is None:
        if store.is_dir() and any(store.iterdir()):
            raise ConfigError(
                f"{store}: holds files but no {FILE_NAME}; take an empty or a new folder"
            )
        tree = {
            "spacing_mm": list(spacing_mm or DEFAULT_SPACING_MM),
            "normalization": normalization or "zscore",
        }
        return validate(StorePlan, tree, where="prepare")
    different = []
    if spacing_mm is not None and tuple(spacing_mm) != before.spacing_mm:
        different.append(f"spacing {_by(before.spacing_mm)} mm, asked for {_by(spacing_mm)} mm")
    if normalization is not None and normalization != before.normalization:
        different.append(f"normalization {before.normalization}, asked for {normalization}")
    if different:
        raise ConfigError(
            f"{store}: its {len(before.datasets)} data sets ({', '.join(before.datasets)}) were "
            f"prepared with {'; '.join(different)}; all data sets of a store need the same plan: "
            "leave the option out, or take a new folder"
        )
    return before


def read_plan(store: Path) -> StorePlan | None:
    """The plan in `store`; None where there is none."""
    path = store / FILE_NAME
    if not path.exists():
        return None
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.pop("schema", None) != SCHEMA or "datasets" not in tree:
        raise DataError(
            f"{path}: not the plan of a store of several data sets (schema {SCHEMA}); "
            "take a new folder"
        )
    return validate(StorePlan, tree, where=str(path))


def write_plan(store: Path, plan: StorePlan) -> None:
    """Writes `prepare.json`."""
    write_json(store / FILE_NAME, {"schema": SCHEMA, **plan.model_dump(mode="json")})


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
