from voxelbridge.core.data.patient_split import split_cases


def test_no_patient_is_on_both_sides() -> None:
    patients = {f"case{n:03d}": f"p{n // 3}" for n in range(300)}
    training, validation = split_cases(patients, seed=3)
    assert sorted(training + validation) == sorted(patients)
    assert not {patients[case] for case in training} & {patients[case] for case in validation}
    assert len(validation) == 15  # 5 of 100 patients


def test_at_least_one_and_at_most_50_patients_validate() -> None:
    for patients, expected in ((9, 0), (10, 1), (39, 1), (40, 2), (5_000, 50)):
        names = {f"case{n}": f"case{n}" for n in range(patients)}
        assert len(split_cases(names, seed=0)[1]) == expected


def test_the_split_depends_on_names_and_seed_alone() -> None:
    names = [f"case{n}" for n in range(40)]
    forward = split_cases({name: name for name in names}, seed=0)
    assert forward == split_cases({name: name for name in reversed(names)}, seed=0)
    assert forward != split_cases({name: name for name in names}, seed=1)
