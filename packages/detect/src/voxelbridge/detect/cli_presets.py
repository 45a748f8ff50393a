"""The commands of `vb-detect` that tell about presets: info, show, schedule."""

import json
from pathlib import Path
from typing import Annotated

import typer

from voxelbridge.core.command_line import Json, Overrides


def info(
    preset: Annotated[str, typer.Argument(help="Name of a shipped preset, or a TOML file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    channels: Annotated[int, typer.Option(min=1, help="Input channels.")] = 1,
    classes: Annotated[int, typer.Option(min=1, help="Foreground classes.")] = 1,
    store: Annotated[
        Path | None, typer.Option(help="Store whose plan a preset with that architecture takes.")
    ] = None,
) -> None:
    """What a preset costs: parameters, operations, anchors, memory."""
    from voxelbridge.detect.info import describe_preset
    from voxelbridge.detect.plan import read_plan

    facts = describe_preset(
        preset, in_channels=channels, num_classes=classes, plan=read_plan(store) if store else None
    )
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"{preset}: patch {facts['patch_size']}, batch {facts['batch_size']}")
    for name, count in facts["parameters"].items():
        print(f"  {name:<12} {count:>12,} parameters")
    sizes = ", ".join(
        f"{facts[name]:,} {name}" for name in ("anchors", "tokens", "queries") if name in facts
    )
    print(f"  {facts['gflop']:,} GFLOP for one patch forward, {sizes}")
    print(f"  about {facts['memory_gib']} GiB for a training step of the batch")


def show(
    preset: Annotated[
        str, typer.Argument(help="Name of a shipped preset, a TOML file, or a run directory.")
    ],
    overrides: Overrides = None,
    store: Annotated[
        Path | None, typer.Option(help="Store whose plan a preset with that architecture takes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the resolved settings, each with its origin."""
    from voxelbridge.detect.origins import settings_of

    settings = settings_of(preset, overrides or [], store=store)
    print(json.dumps(settings.as_json(), indent=2) if as_json else settings.describe())


def schedule(
    preset: Annotated[str, typer.Argument(help="Name of a shipped preset, or a TOML file.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the phases as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the learning rate too.")
    ] = None,
    epoch: Annotated[int, typer.Option(min=1, help="Steps that count as an epoch.")] = 2500,
    store: Annotated[
        Path | None, typer.Option(help="Store whose plan a preset with that architecture takes.")
    ] = None,
) -> None:
    """What a training does when: steps, learning rates, what is frozen, averaged, restarted."""
    from voxelbridge.detect.build import load_detect_config
    from voxelbridge.detect.plan import read_plan
    from voxelbridge.detect.show_schedule import describe_schedule, plot_schedule, schedule_facts

    plan = read_plan(store) if store else None
    config = load_detect_config(preset, overrides or [], plan=plan)
    if plot:
        plot_schedule(config, plot)
    if as_json:
        print(json.dumps(schedule_facts(config, epoch_steps=epoch), indent=2))
        return
    print(describe_schedule(config, epoch_steps=epoch))
