"""Both schemes of the paper (arXiv 2509.15947, C.3), step by step against numbers computed here."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.train.restart import scheme_of
from voxelbridge.core.train.schedule import Scheme
from voxelbridge.detect.build import load_detect_config
from voxelbridge.detect.cli import app
from voxelbridge.detect.config import DetectConfig
from voxelbridge.detect.show_schedule import describe_schedule, plot_schedule, schedule_facts

RULE = "restart.after_steps=25000", "restart.min_improvement=0.05"


def scheme(config: DetectConfig, attempt: int = 0) -> Scheme:
    return scheme_of(
        config.schedule, lr=config.optim.lr, averaging=config.averaging, restart=config.restart,
        attempt=attempt,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "frozen", "steps", "peak"),
    [
        ("retunet", 7_500, 125_000, 1e-2),
        ("resenc_retunet", 7_500, 125_000, 1e-2),
        ("defdetr", 12_500, 250_000, 3e-4),
        ("resenc_defdetr", 12_500, 250_000, 3e-4),
    ],
)
def test_rate_and_frozen_encoder_of_every_phase_are_the_papers(
    name: str, frozen: int, steps: int, peak: float
) -> None:
    run = scheme(load_detect_config(name))
    assert run.schedule.steps == frozen + steps
    expected = {0: 1e-6, frozen - 1: 1e-6 + (peak - 1e-6) * (frozen - 1) / frozen}
    expected |= {frozen: 1e-6, frozen + 2_000: (1e-6 + peak) / 2, frozen + 4_000: peak}
    for share in (0.25, 0.5, 0.75):
        after = round(share * (steps - 4_000))
        expected[frozen + 4_000 + after] = peak * (1 - share) ** 0.9
    expected[frozen + steps - 1] = peak * (1 / (steps - 4_000)) ** 0.9
    for step, rate in expected.items():
        assert run.learning_rate(step) == pytest.approx(rate, rel=1e-9), step
    frozen_steps = (0, 1, frozen - 1)
    assert all(run.frozen_parts(step) == ("detector.encoder",) for step in frozen_steps)
    assert all(run.frozen_parts(step) == () for step in (frozen, frozen + 4_000, steps))


def test_restart_has_ten_thousand_steps_of_warm_up_of_all_to_1e_4() -> None:
    run = scheme(load_detect_config("defdetr", RULE), attempt=1)
    assert run.schedule.steps == 250_000
    assert run.learning_rate(0) == 1e-6
    assert run.learning_rate(5_000) == pytest.approx((1e-6 + 1e-4) / 2)
    assert run.learning_rate(10_000) == 1e-4
    assert run.learning_rate(130_000) == pytest.approx(1e-4 * 0.5**0.9)
    assert run.frozen_parts(0) == ()


def test_every_phase_is_told_with_its_steps_epochs_and_rates() -> None:
    facts = schedule_facts(load_detect_config("defdetr", RULE))
    rows = [(p["attempt"], p["name"], p["steps"], p["epochs"]) for p in facts["phases"]]
    assert rows == [
        (0, "frozen warm-up", 12_500, 5), (0, "warm-up", 4_000, 1.6), (0, "decay", 246_000, 98.4),
        (1, "warm-up", 10_000, 4), (1, "decay", 240_000, 96),
    ]  # fmt: skip
    first = facts["phases"][0]
    assert (first["first_step"], first["last_step"]) == (0, 12_499)
    assert first["frozen"] == ("detector.encoder",)
    assert facts["restart"]["after_steps"] == 25_000
    text = describe_schedule(load_detect_config("nndet_v001"))
    assert "125,000 - 149,999" in text
    assert "before it and after every 2,500 steps, 11 times" in text
    assert "no restart rule" in text


def test_nndet_v001_climbs_in_each_of_its_last_ten_epochs() -> None:
    run = scheme(load_detect_config("nndet_v001"))
    starts = [125_000 + 2_500 * epoch for epoch in range(10)]
    assert [run.learning_rate(step) for step in starts] == [1e-5] * 10
    assert run.learning_rate(126_250) == pytest.approx((1e-5 + 1e-3) / 2)
    assert run.learning_rate(124_999) == pytest.approx(1e-2 * (1 / 121_000) ** 0.9)


def test_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "rate.png"
    app(["schedule", "retunet", "--json", "--plot", str(picture)], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in facts["phases"]] == ["frozen warm-up", "warm-up", "decay"]
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[0] > 300
    assert np.ptp(pixels[..., 0]) > 0.5
    with pytest.raises(ConfigError, match=r"rate\.txt: expected a \.png file"):
        plot_schedule(load_detect_config("retunet"), tmp_path / "rate.txt")
