"""The list of public data sets that share scans: sound in itself, and found under usual names."""

from collections import Counter

import pytest

from voxelbridge.core.data.known_overlaps import KnownOverlaps, read_known_overlaps


@pytest.fixture(scope="module")
def known() -> KnownOverlaps:
    return read_known_overlaps()


def test_slugs_are_unique_and_overlaps_name_two_of_them_once(known: KnownOverlaps) -> None:
    slugs = Counter(dataset.slug for dataset in known.datasets)
    assert set(slugs.values()) == {1}
    pairs = Counter(frozenset(overlap.between) for overlap in known.overlaps)
    assert set(pairs.values()) == {1}
    assert all(len(pair) == 2 and pair <= slugs.keys() for pair in pairs)


def test_no_name_stands_for_two_data_sets(known: KnownOverlaps) -> None:
    for dataset in known.datasets:
        for name in (dataset.slug, dataset.name, *dataset.aliases):
            assert known.slug(name) == dataset.slug, name


def test_the_eight_detection_data_sets_are_listed_and_come_second(known: KnownOverlaps) -> None:
    numbers = {dataset.detection: dataset.slug for dataset in known.datasets if dataset.detection}
    assert sorted(numbers) == [f"D0{n}" for n in range(1, 9)]
    measured = set(numbers.values())
    for overlap in known.overlaps:
        if measured & set(overlap.between):
            assert overlap.between[1] in measured
            assert overlap.exclude


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("kits21", "kits"),
        ("KiTS_2023", "kits"),
        ("Dataset220_KiTS2023", "kits"),
        ("Task020FG_RibFrac", "ribfrac"),
        ("Task07_Pancreas", "msd-pancreas"),
        ("Dataset023_AbdomenAtlas1.1Mini", "abdomenatlas"),
        ("LIDC-IDRI", "lidc"),
        ("pancreas", None),  # of which collection?
        ("Dataset500_Mine", None),
        ("", None),
    ],
)
def test_names_are_recognised_without_guessing(
    known: KnownOverlaps, name: str, slug: str | None
) -> None:
    assert known.slug(name) == slug


def test_overlaps_between_names_do_not_depend_on_the_order(known: KnownOverlaps) -> None:
    there = known.between(["AbdomenAtlas1.1Mini", "mine"], ["kits21", "lidc"])
    back = known.between(["kits21", "lidc"], ["AbdomenAtlas1.1Mini", "mine"])
    assert [overlap.between for overlap in there] == [("abdomenatlas", "kits")]
    assert back == there
    assert known.between(["kits19"], ["kits21"]) == ()  # one data set: origins compare its cases
    assert known.between(["mine"], ["kits"]) == known.between([], []) == ()


def test_a_line_says_how_sure_it_is_and_what_to_leave_out(known: KnownOverlaps) -> None:
    (sure,) = known.between(["sega"], ["kits"])
    assert known.describe(sure).startswith("SegA (AVT) and KiTS (19, 21, 23) share scans: 20 of")
    assert "leave out: K1 to K20" in known.describe(sure)
    (perhaps,) = known.between(["msd-colon"], ["msd-pancreas"])
    assert "may share scans" in known.describe(perhaps)
