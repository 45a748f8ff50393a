"""What the cells of tools/few_labels.py say: paired differences, their table and their figure."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SCRATCH = "scratch"
SHUFFLED = "shuffled_"  # before a method's name: its weights, permuted within each tensor
PRIMARY = "mAP@0.10"
CONFIDENCE = 0.95

Results = Sequence[dict[str, Any]]  # JSON values, one entry per fine-tuning


def write_results(out: Path, results: Results) -> None:
    """results.csv, comparison.md, few_labels.png, and the comparison on the terminal."""
    with (out / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(results[0]))
        writer.writeheader()
        writer.writerows(results)
    table = comparison_table(results)
    (out / "comparison.md").write_text(table + "\n")
    draw(out / "few_labels.png", results)
    print(table)


def scores(results: Results, arm: str, labels: int, figure: str = PRIMARY) -> list[float]:
    """The figure of an arm by seed; an undefined one counts as 0."""
    chosen = [r for r in results if r["arm"] == arm and r["labels"] == labels]
    return [r[figure] or 0.0 for r in sorted(chosen, key=lambda r: r["seed"])]


@dataclass(frozen=True)
class Difference:
    """Paired difference of an arm to a baseline over the seeds."""

    arm: str
    baseline: str
    labels: int
    mean: float
    low: float
    high: float
    p_value: float
    adjusted: float = 1.0  # by Holm over all comparisons


def arms_and_labels(results: Results) -> tuple[list[str], list[int]]:
    """The arms and the numbers of labels of the results, in the order of their cells."""
    return list(dict.fromkeys(r["arm"] for r in results)), sorted({r["labels"] for r in results})


def comparisons(results: Results) -> list[tuple[str, str, int]]:
    """(arm, baseline, labels): every arm against scratch, a method also against its control."""
    arms, counts = arms_and_labels(results)
    pairs = [(arm, SCRATCH) for arm in arms if arm != SCRATCH]
    if len(controls := [arm for arm in arms if arm.startswith(SHUFFLED)]) > 1:
        pairs += [(control.removeprefix(SHUFFLED), control) for control in controls]
    return [(arm, baseline, count) for count in counts for arm, baseline in pairs]


def differences(results: Results, figure: str = PRIMARY) -> list[Difference]:
    """Mean, 95 % interval and p of the paired t-test of every comparison, with Holm's p."""
    import numpy as np
    from scipy import stats

    found = []
    for arm, baseline, labels in comparisons(results):
        base = np.array(scores(results, baseline, labels, figure))
        gains = np.array(scores(results, arm, labels, figure)) - base
        mean, error = float(gains.mean()), float(stats.sem(gains))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1)) * error
        ratio = abs(mean) / error if error else (np.inf if mean else 0.0)
        p_value = 2 * float(stats.t.sf(ratio, len(gains) - 1))
        found.append(Difference(arm, baseline, labels, mean, mean - half, mean + half, p_value))
    order = sorted(range(len(found)), key=lambda n: found[n].p_value)
    running = 0.0
    adjusted = [1.0] * len(found)
    for rank, number in enumerate(order):
        running = max(running, min(1.0, (len(found) - rank) * found[number].p_value))
        adjusted[number] = running
    return [replace(d, adjusted=holm) for d, holm in zip(found, adjusted, strict=True)]


def comparison_table(results: Results) -> str:
    """Markdown: mean and standard deviation of each arm, then every paired difference."""
    import numpy as np

    arms, counts = arms_and_labels(results)
    lines = ["| labels | " + " | ".join(arms) + " |", "|---" * (1 + len(arms)) + "|"]
    for labels in counts:
        cells = [np.array(scores(results, arm, labels)) for arm in arms]
        texts = [f"{values.mean():.3f} ({values.std(ddof=1):.3f})" for values in cells]
        lines.append(f"| {labels} | " + " | ".join(texts) + " |")
    seeds = len(scores(results, SCRATCH, counts[0]))
    lines = [f"{PRIMARY}, mean (standard deviation) of {seeds} seeds:", "", *lines, ""]
    lines += ["| labels | arm | minus | 95 % interval | p | p (Holm) |", "|---" * 6 + "|"]
    for d in differences(results):
        lines.append(
            f"| {d.labels} | {d.arm} | {d.baseline} | {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] "
            f"| {d.p_value:.3f} | {d.adjusted:.3f} |"
        )
    return "\n".join(lines)


def draw(path: Path, results: Results) -> None:
    """Differences with their intervals, one panel per number of labels."""
    from matplotlib.figure import Figure

    _, counts = arms_and_labels(results)
    found = differences(results)
    rows = len(found) // len(counts)
    figure = Figure(figsize=(3 + 2.2 * len(counts), 1 + 0.45 * rows), layout="constrained")
    panels = figure.subplots(1, len(counts), sharey=True, sharex=True, squeeze=False)[0]
    for panel, labels in zip(panels, counts, strict=True):
        chosen = [d for d in found if d.labels == labels]
        for row, d in enumerate(chosen):
            pairs = zip(
                scores(results, d.arm, labels), scores(results, d.baseline, labels), strict=True
            )
            gains = [a - b for a, b in pairs]
            panel.scatter(gains, [row + 0.22] * len(gains), s=9, color="0.6")
            panel.plot([d.low, d.high], [row, row], color="#125ca5", linewidth=2)
            panel.plot([d.mean], [row], "o", color="#125ca5")
        panel.axvline(0, color="0.3", linewidth=0.8)
        panel.set_title(f"{labels} labelled volumes", fontsize=10)
        panel.set_yticks(range(len(chosen)), [f"{d.arm} - {d.baseline}" for d in chosen])
        panel.set_xlabel(f"difference of {PRIMARY}", fontsize=9)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
