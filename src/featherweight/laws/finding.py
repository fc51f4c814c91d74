"""What the runs of a sweep say: the law, how far it reaches, and what a non-zero weight is worth at each sparsity.

Shapes: P runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from featherweight.errors import RequestError
from featherweight.laws import checks
from featherweight.laws.fit import fit
from featherweight.laws.forms import PUBLISHED, Coefficients, as_dict, size_gain
from featherweight.laws.ledger import replace
from featherweight.laws.points import Points, points

GAINS = (0.5, 0.75, 0.875)
Tell = Callable[[float, float, str], None]


def check() -> None:
    """Raises RequestError, before any long work, when scipy, which fits, is missing."""
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise RequestError("a sweep ends with a fit, which needs scipy: pip install 'featherweight[laws]'.") from error


def finding(rows: Sequence[dict[str, str]], bootstraps: int = 200, seed: int = 0, tell: Tell | None = None) -> Any:
    """Everything `laws sweep` ends with, as plain values; what the runs cannot tell is a sentence under "unknown".

    rows: those of a sweep's CSV, as text. The joint law is fitted to the unstructured runs alone; N:M runs then give
    gains of their own and, where there are three sparsities with the dense one, a factor of S of their own.
    """
    found: dict[str, Any] = {"unknown": []}
    plain = [row for row in rows if ":" not in row["pattern"]]
    runs = _points(plain)
    try:
        fitted = fit(runs, seed=seed)
        draws = checks.bootstrap(runs, fitted, bootstraps, seed, tell=tell) if bootstraps else ()
    except RequestError as error:
        found["unknown"].append(f"the law: {error}")
        return found
    co = fitted.coefficients
    spans = checks.intervals(draws) if draws else None
    found |= {"coefficients": as_dict(co), "objective": fitted.objective, "intervals": spans, "points": len(runs)}
    sparsities = sorted({s for s in runs.sparsity_P.tolist() if s})
    found["gains"] = [_gain(s, co, draws) for s in sorted({*GAINS, *sparsities})]
    dense = [float(row["dense_parameters"]) for row in plain]
    try:
        held = [size >= max(dense) for size in dense]
        found["extrapolation"] = asdict(checks.extrapolation(runs, fitted, seed, held=held))
    except RequestError as error:
        found["unknown"].append(f"the largest size from the others: {error}")
    _add_grouped(found, rows, co, draws, seed)
    return found


def _points(rows: Sequence[dict[str, str]]) -> Points:
    columns = ("sparsity", "nonzero_parameters", "data", "loss")
    return points(*([float(row[column]) for row in rows] for column in columns))


def _gain(sparsity: float, co: Coefficients, draws: Sequence[Coefficients]) -> dict[str, Any]:
    """The dense-equivalent size of a non-zero at this sparsity, its 95 % interval, and the published T5 law's."""
    span = checks.quantiles([size_gain(draw, sparsity) for draw in draws]) if draws else None
    paper = float(size_gain(PUBLISHED["t5"], sparsity))
    return {"sparsity": sparsity, "gain": float(size_gain(co, sparsity)), "interval": span, "paper": paper}


def _add_grouped(
    found: dict[str, Any],
    rows: Sequence[dict[str, str]],
    co: Coefficients,
    draws: Sequence[Coefficients],
    seed: int,
) -> None:
    """The N:M runs, pattern by pattern, and all of them by a law of their own factor."""
    names = sorted({row["pattern"] for row in rows if ":" in row["pattern"]})
    if not names:
        return
    found["grouped_gains"] = []
    for name in names:
        runs = _points([row for row in rows if row["pattern"] == name])
        try:
            found["grouped_gains"].append({"pattern": name, **_measured_gain(runs, co, draws, seed)})
        except RequestError as error:
            found["unknown"].append(f"the gain of {name}: {error}")
    try:
        both = _points([row for row in rows if ":" in row["pattern"] or float(row["sparsity"]) == 0])
        refit = fit(both, seed=seed, form="n:m", base=co)
        kept = as_dict(refit.coefficients)
        found["grouped_law"] = {name: kept[name] for name in ("a_S", "b_S", "c_S")}
    except RequestError as error:
        found["unknown"].append(f"a factor of S for {', '.join(names)}: {error}")


def _measured_gain(runs: Points, co: Coefficients, draws: Sequence[Coefficients], seed: int) -> dict[str, Any]:
    """What a non-zero of these runs is worth in dense ones; the interval is over draws of the law and of the runs."""
    import numpy as np

    log_P = _log_gains(runs, co)
    if not np.isfinite(log_P).all():
        raise RequestError("a run is better than the law allows a dense model of any size: add runs.")
    generator, spread = np.random.default_rng(seed), []
    for draw in draws:
        drawn_P = _log_gains(runs.take(generator.integers(len(runs), size=len(runs))), draw)
        spread.append(float(np.exp(np.mean(np.where(np.isfinite(drawn_P), drawn_P, np.inf)))))
    span = checks.quantiles(spread) if spread and np.isfinite(spread).all() else None
    return {"sparsity": float(runs.sparsity_P[0]), "gain": float(np.exp(log_P.mean())), "interval": span}


def _log_gains(runs: Points, co: Coefficients) -> Any:
    """ln g of each run, solving loss = (a_S + c_S) (g N)^-b_N + (a_D / D)^b_D + c; not finite where none does."""
    import numpy as np

    _sparsity_P, parameters_P, data_P, loss_P = runs.columns()
    left_P = loss_P - (co.a_D / data_P) ** co.b_D - co.c
    with np.errstate(invalid="ignore", divide="ignore"):
        return -np.log(left_P / (co.a_S + co.c_S)) / co.b_N - np.log(parameters_P)


def kept(path: Path, key: dict[str, Any], make: Callable[[], Any]) -> Any:
    """The finding on file, if it was made with this key, else a new one, put there."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["key"] == key:
            return before["finding"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or a file cut short: it is made anew, as it would be without one
    made = make()
    replace(path, json.dumps({"key": key, "finding": made}, indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))["finding"]
