"""Planning: target spacing, normalisation, anchors, queries, overrides, round trip."""

import json
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.normalize import CTPercentile, ZScore
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.detect.fingerprint import CaseFingerprint
from voxelbridge.detect.plan import Plan, make_plan, median_spacing, read_plan, write_plan
from voxelbridge.detect.plan_request import PlanRequest, parse_bytes, parse_request

Triple = tuple[float, float, float]
FIXED = PlanRequest("fixed")
DEFAULT = PlanRequest("default")


def fingerprint(
    number: int,
    shape: tuple[int, int, int],
    spacing: Triple,
    *,
    centres_mm: tuple[Triple, ...] = ((5.0, 5.0, 5.0),),
    size: Triple = (4.0, 5.0, 6.0),  # voxels
    kept: float = 1.0,
    samples: tuple[float, ...] = (0.0, 100.0, 50.0),
) -> CaseFingerprint:
    count = len(centres_mm)
    return CaseFingerprint(
        case_id=f"c{number}",
        shape=shape,
        spacing_mm=spacing,
        kept_by_crop=kept,
        boxes=np.tile(np.array([0, 0, 0, *size], dtype=np.float32), (count, 1)),
        labels=np.zeros(count, dtype=np.int64),
        centres_mm=np.array(centres_mm, dtype=np.float64).reshape(-1, 3),
        sizes_mm=np.tile(np.array(size) * np.array(spacing), (count, 1)),
        samples=np.array([samples], dtype=np.float32),
    )


def plan_of(
    cases: list[CaseFingerprint], request: PlanRequest = DEFAULT, channel: str = "CT"
) -> Plan:
    return make_plan(cases, request, channel_names=[channel], class_names=["a"])


def test_isotropic_data_get_their_median() -> None:
    cases = [fingerprint(n, (100, 100, 100), (s, 1.0, 1.0)) for n, s in enumerate((1.0, 2.0, 2.5))]
    assert median_spacing(cases) == (2.0, 1.0, 1.0)


def test_a_very_coarse_axis_is_taken_at_its_tenth_percentile() -> None:
    spacings = (3.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)
    shape = (30, 200, 200)
    cases = [fingerprint(n, shape, (s, 1.0, 1.0)) for n, s in enumerate(spacings)]
    assert median_spacing(cases) == (5.0, 1.0, 1.0)
    finer = [fingerprint(n, shape, (s, 1.0, 1.0)) for n, s in enumerate((3.0, *spacings))]
    assert median_spacing(finer)[0] == pytest.approx(3.2)
    finest = [fingerprint(n, shape, (s, 1.0, 1.0)) for n, s in enumerate((0.5,) * 3 + (5.0,) * 8)]
    assert median_spacing(finest)[0] == pytest.approx(1.0, abs=1e-4)


def test_a_coarse_axis_with_many_slices_keeps_its_median() -> None:
    cases = [fingerprint(n, (150, 200, 200), (s, 1.0, 1.0)) for n, s in enumerate((1.0, 5.0, 5.0))]
    assert median_spacing(cases) == (5.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["CT", "ct"])
def test_ct_channels_use_the_foreground(name: str) -> None:
    cases = [fingerprint(0, (10, 10, 10), (1.0, 1.0, 1.0))]
    scheme = plan_of(cases, channel=name).normalization[0]
    assert isinstance(scheme, CTPercentile)
    assert scheme.mean == pytest.approx(50.0)
    assert plan_of(cases, channel="T1").normalization == (ZScore(),)


def test_healthy_cases_do_not_pull_the_ct_figures_to_air() -> None:
    sick = fingerprint(0, (10, 10, 10), (1.0, 1.0, 1.0))
    healthy = fingerprint(1, (10, 10, 10), (1.0, 1.0, 1.0), centres_mm=(), samples=(-1000.0,) * 3)
    both, alone = plan_of([sick, healthy]).normalization[0], plan_of([healthy]).normalization[0]
    assert isinstance(both, CTPercentile)
    assert both.mean == pytest.approx(50.0)
    assert isinstance(alone, CTPercentile)
    assert alone.mean == pytest.approx(-1000.0)


