"""The page of a run: curves of every data set, pictures, scores, and what it says of gaps."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from voxelbridge.core.data.volume import Grid
from voxelbridge.core.errors import ConfigError, DataError
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.dataset_labels import DatasetLabels, Target
from voxelbridge.pretrain_sup.label_space import LabelSpace, build_label_space
from voxelbridge.pretrain_sup.overlays import write_overlay
from voxelbridge.pretrain_sup.report import parameter_counts, write_training_report
from voxelbridge.pretrain_sup.weights import new_network

WriteRun = Callable[..., MultiTalentConfig]

SCORES = {
    "schema": 1,
    "dataset": "liver",
    "num_cases": 2,
    "mean": {"dice": 0.75, "assd_mm": 1.5, "hd95_mm": None},
    "targets": {
        "liver <b>": {
            "num_cases": 2, "num_missed": 0, "num_spurious": 1, "num_absent": 0,
            "dice": 0.75, "assd_mm": 1.5, "hd95_mm": None,
        },
    },
}  # fmt: skip


def space_of(count: int = 2) -> LabelSpace:
    channels = (("CT",), ("T1", "T2"))
    targets = (Target("a", (1,)),)
    return build_label_space(
        [
            DatasetLabels(name, channels[number % 2], targets, None, 5)
            for number, name in enumerate(
                ["liver", "glioma", *(f"set{n}" for n in range(2, count))]
            )
        ],
        layout="per_dataset",
    )


@pytest.fixture
def run(tmp_path: Path, write_rigged_run: WriteRun) -> Path:
    write_rigged_run(tmp_path / "run", space_of(), {})
    return tmp_path / "run"


def record_losses(run: Path, datasets: list[str], *, steps: int = 60) -> None:
    lines = []
    for step in range(0, steps, 2):
        fall = float(np.exp(-step / 20))
        record = {"step": step, "loss": 2 * fall, "ce": fall, "dice": fall, "learning_rate": 0.1}
        for number, name in enumerate(datasets):
            if step % (number + 2) == 0:  # data sets of few cases are not in every record
                record[name] = fall * (1 + 0.1 * number) + 0.2
        if step % 10 == 0:
            record |= {"val_loss": 2 * fall + 0.1, f"val_{datasets[0]}": fall + 0.3}
            record[f"val_{datasets[0]}.dice"] = 1 - fall
        lines.append(json.dumps(record))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


class Parsed(HTMLParser):
    """Tags that open and close, sources of pictures, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: Path, output: Path, **arguments: list[Path]) -> tuple[str, Parsed]:
    write_training_report(run, output, **arguments)
    page = output.read_text(encoding="utf-8")
    return page, Parsed(page)


def test_every_data_set_has_its_curve_and_its_figures(run: Path, tmp_path: Path) -> None:
    record_losses(run, ["liver", "glioma"])
    page, parsed = page_of(run, tmp_path / "report.html")
    assert "The training loss fell on 2 of 2 data sets." in parsed.text
    curves = page[page.index('<section id="curves"') : page.index('<section id="labels"')]
    for title in ("total loss", "ce", "dice", "liver", "glioma", "liver.dice"):
        assert curves.count(f"<figcaption>{title}</figcaption>") == 1
    assert curves.count("<figure>") == 6
    assert "60 of 600" not in parsed.text  # the last record is of step 58
    assert "59 of 600, finished" in parsed.text
    assert not [source for source in parsed.sources if source.startswith("http")]


def test_pictures_and_scores_are_in_the_page(run: Path, tmp_path: Path) -> None:
    record_losses(run, ["liver", "glioma"])
    rng = np.random.default_rng(0)
    image, labels = rng.normal(size=(9, 40, 50)), np.zeros((9, 40, 50), np.uint8)
    labels[2:7, 8:30, 5:22] = 1
    grid = Grid.from_parts(image.shape, (3.0, 1.0, 1.0))
    for folder in (run / "overlays", tmp_path / "predicted"):
        write_overlay(folder / "case<1>.png", image, labels, grid=grid, names={1: "liver"})
    (tmp_path / "predicted" / "predictions.json").write_text('{"dataset": "liver"}')
    (tmp_path / "metrics.json").write_text(json.dumps(SCORES))
    page, parsed = page_of(
        run, tmp_path / "report.html", predictions=[tmp_path / "predicted"],
        metrics=[tmp_path / "metrics.json"],
    )  # fmt: skip
    assert page.count("data:image/png;base64,") == 2
    assert "predicted: liver" in parsed.text
    assert "case<1>" in parsed.text
    assert "liver: 2 cases" in parsed.text
    assert "liver <b>" in parsed.text
    assert "0.750" in parsed.text
    assert "n/a" in parsed.text


def test_a_run_without_anything_says_so(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "network.safetensors").unlink()
    _, parsed = page_of(run, tmp_path / "report.html")
    for text in (
        "0 of 600, not finished",
        "Nothing was recorded yet.",
        "No loss was recorded.",
        "No pictures were given",
        "No scores were given",
        "The run is not finished",
    ):
        assert text in parsed.text


def test_many_data_sets_all_have_a_curve(tmp_path: Path, write_rigged_run: WriteRun) -> None:
    space = space_of(20)
    write_rigged_run(tmp_path / "run", space, {})
    names = [dataset.name for dataset in space.datasets]
    record_losses(tmp_path / "run", names, steps=100)
    page, _ = page_of(tmp_path / "run", tmp_path / "report.html")
    assert all(f"<figcaption>{name}</figcaption>" in page for name in names)


def test_foreign_files_are_refused_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no picture"):
        write_training_report(run, output, predictions=[tmp_path / "empty"])
    (tmp_path / "scores.json").write_text('{"schema": 2}')
    with pytest.raises(DataError, match=r"scores\.json: not what `vb-sup evaluate` writes"):
        write_training_report(run, output, metrics=[tmp_path / "scores.json"])
    with pytest.raises(ConfigError, match="not a run directory"):
        write_training_report(tmp_path / "empty", output)
    assert not output.exists()


def test_parameters_are_counted_without_building_the_network(
    tmp_path: Path, write_rigged_run: WriteRun
) -> None:
    space = space_of()
    config = write_rigged_run(tmp_path / "run", space, {})
    network = new_network(config, space)
    total = sum(p.numel() for p in network.parameters())
    assert parameter_counts(config, space) == (
        total, sum(p.numel() for p in network.encoder.parameters())
    )  # fmt: skip
