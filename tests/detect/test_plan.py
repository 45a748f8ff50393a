"""Planning: target spacing, normalisation by channel name, round trip."""

from pathlib import Path

import pytest

from voxelbridge.core.data.normalize import CTPercentile, ZScore
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.plan import (
    CaseFingerprint,
    make_plan,
    median_spacing,
    read_plan,
    write_plan,
)


def _case(
    number: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> CaseFingerprint:
    return CaseFingerprint(
        case_id=f"c{number}",
        shape=shape,
        spacing_mm=spacing,
        boxes=((0, 0, 0, 4, 5, 6),),
        object_sizes_mm=((4.0 * spacing[0], 5.0 * spacing[1], 6.0 * spacing[2]),),
        labels=(0,),
        intensity_samples=((0.0, 100.0, 50.0),),
    )


def test_isotropic_data_get_their_median() -> None:
    cases = [_case(n, (100, 100, 100), (s, 1.0, 1.0)) for n, s in enumerate((1.0, 2.0, 2.5))]
    assert median_spacing(cases) == (2.0, 1.0, 1.0)


def test_a_very_coarse_axis_is_taken_at_its_tenth_percentile() -> None:
    spacings = (3.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)
    cases = [_case(n, (30, 200, 200), (s, 1.0, 1.0)) for n, s in enumerate(spacings)]
    assert median_spacing(cases) == (5.0, 1.0, 1.0)
    finer = [_case(n, (30, 200, 200), (s, 1.0, 1.0)) for n, s in enumerate((3.0, *spacings))]
    assert median_spacing(finer)[0] == pytest.approx(3.2)
    finest = [
        _case(n, (30, 200, 200), (s, 1.0, 1.0)) for n, s in enumerate((0.5,) * 3 + (5.0,) * 8)
    ]
    assert median_spacing(finest)[0] == pytest.approx(1.0, abs=1e-4)


def test_a_coarse_axis_with_many_slices_keeps_its_median() -> None:
    cases = [_case(n, (150, 200, 200), (s, 1.0, 1.0)) for n, s in enumerate((1.0, 5.0, 5.0))]
    assert median_spacing(cases) == (5.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["CT", "ct"])
def test_ct_channels_use_the_foreground(name: str) -> None:
    cases = [_case(0, (10, 10, 10), (1.0, 1.0, 1.0))]
    plan = make_plan(cases, rule="default", channel_names=[name], class_names=["a"])
    scheme = plan.normalization[0]
    assert isinstance(scheme, CTPercentile)
    assert scheme.mean == pytest.approx(50.0)
    plan = make_plan(cases, rule="default", channel_names=["T1"], class_names=["a"])
    assert plan.normalization == (ZScore(),)


def test_sizes_are_in_voxels_of_the_target_spacing() -> None:
    cases = [_case(0, (10, 10, 10), (2.0, 1.0, 1.0))]
    plan = make_plan(cases, rule="fixed", channel_names=["MR"], class_names=["a", "b"])
    assert plan.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.object_sizes == ((8.0, 5.0, 6.0),)
    assert plan.median_shape == (20, 10, 10)
    assert plan.num_objects_per_class == (1, 0)
    other = make_plan(
        cases, rule="fixed", channel_names=["MR"], class_names=["a"], spacing_mm=(2.0, 2.0, 2.0)
    )
    assert other.object_sizes == ((4.0, 2.5, 3.0),)


def test_no_case_is_an_error() -> None:
    with pytest.raises(DataError, match="no readable training case"):
        make_plan([], rule="default", channel_names=["CT"], class_names=["a"])


def test_a_written_plan_reads_back_equal_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    cases = [_case(0, (10, 10, 10), (0.7, 1.0, 1.0))]
    plan = make_plan(cases, rule="default", channel_names=["CT"], class_names=["a"])
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"rule": "default"', '"rule": "other"'))
    with pytest.raises(ConfigError, match=r"plan\.json: rule"):
        read_plan(tmp_path)
