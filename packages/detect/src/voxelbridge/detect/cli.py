"""vb-detect: check, prepare, train, predict, look. Heavy imports wait until a command runs."""

from voxelbridge.core.command_line import make_app, run_app
from voxelbridge.detect.cli_data import check, convert, prepare
from voxelbridge.detect.cli_outcomes import evaluate, rank, report
from voxelbridge.detect.cli_presets import info, schedule, show
from voxelbridge.detect.cli_protocols import add_protocol_commands
from voxelbridge.detect.cli_runs import (
    cross_validate,
    export,
    out_of_fold,
    predict,
    sweep,
    train,
)
from voxelbridge.detect.cli_study import study_app

app = make_app(
    "Find lesions in 3D medical images: prepare, train, predict, evaluate, report.",
    command="vb-detect",
    package="voxelbridge-detect",
)

# In the order of `vb-detect --help`.
for command in (
    convert, prepare, check, train, predict, sweep, cross_validate, out_of_fold, evaluate,
):  # fmt: skip
    app.command()(command)
add_protocol_commands(app)
for command in (rank, info, show, schedule, report, export):
    app.command()(command)
app.add_typer(study_app, name="study", help="A whole experiment matrix from one file.")


def main() -> None:
    """Entry point of the `vb-detect` command."""
    run_app(app)


if __name__ == "__main__":
    main()
