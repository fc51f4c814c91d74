"""The sensitivity of every matrix to every option, and what it means for the model: what `plan` decides by.

`measure` walks the original model once: in each block it adds up every group's H, solves each matrix for each option
and writes one line a matrix. `calibrate` changes one matrix (or group) at a time and measures how far the model's
predictions move, which turns losses into nats. Both go on where they were stopped.

Shapes: S sequences, T tokens, R outputs, C inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
) -> Database:
    """Measures every option of every matrix on the original model's inputs, into the database at `path`.

    Args:
        recipe: calibration text, windows, seed, damping, sink_share, order.
        options: what to try (default: `plan.menu` with scales in the model's dtype); a matrix gets those that fit it.
        choices: how layers are solved, `quick(recipe)` unless given.
        keep: is handed (matrix name, label, values R x C float32 on the device) of all that is solved by this run.

    Raises RequestError for what `compress` refuses, a matrix that no option fits, a recipe without calibration text,
    and a database begun with another model, text, settings or options.
    """
    walk = Walk(model, recipe, options, device, choices, Path(path), tell)
    database = Database.begin(path, walk.header())
    with torch.no_grad():
        for block, solver in walk.blocks(lambda block: any(m.name not in database.rows for m in block.matrices)):
            for inputs in solver.inputs:
                if any(matrix.name not in database.rows for matrix in inputs.matrices):
                    for row in solver.rows(block, inputs, keep):
                        if row.name not in database.rows:
                            database.add(row)
    return database


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
) -> Database:
    """Measures the KL that changing one matrix (or all that are fed the same input) alone does, at a few options.

    Args:
        database: complete, as `measure` made it with the same recipe, options and choices.
        windows_ST: int64 ids, a handful of windows (8 x 512 say); the dense model, their logits and hidden states must
            fit on the device.
        values: solved weights by (matrix name, label), as `measure` hands them to `keep`; else they are solved again.
        points: labels to measure at; by default the worst option, and those with about `LESS` and `LESS`^2 times less.
        unit: "group" is fewer measurements and shares a group's harm out evenly.

    Raises RequestError for a database of another request or with matrices missing.
    """
    walk = Walk(model, recipe, options, device, choices, database.path, tell)
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
                _measure_point(probe, database, label, {name: values(name, label) for name in names})
            walk.tell(done + 1, len(todo), "calibrating")
        return database
    with torch.no_grad():
        for block, solver in walk.blocks(lambda block: any(m.name in names for names in todo for m in block.matrices)):
            inside = {matrix.name for matrix in block.matrices}
            for unit_names in (names for names in todo if inside >= set(names)):
                for label in todo[unit_names]:
                    _measure_point(probe, database, label, solver.values(unit_names, label))
    return database


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


def _measure_point(probe: Probe, database: Database, label: str, values: Mapping[str, Tensor]) -> None:
    kl = probe.kl(values) / len(values)
    for name in values:
        database.add_point(name, label, database.rows[name].options[label].relative_error, kl)
