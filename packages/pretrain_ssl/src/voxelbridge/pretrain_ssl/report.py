"""One self-contained HTML page about a pre-training run: curves, pictures, what was run."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from voxelbridge.core.arch.encoder import build_encoder
from voxelbridge.core.arch.presets import ENCODER_PRESETS
from voxelbridge.core.files import atomic_write
from voxelbridge.core.report.losses import TOTAL, TRIVIAL, Record, training_charts
from voxelbridge.core.report.page import (
    Section,
    figure_cell,
    figures_table,
    html_page,
    notes_list,
    png_figure,
)
from voxelbridge.core.report.run_facts import (
    MAX_PICTURE_BYTES,
    NOTHING_RECORDED,
    TIMES,
    Facts,
    last_value,
    progress,
    read_if_there,
    run_notes,
    settings_table,
    start_facts,
)
from voxelbridge.core.run import ENVIRONMENT_FILE, read_run_config
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.pretrain_ssl.config import KIND, PretrainConfig
from voxelbridge.pretrain_ssl.export import FINAL_CHECKPOINT
from voxelbridge.pretrain_ssl.pictures import PICTURE_FOLDER, StoredPicture, find_pictures

MAX_NAMES = 8  # of data sets
VALIDATION = "val_loss"
SLICES = (
    "Slices: the middle along z, first channel, grey from the first panel's 1st to its 99th "
    "percentile; blue is hidden from the network."
)
OVERLAPS = "Overlaps: the share of each target crop (rows) that lies in each base crop (columns)."


def write_pretraining_report(run: Path, output: Path) -> None:
    """Writes the page of a run, finished or not, to `output`, atomically.

    ConfigError for what is no pre-training run; a run that recorded nothing yet gives a page that
    says so.
    """
    config = read_run_config(run, PretrainConfig, kind=KIND)
    data = read_if_there(run / "data.json")
    starts = read_if_there(run / ENVIRONMENT_FILE).get("starts", [])
    metrics = run / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    pictures = find_pictures(run)
    page = html_page(
        f"Pre-training: {run.resolve().name}",
        [
            Section("result", "Result", _result(records) + notes_list(_notes(run, config, data))),
            Section("curves", "Curves", training_charts(records)),
            Section("pictures", "Pictures", _pictures(pictures, config)),
            Section("settings", "Settings", settings_table(config)),
        ],
        lede=_lede(config, data, records),
        facts=_facts(run, config, data, starts, records),
        distribution="voxelbridge-pretrain-ssl",
    )
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")


def parameter_counts(config: PretrainConfig, channels: int) -> tuple[int, int]:
    """Parameters of the encoder, and of all that trains; nothing is allocated for it."""
    with torch.device("meta"):
        encoder = build_encoder(ENCODER_PRESETS[config.encoder], in_channels=channels)
        module = config.method.build(encoder)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return sum(p.numel() for p in encoder.parameters()), trained


def _lede(config: PretrainConfig, data: Facts, records: Sequence[Record]) -> str:
    """One sentence of what was done and one of what came out, as HTML."""
    datasets = data.get("datasets") or ()
    where = f" on {escape(_listed(datasets, most=1))}" if datasets else ""
    text = (
        f"<strong>{escape(config.method.name)}</strong> of {escape(config.encoder)}{where}: "
        f"{progress(records, config.schedule.steps)} steps."
    )
    validation, trivial = last_value(records, VALIDATION), last_value(records, TRIVIAL)
    if validation is None:
        return text
    text += f" Validation loss <strong>{validation:.4g}</strong>"
    if trivial:
        text += f", {validation / trivial:.1%} of the trivial predictor's {trivial:.4g}"
    return text + "."


def _facts(
    run: Path, config: PretrainConfig, data: Facts, starts: Sequence[Facts], records: Sequence[Any]
) -> dict[str, str]:
    finished = (run / "checkpoints" / FINAL_CHECKPOINT).is_file()
    steps = progress(records, config.schedule.steps)
    facts = {
        "method": config.method.name,
        "encoder": config.encoder,
        "patch z, y, x": TIMES.join(str(edge) for edge in config.patch_size),
        "batch size": str(config.batch_size),
        "optimizer steps": steps + (", finished" if finished else ", not finished"),
    }
    if "channels" in data:
        encoder, trained = parameter_counts(config, int(data["channels"]))
        facts["parameters"] = f"{trained:,}, of these encoder {encoder:,}"
    if data.get("datasets"):
        facts["data sets"] = _listed(data["datasets"], most=MAX_NAMES)
    if "num_cases" in data:
        held_out = len(data.get("validation_cases") or ())
        facts["cases"] = f"{data['num_cases']:,}, of these for validation {held_out:,}"
    if "spacing_mm" in data:
        spacing = data["spacing_mm"]
        facts["spacing z, y, x"] = (
            TIMES.join(f"{edge:g}" for edge in spacing) + " mm" if spacing else "varies"
        )
    facts |= start_facts(starts)
    failed = last_value(records, "failed_cases")
    if failed is not None:
        facts["failed cases"] = f"{failed:.0f}"
    return facts


def _result(records: Sequence[Record]) -> str:
    if not records:
        return NOTHING_RECORDED
    rows = []
    for name, key in (("training", TOTAL), ("validation", VALIDATION), ("trivial", TRIVIAL)):
        values = [(float(r[key]), int(r["step"])) for r in records if key in r]
        if values:
            lowest, step = min(values)
            cells = [figure_cell(v, form=".4g") for v in (values[0][0], lowest, values[-1][0])]
            rows.append((name, [cells[0], cells[1], f"{step:,}", cells[2]]))
    heads = ("first", "lowest", "at step", "last")
    parts = [figures_table("Total loss", "loss", heads, rows)]
    if any(TRIVIAL in record for record in records):
        parts.append(
            '<p class="soft">Trivial: the loss, on the same validation patches, of a predictor '
            "that has learned nothing: the mean of what is visible (VoCo: overlap 1/n with each "
            "of the n base crops).</p>"
        )
    failed = last_value(records, "failed_cases")
    if failed:
        parts.append(
            f'<p class="caution">{failed:.0f} case{"" if failed == 1 else "s"} could not be read '
            "and were left out; the training printed each with its path.</p>"
        )
    return "".join(parts)


def _notes(run: Path, config: PretrainConfig, data: Facts) -> list[str]:
    return run_notes(
        finished=(run / "checkpoints" / FINAL_CHECKPOINT).is_file(),
        validated=bool(data.get("validation_cases") and config.validation_patches),
    )


def _pictures(pictures: Sequence[StoredPicture], config: PretrainConfig) -> str:
    """Newest step first, the first step's under it, the others folded away."""
    if not pictures:
        return f'<p class="soft">The run has no pictures (folder {PICTURE_FOLDER}/).</p>'
    steps = {step: list(group) for step, group in groupby(pictures, key=lambda p: p.step)}
    order = sorted(steps, reverse=True)
    newest, first, between = order[0], order[-1], order[1:-1]
    kept, left_out = _within_budget([steps[newest], steps[first]], [steps[s] for s in between])
    parts = [
        '<p class="soft">Validation samples, the same ones at every step. '
        f"{OVERLAPS if config.method.name == 'voco' else SLICES}</p>"
    ]
    for sample in sorted({p.sample for p in (*steps[newest], *steps[first])}):
        shown = [p for step in dict.fromkeys((newest, first)) for p in steps[step]]
        figures = [
            _figure(p, "newest" if p.step == newest else "first")
            for p in shown
            if p.sample == sample
        ]
        parts.append(f'<h3>Sample {sample}</h3><div class="pictures">{"".join(figures)}</div>')
    if kept:
        figures = "".join(_figure(p) for group in kept for p in group)
        parts.append(
            f"<details><summary>{len(kept)} steps between</summary>"
            f'<div class="pictures">{figures}</div></details>'
        )
    if left_out:
        parts.append(
            f'<p class="soft">Pictures of {left_out} more steps did not fit into the page; they '
            f"are in the run's folder {PICTURE_FOLDER}/.</p>"
        )
    return "".join(parts)


def _within_budget(
    always: Sequence[Sequence[StoredPicture]], others: Sequence[Sequence[StoredPicture]]
) -> tuple[list[Sequence[StoredPicture]], int]:
    """As many of `others`, evenly spread, as fit beside `always`; and how many do not."""
    sizes = [sum(p.path.stat().st_size for p in group) for group in others]
    room = MAX_PICTURE_BYTES - sum(p.path.stat().st_size for group in always for p in group)
    stride = 1
    while sum(sizes[::stride]) > room and stride <= len(others):
        stride += 1
    kept = list(others[::stride]) if stride <= len(others) else []
    return kept, len(others) - len(kept)


def _figure(picture: StoredPicture, role: str = "") -> str:
    name = f"step {picture.step:,}" + (f" ({role})" if role else f", sample {picture.sample}")
    alt = f"validation sample {picture.sample} at {name}"
    return png_figure(picture.path, name, alt=alt)


def _listed(names: Sequence[str], *, most: int) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(str(name) for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
