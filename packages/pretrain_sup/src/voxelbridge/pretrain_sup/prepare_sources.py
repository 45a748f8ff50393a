"""What `vb-sup prepare` works on: raw data sets, and what the store says about them already.

A store keeps its plan and its label space; everything that does not fit them is refused here,
before anything is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from voxelbridge.core.data.dataset import RawDataset
from voxelbridge.core.data.provenance import Provenance
from voxelbridge.core.data.raw_problems import few_of
from voxelbridge.core.data.survey import Spacing
from voxelbridge.core.errors import ConfigError
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels
from voxelbridge.pretrain_sup.declaration import (
    LabelDeclaration,
    read_datasets,
    read_declaration,
)
from voxelbridge.pretrain_sup.label_space import FILE_NAME as LABEL_SPACE_FILE
from voxelbridge.pretrain_sup.label_space import (
    MAX_TARGETS,
    LabelSpace,
    Layout,
    build_label_space,
    read_label_space,
)
from voxelbridge.pretrain_sup.plan import (
    DatasetPlan,
    NormalizationRule,
    StorePlan,
    begin_plan,
)
from voxelbridge.pretrain_sup.prepare_case import SourceCase


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """What a person asks for; None: as the store already has it, or the default of a new one."""

    spacing_mm: Spacing | None = None
    normalization: NormalizationRule | None = None
    labels: Path | None = None  # a declaration in TOML
    max_targets: int | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class SourceDataset:
    """A raw data set and its labels under the name that it has in the store."""

    raw: RawDataset
    labels: DatasetLabels

    @property
    def name(self) -> str:
        return self.labels.name

    def cases(self) -> list[SourceCase]:
        return [SourceCase(case, self.name) for case in self.raw.cases]

    def provenance(self, case_id: str, plan: DatasetPlan) -> Provenance:
        return Provenance(
            patient=self.raw.groups.get(case_id),
            origin_ids=self.raw.origins.get(case_id, ()),
            dataset=self.name,
            modality=plan.modality,
        )


@dataclass(frozen=True)
class Inspected:
    """Data sets that fit a store, and its plan and label space before anything is done."""

    sources: tuple[SourceDataset, ...]
    plan: StorePlan
    known_space: LabelSpace | None  # None: the store has none yet
    layout: Layout | None  # asked for
    max_targets: int | None  # asked for

    def space_with(self, sources: Sequence[SourceDataset]) -> LabelSpace:
        """The label space of the store once it holds `sources`: those new to it come last."""
        if self.known_space is None:
            return build_label_space(
                [source.labels for source in sources],
                layout=self.layout or "per_dataset",
                max_targets=self.max_targets or MAX_TARGETS,
            )
        known = {dataset.name for dataset in self.known_space.datasets}
        new = [source.labels for source in sources if source.name not in known]
        return self.known_space.extended(new) if new else self.known_space


def inspect(datasets: Sequence[Path], store: Path, request: PrepareRequest) -> Inspected:
    """Opens the raw data sets by their names and descriptions, and checks them against the store.

    Raises ConfigError where the store was begun with another plan or other labels, and DataError
    for data sets that cannot be used together.
    """
    declaration = LabelDeclaration() if request.labels is None else read_declaration(request.labels)
    said = declaration.model_fields_set
    sources = _open(datasets, declaration, where=request.labels)
    plan = begin_plan(store, spacing_mm=request.spacing_mm, normalization=request.normalization)
    found = Inspected(
        sources,
        plan,
        _known_space(store, plan, sources, declared=request.labels is not None),
        request.layout or (declaration.layout if "layout" in said else None),
        request.max_targets or (declaration.max_targets if "max_targets" in said else None),
    )
    _check_rules(store, found)
    _check_channels(plan, sources)
    found.space_with(sources)  # names that collide are told now, not after an hour of reading
    _check_case_names(sources)
    return found


def _open(
    datasets: Sequence[Path], declaration: LabelDeclaration, *, where: Path | None
) -> tuple[SourceDataset, ...]:
    try:
        labels = read_datasets(datasets, declaration.datasets)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error
    return tuple(
        SourceDataset(RawDataset.open(folder), of_folder)
        for folder, of_folder in zip(datasets, labels, strict=True)
    )


def _known_space(
    store: Path, plan: StorePlan, sources: Sequence[SourceDataset], *, declared: bool
) -> LabelSpace | None:
    """The label space of the store; None while it has none. ConfigError where labels changed."""
    path = store / LABEL_SPACE_FILE
    if not path.exists():
        given = {source.name for source in sources}
        if missing := [name for name in plan.datasets if name not in given]:
            raise ConfigError(
                f"{path}: missing; give the folders of all data sets of the store to build it "
                f"again, also {', '.join(missing)}"
            )
        return None
    space = read_label_space(path)
    known = {dataset.name: dataset for dataset in space.datasets}
    for source in sources:
        before = known.get(source.name)
        if before is None:
            continue
        new = sorted(source.labels.legal_ids - before.legal_ids)
        if new or (declared and before != replace(source.labels, num_cases=before.num_cases)):
            what = f"label ids {few_of(new)} are new" if new else "other targets than before"
            raise ConfigError(f"{path}: data set {source.name}: {what}; {_keeps(path)}")
    return space


def _check_rules(store: Path, found: Inspected) -> None:
    space, path = found.known_space, store / LABEL_SPACE_FILE
    if space is None:
        return
    for name, before, asked in (
        ("layout", space.layout, found.layout),
        ("max_targets", space.max_targets, found.max_targets),
    ):
        if asked is not None and asked != before:
            raise ConfigError(f"{path}: {name} is {before}, asked for {asked}; {_keeps(path)}")


def _keeps(path: Path) -> str:
    return (
        f"a store keeps its label space: leave it so, or remove {path.name} and give all data sets"
    )


def _check_channels(plan: StorePlan, sources: Sequence[SourceDataset]) -> None:
    for source in sources:
        before = plan.datasets.get(source.name)
        if before is not None and before.channel_names != source.raw.channel_names:
            raise ConfigError(
                f"data set {source.name}: channels {', '.join(source.raw.channel_names)}, in the "
                f"store {', '.join(before.channel_names)}; declare another name for the new one"
            )


def _check_case_names(sources: Sequence[SourceDataset]) -> None:
    """ConfigError where two cases would get one name in the store."""
    seen: dict[str, SourceCase] = {}
    for source in sources:
        for case in source.cases():
            other = seen.setdefault(case.case_id, case)
            if other is not case:
                raise ConfigError(
                    f"{other} and {case}: both would be {case.case_id} in the store; rename one"
                )
