"""Fitting the law: the Huber loss the published notebook minimises, by many bounded starts with exact gradients.

The objective, which reproduces the published 7.60e-6 (T5) and 4.93e-4 (ViT) at the published coefficients:

    mean over points of h(r),  h(r) = r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2)

with r = ln L_predicted - ln L (kind "log", delta 1e-3: T5) or r = L_predicted - L (kind "raw", delta 1e-2 in units of
loss: ViT). It is the mean, not the sum; the units of N and D fall out of it, so it needs no normalisation.

Inside, N and D are divided by their geometric means and L by its median; coefficients are searched in logs, the data
term as e (D / D_0)^-b_D, e = (a_D / D_0)^b_D, because a_D and b_D alone all but trade off; bounds are on those logs.
Each start runs a trust-region least squares, then L-BFGS on the Huber loss in coordinates in which the Gauss-Newton
matrix is the identity: plain BFGS in the published coordinates stops early, at 1.5 to 3 times this minimum.

Shapes: P points, F free coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from featherweight.errors import RequestError
from featherweight.laws.forms import NAMES, SPARSITY_NAMES, Coefficients, gradients
from featherweight.laws.forms import loss as law
from featherweight.laws.points import Points, check_identifiable, check_rank

DELTA = {"log": 1e-3, "raw": 1e-2}
FREE = {
    "joint": NAMES,
    "chinchilla": tuple(name for name in NAMES if name not in ("a_S", "b_S")),
    "n:m": SPARSITY_NAMES,
}
# Of the normalised coefficients: three amplitudes in medians of the loss, three exponents, and the offset c.
LOWER = (1e-5, 0.02, 1e-5, 0.02, 1e-5, 0.02, 0.0)
UPPER = (1e3, 8.0, 1e3, 5.0, 1e3, 5.0, 1.0)
BOUNDS = dict(zip(NAMES, zip(LOWER, UPPER, strict=True), strict=True))
OFFSET = NAMES.index("c")  # searched as it is, since it may be 0
FIRST_LOW = (0.05, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05)
FIRST_HIGH = (1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.95)


@dataclass(frozen=True)
class Fit:
    """The best coefficients in plain units, the objective there, and the objective every start came to."""

    coefficients: Coefficients
    objective: float
    kind: str
    form: str
    points: int
    starts: tuple[float, ...]


def huber(residual: Any, delta: float) -> Any:
    """h(r) of this file's head, element by element; the residual's unit squared."""
    import numpy as np

    size = np.abs(residual)
    return np.where(size <= delta, size * size / 2, delta * (size - delta / 2))


def objective(runs: Points, co: Coefficients, kind: str = "log", delta: float | None = None) -> float:
    """Mean Huber loss of a law on these runs: nats^2 of log loss ("log") or the loss's unit squared ("raw")."""
    import numpy as np

    sparsity_P, parameters_P, data_P, loss_P = runs.columns()
    predicted_P = law(co, sparsity_P, parameters_P, data_P)
    residual_P = np.log(predicted_P / loss_P) if kind == "log" else predicted_P - loss_P
    return float(huber(residual_P, huber_delta(kind, delta)).mean())


def fit(
    runs: Points,
    kind: str = "log",
    delta: float | None = None,
    starts: int = 12,
    seed: int = 0,
    form: str = "joint",
    base: Coefficients | None = None,
) -> Fit:
    """The law of least objective over seeded random starts; for form "n:m", a_S, b_S and c_S alone, the rest `base`'s.

    Raises RequestError when the points cannot identify the coefficients of that form.
    """
    import numpy as np

    if starts < 1:
        raise RequestError(f"{starts} starts asked for: at least 1 is needed.")
    if form not in FREE or (base is None) != (form != "n:m"):
        raise RequestError(f"form {form!r}: take joint, chinchilla, or n:m with the coefficients to keep.")
    check_identifiable(runs, form, FREE[form])
    search = Search(runs, kind, huber_delta(kind, delta), form, base)
    generator = np.random.default_rng(seed)
    found = [search.minimum(search.start(generator)) for _ in range(starts)]
    best_F, least = min(found, key=lambda pair: pair[1])
    check_rank(search.residuals(best_F)[1], FREE[form])
    every = tuple(value for _, value in found)
    return Fit(search.coefficients(best_F), least, kind, form, len(runs), every)


