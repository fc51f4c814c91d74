"""What every command prints: one JSON line on stdout, and tables, progress and remarks on stderr."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from featherweight.errors import RequestError

COUNTS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
BYTES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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


def quantity(name: str, text: str, units: dict[str, float]) -> float:
    """A number with one of these units, such as 60MB; RequestError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in units or not 0 < float(found[1]) * units[found[2].upper()] < math.inf:
        known = ", ".join(unit for unit in units if unit)
        raise RequestError(f"{name} {text!r}: give a number above 0, alone or with one of {known}.")
    return float(found[1]) * units[found[2].upper()]
