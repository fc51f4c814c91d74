"""How far a fit can be trusted: bootstrap intervals, leave-one-out error, and error on sizes beyond the fit.

Shapes: P points, B bootstrap draws, F free coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.errors import RequestError
from featherweight.laws.fit import FREE, Fit, Search, fit, huber_delta
from featherweight.laws.forms import NAMES, Coefficients
from featherweight.laws.forms import loss as law
from featherweight.laws.points import Points, check_identifiable


def bootstrap(
    runs: Points,
    fitted: Fit,
    draws: int = 200,
    seed: int = 0,
    delta: float | None = None,
    tell: Callable[[float, float, str], None] | None = None,
) -> tuple[Coefficients, ...]:
    """Coefficients of refits to B resamples (whole runs, with replacement), each started from the fit.

    In logs, every draw's distance from the fit is stretched by sqrt(P / (P - F)): residuals of a fit with F
    coefficients are that much too small (the classical correction). Resamples that could identify nothing are drawn
    again.
    Raises RequestError when resample after resample cannot be fitted.
    """
    import numpy as np

    free = FREE[fitted.form]
    if len(runs) <= len(free):
        raise RequestError(f"{len(runs)} points for {len(free)} coefficients leave nothing to resample: add runs.")
    generator, base = np.random.default_rng(seed), fitted.coefficients
    stretch = (len(runs) / (len(runs) - len(free))) ** 0.5
    found = []
    for done in range(draws):
        search = _resampled(runs, fitted, generator, delta)
        place_F, _least = search.descend(search.place(base), tolerance=1e-3)
        found.append(_stretched(base, search.coefficients(place_F), stretch))
        if tell is not None:
            tell(done + 1, draws, f"bootstrap {done + 1} of {draws}")
    return tuple(found)


def _resampled(runs: Points, fitted: Fit, generator: Any, delta: float | None) -> Search:
    import numpy as np

    for _attempt in range(100):
        counts_P = np.bincount(generator.integers(len(runs), size=len(runs)), minlength=len(runs))
        kept = runs.take(counts_P > 0)
        try:
            check_identifiable(kept, fitted.form, FREE[fitted.form])
        except RequestError:
            continue
        weight_P, chosen = counts_P[counts_P > 0], huber_delta(fitted.kind, delta)
        return Search(kept, fitted.kind, chosen, fitted.form, _held(fitted), weight_P)
    raise RequestError(
        f"of {len(runs)} points no resample identifies every coefficient: add runs or ask for no bootstraps."
    )


def _held(fitted: Fit) -> Coefficients | None:
    return fitted.coefficients if fitted.form == "n:m" else None


def _stretched(base: Coefficients, draw: Coefficients, stretch: float) -> Coefficients:
    """base (draw / base)^stretch, coefficient by coefficient; a coefficient held at 0 stays there."""
    pairs = zip(base.as_tuple(), draw.as_tuple(), strict=True)
    return Coefficients.of(b * (d / b) ** stretch if b > 0 and d > 0 else d for b, d in pairs)


def intervals(draws: tuple[Coefficients, ...], share: float = 0.95) -> dict[str, tuple[float, float]]:
    """The central `share` of the draws of every coefficient, in plain units."""
    tails = ((1 - share) / 2, (1 + share) / 2)
    return {name: quantiles([getattr(draw, name) for draw in draws], tails) for name in NAMES}


def quantiles(values: Any, tails: tuple[float, float] = (0.025, 0.975)) -> tuple[float, float]:
    """Two quantiles of a sequence, as plain floats."""
    import numpy as np

    low, high = np.quantile(np.asarray(values, float), tails)
    return float(low), float(high)


@dataclass(frozen=True)
class Misses:
    """Relative errors |predicted / measured - 1| of runs that the fit has not seen; no unit."""

    runs: int
    mean: float
    largest: float


def leave_one_out(runs: Points, fitted: Fit, delta: float | None = None) -> Misses:
    """Every run predicted by the law refitted, from the fit's minimum, to all the others."""
    import numpy as np

    misses = []
    for i in range(len(runs)):
        rest = runs.take(np.arange(len(runs)) != i)
        check_identifiable(rest, fitted.form, FREE[fitted.form])
        search = Search(rest, fitted.kind, huber_delta(fitted.kind, delta), fitted.form, _held(fitted))
        place_F, _least = search.minimum(search.place(fitted.coefficients))
        misses.append(_miss(search.coefficients(place_F), runs.take(np.array([i]))))
    return _summary(np.concatenate(misses))


def extrapolation(
    runs: Points, fitted: Fit, seed: int = 0, delta: float | None = None, held: Sequence[bool] | None = None
) -> Misses:
    """The runs with most non-zeros (all of that size), or those `held`, predicted by a law fitted anew to the rest."""
    import numpy as np

    most = runs.parameters_P.max() * (1 - 1e-9)
    largest_P = runs.parameters_P >= most if held is None else np.asarray(held, bool)
    rest = runs.take(~largest_P)
    refit = fit(rest, fitted.kind, delta, seed=seed, form=fitted.form, base=_held(fitted))
    return _summary(_miss(refit.coefficients, runs.take(largest_P)))


def _miss(co: Coefficients, runs: Points) -> Any:
    sparsity_P, parameters_P, data_P, loss_P = runs.columns()
    return abs(law(co, sparsity_P, parameters_P, data_P) / loss_P - 1)


def _summary(miss_P: Any) -> Misses:
    return Misses(len(miss_P), float(miss_P.mean()), float(miss_P.max()))
