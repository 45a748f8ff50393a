"""One self-contained HTML page about a training on many data sets: curves, label maps, scores."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from voxelbridge.core.errors import DataError
from voxelbridge.core.files import atomic_write, read_json
from voxelbridge.core.report.losses import TOTAL, Record, training_charts
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
from voxelbridge.core.run import ENVIRONMENT_FILE
from voxelbridge.core.train.metrics import read_metrics
from voxelbridge.pretrain_sup.config import MultiTalentConfig
from voxelbridge.pretrain_sup.evaluate import MEASURES
from voxelbridge.pretrain_sup.evaluate import SCHEMA as SCORES_SCHEMA
from voxelbridge.pretrain_sup.label_space import LabelSpace
from voxelbridge.pretrain_sup.predict_cases import MANIFEST_FILE
from voxelbridge.pretrain_sup.weights import NETWORK_FILE, new_network, read_run

OVERLAY_FOLDER = "overlays"  # in the run directory
MAX_DATASET_CHARTS = 100
VALIDATION = "val_"  # val_<data set> is its loss
PSEUDO_DICE = ".dice"  # val_<data set>.dice is its Dice


def write_training_report(
    run: Path, output: Path, *, predictions: Sequence[Path] = (), metrics: Sequence[Path] = ()
) -> None:
    """Writes the page of a run, finished or not, to `output`, atomically.

    Shows the pictures in RUN/overlays and in `predictions` (folders of `vb-sup predict`), and the
    scores in `metrics` (files of `vb-sup evaluate`). ConfigError for what is no such run, DataError
    for a folder without pictures and for foreign files.
    """
    config, space, _ = read_run(run)
    data = read_if_there(run / "data.json")
    starts = read_if_there(run / ENVIRONMENT_FILE).get("starts", [])
    path = run / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    folders = [*([run / OVERLAY_FOLDER] if (run / OVERLAY_FOLDER).is_dir() else []), *predictions]
    sections = [
        Section("result", "Result", _result(records, space) + notes_list(_notes(run, records))),
        Section("curves", "Curves", _curves(records, space)),
        Section("labels", "Label maps", _label_maps(folders)),
        Section("scores", "Scores", _scores([_read_scores(file) for file in metrics])),
        Section("datasets", "Data sets", _datasets(space, data)),
        Section("settings", "Settings", settings_table(config)),
    ]
    page = html_page(
        f"Supervised pre-training: {run.resolve().name}",
        sections,
        lede=_lede(config, space, records),
        facts=_facts(run, config, space, data, starts, records),
        distribution="voxelbridge-pretrain-sup",
    )
    with atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")


def parameter_counts(config: MultiTalentConfig, space: LabelSpace) -> tuple[int, int]:
    """Parameters of the network, and of the encoder with all its stems; allocates nothing."""
    plain = config.model_copy(update={"init": "torch_default"})  # normal draws take seconds there
    with torch.device("meta"):
        network = new_network(plain, space)
    return (
        sum(p.numel() for p in network.parameters()),
        sum(p.numel() for p in network.encoder.parameters()),
    )


def _lede(config: MultiTalentConfig, space: LabelSpace, records: Sequence[Record]) -> str:
    """One sentence of what was done and one of what came out, as HTML."""
    count = len(space.datasets)
    text = (
        f"<strong>{escape(config.encoder)}</strong> on {count} data set{'s' * (count != 1)}: "
        f"{progress(records, config.schedule.steps)} steps."
    )
    ends = {name: _ends(records, name) for name in (d.name for d in space.datasets)}
    both = {name: pair for name, pair in ends.items() if pair is not None}
    fallen = sum(last < first for first, last in both.values())
    if both:
        text += f" The training loss fell on <strong>{fallen} of {len(both)}</strong> data sets."
    return text


def _facts(
    run: Path,
    config: MultiTalentConfig,
    space: LabelSpace,
    data: Facts,
    starts: Sequence[Facts],
    records: Sequence[Record],
) -> dict[str, str]:
    finished = (run / "checkpoints" / NETWORK_FILE).is_file()
    total, encoder = parameter_counts(config, space)
    targets = sum(len(dataset.targets) for dataset in space.datasets)
    facts = {
        "encoder": config.encoder,
        "decoder": {"unet": "U-Net", "ufpn": "U-FPN"}[config.decoder.kind],
        "patch z, y, x": TIMES.join(str(edge) for edge in config.patch_size),
        "batch size": str(config.batch_size),
        "optimizer steps": progress(records, config.schedule.steps)
        + (", finished" if finished else ", not finished"),
        "parameters": f"{total:,}, of these encoder {encoder:,}",
        "data sets": f"{len(space.datasets)} with {targets} targets",
        "label layout": f"{space.layout}, {len(space.output_layers)} output layers",
    }
    cases = data.get("cases_per_dataset")
    if cases:
        held_out = len(data.get("validation_cases") or ())
        facts["cases"] = f"{sum(cases.values()):,}, of these for validation {held_out:,}"
    return facts | start_facts(starts)


def _result(records: Sequence[Record], space: LabelSpace) -> str:
    if not records:
        return NOTHING_RECORDED
    rows = []
    for title, key in [("all", TOTAL), *((d.name, d.name) for d in space.datasets)]:
        ends = _ends(records, key)
        if ends is None:
            rows.append((title, [figure_cell(None)] * 5))
            continue
        first, last = (figure_cell(value, form=".4g") for value in ends)
        lowest = figure_cell(min(float(r[key]) for r in records if key in r), form=".4g")
        validation = last_value(records, f"{VALIDATION}{key}")
        dice = last_value(records, f"{VALIDATION}{key}{PSEUDO_DICE}")
        rows.append(
            (title, [first, lowest, last, figure_cell(validation, form=".4g"), figure_cell(dice)])
        )
    heads = ("first", "lowest", "last", "validation, last", "pseudo Dice, last")
    return figures_table("Loss", "data set", heads, rows) + (
        '<p class="soft">All: the loss of the step as it was minimised. Data sets: the mean over '
        "their own samples. Pseudo Dice: over all validation patches of a data set together, mean "
        "of its targets.</p>"
    )


def _notes(run: Path, records: Sequence[Record]) -> list[str]:
    return run_notes(
        finished=(run / "checkpoints" / NETWORK_FILE).is_file(),
        validated=not records or any(key.startswith(VALIDATION) for r in records for key in r),
    )


def _curves(records: Sequence[Record], space: LabelSpace) -> str:
    names = {dataset.name for dataset in space.datasets}
    losses = names | {f"{VALIDATION}{name}" for name in names}
    dice = {f"{VALIDATION}{name}{PSEUDO_DICE}" for name in names}
    parts = [
        "<h3>All data sets together</h3>",
        training_charts(_only(records, lambda key: key not in losses | dice)),
        "<h3>Loss of each data set</h3>",
        training_charts(_only(records, losses.__contains__), limit=MAX_DATASET_CHARTS),
    ]
    scored = _only(records, dice.__contains__)
    if scored:
        parts += [
            "<h3>Pseudo Dice on the validation patches</h3>",
            training_charts(scored, limit=MAX_DATASET_CHARTS),
        ]
    return "".join(parts)


def _label_maps(folders: Sequence[Path]) -> str:
    if not folders:
        return (
            '<p class="soft">No pictures were given (folder overlays/ of the run, or '
            "<code>--predictions</code>).</p>"
        )
    parts = [
        '<p class="soft">Axial slices, the patient&#39;s right on the left; grey from the 1st to '
        "the 99th percentile of the slices.</p>"
    ]
    room, left_out = MAX_PICTURE_BYTES, 0
    for folder in folders:
        paths = sorted(folder.glob("*.png"))
        if not paths:
            raise DataError(f"{folder}: no picture ({{case}}.png); `vb-sup predict` writes them")
        told = read_if_there(folder / MANIFEST_FILE)
        whose = f"{folder.name}: {told['dataset']}" if "dataset" in told else folder.name
        figures = []
        for path in paths:
            room -= path.stat().st_size
            if room >= 0:
                figures.append(png_figure(path, path.stem, alt=f"labels over case {path.stem}"))
        left_out += len(paths) - len(figures)
        parts.append(f'<h3>{escape(whose)}</h3><div class="pictures">{"".join(figures)}</div>')
    if left_out:
        parts.append(f'<p class="soft">{left_out} more pictures did not fit into the page.</p>')
    return "".join(parts)


def _read_scores(path: Path) -> Facts:
    content = read_json(path)
    legal = isinstance(content, dict) and content.get("schema") == SCORES_SCHEMA
    if not legal or not {"dataset", "num_cases", "mean", "targets"} <= content.keys():
        raise DataError(f"{path}: not what `vb-sup evaluate` writes (schema {SCORES_SCHEMA})")
    return content


def _scores(summaries: Sequence[Facts]) -> str:
    if not summaries:
        return '<p class="soft">No scores were given (<code>--metrics</code>).</p>'
    heads = ("cases", "missed", "spurious", "Dice", "ASSD mm", "HD95 mm")
    counts = ("num_cases", "num_missed", "num_spurious")
    parts = []
    for summary in summaries:
        rows = [
            (name, [*(f"{scores[key]:,}" for key in counts), *_measures(scores)])
            for name, scores in summary["targets"].items()
        ]
        rows.append(("mean", ["", "", "", *_measures(summary["mean"])]))
        caption = f"{summary['dataset']}: {summary['num_cases']:,} cases"
        parts.append(figures_table(caption, "target", heads, rows))
    return "".join(parts) + (
        '<p class="soft">Means over the cases that have the score. Missed: only the reference has '
        "the target; spurious: only the prediction has it. ASSD: average symmetric surface "
        "distance; HD95: 95th percentile Hausdorff distance.</p>"
    )


def _measures(scores: Facts) -> list[str]:
    forms = zip(MEASURES, (".3f", ".2f", ".2f"), strict=True)
    return [figure_cell(scores[key], form=form) for key, form in forms]


def _datasets(space: LabelSpace, data: Facts) -> str:
    cases: Mapping[str, int] = data.get("cases_per_dataset") or {}
    rows = []
    for dataset in space.datasets:
        kind = "regions" if dataset.regions else "labels"
        heads = space.heads_of(dataset.name)
        cells = [
            f"{cases.get(dataset.name, dataset.num_cases):,}",
            escape(", ".join(dataset.channels)),
            f"{len(dataset.targets)} {kind}",
            str(len(heads)),
        ]
        rows.append((dataset.name, cells))
    return figures_table(
        "Cases in the store, training and validation", "data set",
        ("cases", "channels", "targets", "heads"), rows,
    )  # fmt: skip


def _only(records: Sequence[Record], keep: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The records with the chosen values alone, without those that have none."""
    chosen = [{key: value for key, value in r.items() if keep(key)} for r in records]
    return [
        {"step": record["step"], **values}
        for record, values in zip(records, chosen, strict=True)
        if values.keys() - {"step"}
    ]


def _ends(records: Sequence[Record], key: str) -> tuple[float, float] | None:
    """The first and the last value; None where there are not two."""
    values = [float(r[key]) for r in records if key in r]
    return (values[0], values[-1]) if len(values) > 1 else None
