"""Seeded splits by patient: a test set and cross-validation folds of the rest."""

from collections.abc import Mapping

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, KFold

from voxelbridge.detect.splits import Split

NUM_FOLDS = 5  # one fold held out is the 80/20 of the published splits


def patient_split(
    patients: Mapping[str, str], *, test_fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """Train and test cases of `patients` (case -> patient), all of a patient on one side.

    The fraction counts patients. Sorted ids; the same cases and seed give the same split. A single
    patient stays in train.
    """
    cases = sorted(patients)
    names = [patients[case] for case in cases]
    if len(set(names)) < 2 or test_fraction <= 0:
        return cases, []
    splitter = GroupShuffleSplit(1, test_size=test_fraction, random_state=seed)
    train, test = next(splitter.split(np.zeros(len(cases)), groups=names))
    return [cases[index] for index in train], [cases[index] for index in test]


def patient_folds(
    patients: Mapping[str, str], *, seed: int, num_folds: int = NUM_FOLDS
) -> list[Split]:
    """Folds of `patients` (case -> patient) by patient; fewer patients give fewer folds.

    A single patient gives none.
    """
    names = sorted(set(patients.values()))
    if len(names) < 2:
        return []
    cases = sorted(patients)
    folds = KFold(min(num_folds, len(names)), shuffle=True, random_state=seed)
    splits: list[Split] = []
    for _, held_out in folds.split(names):
        val = {names[index] for index in held_out}
        splits.append(
            {
                "train": [case for case in cases if patients[case] not in val],
                "val": [case for case in cases if patients[case] in val],
            }
        )
    return splits
