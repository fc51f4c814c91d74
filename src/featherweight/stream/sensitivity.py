"""The sensitivity of every matrix to every option, and what it means for the model: what `plan` decides by.

`measure` walks the original model once: in each block it adds up every group's H, solves each matrix for each option
and writes one line a matrix. `calibrate` changes one matrix (or group) at a time and measures how far the model's
predictions move, which turns losses into nats. Both go on where they were stopped.

Shapes: S sequences, T tokens, R outputs, C inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from featherweight import data
from featherweight.core.solve import Choices
from featherweight.errors import RequestError
from featherweight.plan.database import Database, Row
from featherweight.plan.options import Option
from featherweight.recipe import Recipe
from featherweight.stream.calibration import Tell
from featherweight.stream.parallel import ALONE, World
from featherweight.stream.probe import Probe
from featherweight.stream.walk import Keep, Walk, quick

__all__ = ["Values", "calibrate", "measure", "quick"]

Values = Callable[[str, str], Tensor]
Unit = Literal["matrix", "group"]
LESS = 8.0  # calibration's next point has so many times less error than the one before
POINTS = 3


def measure(
    model: str | Path,
    path: str | Path,
    recipe: Recipe,
    options: Sequence[Option] | None = None,
    device: str = "auto",
    choices: Choices | None = None,
    tell: Tell | None = None,
    keep: Keep | None = None,
    world: World = ALONE,
) -> Database:
    """Measures every option of every matrix on the original model's inputs, into the database at `path`.

    Args:
        recipe: calibration text, windows, seed, damping, sink_share, order.
        options: what to try (default: `plan.menu` with scales in the model's dtype); a matrix gets those that fit it.
        choices: how layers are solved, `quick(recipe)` unless given.
        keep: is handed (matrix name, label, values R x C float32 on the device) of all that is solved by this run.
        world: the processes that measure together, each with its own sequences and some of each block's matrices; all
            have the whole database in the end, and process 0 writes it.

    Raises RequestError for what `compress` refuses, a matrix that no option fits, a recipe without calibration text,
    and a database begun with another model, text, settings or options.
    """
    walk = Walk(model, recipe, options, device, choices, Path(path), tell, world)
    database = Database.begin(path, walk.header()) if world.leads else None
    database = _as_first_has_it(Path(path), database, world)
    with torch.no_grad():
        for block, solver in walk.blocks(lambda block: any(m.name not in database.rows for m in block.matrices)):
            found: list[Row] = []
            for inputs in solver.inputs:
                if any(matrix.name not in database.rows for matrix in inputs.matrices):
                    found += _new(database, solver.rows(block, inputs, keep))
            for others in world.each([asdict(row) for row in found]):
                _new(database, map(Row.of, others))
    return _as_first_has_it(Path(path), database, world)


def _as_first_has_it(path: Path, database: Database | None, world: World) -> Database:
    """The database of process 0, which writes it, in every process."""
    lines = world.first(database.lines() if world.leads and database is not None else None)
    return database if world.leads and database is not None else Database.of(path, lines, writes=False)


def _new(database: Database, rows: Iterable[Row]) -> list[Row]:
    """Adds the rows that the database lacks, and returns them."""
    added = [row for row in rows if row.name not in database.rows]
    for row in added:
        database.add(row)
    return added


def calibrate(
    model: str | Path,
    database: Database,
    windows_ST: Tensor,
    recipe: Recipe,
    options: Sequence[Option] | None = None,
    device: str = "auto",
    choices: Choices | None = None,
    tell: Tell | None = None,
    values: Values | None = None,
    points: Sequence[str] | None = None,
    unit: Unit = "matrix",
    world: World = ALONE,
) -> Database:
    """Measures the KL that changing one matrix (or all that are fed the same input) alone does, at a few options.

    Args:
        database: complete, as `measure` made it with the same recipe, options and choices.
        windows_ST: int64 ids, a handful of windows (8 x 512 say); the dense model, their logits and hidden states must
            fit on the device.
        values: solved weights by (matrix name, label), as `measure` hands them to `keep`; else they are solved again.
        points: labels to measure at; by default the worst option, and those with about `LESS` and `LESS`^2 times less.
        unit: "group" is fewer measurements and shares a group's harm out evenly.
        world: as in `measure`; each process has the dense model, and changes the matrices that it has solved.

    Raises RequestError for a database of another request or with matrices missing.
    """
    walk = Walk(model, recipe, options, device, choices, database.path, tell, world)
    database.require(walk.header())
    missing = [m.name for block in walk.tree.blocks for m in block.matrices if m.name not in database.rows]
    if missing:
        raise RequestError(f"{database.path} lacks {missing[0]} and {len(missing) - 1} more: measure to the end first.")
    windows_ST = windows_ST.cpu()
    settings = {"ids_sha256": data.digest(windows_ST), "unit": unit, "points": None if points is None else list(points)}
    database.begin_calibration(settings)
    todo = {
        name: labels for name, labels in _points(database, unit, points).items() if not _has(database, name, labels)
    }
    if not todo:
        return database
    probe = Probe(model, windows_ST, walk.device)
    if values is not None:
        for done, (names, labels) in enumerate(todo.items()):
            for label in labels:
                solved = {name: values(name, label) for name in names}
                _add_point(database, names, label, probe.kl(solved))
            walk.tell(done + 1, len(todo), "calibrating")
        return database
    with torch.no_grad():
        for block, solver in walk.blocks(lambda block: any(m.name in names for names in todo for m in block.matrices)):
            inside = {matrix.name for matrix in block.matrices}
            measured: list[tuple[tuple[str, ...], str, float]] = []
            for names in (names for names in todo if inside >= set(names) and solver.has(names)):
                for label in todo[names]:
                    measured.append((names, label, probe.kl(solver.values(names, label))))
                    _add_point(database, *measured[-1])
            for number, others in enumerate(world.each(measured)):
                for point in others if number != world.rank else ():
                    _add_point(database, *point)
    return _as_first_has_it(database.path, database, world)


def _points(database: Database, unit: Unit, points: Sequence[str] | None) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The labels to measure at, by the names that are changed together."""
    groups: dict[str, list[Row]] = {}
    for row in database.rows.values():
        groups.setdefault(f"{row.block}:{row.inputs}", []).append(row)
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for rows in groups.values():
        labels = [label for label in rows[0].options if all(label in row.options for row in rows)]
        unknown = set(points or ()) - set(labels)
        if unknown:
            raise RequestError(f"{rows[0].name} has no option {min(unknown)}, only {', '.join(labels)}: choose others.")
        chosen = tuple(points) if points else _spread(rows[0], labels)
        names = [row.name for row in rows]
        found |= dict.fromkeys([tuple(names)] if unit == "group" else [(name,) for name in names], chosen)
    return found


def _spread(row: Row, labels: Sequence[str]) -> tuple[str, ...]:
    """The worst option, and those whose errors are nearest to `LESS` and `LESS`^2 times less."""
    errors = {label: max(row.options[label].relative_error, 1e-12) for label in labels}
    worst = max(errors.values())

    def nearest(goal: float) -> str:
        return min(labels, key=lambda label: abs(math.log(errors[label] / goal)))

    return tuple(dict.fromkeys(nearest(worst / LESS**n) for n in range(POINTS)))


def _has(database: Database, names: tuple[str, ...], labels: tuple[str, ...]) -> bool:
    return all(label in database.points.get(name, {}) for name in names for label in labels)


def _add_point(database: Database, names: Sequence[str], label: str, kl: float) -> None:
    """What changing these matrices together does, shared out evenly."""
    for name in names:
        database.add_point(name, label, database.rows[name].options[label].relative_error, kl / len(names))
