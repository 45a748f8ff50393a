"""What the command lines of all parts share: how an app is made, options, how errors are told.

Nothing heavy is imported here: `--help` must answer at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from voxelbridge.core.errors import ConfigError, VoxelbridgeError

DEBUG_FLAG = "--debug"
INTERRUPTED = 130  # the exit status after Ctrl-C
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports its subclass alone

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU if there is one.")
]
License = Annotated[
    str | None, typer.Option("--license", help="Licence of the weights, for instance CC-BY-4.0.")
]
DryPrepare = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def make_app(text: str, *, command: str, package: str) -> typer.Typer:
    """A typer app whose help starts with `text`; tracebacks and completion commands are off.

    Its `--version` prints `command` and the version of the installed distribution `package`.
    """
    app = typer.Typer(
        help=f"{text}\n\nEvery error is one line; add {DEBUG_FLAG} to see where it came from.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def tell_version(asked: bool) -> None:
        if asked:
            typer.echo(f"{command} {_version_of(package)}")
            raise typer.Exit

    # The callback also keeps an app with one command from becoming that command.
    @app.callback()
    def common(
        *,
        _version: Annotated[
            bool,
            typer.Option(
                "--version", help="Print the version.", is_eager=True, callback=tell_version
            ),
        ] = False,
    ) -> None:
        return None

    return app


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Runs `app`; exit status 0 success, 1 bad data or files, 2 wrong usage, 130 Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG_FLAG in given
    try:
        status = app(
            args=[argument for argument in given if argument != DEBUG_FLAG], standalone_mode=False
        )
    except UsageError as error:
        _tell_usage(error)
        sys.exit(2)
    except VoxelbridgeError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a path in the way, not to be written, or a full disk
        if debug or error.strerror is None:
            raise
        path = error.filename2 or error.filename
        where = f"{path}: " if path else ""
        print(
            f"error: {where}{_lower(error.strerror)}; check the path, its permissions and the "
            "free disk",
            file=sys.stderr,
        )
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        status = INTERRUPTED
    if status == INTERRUPTED:
        print("stopped by Ctrl-C", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _tell_usage(error: Any) -> None:  # Any: typer's base class of usage errors has no public name
    """One line; the whole help where a command was called without anything."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    command = error.ctx.command_path if error.ctx else Path(sys.argv[0]).name
    text = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    print(f"error: {command}: {_lower(text)}; see {command} --help", file=sys.stderr)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        raise ConfigError(f"{package} is not installed; install it to learn its version") from None
