"""Cross-validation folds by patient, written beside the case store as `splits.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import read_json, write_json

FILE_NAME = "splits.json"
NUM_FOLDS = 5
SEED = 12345  # nnU-Net's and nnDetection's, so that equal names give equal folds

Split = dict[str, list[str]]  # "train" and "val" -> case ids


def make_splits(case_ids: Sequence[str], groups: Mapping[str, str]) -> list[Split]:
    """Up to five folds over sorted patients; all cases of a patient are on one side.

    `groups` names the patient of a case; a case without one is a patient of its own. Fewer than
    five patients give a fold each; a single patient gives one fold that validates on its own
    training cases, since nothing else is there.
    """
    from sklearn.model_selection import KFold  # 300 MB of imports, which prepare's workers spare

    patient = {case_id: groups.get(case_id, case_id) for case_id in sorted(case_ids)}
    patients = sorted(set(patient.values()))
    if len(patients) < 2:
        return [{"train": list(patient), "val": list(patient)}]
    folds = KFold(min(NUM_FOLDS, len(patients)), shuffle=True, random_state=SEED)
    splits = []
    for _, validation in folds.split(patients):
        held_out = {patients[index] for index in validation}
        splits.append(
            {
                "train": [case for case, name in patient.items() if name not in held_out],
                "val": [case for case, name in patient.items() if name in held_out],
            }
        )
    return splits


def write_splits(store: Path, splits: Sequence[Split]) -> None:
    """Writes the folds into the store."""
    write_json(store / FILE_NAME, list(splits))


def read_splits(store: Path) -> list[Split]:
    """The folds of a prepared store."""
    path = store / FILE_NAME
    if not path.is_file():
        raise DataError(f"{path}: missing; is {store} a store written by `vb-detect prepare`?")
    splits: list[Split] = read_json(path)
    return splits
