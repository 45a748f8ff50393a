"""The page of a pre-training run: complete for whole runs, clear for broken or empty ones."""

import base64
import json
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelbridge.core.config import load_config, preset_path
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_ssl import report
from voxelbridge.pretrain_ssl.config import KIND, PretrainConfig
from voxelbridge.pretrain_ssl.panels import Panel, Picture
from voxelbridge.pretrain_ssl.pictures import picture_path, write_picture
from voxelbridge.pretrain_ssl.report import parameter_counts, write_pretraining_report

DATA = {
    "schema": 1,
    "datasets": ["brains <1>"],
    "num_cases": 1200,
    "channels": 1,
    "spacing_mm": [1.0, 0.5, 0.5],
    "validation_cases": ["a", "b"],
}
RECORDS = [
    {"step": 4, "loss": 1.5, "learning_rate": 0.1},
    {"step": 9, "loss": 0.75, "learning_rate": 0.1, "val_loss": 0.5, "val_trivial": 2.0},
]
VOID = {"meta", "link", "img", "path", "circle"}


def config() -> PretrainConfig:
    preset = preset_path("voxelbridge.pretrain_ssl", "mae_small")
    return load_config(PretrainConfig, preset, ["schedule.steps=10"]).config


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(
        *,
        records: list[dict[str, Any]] | None = None,
        data: dict[str, Any] | None = None,
        finished: bool = True,
        steps: tuple[int, ...] = (),
    ) -> Path:
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        content = {"schema": 1, "kind": KIND, **config().model_dump(mode="json")}
        (run / "config.json").write_text(json.dumps(content))
        if data is not None:
            (run / "data.json").write_text(json.dumps(data))
        if records is not None:
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (run / "metrics.jsonl").write_text(lines)
        if finished:
            (run / "checkpoints" / "final.safetensors").touch()
        for step in steps:
            for sample in range(2):
                values = np.full((4, 4), step + sample / 10, np.float32)
                picture = Picture("slices", (Panel("input", values),))
                write_picture(picture_path(run, step, sample), picture)
        return run

    return make


def page_of(run: Path) -> str:
    output = run.parent / "report.html"
    write_pretraining_report(run, output)
    text = output.read_text(encoding="utf-8")
    _Nesting(text)
    return text


class _Nesting(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def facts_of(page: str) -> dict[str, str]:
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)
    return {unescape(name): unescape(value) for name, value in pairs}


def captions_of(page: str) -> list[str]:
    pictures = page[page.index('id="pictures"') : page.index('id="settings"')]
    return re.findall(r"<figcaption>(.*?)</figcaption>", pictures)


def test_page_tells_what_was_run_and_what_came_out(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run(records=RECORDS, data=DATA))
    facts = facts_of(page)
    encoder, trained = parameter_counts(config(), 1)
    assert facts["method"] == "mae"
    assert facts["optimizer steps"] == "10 of 10, finished"
    assert facts["data sets"] == "brains <1>"
    assert facts["cases"] == "1,200, of these for validation 2"
    assert (
        facts["spacing z, y, x"] == "1 \N{MULTIPLICATION SIGN} 0.5 \N{MULTIPLICATION SIGN} 0.5 mm"
    )
    assert facts["parameters"] == f"{trained:,}, of these encoder {encoder:,}"
    assert "brains &lt;1&gt;" in page
    assert "Validation loss <strong>0.5</strong>, 25.0% of the trivial predictor's 2." in page
    for label in ("training 0.75", "validation 0.5", "trivial 2"):
        assert f">{label}</text>" in page


def test_parameters_are_those_of_the_network() -> None:
    from voxelbridge.pretrain_ssl.train import build_objective

    objective = build_objective(config(), 2)
    _, trained = parameter_counts(config(), 2)
    assert trained == sum(p.numel() for p in objective.parameters() if p.requires_grad)


def test_every_setting_is_on_the_page(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run(records=RECORDS, data=DATA))
    assert '<th scope="row">method.mask_ratio</th><td class="text">0.75</td>' in page
    assert '<th scope="row">schedule.steps</th><td class="text">10</td>' in page


