"""What every command prints: one JSON line on stdout, and tables, progress and remarks on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer


def last_line(values: dict[str, Any]) -> None:
    """The line that scripts read."""
    typer.echo(json.dumps(values))


def say(text: str) -> None:
    """A remark on stderr."""
    typer.echo(text, err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], between: str = " to ") -> None:
    """A table on stderr; floats get four digits, lists are joined by `between`, None is a dash."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table()
    for column in columns:
        drawn.add_column(column, overflow="fold")  # a name cut short says nothing
    for row in rows:
        drawn.add_row(*(_cell(value, between) for value in row))
    Console(stderr=True).print(drawn)


def _cell(value: Any, between: str) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return between.join(_cell(each, between) for each in value)
    return "-" if value is None else str(value)


@contextmanager
def progress() -> Iterator[Callable[[float, float, str], None]]:
    """A bar with the time left, on stderr, which an error wipes away; yields (done, total, what is being done)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)
        try:
            yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
        except BaseException:
            bar.live.transient = True
            raise
