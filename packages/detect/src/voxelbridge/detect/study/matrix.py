"""The cells of a study with everything that their settings add up to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from voxelbridge.core.config import preset_path
from voxelbridge.core.errors import ConfigError
from voxelbridge.detect.build import load_detect_config
from voxelbridge.detect.config import DetectConfig, InitParts, TuneName
from voxelbridge.detect.study.config import Initialisation, Rule, Study
from voxelbridge.detect.study_cells import CellKey


@dataclass(frozen=True)
class Cell:
    """One training and what follows from it. Paths are absolute."""

    key: CellKey
    preset: str  # shipped name or path
    settings: tuple[str, ...]  # KEY=VALUE in the order in which they count, the seed last
    plan: str
    init: Path | None
    stem: str | None
    parts: InitParts | None
    tune: TuneName | None


@dataclass(frozen=True)
class _Row:
    """What one (data set, architecture, initialisation) comes to after all rules."""

    plan: str
    checkpoints: Mapping[str, str]
    checkpoint: str | None
    stem: str | None
    parts: InitParts | None
    tune: TuneName | None
    settings: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, init: Initialisation) -> "_Row":
        return cls(
            init.plan, init.checkpoints, init.checkpoint, init.stem, init.parts, init.tune
        )  # fmt: skip

    def changed(self, rule: Rule) -> "_Row":
        given = {
            name: value
            for name in ("plan", "checkpoint", "stem", "parts", "tune")
            if (value := getattr(rule, name)) is not None
        }
        if rule.checkpoint is not None:
            given["checkpoints"] = {}
        return replace(self, **given, settings=(*self.settings, *rule.settings))


def cells_of(study: Study) -> tuple[Cell, ...]:
    """Every cell, in the file's order: data sets, architectures, initialisations, folds, seeds.

    ConfigError for presets, settings and checkpoints that cannot be meant.
    """
    config = study.config
    presets = {name: _preset(study, name) for name in config.architectures}
    cells: list[Cell] = []
    for dataset in config.datasets:
        for architecture in config.architectures:
            for initialisation in config.initialisations:
                cells += _cells(study, presets[architecture], dataset, architecture, initialisation)
    if not cells:
        raise ConfigError(f"{study.source}: rules and exclusions leave no cell")
    _check_settings(study, cells)
    return tuple(cells)


def without_plan(settings: Sequence[str]) -> tuple[str, ...]:
    """`settings` as far as they mean something without a store."""
    return tuple(text for text in settings if text.replace(" ", "") != "architecture=plan")


def config_of(cell: Cell) -> DetectConfig:
    """The config of a cell as far as it is known without a store: an architecture that is to
    come from the plan is the preset's here. ConfigError for settings that do not exist."""
    return load_detect_config(cell.preset, without_plan(cell.settings))


def _cells(
    study: Study, preset: tuple[str, DetectConfig], dataset: str, architecture: str, init: str
) -> list[Cell]:
    config = study.config
    row = _row(study, dataset, architecture, init)
    if row is None:
        return []
    name, resolved_preset = preset
    place = f"initialisations.{init}"
    checkpoint = _checkpoint(row, architecture, resolved_preset.encoder, place)
    if config.datasets[dataset].raw is None and row.plan not in config.datasets[dataset].stores:
        raise ConfigError(
            f"{study.source}: datasets.{dataset}: {init} needs the plan {row.plan}, for which "
            "there is neither raw nor a store; state one, or exclude the cell by a rule"
        )
    if checkpoint is None and (row.stem is not None or row.parts is not None):
        raise ConfigError(
            f"{study.source}: {place}: stem and parts need a checkpoint; state one, or leave "
            "them out"
        )
    settings = (
        *config.settings,
        *config.architectures[architecture].settings,
        *config.initialisations[init].settings,
        *config.datasets[dataset].settings,
        *row.settings,
    )
    return [
        Cell(
            key=CellKey(dataset, architecture, init, fold=fold, seed=seed),
            preset=name,
            settings=(*settings, f"seed={seed}"),
            plan=row.plan,
            init=study.path(checkpoint) if checkpoint else None,
            stem=row.stem if checkpoint else None,
            parts=row.parts,
            tune=row.tune,
        )
        for fold in config.datasets[dataset].folds or config.folds
        for seed in config.seeds
    ]


def _row(study: Study, dataset: str, architecture: str, init: str) -> _Row | None:
    """None where the cell is excluded."""
    stated = study.config.initialisations[init]
    if stated.architectures is not None and architecture not in stated.architectures:
        return None
    if stated.datasets is not None and dataset not in stated.datasets:
        return None
    row = _Row.of(stated)
    for rule in study.config.rules:
        if rule.covers(dataset, architecture, init):
            if rule.exclude:
                return None
            row = row.changed(rule)
    return row


def _checkpoint(row: _Row, architecture: str, encoder: str, place: str) -> str | None:
    if row.checkpoint is not None:
        return row.checkpoint
    if not row.checkpoints:
        return None
    for name in (architecture, encoder):
        if name in row.checkpoints:
            return row.checkpoints[name]
    raise ConfigError(
        f"{place}.checkpoints: none for {architecture} or its encoder {encoder}; add it, or "
        f"leave {architecture} out with {place}.architectures"
    )


def _check_settings(study: Study, cells: Sequence[Cell]) -> None:
    """Every combination of settings is tried once, so that no training fails for a misspelling."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for cell in cells:
        key = (cell.preset, cell.settings[:-1])
        if key in seen:
            continue
        seen.add(key)
        try:
            config_of(cell)
        except ConfigError as error:
            raise ConfigError(f"{study.source}: settings of {cell.key}: {error}") from None


def _preset(study: Study, architecture: str) -> tuple[str, DetectConfig]:
    """The preset's name, or its file relative to the study's, and what it states."""
    stated = study.config.architectures[architecture]
    name = stated.preset
    if Path(name).suffix in (".toml", ".json"):
        name = str(study.path(name))
    place = f"{study.source}: architectures.{architecture}.preset"
    try:
        preset_path("voxelbridge.detect", name)
        return name, load_detect_config(name)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
