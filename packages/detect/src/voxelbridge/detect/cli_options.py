"""Options that several commands of `vb-detect` have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Store = Annotated[Path, typer.Option(help="Case store written by `prepare`.")]
RunStore = Annotated[
    Path | None, typer.Option(help="Store of the runs; default: where their training found it.")
]
Objective = Annotated[
    Literal["map_range", "map_0.10", "map_0.30", "map_0.50", "froc_0.10", "froc_0.30"],
    typer.Option(help="What is to be large; map_range is the mean AP at IoU 0.10 to 0.50."),
]
SkippedSteps = Annotated[
    list[str] | None,
    typer.Option(help="Setting to leave alone, such as min_size for tiny lesions; repeatable."),
]
SweptSteps = Annotated[
    list[str] | None, typer.Option(help="Setting to try, the others left alone; repeatable.")
]
SweepTTA = Annotated[
    int, typer.Option(min=0, max=8, help="Mirrored copies: 0 none, 4 in-plane, 8 all axes.")
]
Weights = Annotated[
    Literal["last", "best"], typer.Option(help="After the last step, or best on validation.")
]
Mergers = Annotated[int, typer.Option(min=0, help="Processes that merge boxes.")]
