"""Splits keep patients together, depend on the seed only, and use every case."""

from hypothesis import given, settings
from hypothesis import strategies as st

from voxelbridge.detect.convert.splits import patient_folds, patient_split

PATIENTS = st.dictionaries(st.text("abc", min_size=1), st.sampled_from("uvwxyz"), min_size=2)


@settings(deadline=None, max_examples=25)
@given(PATIENTS, st.integers(0, 5))
def test_no_patient_is_on_two_sides(patients: dict[str, str], seed: int) -> None:
    train, test = patient_split(patients, test_fraction=0.3, seed=seed)
    assert sorted([*train, *test]) == sorted(patients)
    assert not {patients[case] for case in train} & {patients[case] for case in test}
    folds = patient_folds(patients, seed=seed)
    for fold in folds:
        assert sorted([*fold["train"], *fold["val"]]) == sorted(patients)
        held_out = {patients[case] for case in fold["val"]}
        assert not held_out & {patients[case] for case in fold["train"]}
    if folds:
        assert sorted(case for fold in folds for case in fold["val"]) == sorted(patients)


def test_fraction_counts_patients_and_the_seed_decides() -> None:
    patients = {f"c{n:03d}": f"p{n // 2:03d}" for n in range(200)}
    first = patient_split(patients, test_fraction=0.15, seed=0)
    assert len(first[1]) == 30
    assert first == patient_split(dict(reversed(patients.items())), test_fraction=0.15, seed=0)
    assert first != patient_split(patients, test_fraction=0.15, seed=1)


def test_a_single_patient_trains_and_has_no_folds() -> None:
    patients = {"a": "p", "b": "p"}
    assert patient_split(patients, test_fraction=0.5, seed=0) == (["a", "b"], [])
    assert patient_folds(patients, seed=0) == []
