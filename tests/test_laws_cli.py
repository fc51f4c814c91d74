"""`featherweight laws`: last lines, pictures, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from featherweight.laws import forms, optimum, plan
from featherweight.laws import points as runs_of
from featherweight.laws.forms import NAMES, PUBLISHED
from featherweight.laws.points import COLUMNS, Points
from runs import featherweight


def write(path: Path, runs: Points | list[list[object]], header: tuple[str, ...] = COLUMNS) -> Path:
    rows = zip(*runs.columns(), strict=True) if isinstance(runs, Points) else runs
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


# --- commands


def test_fit_command(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", runs_of.published("t5"))
    ran = featherweight("laws", "fit", path, "--bootstraps", 5, "--starts", 2)
    assert ran.code == 0 and len(ran.out.splitlines()) == 1
    assert list(ran.last) == ["coefficients", "objective", "intervals", "points"]
    assert tuple(ran.last["coefficients"]) == NAMES == tuple(ran.last["intervals"])
    assert ran.last["points"] == 48 and ran.last["objective"] == pytest.approx(4.8801e-6, rel=1e-4)
    (tmp_path / "law.json").write_text(ran.out)
    best = featherweight("laws", "optimum", "--parameters", "85M", "--tokens", "50B", "--law", tmp_path / "law.json")
    expected = optimum.optimum(forms.Coefficients(**ran.last["coefficients"]), 85e6, 50e9, "gradual")
    assert best.last["optima"][1]["sparsity"] == pytest.approx(expected.sparsity, abs=1e-9)


def test_fit_command_checks_itself() -> None:
    found = featherweight("laws", "fit", "vit", "--objective", "raw", "--bootstraps", 0, "--starts", 1, "--check").last
    assert found["intervals"] is None and found["points"] == 112
    assert found["leave_one_out"]["runs"] == 112 and found["extrapolation"]["mean"] < 0.02


def test_optimum_command() -> None:
    found = featherweight("laws", "optimum", "--parameters", "85M", "--tokens", "50B").last
    assert list(found) == ["parameters", "tokens", "chinchilla_multiple", "optima"]
    assert (found["parameters"], found["tokens"]) == (85e6, 50e9)
    assert [(row["cost"], round(row["sparsity"], 2)) for row in found["optima"]] == [("dense", 0.41), ("gradual", 0.67)]


def test_plan_command() -> None:
    ran = featherweight("laws", "plan", "--bytes", "8GB", "--tokens", "2T", "--bootstraps", 4)
    assert ran.code == 0 and len(ran.last["candidates"]) == len(plan.BITS) * len(plan.SPARSITIES)
    assert ran.last["best"] == ran.last["candidates"][0]
    assert all(f"assumed: {line}" in ran.err for line in ran.last["assumptions"])
    low, high = ran.last["best"]["interval"]
    assert low < high
    only = featherweight("laws", "plan", "--bytes", "1GiB", "--tokens", "1e9", "--bootstraps", 1, "--bits", 4).last
    assert {row["bits"] for row in only["candidates"]} == {4}


def test_pictures(tmp_path: Path) -> None:
    one, two = tmp_path / "fit.svg", tmp_path / "optimum.svg"
    assert featherweight("laws", "fit", "t5", "--bootstraps", 3, "--starts", 1, "--plot", one).code == 0
    asked = ("laws", "optimum", "--parameters", "85M", "--tokens", "50B", "--plot")
    assert featherweight(*asked, two).code == 0
    first = two.read_bytes()
    assert featherweight(*asked, two).code == 0 and two.read_bytes() == first
    assert all(path.read_text().startswith("<?xml") and "<svg" in path.read_text() for path in (one, two))
    assert refused(*asked, tmp_path / "x.png").endswith("ends in .svg.")
    assert "is not there" in refused(*asked, tmp_path / "no" / "x.svg")


def test_pictures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refused("laws", "fit", "t5", "--plot", tmp_path / "x.svg")
    assert "pip install 'featherweight[laws]'" in said and not (tmp_path / "x.svg").exists()


# --- bad input


def refused(*command: object) -> str:
    """What the command says as it exits with 2: one sentence, no traceback, nothing on stdout."""
    ran = featherweight(*command)
    assert ran.code == 2 and ran.out == "" and "Traceback" not in ran.err
    said = ran.err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and said[0].endswith(".")
    return said[0]


GOOD = [[s, n * (1 - s), d, 2.0 + s] for s in (0.0, 0.5, 0.75) for n in (1e6, 4e6, 1.6e7) for d in (1e9, 2e9, 4e9)]


def only(keep: Any) -> list[list[object]]:
    return [list(row) for row in GOOD if keep(row)]


BAD: dict[str, tuple[list[list[object]], tuple[str, ...], tuple[str, ...]]] = {
    "missing columns": ([], ("sparsity", "loss"), ("missing column nonzero_parameters, data", "'sparsity', 'loss'")),
    "zero loss": ([*GOOD, [0.5, 1e6, 1e9, 0]], COLUMNS, ("line 29", "loss is 0", "above 0")),
    "negative loss": ([*GOOD, [0.5, 1e6, 1e9, -1.5]], COLUMNS, ("line 29", "loss is -1.5")),
    "a loss that is no number": ([*GOOD, [0.5, 1e6, 1e9, "nan"]], COLUMNS, ("line 29", "loss is nan")),
    "text": ([*GOOD, [0.5, "many", 1e9, 2.0]], COLUMNS, ("nonzero_parameters is 'many'", "no number")),
    "a short row": ([*GOOD, [0.5, 1e6, 1e9]], COLUMNS, ("loss is None",)),
    "everything zero": ([*GOOD, [1.0, 1e6, 1e9, 2.0]], COLUMNS, ("sparsity is 1.0", "not including, 1")),
    "one sparsity": (only(lambda r: r[0] == 0.5), COLUMNS, ("cannot identify a_S, b_S and c_S", "1 different", "3")),
    "dense alone": (only(lambda r: r[0] == 0), COLUMNS, ("cannot identify a_S", "--form chinchilla")),
    "one data": (only(lambda r: r[2] == 1e9), COLUMNS, ("cannot identify a_D, b_D and c", "1 different data")),
    "one size": ([[s, 1e6, d, 2.0] for s, _n, d, _l in GOOD], COLUMNS, ("cannot identify b_N and c",)),
    "few points": ([list(row) for row in GOOD[:6]], COLUMNS, ("6 points cannot fix the 7 coefficients",)),
    "no points": ([], COLUMNS, ("0 points",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_runs(name: str, tmp_path: Path) -> None:
    rows, header, expected = BAD[name]
    said = refused("laws", "fit", write(tmp_path / "runs.csv", rows, header), "--bootstraps", 0)
    for part in expected:
        assert part in said


def test_bad_options(tmp_path: Path) -> None:
    assert "no-such.csv" in refused("laws", "fit", tmp_path / "no-such.csv")
    assert "take log or raw" in refused("laws", "fit", "t5", "--objective", "cubic")
    assert "joint or chinchilla" in refused("laws", "fit", "t5", "--form", "n:m")
    assert "at least 0" in refused("laws", "fit", "t5", "--bootstraps", -1)
    assert "at least 1" in refused("laws", "fit", "t5", "--starts", 0)
    assert "above 0" in refused("laws", "fit", "t5", "--delta", 0)
    few = write(tmp_path / "few.csv", [[s, n, d, 3 - s + 1e6 / n + 1e9 / d] for s, n, d, _l in GOOD[::4]])
    assert "leave nothing to resample" in refused("laws", "fit", few)


@pytest.mark.parametrize("size", ["0", "-8GB", "8XB", "lots", "1KB", "nan", "1e999"])
def test_impossible_budgets(size: str) -> None:
    said = refused("laws", "plan", "--bytes", size, "--tokens", "2T")
    assert "above 0" in said or "room for 1000000" in said


def test_other_impossible_requests(tmp_path: Path) -> None:
    assert "too few" in refused("laws", "plan", "--bytes", "8GB", "--tokens", "1K")
    assert "bits 7" in refused("laws", "plan", "--bytes", "8GB", "--tokens", "2T", "--bits", 7)
    assert "tokens '0'" in refused("laws", "optimum", "--parameters", "85M", "--tokens", "0")
    asked = ("laws", "optimum", "--parameters", "85M", "--tokens", "50B", "--law")
    assert "take t5, vit or a file" in refused(*asked, "gpt")
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"coefficients": {**forms.as_dict(PUBLISHED["t5"]), "a_S": 0.0}}))
    assert "does not see sparsity" in refused(*asked, law)


# --- minutes


@pytest.mark.slow
def test_two_hundred_bootstraps_in_half_a_minute() -> None:
    began = time.perf_counter()
    assert featherweight("laws", "fit", "t5", "--bootstraps", 200).code == 0
    assert time.perf_counter() - began < 30