def test_images_that_lost_their_background_are_scored_inside() -> None:
    cases = [fingerprint(n, (10, 10, 10), (1.0, 1.0, 1.0), kept=0.7) for n in range(3)]
    assert plan_of(cases, channel="MR").normalization == (ZScore(nonzero_only=True),)
    kept = [fingerprint(n, (10, 10, 10), (1.0, 1.0, 1.0), kept=0.75) for n in range(3)]
    assert plan_of(kept, channel="MR").normalization == (ZScore(),)


def test_the_fixed_plan_is_the_papers() -> None:
    plan = plan_of([fingerprint(0, (50, 400, 400), (3.0, 0.7, 0.7))], FIXED)
    assert plan.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.patch_size == (128, 128, 128)
    assert plan.batch_size == 4
    assert plan.features == (32, 64, 128, 256, 320, 320)
    assert plan.strides == ((1, 1, 1), *((2, 2, 2),) * 5)
    assert plan.kernels == ((3, 3, 3),) * 6
    assert plan.head_levels == (2, 3, 4, 5)
    assert plan.head_strides == ((4, 4, 4), (8, 8, 8), (16, 16, 16), (32, 32, 32))


def test_anisotropic_data_get_anisotropic_stages() -> None:
    plan = plan_of([fingerprint(n, (40, 320, 320), (5.0, 0.8, 0.8)) for n in range(3)])
    assert plan.kernels[0] == (1, 3, 3)
    assert plan.strides[1] == (1, 2, 2)
    assert plan.patch_size[0] < plan.patch_size[1]
    assert plan.memory_gib["plain"] <= plan.gpu_memory_gib


def test_more_memory_gives_a_larger_patch() -> None:
    cases = [fingerprint(0, (300, 300, 300), (1.0, 1.0, 1.0))]
    small, large = (
        plan_of(cases, parse_request("default", gpu_memory=memory)) for memory in ("6GiB", "24GiB")
    )
    assert np.prod(small.patch_size) < np.prod(large.patch_size)
    for plan in (small, large):
        assert plan.memory_gib["plain"] <= plan.gpu_memory_gib


def test_queries_follow_the_crowd_within_a_patch() -> None:
    near = tuple((10.0 + n, 10.0, 10.0) for n in range(9))
    plan = plan_of([fingerprint(0, (200, 200, 200), (1.0, 1.0, 1.0), centres_mm=near)], FIXED)
    assert plan.objects_per_patch == 9.0
    assert plan.num_queries == 27
    # 64 voxels is half a patch: further away they are never together.
    far = tuple((10.0 + 65.0 * n, 10.0, 10.0) for n in range(3))
    alone = plan_of([fingerprint(0, (300, 300, 300), (1.0, 1.0, 1.0), centres_mm=far)], FIXED)
    assert alone.objects_per_patch == 1.0
    assert alone.num_queries == 12


def test_no_object_at_all_is_planned_and_noted() -> None:
    plan = plan_of([fingerprint(0, (64, 64, 64), (1.0, 1.0, 1.0), centres_mm=())])
    assert plan.num_queries == 12
    assert plan.anchor_overlap is None
    assert plan.num_objects_per_class == (0,)
    assert any("no case has an object" in note for note in plan.notes)


def test_objects_larger_than_the_patch_are_noted() -> None:
    big = fingerprint(0, (400, 200, 200), (1.0, 1.0, 1.0), size=(300.0, 20.0, 20.0))
    assert any("exceed the patch" in note for note in plan_of([big], FIXED).notes)
    small = fingerprint(0, (400, 200, 200), (1.0, 1.0, 1.0))
    assert not any("exceed the patch" in note for note in plan_of([small], FIXED).notes)


def test_sizes_are_in_voxels_of_the_target_spacing() -> None:
    cases = [fingerprint(0, (10, 10, 10), (2.0, 1.0, 1.0))]
    plan = make_plan(cases, FIXED, channel_names=["MR"], class_names=["a", "b"])
    assert plan.object_sizes == ((8.0, 5.0, 6.0),)
    assert plan.median_shape == (20, 10, 10)
    assert plan.num_objects_per_class == (1, 0)
    coarse = parse_request("fixed", spacing_mm=(2.0, 2.0, 2.0))
    assert plan_of(cases, coarse).object_sizes == ((4.0, 2.5, 3.0),)