def huber_delta(kind: str, delta: float | None) -> float:
    """Huber's delta: the one given, or that of the kind. RequestError for an unknown kind, or 0 or less."""
    if kind not in DELTA:
        raise RequestError(f"objective {kind!r}: take {' or '.join(DELTA)}.")
    if delta is not None and not delta > 0:
        raise RequestError(f"Huber's delta is {delta}, but must be above 0.")
    return DELTA[kind] if delta is None else delta


def _to_search(values: Any) -> Any:
    """Seven normalised coefficients to coordinates of the search: logs, but for c itself."""
    import numpy as np

    logs = np.log(np.maximum(values, 1e-300))
    logs[OFFSET] = values[OFFSET]
    return logs


class Search:
    """One set of runs with weights, in normalised units, and the search for its minimum from a given start."""

    def __init__(
        self, runs: Points, kind: str, delta: float, form: str, base: Coefficients | None, weight_P: Any = None
    ) -> None:
        import numpy as np

        self.n0 = float(np.exp(np.log(runs.parameters_P).mean()))
        self.d0 = float(np.exp(np.log(runs.data_P).mean()))
        self.l0 = float(np.median(runs.loss_P))
        self.axes = (runs.sparsity_P, runs.parameters_P / self.n0, runs.data_P / self.d0)
        self.target_P, self.log = runs.loss_P / self.l0, kind == "log"
        self.delta = delta if self.log else delta / self.l0
        weights_P = np.ones(len(runs)) if weight_P is None else np.asarray(weight_P, float)
        self.share_P = weights_P / weights_P.sum()
        self.free = np.array([NAMES.index(name) for name in FREE[form]])
        self.logs = self.free[self.free != OFFSET]
        held = base or Coefficients(0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
        self.held = np.array((self._inside(held) if base else held).as_tuple())
        self.low_F, self.high_F = _to_search(LOWER)[self.free], _to_search(UPPER)[self.free]

    def _inside(self, co: Coefficients) -> Coefficients:
        """From plain units to those of the search, a_D still a_D."""
        unit = self.l0 * self.n0**co.b_N
        return Coefficients(
            co.a_S / unit,
            co.b_S,
            co.c_S / unit,
            co.b_N,
            co.a_D / self.d0 * self.l0 ** (-1 / co.b_D),
            co.b_D,
            co.c / self.l0,
        )

    def _law(self, place_F: Any) -> Coefficients:
        """The coefficients, in units of the search, at a point of the search; clamped to the bounds."""
        import numpy as np

        values = self.held.copy()
        values[self.free] = np.minimum(np.maximum(place_F, self.low_F), self.high_F)
        values[self.logs] = np.exp(values[self.logs])
        if 4 in self.free:
            values[4] = values[4] ** (1 / values[5])
        return Coefficients.of(values)

    def coefficients(self, place_F: Any) -> Coefficients:
        """The coefficients in plain units at a point of the search."""
        co, unit = self._law(place_F), self.l0
        scale = unit * self.n0**co.b_N
        a_d = co.a_D * self.d0 * unit ** (1 / co.b_D)
        return Coefficients(co.a_S * scale, co.b_S, co.c_S * scale, co.b_N, a_d, co.b_D, co.c * unit)

    def place(self, co: Coefficients) -> Any:
        """The point of the search at which the coefficients are these; the way back of `coefficients`."""
        import numpy as np

        inside = self._inside(co)
        values = np.array(inside.as_tuple())
        values[4] = inside.a_D**inside.b_D
        return np.clip(_to_search(values)[self.free], self.low_F, self.high_F)

    def start(self, generator: Any) -> Any:
        """A random point of the search: uniform in the normalised coefficients."""
        return _to_search(generator.uniform(FIRST_LOW, FIRST_HIGH))[self.free]

    def _predicted(self, place_F: Any) -> tuple[Any, Any]:
        """Predictions, P, and their derivatives by the logs, P x F: zero beyond a bound, where `_law` clamps."""
        import numpy as np

        co = self._law(place_F)
        a_s, _b_s, c_s, _b_n, a_d, b_d, c = values = co.as_tuple()
        slope_P7 = gradients(co, *self.axes)
        # L is linear in a_S, c_S and c, and its data term is a_D / b_D times the slope by a_D.
        predicted_P = a_s * slope_P7[:, 0] + c_s * slope_P7[:, 2] + a_d / b_d * slope_P7[:, 4] + c
        slope_P7[:, self.logs] *= np.array(values)[self.logs]
        if 4 in self.free:
            # a_D = e^(1 / b_D): d ln a_D / d ln e = 1 / b_D and d ln a_D / d ln b_D = -ln a_D.
            slope_P7[:, 5] -= slope_P7[:, 4] * np.log(a_d)
            slope_P7[:, 4] /= b_d
        return predicted_P, slope_P7[:, self.free] * ((place_F >= self.low_F) & (place_F <= self.high_F))

    def residuals(self, place_F: Any) -> tuple[Any, Any]:
        """r of this file's head in units of the search, P, and dr / d log coefficient, P x F."""
        import numpy as np

        predicted_P, slope_PF = self._predicted(place_F)
        if self.log:
            return np.log(predicted_P / self.target_P), slope_PF / predicted_P[:, None]
        return predicted_P - self.target_P, slope_PF

    def value(self, place_F: Any) -> tuple[float, Any]:
        """The weighted mean of h(r) / delta^2 and its gradient by the logs."""
        import numpy as np

        residual_P, slope_PF = self.residuals(place_F)
        residual_P = residual_P / self.delta
        pull_P = self.share_P * np.minimum(np.maximum(residual_P, -1), 1) / self.delta
        return float(self.share_P @ huber(residual_P, 1.0)), pull_P @ slope_PF

    def minimum(self, start_F: Any) -> tuple[Any, float]:
        """A local minimum's place, and the objective there in the units of `objective`."""
        from scipy.optimize import least_squares

        root_P = self.share_P**0.5
        solved = least_squares(
            lambda place_F: self.residuals(place_F)[0] * root_P,
            start_F,
            lambda place_F: self.residuals(place_F)[1] * root_P[:, None],
            bounds=(self.low_F - 1e-9, self.high_F + 1e-9),
            x_scale="jac",
            max_nfev=200,
        )
        place_F, least = self.descend(solved.x)
        return place_F, least * self.delta**2 * (1 if self.log else self.l0**2)

    def descend(self, place_F: Any, tolerance: float = 1e-7) -> tuple[Any, float]:
        """L-BFGS in whitened coordinates, whitened anew until a round gains less than this share of the value."""
        import numpy as np
        from scipy.optimize import minimize

        least = self.value(place_F)[0]
        options = {"maxiter": 500, "maxcor": 20, "ftol": tolerance * 1e-5, "gtol": 1e-8}
        for _round in range(8):
            whitened, to_logs = self._whitened(place_F)
            found = minimize(whitened, np.zeros(len(place_F)), jac=True, method="L-BFGS-B", options=options)
            place_F = np.clip(place_F + to_logs @ found.x, self.low_F, self.high_F)
            gain, least = least - found.fun, float(found.fun)
            if gain < tolerance * least:
                break
        return place_F, least

    def _whitened(self, centre_F: Any) -> tuple[Callable[[Any], tuple[float, Any]], Any]:
        """`value` by coordinates about `centre_F` in which a unit step moves residuals by delta; and their matrix."""
        import numpy as np

        slope_PF = self.residuals(centre_F)[1] * self.share_P[:, None] ** 0.5
        values, vectors = np.linalg.eigh(slope_PF.T @ slope_PF)
        # The floor: in a direction that the runs hardly see, a unit is a factor of e in the coefficients.
        to_logs = self.delta * vectors / np.sqrt(np.maximum(values, self.delta**2))

        def whitened(z_F: Any) -> tuple[float, Any]:
            value, slope_F = self.value(centre_F + to_logs @ z_F)
            return value, slope_F @ to_logs

        return whitened, to_logs
