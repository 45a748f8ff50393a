"""The cells of a study: which they are, where their results lie, and what is there.

`RESULTS/<dataset>/<architecture>/<initialisation>/fold_<k>_seed_<s>/` holds cases.csv,
ground_truth.csv, predictions.csv (docs/formats/predictions.md) and metrics.json. A cell whose
metrics.json is missing is not finished: it does not exist here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.core.files import read_json

CASES_FILE = "cases.csv"
GROUND_TRUTH_FILE = "ground_truth.csv"
PREDICTIONS_FILE = "predictions.csv"
METRICS_FILE = "metrics.json"
METRICS_SCHEMA = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_LAST_LEVEL = re.compile(r"fold_(0|[1-9][0-9]*)_seed_(0|[1-9][0-9]*)")


@dataclass(frozen=True, order=True)
class CellKey:
    """One training of a study. Names are folder names: letters, digits and `_ . + -`."""

    dataset: str
    architecture: str
    initialisation: str
    fold: int
    seed: int

    def __post_init__(self) -> None:
        for field in ("dataset", "architecture", "initialisation"):
            check_name(field, getattr(self, field))
        if self.fold < 0 or self.seed < 0:
            raise ConfigError(f"{self}: fold and seed must be 0 or more")

    def __str__(self) -> str:
        return self.path.as_posix()

    @property
    def path(self) -> Path:
        """Where the cell's results lie, relative to the folder of all results."""
        last = f"fold_{self.fold}_seed_{self.seed}"
        return Path(self.dataset, self.architecture, self.initialisation, last)


@dataclass(frozen=True)
class CellResult:
    """A finished cell. `metrics` is the parsed metrics.json; `folder` holds the tables too."""

    key: CellKey
    metrics: Mapping[str, Any]  # Any: docs/formats/predictions.md, metrics.json
    folder: Path

    @property
    def cases(self) -> Path:
        """cases.csv."""
        return self.folder / CASES_FILE

    @property
    def ground_truth(self) -> Path:
        """ground_truth.csv."""
        return self.folder / GROUND_TRUTH_FILE

    @property
    def predictions(self) -> Path:
        """predictions.csv."""
        return self.folder / PREDICTIONS_FILE


def check_name(field: str, name: str) -> None:
    """ConfigError unless `name` can be a folder of the results on every file system."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{field}: got {name!r}, expected letters, digits and _ . + - (it names a folder)"
        )


def read_cells(results: Path) -> list[CellResult]:
    """The finished cells under `results`, sorted by key; other files and folders are passed over.

    DataError for a folder that does not exist and a metrics.json that is none.
    """
    if not results.is_dir():
        raise DataError(f"{results}: no such folder; give the folder of a study's results")
    cells = [
        CellResult(key, read_metrics(path), path.parent)
        for path in results.glob(f"*/*/*/*/{METRICS_FILE}")
        if (key := _key(path.parent)) is not None
    ]
    return sorted(cells, key=lambda cell: cell.key)


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of a metrics.json; another schema or another file is a DataError."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"ap", "froc"} <= content.keys():
        raise DataError(f"{path}: no metrics of `vb-detect evaluate`; evaluate this cell again")
    if content.get("schema") != METRICS_SCHEMA:
        raise DataError(
            f"{path}: got schema {content.get('schema')}, expected {METRICS_SCHEMA}; "
            "evaluate this cell again"
        )
    return content


def _key(folder: Path) -> CellKey | None:
    """The key that the last four folder names spell, None where they spell none."""
    last = _LAST_LEVEL.fullmatch(folder.name)
    dataset, architecture, initialisation = folder.parts[-4:-1]
    names = (dataset, architecture, initialisation)
    if last is None or not all(_NAME.fullmatch(name) for name in names):
        return None
    return CellKey(*names, fold=int(last[1]), seed=int(last[2]))
