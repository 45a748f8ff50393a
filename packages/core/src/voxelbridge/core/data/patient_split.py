"""Which cases train and which validate: no patient does both."""

from collections.abc import Mapping

import numpy as np

from voxelbridge.core.data.case_store import CaseStore

MIN_PATIENTS_TO_SPLIT = 10  # fewer patients all train
PATIENTS_PER_VALIDATION_PATIENT = 20
MAX_VALIDATION_PATIENTS = 50
_SPLIT_STREAM = 2  # keeps the random stream of the split apart from training's


def split_cases(patients: Mapping[str, str], *, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation cases, both sorted, from the patient of each case.

    One patient in 20 validates with all cases, at least one and at most 50, drawn by `seed` from
    the sorted names; with fewer than 10 patients none does.
    """
    names = sorted(set(patients.values()))
    if len(names) < MIN_PATIENTS_TO_SPLIT:
        return sorted(patients), []
    count = min(MAX_VALIDATION_PATIENTS, max(1, len(names) // PATIENTS_PER_VALIDATION_PATIENT))
    rng = np.random.default_rng(np.random.SeedSequence((seed, _SPLIT_STREAM)))
    chosen = {names[index] for index in rng.permutation(len(names))[:count]}
    training = sorted(case for case, patient in patients.items() if patient not in chosen)
    return training, sorted(case for case, patient in patients.items() if patient in chosen)


def patients_of(store: CaseStore) -> dict[str, str]:
    """The patient of each case of a store; a case whose patient is not known is its own."""
    return {record.case_id: record.provenance.patient or record.case_id for record in store.cases}