def test_the_order_of_cases_does_not_matter() -> None:
    cases = [
        fingerprint(n, (100 + n, 90, 80), (1.0 + n / 10, 1.0, 1.0), size=(4.0 + n, 5.0, 6.0))
        for n in range(5)
    ]
    assert plan_of(cases) == plan_of(cases[::-1])


def test_every_field_can_be_set() -> None:
    request = parse_request(
        "default",
        settings=[
            "spacing_mm=[2, 1, 1]",
            "patch_size=[16,64,64]",
            "batch_size=2",
            "strides=[[1,1,1],[1,2,2],[2,2,2]]",
            "kernels=[[1,3,3],[3,3,3],[3,3,3]]",
            "features=[8,16,32]",
            "head_levels=[1,2]",
            "num_queries=50",
            "anchor_sizes=[[[2],[4],[4]],[[4],[8],[8]]]",
            'normalization=[{"name":"zscore","nonzero_only":true}]',
        ],
    )
    plan = plan_of([fingerprint(0, (100, 200, 200), (3.0, 1.0, 1.0))], request)
    assert plan.spacing_mm == (2.0, 1.0, 1.0)
    assert plan.patch_size == (16, 64, 64)
    assert plan.batch_size == 2
    assert plan.features == (8, 16, 32)
    assert plan.head_strides == ((1, 2, 2), (2, 4, 4))
    assert plan.num_queries == 50
    assert plan.anchor_sizes[0] == ((2.0,), (4.0,), (4.0,))
    assert plan.normalization == (ZScore(nonzero_only=True),)
    assert "patch_size=[16, 64, 64]" in plan.overrides


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "patch_size=[100,100,100]",
            r"patch_size \[100, 100, 100\]: every edge must be a multiple",
        ),
        ("patch_size=[32,64,64]", r"patch_size \[32, 64, 64\].*at least twice"),
        ("strides=[[2,2,2],[2,2,2]]", "the first stage keeps the resolution"),
        ("kernels=[[3,3,3]]", "strides has 6 stages and kernels has 1"),
        ("kernels=[[2,3,3]]", "must be odd"),
        ("features=[32,64]", "6 stages are planned, but features has 2"),
        ("head_levels=[5,6]", "6 stages are planned"),
        ("head_levels=[2,4]", "neighbouring"),
        ("anchor_sizes=[[[4],[4],[4]]]", "got 1 levels, expected 4"),
        ("anchor_sizes=[[[-4],[4],[4]]]", "anchor_sizes"),
        ("spacing_mm=[0,1,1]", "spacing_mm"),
        ("patchsize=[64,64,64]", "did you mean patch_size"),
        ("patch_size", "expected KEY=VALUE"),
        ("batch_size=four", "batch_size"),
    ],
)
def test_impossible_settings_are_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(
            [fingerprint(0, (100, 200, 200), (1.0, 1.0, 1.0))],
            parse_request("fixed", settings=[setting]),
        )


@pytest.mark.parametrize("text", ["24", "GiB", "24 gib", "0GiB", "-1GiB", "1e3GiB", "", "24GiBx"])
def test_a_memory_without_a_clear_unit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory: got"):
        parse_bytes(text, option="--gpu-memory")


def test_memory_sizes_are_read_exactly() -> None:
    assert parse_bytes("24GiB", option="x") == 24 * 2**30
    assert parse_bytes("1.5 GB", option="x") == 1_500_000_000
    assert parse_bytes("512MiB", option="x") == 2**29


def test_no_case_is_an_error() -> None:
    with pytest.raises(DataError, match="no readable training case"):
        plan_of([])


def test_a_written_plan_reads_back_equal_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    plan = plan_of([fingerprint(0, (10, 10, 10), (0.7, 1.0, 1.0))])
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    text = (tmp_path / "plan.json").read_text()
    assert '"patch_size": [' in text
    (tmp_path / "plan.json").write_text(text.replace('"rule": "default"', '"rule": "other"'))
    with pytest.raises(ConfigError, match=r"plan\.json: rule"):
        read_plan(tmp_path)
    content = json.loads(text)
    (tmp_path / "plan.json").write_text(json.dumps(content | {"patch_size": [10, 10, 11]}))
    with pytest.raises(ConfigError, match=r"plan\.json: .*patch_size \[10, 10, 11\]"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(content | {"schema": 1}))
    with pytest.raises(DataError, match=r"schema 1, this version reads 2"):
        read_plan(tmp_path)
