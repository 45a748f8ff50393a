"""The learning rate and what trains, step by step, as a table, as JSON and as a picture."""

from pathlib import Path
from typing import Any

from voxelbridge.core.errors import ConfigError
from voxelbridge.core.files import atomic_write
from voxelbridge.core.train.phases import Phase, describe_phases, phases_of
from voxelbridge.core.train.restart import scheme_of
from voxelbridge.detect.config import DetectConfig

EPOCH_STEPS = 2500  # what the paper and nnDetection call an epoch
CURVE_POINTS = 4000  # of one attempt, besides the first and last step of every phase


def schedule_facts(config: DetectConfig, *, epoch_steps: int = EPOCH_STEPS) -> dict[str, Any]:
    """What `--json` prints: phases, averaging and restart rule. Any: JSON values."""
    return {
        "epoch_steps": epoch_steps,
        "phases": [phase.facts(epoch_steps=epoch_steps) for phase in phases(config)],
        "averaging": config.averaging.model_dump(mode="json"),
        "restart": config.restart.model_dump(mode="json") if config.restart else None,
    }


def describe_schedule(config: DetectConfig, *, epoch_steps: int = EPOCH_STEPS) -> str:
    """What the command prints for people."""
    lines = [describe_phases(phases(config), epoch_steps=epoch_steps)]
    rule = config.restart
    if rule is None:
        lines.append("no restart rule")
    else:
        by = "(first - last) / first" if rule.goal == "decrease" else "last - first"
        lines.append(
            f"restart rule: judged after {rule.after_steps:,} steps by {rule.metric}, {by} must be "
            f"{rule.min_improvement:g}; at most {rule.max_restarts} restarts"
        )
    lines.append(f"epochs of {epoch_steps:,} steps; steps count from 0")
    return "\n".join(lines)


def phases(config: DetectConfig) -> list[Phase]:
    """The phases that `config` asks for."""
    return phases_of(
        config.schedule, lr=config.optim.lr, averaging=config.averaging, restart=config.restart
    )


def plot_schedule(config: DetectConfig, path: Path) -> None:
    """Draws the learning rate over the steps; frozen phases are shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path}: expected a .png file")
    found = phases(config)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for attempt in sorted({phase.attempt for phase in found}):
        own = [phase for phase in found if phase.attempt == attempt]
        scheme = scheme_of(
            config.schedule, lr=config.optim.lr, averaging=config.averaging,
            restart=config.restart, attempt=attempt,
        )  # fmt: skip
        stride = max(1, scheme.schedule.steps // CURVE_POINTS)
        edges = {step for phase in own for step in (phase.first_step, phase.last_step)}
        steps = sorted(edges | set(range(0, scheme.schedule.steps, stride)))
        name = "after a restart" if attempt else "learning rate"
        axes.plot(steps, [scheme.learning_rate(step) for step in steps], label=name, linewidth=1.2)
        for phase in own:
            if phase.frozen:
                label = f"frozen: {', '.join(phase.frozen)}"
                axes.axvspan(phase.first_step, phase.last_step, alpha=0.15, label=label)
            if phase.averaged.startswith("before"):
                axes.axvspan(
                    phase.first_step, phase.last_step, alpha=0.15, color="tab:green",
                    label="weights averaged" if not attempt else None,
                )  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
