"""The report page: self-contained, escaped, complete, and true to its tables."""

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from voxelbridge.core.errors import DataError
from voxelbridge.detect import report_viewer
from voxelbridge.detect.evaluate.assign import true_positive_flags
from voxelbridge.detect.evaluate.metrics import compute_metrics
from voxelbridge.detect.evaluate.tables import BoxTable
from voxelbridge.detect.report import Arm, CaseImage, write_report
from voxelbridge.detect.report_curves import validation_charts, without_validation_figures
from voxelbridge.detect.report_images import MAX_SIDE, case_pictures, pictures_size
from voxelbridge.detect.report_outcomes import (
    FALSE,
    NOT_COUNTED,
    assess,
    score_at_rate,
    worst_errors,
)

HOSTILE = '<script>alert("1")</script>&\'"><img src=x onerror=alert(2)>'
VOID = {"meta", "link", "input", "img", "br", "hr", "rect", "circle"}
PAGE_CHECKS = settings(deadline=None, max_examples=25)

Rows = Sequence[Sequence[float]]


class Page(HTMLParser):
    """Elements with their attributes, visible text and script contents; checks nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and tag != "path":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        match self.open[-1] if self.open else "":
            case "script":
                self.scripts.append(data)
            case "style":
                pass
            case _:
                self.text.append(data)

    @property
    def content(self) -> dict[str, Any]:
        return json.loads(self.scripts[0], parse_constant=_refuse_constant)

    def values(self, tag: str, attribute: str) -> list[str]:
        return [str(a[attribute]) for t, a in self.elements if t == tag and attribute in a]


def _refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def table(rows: Rows, *, scored: bool) -> BoxTable:
    """Rows of (case, label, [score,] 6 edges)."""
    array = np.array(rows, dtype=np.float64).reshape(-1, 9 if scored else 8)
    return BoxTable(
        case_index=array[:, 0].astype(np.int64),
        labels=array[:, 1].astype(np.int64),
        boxes=array[:, -6:],
        scores=array[:, 2] if scored else None,
    )


OBJECTS = [(0, 0, 2, 2, 2, 6, 6, 6), (0, 1, 6, 6, 6, 9, 10, 11), (1, 0, 0, 0, 0, 4, 4, 4)]
PREDICTIONS = [
    (0, 0, 0.9, 2.25, 2, 2, 6, 6, 6.125),  # finds object 0
    (0, 0, 0.8, 2, 2, 2, 6, 6, 5),  # duplicate
    (0, 0, 0.7, 6, 6, 6, 9, 10, 11),  # wrong class
    (1, 0, 1 / 3, 3.5, 3.5, 3.5, 8, 8, 8),  # poor overlap
    (2, 1, 0.1, 1, 1, 1, 3, 3, 3),  # nothing there
]
CASES = ["case_a", "case_b", "case_c"]


def arm(
    name: str,
    *,
    objects: Rows = OBJECTS,
    predictions: Rows = PREDICTIONS,
    cases: Sequence[str] = CASES,
    num_classes: int = 2,
) -> Arm:
    ground_truth, found = table(objects, scored=False), table(predictions, scored=True)
    records = [{"step": s, "loss": 1.0 / (1 + s), "box": 0.5, "learning_rate": 0.1} for s in (0, 9)]
    metrics = compute_metrics(cases, ground_truth, found, num_classes=num_classes)
    return Arm(name, records, metrics, cases, ground_truth, found)


def image(case_id: str, shape: tuple[int, ...] = (12, 13, 14), seed: int = 0) -> CaseImage:
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return CaseImage(case_id, lambda: (array, (3.0, 0.5, 0.75)))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Page]:
    def write_page(arms: Sequence[Arm], **changes: Any) -> Page:  # Any: arguments of write_report
        arguments: dict[str, Any] = {
            "title": "A title",
            "pretraining_records": [{"step": 0, "loss": 2.0}, {"step": 5, "loss": 1.5}],
            "case_images": [image(case) for one in arms[:1] for case in one.cases],
            "class_names": ["bright", "dark"],
            "facts": {"data set": "phantoms"},
            "notes": ["a note"],
        }
        path = tmp_path / "report.html"
        write_report(path, arms=arms, **(arguments | changes))
        return Page(path.read_text(encoding="utf-8"))

    return write_page


def test_page_is_complete_html_with_unique_ids(write: Callable[..., Page]) -> None:
    page = write([arm("scratch"), arm("pretrained", predictions=PREDICTIONS[1:])])
    assert page.source.startswith("<!DOCTYPE html>")
    ids = [value for tag, attributes in page.elements if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    targets = [link[1:] for link in page.values("a", "href") if "=" not in link]
    assert targets
    assert set(targets) <= set(ids)
    assert "Research use only, not a medical device." in "".join(page.text)


def test_page_holds_the_figures_of_both_arms_exactly(write: Callable[..., Page]) -> None:
    arms = [arm("scratch"), arm("pretrained", predictions=PREDICTIONS[2:])]
    page = write(arms)
    values = page.values("data", "value")
    for one in arms:
        figure = one.metrics["ap"]["0.10"]["map"]
        assert repr(figure) in values
        assert f"mAP@0.1 {figure:.3f}" in "".join(page.text)
        assert repr(one.metrics["froc"]["0.10"]["pooled"]["mean"]) in values
    first, second = (one.metrics["ap"]["0.10"]["map"] for one in arms)
    text = " ".join(page.text)
    assert "pretrained minus scratch" in text
    assert f"{second - first:+.3f}".replace("-", "\N{MINUS SIGN}") in text
    assert "no evidence" in text


def test_page_loads_nothing(write: Callable[..., Page]) -> None:
    page = write([arm("scratch"), arm("pretrained")])
    assert "http://" not in page.source
    assert "https://" not in page.source
    for attribute in ("src", "href", "srcset", "action", "data", "poster"):
        for tag, attributes in page.elements:
            value = attributes.get(attribute)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "@import" not in page.source
    assert re.findall(r"url\((?!data:)", page.source) == []


def test_hostile_names_stay_text(write: Callable[..., Page]) -> None:
    cases = [HOSTILE, "</script><b>", "c"]
    page = write(
        [arm(HOSTILE, cases=cases), arm("b" + HOSTILE, cases=cases)],
        title=HOSTILE,
        class_names=[HOSTILE, "<i>"],
        facts={HOSTILE: HOSTILE},
        notes=[HOSTILE],
    )
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert [case["id"] for case in page.content["cases"]] == cases
    assert page.content["classes"][0] == HOSTILE
    assert HOSTILE in "".join(page.text)


def test_embedded_boxes_equal_the_tables(write: Callable[..., Page]) -> None:
    one = arm("scratch")
    (content,) = write([one]).content["arms"]
    for key, expected in (("truth", one.ground_truth), ("predictions", one.predictions)):
        assert content[key]["case"] == expected.case_index.tolist()
        assert content[key]["label"] == expected.labels.tolist()
        assert content[key]["box"] == expected.boxes.tolist()
    assert one.predictions.scores is not None
    assert content["predictions"]["score"] == one.predictions.scores.tolist()
    assert content["reasons"]["0.10"] == [
        "",
        "duplicate",
        "wrong class",
        "poor overlap",
        "nothing there",
    ]


def test_arms_with_different_cases_share_one_list(write: Callable[..., Page]) -> None:
    other = arm("other", cases=["case_c", "case_d", "case_a"])
    content = write([arm("first"), other]).content
    assert [case["id"] for case in content["cases"]] == [*CASES, "case_d"]
    assert content["arms"][1]["cases"] == [2, 3, 0]
    assert content["arms"][1]["truth"]["case"] == [2, 2, 3]
    assert content["cases"][3]["pictures"] is None


@pytest.mark.parametrize(
    ("objects", "predictions"), [([], []), ([], PREDICTIONS), (OBJECTS, []), (OBJECTS[:1], [])]
)
def test_empty_tables_give_a_page(
    write: Callable[..., Page], objects: Rows, predictions: Rows
) -> None:
    one = arm("only", objects=objects, predictions=predictions)
    page = write(
        [one], pretraining_records=[], class_names=["a", "never there"], facts={}, notes=[]
    )
    assert len(page.content["arms"][0]["truth"]["box"]) == len(objects)
    text = "".join(page.text)
    assert "nan" not in text.lower()
    assert "minus" not in text
    if len(objects) < 2:
        assert "n/a" in text


def test_absent_class_is_not_a_zero(write: Callable[..., Page]) -> None:
    page = write([arm("x", objects=[OBJECTS[0]], num_classes=2)])
    row = re.search(r"<th scope=\"row\">dark</th>(.*?)</tr>", page.source)
    assert row is not None
    assert row[1].count("n/a") == 3
    assert "0.000" not in row[1]


def test_records_without_losses_or_with_broken_values_are_drawn(write: Callable[..., Page]) -> None:
    records = [{"step": 0}, {"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0, "ok": True}]
    records += [{"step": 2, "loss": 3.0}]  # after a resume the last record of a step counts
    one = arm("scratch")
    page = write(
        [Arm("scratch", records, one.metrics, one.cases, one.ground_truth, one.predictions)],
        pretraining_records=[],
    )
    assert "scratch 3" in "".join(page.text)
    assert not re.search(r'd="[^"]*nan', page.source)


def test_curves_of_the_validation_are_drawn_apart_from_the_losses() -> None:
    first = [
        {"step": 1, "loss": 2.0, "val_map_range": 0.1},
        {"step": 3, "loss": 1.0, "val_map_range": 0.4, "val_case_map_range": 0.2},
        {"step": 5, "val_map_range": 0.3, "val_case_failed": 1.0},
    ]
    charts = validation_charts([("a", first), ("b", [{"step": 1, "val_map_range": 0.2}])])
    assert "patches: mAP@0.10:0.50" in charts
    assert "0.300, highest 0.400" in charts
    assert "0.200, highest 0.200" in charts
    assert "whole cases: mAP@0.10:0.50" in charts
    assert "FROC" not in charts
    assert validation_charts([("a", [{"step": 1, "loss": 2.0}])]) == ""
    left = without_validation_figures(first)
    assert left == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 5}]


def test_arms_need_different_names(write: Callable[..., Page]) -> None:
    with pytest.raises(ValueError, match="different names"):
        write([arm("a"), arm("a")])
    with pytest.raises(ValueError, match="different names"):
        write([])


def test_failing_image_leaves_no_file(write: Callable[..., Page], tmp_path: Path) -> None:
    bad = CaseImage("case_a", lambda: (np.zeros((2, 3)), (1.0, 1.0, 1.0)))
    with pytest.raises(DataError, match="case case_a: image of shape"):
        write([arm("a")], case_images=[bad])
    assert list(tmp_path.iterdir()) == []


def test_images_are_loaded_once_and_worst_cases_come_first(
    write: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(case: str) -> CaseImage:
        array = np.random.default_rng(0).normal(size=(12, 13, 14))
        return CaseImage(case, lambda: (loaded.append(case), (array, (1.0, 1.0, 1.0)))[1])

    monkeypatch.setattr(report_viewer, "IMAGE_BUDGET", 150_001)  # room for one case
    objects = [OBJECTS[0], *[(2, 0, k, 0, 0, k + 1, 2, 2) for k in range(5)]]
    page = write([arm("a", objects=objects)], case_images=[counted(case) for case in CASES])
    assert loaded == ["case_c"]
    pictures = [case["pictures"] is not None for case in page.content["cases"]]
    assert pictures == [False, False, True]
    assert "room only for the cases with the most errors" in page.content["cases"][0]["note"]


def _tiles(stack: dict[str, Any]) -> list[NDArray[np.uint8]]:
    kind, data = stack["image"].split(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    montage = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    (height, width), (pitch_y, pitch_x) = stack["tile"], stack["pitch"]
    tiles = []
    for number in range(len(stack["indices"])):
        y, x = number // stack["columns"] * pitch_y, number % stack["columns"] * pitch_x
        tiles.append(montage[y : y + height, x : x + width])
    return tiles


def test_small_volume_is_embedded_whole_and_exact() -> None:
    volume = np.arange(7 * 18 * 33, dtype=np.int16).reshape(7, 18, 33)
    content = case_pictures(
        CaseImage("c", lambda: (volume, (4.0, 1.0, 2.0))), [], budget=150_000
    ).content
    assert content["shape"] == [7, 18, 33]
    assert content["spacing"] == [4.0, 1.0, 2.0]
    (stack,) = content["stacks"]
    assert stack["whole"]
    low, high = content["limits"]
    expected = np.rint(np.clip((volume - low) / (high - low), 0, 1) * 255).astype(int)
    assert np.abs(np.stack(_tiles(stack)).astype(int) - expected).max() <= 1


def test_large_volume_shows_wanted_planes_downscaled_in_true_aspect() -> None:
    volume = np.random.default_rng(0).normal(size=(30, 400, 700))
    source = CaseImage("c", lambda: (volume, (5.0, 0.7, 0.7)))
    planes = [(0, 3), (1, 399), (2, 0), (0, 3), (0, 30), (0, -1)]
    pictures = case_pictures(source, planes, extra=[(0, 4)], budget=400_000)
    stacks = pictures.content["stacks"]
    assert [(s["axis"], s["indices"]) for s in stacks] == [(0, [3]), (1, [399]), (2, [0]), (0, [4])]
    assert [s["tile"] for s in stacks] == [[183, 320], [14, 320], [24, 320], [183, 320]]
    assert all(max(s["tile"]) <= MAX_SIDE and not s["whole"] for s in stacks)
    assert pictures.left_out == 0


def test_pictures_keep_to_their_budget_and_count_what_is_left_out() -> None:
    volume = np.random.default_rng(0).normal(size=(40, 200, 200))
    source = CaseImage("c", lambda: (volume, (1.0, 1.0, 1.0)))
    pictures = case_pictures(source, [(0, z) for z in range(40)], budget=150_000)
    assert 0 < pictures_size(pictures.content) <= 150_000
    assert len(pictures.content["stacks"]) + pictures.left_out == 40
    assert pictures.left_out > 0


def test_page_of_large_volumes_stays_small(
    write: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_viewer, "IMAGE_BUDGET", 500_000)
    page = write([arm("a")], case_images=[image(case, (30, 300, 300)) for case in CASES])
    assert len(page.source) < 500_000 + 150_000
    assert any(case["left_out"] for case in page.content["cases"])


def test_channel_zero_of_several_and_broken_voxels_are_shown() -> None:
    volume = np.zeros((2, 4, 5, 6))
    volume[0, 1:] = 10.0
    volume[0, 0, 0, 0] = np.nan
    volume[0, 0, 0, 1] = np.inf
    volume[1] = 1e9
    content = case_pictures(
        CaseImage("c", lambda: (volume, (1.0, 1.0, 1.0))), [], budget=150_000
    ).content
    assert content["channels"] == 2
    assert content["limits"] == [0.0, 10.0]
    tiles = _tiles(content["stacks"][0])
    assert tiles[0].max() == 0
    assert tiles[1].min() == 255


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_constant_volume_is_shown(value: float) -> None:
    source = CaseImage("c", lambda: (np.full((1, 3, 3), value), (1.0, 1.0, 1.0)))
    content = case_pictures(source, [(0, 0)], budget=150_000).content
    low, high = content["window"]
    assert 0 <= low < high <= 255
    assert json.dumps(content, allow_nan=False)


box_rows = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 1),
        st.sampled_from([0.1, 0.2, 0.5, 0.9]),
        *[st.integers(0, 3)] * 3,
        *[st.integers(4, 6)] * 3,
    ),
    max_size=12,
)


@PAGE_CHECKS
@given(objects=box_rows, predictions=box_rows, iou=st.sampled_from([0.1, 0.5]))
def test_outcomes_agree_with_the_metrics_assignment(
    objects: list[tuple[float, ...]], predictions: list[tuple[float, ...]], iou: float
) -> None:
    truth = table([(*row[:2], *row[3:]) for row in objects], scored=False)
    found = table(predictions, scored=True)
    outcomes = assess(truth, found, iou=iou)
    flags, found_by = true_positive_flags(CASES, truth, found, iou_threshold=iou)
    assert (outcomes.matched >= 0).tolist() == flags.tolist()
    assert outcomes.found_by.tolist() == found_by.tolist()
    assert [bool(reason) for reason in outcomes.reasons] == (outcomes.matched == FALSE).tolist()


@PAGE_CHECKS
@given(predictions=box_rows, rate=st.sampled_from([0.0, 0.125, 1.0, 2.0]))
def test_score_at_rate_is_the_lowest_that_keeps_the_rate(
    predictions: list[tuple[float, ...]], rate: float
) -> None:
    found = table(predictions, scored=True)
    truth = table([(0, 0, 0, 0, 0, 5, 5, 5)], scored=False)
    outcomes = assess(truth, found, iou=0.1)
    scores = found.scores
    assert scores is not None
    level = score_at_rate(found, outcomes, rate=rate, images=3)

    def falses(threshold: float) -> int:
        return int(((outcomes.matched == FALSE) & (scores >= threshold)).sum())

    assert falses(level) <= rate * 3
    lower = scores[scores < level]
    if len(lower):
        assert falses(float(lower.max())) > rate * 3


def test_predictions_beyond_the_hundred_counted_are_marked() -> None:
    rows = [(0, 0, 1 - k / 200, 0, 0, 0, 1, 1, 1) for k in range(101)]
    outcomes = assess(table(OBJECTS, scored=False), table(rows, scored=True), iou=0.1)
    assert outcomes.matched.tolist() == [FALSE] * 100 + [NOT_COUNTED]
    assert outcomes.reasons[-1] == ""


def test_worst_errors_are_large_misses_then_confident_falses() -> None:
    objects = [*OBJECTS, (2, 1, 5, 5, 5, 12, 12, 12)]
    truth, found = table(objects, scored=False), table(PREDICTIONS, scored=True)
    outcomes = assess(truth, found, iou=0.1)
    errors = worst_errors(truth, found, outcomes, limit=6)
    assert [(error.kind, error.row) for error in errors] == [
        ("missed", 3),
        ("missed", 2),
        ("missed", 1),
        ("false", 1),
        ("false", 2),
        ("false", 3),
    ]
    assert len(worst_errors(truth, found, outcomes, limit=2)) == 2


def test_error_links_name_case_arm_and_row(write: Callable[..., Page]) -> None:
    page = write([arm("my arm")])
    links = [link for link in page.values("a", "href") if "=" in link]
    assert "#case=case_a&arm=my+arm&iou=0.10&object=t1" in links
    assert "#case=case_c&arm=my+arm&iou=0.10&object=p4" in links
