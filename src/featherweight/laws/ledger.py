"""The files of a sweep's folder: its settings, the runs that are done, the group in flight and the law at the end.

Every file is put in place whole, so a command may be stopped at any moment.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import RequestError

if TYPE_CHECKING:
    from featherweight.laws.train import Group

COLUMNS = (
    "sparsity", "nonzero_parameters", "data", "loss", "pattern", "dense_parameters", "width", "layers", "steps",
    "seconds", "seed",
)  # fmt: skip
CSV, SETTINGS, CHECKPOINT, LAW = "runs.csv", "sweep.json", "group.safetensors", "law.json"
Rows = list[dict[str, str]]


def settle(out: Path, settings: Mapping[str, Any]) -> str:
    """Writes the settings, or compares them with those the folder was begun with; returns their hash."""
    plain = json.loads(json.dumps(settings))
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    path = out / SETTINGS
    if path.exists():
        _compare(path, plain)
        return digest
    if (out / CSV).exists():
        raise RequestError(f"{out / CSV} is there without {SETTINGS}, so another program wrote it: take a new folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps({"settings": plain, "digest": digest}, indent=1) + "\n")
    except OSError as error:
        raise RequestError(f"{out} cannot be written to ({error.strerror or error}): take another folder.") from error
    return digest


def _compare(path: Path, settings: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        other = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} is no file of a sweep that can be read: take a new folder.") from error
    if other:
        listed = "; ".join(f"{name} {before.get(name)}, now {settings.get(name)}" for name in other)
        raise RequestError(
            f"{path.parent} was begun with other settings ({listed}): repeat those or take a new folder."
        )


def read_rows(path: Path) -> Rows:
    """The rows of a sweep's CSV as text; none when it is not there. RequestError for a file no sweep wrote."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in (*row, *row.values()) for row in rows):
        raise RequestError(f"{path} is not as a sweep writes it: take a new folder.")
    return rows


def write_rows(path: Path, rows: Rows) -> None:
    """Puts the whole CSV in place."""
    replace(path, "".join(",".join(line) + "\n" for line in (COLUMNS, *(row.values() for row in rows))))


def new_rows(group: Group, losses: Sequence[float], nonzero: Sequence[int], seconds: float) -> Rows:
    """A row for each run of a finished group; `seconds` is the share of one run."""
    size, setting = group.size, group.setting
    found = []
    for which, loss, count in zip(group.patterns, losses, nonzero, strict=True):
        values = (
            which.sparsity, count, group.steps * setting.windows * setting.window, loss, which.name, size.parameters,
            size.width, size.layers, group.steps, round(seconds, 3), setting.seed,
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return found


def has(rows: Rows, size: tuple[int, int], steps: int) -> bool:
    """Whether the group of this size (width, blocks) and duration is done."""
    key = (*map(str, size), str(steps))
    return any((row["width"], row["layers"], row["steps"]) == key for row in rows)


def replace(path: Path, content: str) -> None:
    """Puts a text file in place whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
