"""Progress of long work: a bar on a terminal, plain lines on stdout anywhere else."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

LINE_EVERY_SECONDS = 10.0  # seconds between plain lines, so that a log file stays readable


def track(iterable: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
    """Yields the items of `iterable` and shows how many of `total` are done, with the rest time."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stdout.isatty():
        yield from _track_with_bar(iterable, description, total)
    else:
        yield from _track_with_lines(iterable, description, total)


def _track_with_bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total)
        for item in iterable:
            yield item
            bar.advance(task)


def _track_with_lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS and done != total:
            last = now
            print(_line(description, done, total, now - start), flush=True)
    print(_line(description, done, total, time.monotonic() - start), flush=True)


def _line(description: str, done: int, total: int | None, seconds: float) -> str:
    if total is None or done == 0 or done >= total:
        return f"{description}: {done} done in {seconds:.0f} s"
    left = seconds / done * (total - done)
    return f"{description}: {done}/{total}, {seconds:.0f} s, about {left:.0f} s left"
