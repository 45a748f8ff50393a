"""What the command lines of all parts share: how an app is made and how errors reach the user.

Nothing heavy is imported here: `--help` must answer at once.
"""

import sys
from collections.abc import Sequence

import typer

from voxelbridge.core.errors import VoxelbridgeError

DEBUG_FLAG = "--debug"


def make_app(text: str) -> typer.Typer:
    """A typer app whose help starts with `text`; tracebacks and completion commands are off."""
    app = typer.Typer(
        help=f"{text}\n\nEvery error is one line; add {DEBUG_FLAG} to see where it came from.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_keep_subcommands)
    return app


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Runs `app`; exit status 0 success, 1 bad data or files, 2 wrong usage, 130 Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG_FLAG in given
    try:
        app(args=[argument for argument in given if argument != DEBUG_FLAG])
    except VoxelbridgeError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def _keep_subcommands() -> None:
    # Without a callback, typer turns an app with one command into that command.
    return None
