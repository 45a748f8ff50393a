from pathlib import Path

import numpy as np
import pytest

from voxelbridge.detect.evaluate.metrics import evaluate_files
from voxelbridge.detect.evaluate.protocols.cta_a import evaluate_cta_a

RATES = [0.125, 0.25, 0.5, 1, 2, 4, 8]


def write(folder: Path, truth: str, predictions: str, cases: str = "a\nb\n") -> None:
    boxes = "z0,y0,x0,z1,y1,x1"
    (folder / "cases.csv").write_text("case_id\n" + cases)
    (folder / "ground_truth.csv").write_text(f"case_id,label,{boxes}\n" + truth)
    (folder / "predictions.csv").write_text(f"case_id,label,score,{boxes}\n" + predictions)


def test_cta_a_is_the_froc_of_evaluate_at_iou_0_3(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth, predictions = "", ""
    for case in "ab":
        for corner in rng.integers(0, 30, (6, 3)):
            edges = [*corner, *(corner + 6)]
            truth += f"{case},0,{','.join(map(str, edges))}\n"
            for shift in rng.integers(0, 4, 2):
                moved = [*(corner + shift), *(corner + shift + 6)]
                predictions += f"{case},0,{rng.random()},{','.join(map(str, moved))}\n"
    write(tmp_path, truth, predictions)
    tables = (tmp_path / "ground_truth.csv", tmp_path / "predictions.csv")
    whole = evaluate_files(*tables, output=tmp_path / "whole.json", bootstrap=30)
    content = evaluate_cta_a(*tables, output=tmp_path / "cta.json", samples=30)
    pooled = whole["froc"]["0.30"]["pooled"]
    assert (content["sensitivity"], content["fppi"]) == (pooled["sensitivity"], RATES)
    assert content["score"] == pooled["mean"]
    assert content["protocol"] == "CTA-A protocol as described by the paper"
    counts, of_class = content["counts"], whole["counts"]["0"]
    assert counts["true_positives"] == of_class["true_positives"]["0.30"]
    assert counts["candidates"] == counts["true_positives"] + counts["false_positives"] == 24
    assert counts["missed"] == 12 - counts["true_positives"]
    low, high = whole["bootstrap"]["froc"]["0.30"]
    assert content["bootstrap"]["score"]["low"] == pytest.approx(low, abs=0.05)
    assert content["bootstrap"]["score"]["high"] == pytest.approx(high, abs=0.05)


@pytest.mark.parametrize("truth", ["", "a,0,0,0,0,2,2,2\n"])
def test_cta_a_is_zero_without_a_true_positive(tmp_path: Path, truth: str) -> None:
    write(tmp_path, truth, "a,0,0.5,9,9,9,12,12,12\n")
    content = evaluate_cta_a(
        tmp_path / "ground_truth.csv", tmp_path / "predictions.csv", output=tmp_path / "m.json",
        samples=4,
    )  # fmt: skip
    assert (content["score"], content["sensitivity"]) == (0, [0] * 7)
    assert content["counts"]["false_positives"] == 1
