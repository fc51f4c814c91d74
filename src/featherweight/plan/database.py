"""The sensitivity database: what every option does to every matrix, as JSON lines, and what that means for the model.

Line 1 says of which model, data, settings and options. Then one line a matrix, as it is measured; then, once the losses
have been calibrated, one line that says on which text, and one line a matrix that was changed alone. A run that is
killed leaves at most half a line, which the next one drops.

Predicted damage is in nats of KL(original || compressed) a token. A matrix alone does damage f(its relative error),
where f goes through the measured points: a power law between two of them, proportional to the error below the first
(KL is quadratic in a small change, as the error is), and on with the last power above. Over matrices damages add up.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featherweight.errors import RequestError
from featherweight.plan.allocate import Layer, Offer

KIND, VERSION = "featherweight sensitivity", 1
LEAST_KL = 1e-12
POWERS = (0.5, 1.5)  # of the error, above the worst measured point


@dataclass(frozen=True)
class Measured:
    """One option of one matrix.

    Attributes:
        loss: the certificate, tr(D H D^T) for the damped H.
        relative_loss: the same over the energy of the matrix's output.
        relative_error: the same for H as measured, without damping.
        bytes: stored.
        kept: weights that may differ from zero.
    """

    loss: float
    relative_loss: float
    relative_error: float
    bytes: int
    kept: int


@dataclass(frozen=True)
class Row:
    """One matrix.

    Attributes:
        block: which block it is in; name: on disk, without ".weight"; path: inside the block.
        inputs: the path of the first matrix that is fed the same tensor: equal for q, k, v and for gate and up.
        rows, columns: its shape. energy: tr(W H W^T), what its output holds.
        options: what was measured, by label.
    """

    block: int
    name: str
    path: str
    inputs: str
    rows: int
    columns: int
    energy: float
    options: dict[str, Measured]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Row:
        """The row of a line."""
        return cls(**{**line, "options": {label: Measured(**each) for label, each in line["options"].items()}})

    @property
    def fusion(self) -> str:
        """Equal for the matrices that engines fuse: one input, or all experts of a block."""
        return f"{self.block}:{'experts' if '.experts.' in f'.{self.path}' else self.inputs}"


@dataclass
class Database:
    """A database file and what is in it; `measure` and `calibrate` (stream) write it, row by row.

    Attributes:
        rows: the matrices measured so far, by name.
        calibration: on what the losses were calibrated, None where they were not.
        points: (relative error, KL in nats) of each matrix changed alone (or of its share, where several were), by
            name and label.
        writes: whether the file is written: of several processes that have one database, one does.
    """

    path: Path
    header: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    points: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    writes: bool = True

    @classmethod
    def open(cls, path: str | Path) -> Database:
        """Reads a database; RequestError if there is none, or it is something else."""
        path = Path(path)
        lines = _lines(path)
        if not lines or lines[0].get("kind") != KIND or lines[0].get("version") != VERSION:
            raise RequestError(
                f"{path} is no sensitivity database of version {VERSION}: measure one, or choose another."
            )
        return cls.of(path, lines)

    @classmethod
    def of(cls, path: Path, lines: list[dict[str, Any]], writes: bool = True) -> Database:
        """The database with these `lines`."""
        database = cls(path, lines[0], writes=writes)
        for line in lines[1:]:
            database._take(line)
        return database

    def lines(self) -> list[dict[str, Any]]:
        """What the file holds, as JSON objects."""
        lines: list[dict[str, Any]] = [self.header, *map(asdict, self.rows.values())]
        if self.calibration is not None:
            lines.append({"calibration": self.calibration})
        for name, points in self.points.items():
            for label, (error, kl) in points.items():
                lines.append({"point": name, "label": label, "relative_error": error, "kl": kl})
        return lines

    @classmethod
    def begin(cls, path: str | Path, header: Mapping[str, Any]) -> Database:
        """Starts a database, or goes on with one begun with the same header; RequestError naming what differs."""
        path, wanted = Path(path), {"kind": KIND, "version": VERSION, **json.loads(json.dumps(header))}
        if not path.exists() or not path.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            database = cls(path, wanted)
            database._rewrite()
            return database
        database = cls.open(path)
        database.require(header)
        database._rewrite()
        return database

    def require(self, header: Mapping[str, Any]) -> None:
        """RequestError naming the first thing in which a request differs from the one this was begun with."""
        wanted = {"kind": KIND, "version": VERSION, **json.loads(json.dumps(header))}
        for name in sorted(self.header.keys() | wanted.keys()):
            before, now = self.header.get(name), wanted.get(name)
            if before != now:
                raise RequestError(
                    f"{self.path} was measured with {name} = {_short(before, now)}, and now {_short(now, before)} is "
                    "asked for: repeat the first request or choose a new file."
                )

    def add(self, row: Row) -> None:
        """Writes the line of one matrix."""
        self._append(asdict(row))

    def begin_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Goes on with a calibration that was begun with the same settings; drops one that was not."""
        wanted = json.loads(json.dumps(calibration))
        if self.calibration != wanted:
            self.calibration, self.points = None, {}
            self._rewrite()
            self._append({"calibration": wanted})

    def add_point(self, name: str, label: str, relative_error: float, kl: float) -> None:
        """Writes the damage that was measured with only this matrix changed."""
        self._append({"point": name, "label": label, "relative_error": relative_error, "kl": kl})

    def damage(self, name: str, label: str) -> float:
        """Predicted nats of KL from giving one matrix one option; its relative error where nothing was calibrated."""
        error = self.rows[name].options[label].relative_error
        return damage_of(error, list(self.points.get(name, {}).values()))

    def layers(
        self,
        fuse: bool = True,
        labels: Collection[str] | None = None,
        seconds: Mapping[tuple[str, str], float] | None = None,
    ) -> list[Layer]:
        """What `allocate` chooses from.

        Args:
            fuse: q/k/v, gate/up and the experts of a block share a choice, as engines ask that fuse them.
            labels: only these options.
            seconds: measured time by (matrix name, label).
        """
        found = []
        for row in self.rows.values():
            offers = tuple(
                Offer(label, self.damage(row.name, label), m.bytes, m.kept, (seconds or {}).get((row.name, label)))
                for label, m in row.options.items()
                if labels is None or label in labels
            )
            if not offers:
                raise RequestError(f"{row.name} has none of the options {', '.join(labels or ())}: allow one it has.")
            found.append(Layer(row.name, row.rows * row.columns, offers, row.fusion if fuse else ""))
        return found

    def _take(self, line: dict[str, Any]) -> None:
        if "calibration" in line:
            self.calibration, self.points = line["calibration"], {}
        elif "point" in line:
            self.points.setdefault(line["point"], {})[line["label"]] = (line["relative_error"], line["kl"])
        else:
            self.rows[line["name"]] = Row.of(line)

    def _append(self, line: dict[str, Any]) -> None:
        if self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._take(json.loads(json.dumps(line)))

    def _rewrite(self) -> None:
        """The whole file anew: without half a line at its end, or an old calibration."""
        if not self.writes:
            return
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in self.lines()), encoding="utf-8")
        part.replace(self.path)