def test_newest_pictures_come_first_and_the_first_step_beside_them(
    make_run: Callable[..., Path],
) -> None:
    run = make_run(records=RECORDS, data=DATA, steps=(1, 3, 5, 9))
    page = page_of(run)
    assert captions_of(page) == [
        "step 9 (newest)",
        "step 1 (first)",
        "step 9 (newest)",
        "step 1 (first)",
        *[f"step {step}, sample {sample}" for step in (5, 3) for sample in (0, 1)],
    ]
    embedded = re.findall(r'src="data:image/png;base64,(.*?)"', page)
    assert base64.b64decode(embedded[0]) == picture_path(run, 9, 0).read_bytes()
    assert len(embedded) == 8
    assert "2 steps between" in page


def test_one_step_of_pictures_is_shown_once(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run(records=RECORDS, data=DATA, steps=(9,)))
    assert captions_of(page) == ["step 9 (newest)"] * 2


def test_too_many_pictures_are_thinned_and_counted(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(records=RECORDS, data=DATA, steps=tuple(range(9)))
    size = sum(p.stat().st_size for p in (run / "pictures").iterdir()) / 9
    monkeypatch.setattr(report, "MAX_PICTURE_BYTES", int(6.1 * size))
    page = page_of(run)
    steps = {int(text.split()[1].strip(",")) for text in captions_of(page)}
    assert {0, 8} < steps
    assert steps == {0, 8, 7, 5, 3, 1}
    assert "Pictures of 3 more steps did not fit" in page
    monkeypatch.setattr(report, "MAX_PICTURE_BYTES", 0)
    assert captions_of(page_of(run)) == ["step 8 (newest)", "step 0 (first)"] * 2


def test_page_loads_nothing(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run(records=RECORDS, data=DATA, steps=(1, 9)))
    assert "http" not in page
    assert all(
        link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="(.*?)"', page)
    )


def test_run_without_validation_and_pictures_says_so(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run(records=RECORDS[:1], data={**DATA, "validation_cases": []}))
    assert "no validation" in page
    assert "The run has no pictures" in page
    assert "trivial" not in page[page.index("<body>") :].lower()


def test_unfinished_and_empty_runs_give_a_page(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run(finished=False))
    assert facts_of(page)["optimizer steps"] == "0 of 10, not finished"
    assert "Nothing was recorded yet" in page
    assert "The run is not finished" in page
    assert "No loss was recorded" in page


def test_failed_cases_are_named_in_number(make_run: Callable[..., Path]) -> None:
    records = [*RECORDS, {"step": 9, "loss": 1.0, "failed_cases": 3}]
    page = page_of(make_run(records=records, data=DATA))
    assert facts_of(page)["failed cases"] == "3"
    assert "3 cases could not be read" in page


def test_spacing_that_varies_is_said(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run(records=RECORDS, data={**DATA, "spacing_mm": None}))
    assert facts_of(page)["spacing z, y, x"] == "varies"


def test_many_data_sets_are_counted(make_run: Callable[..., Path]) -> None:
    page = page_of(make_run(records=RECORDS, data={**DATA, "datasets": list("abcdefghij")}))
    assert facts_of(page)["data sets"] == "a, b, c, d, e, f, g, h and 2 more"
    assert "resenc_small on a and 9 more:" in page


def test_other_folders_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    with pytest.raises(ConfigError, match="not a run directory"):
        write_pretraining_report(tmp_path / "gone", output)
    (tmp_path / "config.json").write_text(json.dumps({"schema": 1, "kind": "detect"}))
    with pytest.raises(ConfigError, match="kind detect"):
        write_pretraining_report(tmp_path, output)
    assert not output.exists()


def test_broken_files_of_a_run_are_named(make_run: Callable[..., Path]) -> None:
    run = make_run(records=RECORDS, data=DATA)
    picture_path(run, 1, 0).parent.mkdir()
    picture_path(run, 1, 0).write_bytes(b"torn")
    with pytest.raises(DataError, match=r"step-00000001-0\.png: not a PNG file"):
        page_of(run)
    (run / "metrics.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl: not a metrics file"):
        page_of(run)
    assert not (run.parent / "report.html").exists()
