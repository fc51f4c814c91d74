"""What a fitted law says to do: the sparsity that is worth training, what it buys, and its contours.

Units: N, non-zero parameters; D, tokens or images; C, training compute in multiply-adds counted as 2 operations, so
that a dense step over one token costs 6 N; budgets may be given as the data a dense model of N parameters would see for
the same compute, C / (6 N). Derivations: docs/laws.md; source: arXiv 2309.08520, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from featherweight.errors import RequestError
from featherweight.laws.forms import Coefficients, size_gain
from featherweight.laws.forms import loss as law

LARGEST_SPARSITY = 0.999


def dense_cost(sparsity: Any) -> Any:
    """Compute per token over 6 N when zeros are multiplied like any weight: 1 / (1 - S); no unit."""
    return 1 / (1 - sparsity)


def gradual_cost(sparsity: Any) -> Any:
    """Compute per token over 6 N when zeros are skipped and sparsity grows as in gradual pruning; no unit.

    A quarter of the steps dense, half on the cubic ramp, whose mean sparsity is 3 S / 4, a quarter at S:
    (1/4 + (1 - 3 S / 4) / 2) / (1 - S) + 1/4.
    """
    return (0.25 + 0.5 * (1 - 0.75 * sparsity)) / (1 - sparsity) + 0.25


COSTS: dict[str, Callable[[Any], Any]] = {"dense": dense_cost, "gradual": gradual_cost}


def chinchilla_data(co: Coefficients, parameters: float) -> float:
    """Tokens or images at which N is the best dense size for compute 6 N D.

    There b_N (a_S + c_S) N^-b_N = b_D (a_D / D)^b_D.
    """
    term = co.b_N * (co.a_S + co.c_S) * parameters**-co.b_N / co.b_D
    return co.a_D * term ** (-1 / co.b_D)


def closed_form(co: Coefficients, parameters: float, dense_data: float) -> float:
    """The best S for N non-zeros and compute 6 N `dense_data`, zeros paid for; in [0, 1).

    Minimises the law over S at D = (1 - S) X, X = `dense_data`:
    1 - S = (b_D N^b_N (a_D / X)^b_D / (a_S b_S))^(1 / (b_S + b_D)).
    """
    _check(co, parameters, dense_data)
    log_ratio = math.log(co.b_D / (co.a_S * co.b_S)) + co.b_N * math.log(parameters)
    log_kept = (log_ratio + co.b_D * math.log(co.a_D / dense_data)) / (co.b_S + co.b_D)
    return max(0.0, -math.expm1(log_kept))


def numerical(co: Coefficients, parameters: float, dense_data: float, cost: str = "gradual") -> float:
    """The best S in [0, 0.999] at D = dense_data / cost(S): a grid for the valley, then golden section inside it."""
    import numpy as np
    from scipy.optimize import minimize_scalar

    _check(co, parameters, dense_data)

    def predicted(sparsity: Any) -> Any:
        return law(co, sparsity, parameters, dense_data / COSTS[cost](sparsity))

    grid = np.linspace(0, LARGEST_SPARSITY, 1000)
    best = int(np.argmin(predicted(grid)))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(predicted, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    return 0.0 if predicted(0.0) <= found.fun else float(found.x)


def _check(co: Coefficients, parameters: float, data: float) -> None:
    if not (parameters > 0 and data > 0 and math.isfinite(parameters * data)):
        raise RequestError(f"{parameters:g} parameters and {data:g} tokens: both must be finite and above 0.")
    if not (co.a_S > 0 and co.b_S > 0):
        raise RequestError(
            f"a law with a_S = {co.a_S:g} and b_S = {co.b_S:g} does not see sparsity: both must be above 0."
        )


@dataclass(frozen=True)
class Optimum:
    """The best sparsity for one budget under one way of counting cost.

    `data` is what each model trains on, in tokens or images; `dense_equivalent` the parameters of a dense model as good
    at equal data; `gain_nats` the loss of the dense model on the same compute minus `loss`.
    """

    cost: str
    sparsity: float
    data: float
    loss: float
    gain_nats: float
    dense_equivalent: float


def optimum(co: Coefficients, parameters: float, dense_data: float, cost: str) -> Optimum:
    """The best S for N non-zeros and the compute of a dense run over `dense_data`; dense cost by the closed form."""
    if cost not in COSTS:
        raise RequestError(f"cost {cost!r}: take {' or '.join(COSTS)}.")
    chosen = closed_form(co, parameters, dense_data) if cost == "dense" else numerical(co, parameters, dense_data, cost)
    data = float(dense_data / COSTS[cost](chosen))
    best, dense = (float(law(co, s, parameters, d)) for s, d in ((chosen, data), (0.0, dense_data)))
    return Optimum(cost, chosen, data, best, dense - best, float(parameters * size_gain(co, chosen)))


def contour(co: Coefficients, sparsity: float, parameters: Any, cost: str = "dense") -> Any:
    """Dense-run data at which S is the best sparsity, for each N; same unit as a_D.

    Setting dL/dS = 0 at D = X / cost(S): (a_D / D)^b_D = a_S b_S (1 - S)^(b_S - 1) N^-b_N / (b_D m),
    m = d ln cost / dS.
    It is a fixed multiple of `chinchilla_data`(N), since both fix the ratio of the data term to N^-b_N.
    """
    import numpy as np

    if not 0 < sparsity < 1:
        raise RequestError(f"a contour at sparsity {sparsity:g}: it must be above 0 and below 1.")
    kept, parameters = 1 - sparsity, np.asarray(parameters, float)
    # d ln cost / dS; for the gradual schedule, (0.75 - 0.375 S) / (1 - S) + 0.25 differentiated.
    rise = 1 / kept if cost == "dense" else 0.375 / kept**2 / gradual_cost(sparsity)
    term = co.a_S * co.b_S * kept ** (co.b_S - 1) * parameters**-co.b_N / (co.b_D * rise)
    return co.a_D * term ** (-1 / co.b_D) * COSTS[cost](sparsity)