def predict(database: Database, choices: Mapping[str, str]) -> float:
    """Predicted nats of KL(original || compressed) a token for a label by matrix name.

    Matrices that are not named stay as they are. Raises RequestError for a matrix or option that was not measured.
    """
    for name, label in choices.items():
        if name not in database.rows:
            raise RequestError(f"{database.path} has no matrix {name}: measure it first.")
        if label not in database.rows[name].options:
            known = ", ".join(database.rows[name].options)
            raise RequestError(f"{database.path} has no option {label} of {name}, only {known}: choose one of these.")
    return sum(database.damage(name, label) for name, label in choices.items())


def damage_of(error: float, points: Collection[tuple[float, float]]) -> float:
    """The damage a relative error does by the measured (error, KL) of one matrix; the error itself without any."""
    if error <= 0 or not points:
        return max(error, 0.0)
    curve: list[tuple[float, float]] = []
    for at, kl in sorted(points):
        kl = max(kl, LEAST_KL, curve[-1][1] if curve else 0.0)  # more error is never less harm
        if at > 0 and (not curve or at > curve[-1][0]):
            curve.append((at, kl))
    if not curve or error <= curve[0][0]:
        return error * (curve[0][1] / curve[0][0] if curve else 1.0)
    for (low, low_kl), (high, high_kl) in itertools.pairwise(curve):
        power = math.log(high_kl / low_kl) / math.log(high / low)
        if error <= high:
            return low_kl * math.pow(error / low, power)
    power = min(max(power, POWERS[0]), POWERS[1]) if len(curve) > 1 else 1.0
    return curve[-1][1] * math.pow(error / curve[-1][0], power)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file: what follows the last line break was cut off."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read ({error}): measure the model first.") from error
    whole = text[: text.rfind("\n") + 1]
    try:
        return [dict(json.loads(line)) for line in whole.splitlines()]
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise RequestError(f"{path} has a line that is no JSON object: measure the model again.") from error


def _short(value: Any, other: Any) -> str:
    """A header's field for a message: of a dict or list only what the other has not."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: item for key, item in value.items() if other.get(key) != item}
    if isinstance(value, list) and isinstance(other, list):
        value = [item for item in value if item not in other]
    if value in ({}, []):
        return "nothing more"
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
