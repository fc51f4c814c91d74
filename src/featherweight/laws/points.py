"""The runs a law is fitted to: P points read from a CSV, checked, and asked what they can identify.

Shapes: P points.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import RequestError

COLUMNS = ("sparsity", "nonzero_parameters", "data", "loss")
SHIPPED = ("t5", "vit")


@dataclass(frozen=True)
class Points:
    """P training runs as float64 arrays: S in [0, 1), N in parameters, D in tokens or images, L > 0."""

    sparsity_P: Any
    parameters_P: Any
    data_P: Any
    loss_P: Any

    def __len__(self) -> int:
        return len(self.loss_P)

    def take(self, chosen: Any) -> Points:
        """The points at these indices, or where this mask is true."""
        return Points(*(column[chosen] for column in self.columns()))

    def columns(self) -> tuple[Any, Any, Any, Any]:
        return self.sparsity_P, self.parameters_P, self.data_P, self.loss_P


def points(sparsity: Any, parameters: Any, data: Any, loss: Any) -> Points:
    """Points of four sequences of equal length, already checked by the caller."""
    import numpy as np

    return Points(*(np.asarray(column, float) for column in (sparsity, parameters, data, loss)))


def read(path: str | Path) -> Points:
    """Points of a CSV with the columns sparsity, nonzero_parameters, data and loss, in any order, beside any others.

    Raises RequestError, naming file and line, for a file that is not there, a column that is missing, a number that is
    none, or one outside what it can be.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            _check_header(str(path), reader.fieldnames)
            rows = [_row(str(path), reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path} is not a CSV file that can be read ({reason}): give one.") from error
    return points(*([row[i] for row in rows] for i in range(len(COLUMNS))))


def published(name: str) -> Points:
    """The 48 T5 ("t5") or 112 ViT ("vit") runs of arXiv 2309.08520; data/README.md has source and licence."""
    if name not in SHIPPED:
        raise RequestError(f"no published points are called {name!r}: take {' or '.join(SHIPPED)}.")
    return read(Path(__file__).parent / "data" / f"{name}.csv")


def _check_header(path: str, header: Iterable[str] | None) -> None:
    found = list(header or ())
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        have = ", ".join(map(repr, found)) or "none"
        raise RequestError(
            f"{path}: missing column {', '.join(missing)} (found {have}); needed are {', '.join(COLUMNS)}."
        )


def _row(path: str, line: int, row: Mapping[str, str | None]) -> list[float]:
    values = []
    for column in COLUMNS:
        text = row[column]
        try:
            value = float(text or "")
        except ValueError:
            raise RequestError(f"{path}, line {line}: {column} is {text!r}, which is no number.") from None
        good = 0 <= value < 1 if column == "sparsity" else value > 0 and math.isfinite(value)
        if not good:
            allowed = "from 0 up to, not including, 1" if column == "sparsity" else "finite and above 0"
            raise RequestError(f"{path}, line {line}: {column} is {text}, but must be {allowed}.")
        values.append(value)
    return values


# What tells each group of coefficients apart: a curve with an offset has three unknowns, so it takes three values.
_DENSE = (("nonzero_parameters", 3, "c_S, b_N and c"), ("data", 3, "a_D, b_D and c"))
_JOINT = (("sparsity", 3, "a_S, b_S and c_S"), ("nonzero_parameters", 2, "b_N and c"), ("data", 3, "a_D, b_D and c"))
NEEDED = {"joint": _JOINT, "chinchilla": _DENSE, "n:m": _JOINT[:1]}


def check_identifiable(runs: Points, form: str, free: tuple[str, ...]) -> None:
    """Raises RequestError, naming the coefficients, when there are too few points or too few different values."""
    import numpy as np

    if len(runs) < len(free):
        raise RequestError(f"{len(runs)} points cannot fix the {len(free)} coefficients {', '.join(free)}: add runs.")
    columns = dict(zip(COLUMNS, runs.columns(), strict=True))
    if form == "chinchilla" and columns["sparsity"].any():
        raise RequestError("the dense law takes runs of sparsity 0 only: drop the others or fit the joint form.")
    for column, least, names in NEEDED[form]:
        found = np.unique(np.round(columns[column], 12))
        if len(found) < least:
            listed = ", ".join(f"{value:g}" for value in found)
            hint = "; dense runs alone take --form chinchilla" if column == "sparsity" and not found.any() else ""
            raise RequestError(
                f"the data cannot identify {names}: it has {len(found)} different {column} ({listed}) and needs at"
                f" least {least}{hint}."
            )


def check_rank(jacobian: Any, free: tuple[str, ...]) -> None:
    """Raises RequestError when moving some coefficients together leaves every prediction as it is.

    `jacobian` is P x len(free), of predictions by relative change of a coefficient, so that its columns compare.
    """
    import numpy as np

    norms = np.linalg.norm(jacobian, axis=0)
    scaled = jacobian / np.where(norms > 0, norms, 1)
    _left, singular, right = np.linalg.svd(scaled, full_matrices=False)
    if singular[-1] > 1e-9 * singular[0]:
        return
    guilty = [name for name, share in zip(free, abs(right[-1]), strict=True) if share > 0.1]
    raise RequestError(
        f"the data cannot identify {' and '.join(guilty)} apart: vary what they depend on, in more runs."
    )
