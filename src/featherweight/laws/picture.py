"""Pictures of a fitted law as SVG files. Needs matplotlib, of the extra `laws`; nothing else here does.

Shapes: P points, X places along an axis.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from featherweight.errors import RequestError
from featherweight.laws.forms import Coefficients
from featherweight.laws.forms import loss as law
from featherweight.laws.optimum import contour
from featherweight.laws.points import Points

CONTOURS = (0.25, 0.5, 0.625, 0.75, 0.875)


def check(path: Path, suffix: str = ".svg", what: str = "pictures are written as SVG") -> None:
    """Raises RequestError, before any long work, when `path` is no such file to be or matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RequestError(f"{path}: pictures need matplotlib: pip install 'featherweight[laws]'.") from error
    if path.suffix.lower() != suffix:
        raise RequestError(f"{path}: {what}: give a name that ends in {suffix}.")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"{path}: the folder {path.absolute().parent} is not there: make it first.")


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
    return figure, axes


def _write(figure: Any, path: Path | TextIO, metadata: dict[str, None] | None = None) -> None:
    """The same bytes every time: no date, and identifiers from a fixed salt."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "featherweight", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, **(metadata or {})})


def inline(figure: Any) -> str:
    """A figure as an <svg> element to put into a page: no prolog, no metadata, nothing fetched."""
    found = io.StringIO()
    _write(figure, found, {"Creator": None, "Format": None, "Type": None})
    text = found.getvalue()
    return text[text.index("<svg") :]


def losses(path: Path, runs: Points, co: Coefficients, draws: Sequence[Coefficients]) -> None:
    """Writes `losses_figure` to an SVG file."""
    check(path)
    _write(losses_figure(runs, co, draws), path)


def losses_figure(runs: Points, co: Coefficients, draws: Sequence[Coefficients]) -> Any:
    """Loss against non-zeros at the runs' most data, a line for each sparsity, with the 95 % band of the draws."""
    import numpy as np

    figure, axes = _axes("non-zero parameters", "loss")
    longest = runs.data_P.max()
    chosen = runs.take(runs.data_P >= longest * (1 - 1e-9))
    n_X = np.geomspace(runs.parameters_P.min() / 2, runs.parameters_P.max() * 4, 80)
    for i, sparsity in enumerate(np.unique(runs.sparsity_P)):
        here = chosen.take(chosen.sparsity_P == sparsity)
        colour = f"C{i % 10}"
        axes.plot(n_X, law(co, sparsity, n_X, longest), color=colour, label=f"S = {sparsity:g}")
        axes.plot(here.parameters_P, here.loss_P, "o", color=colour)
        if draws:
            band = np.quantile([law(draw, sparsity, n_X, longest) for draw in draws], (0.025, 0.975), axis=0)
            axes.fill_between(n_X, *band, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(f"{longest:.3g} tokens or images")
    axes.legend()
    return figure


def contours(path: Path, co: Coefficients, parameters: float, data: float, cost: str) -> None:
    """Writes `contours_figure` to an SVG file."""
    check(path)
    _write(contours_figure(co, parameters, data, cost), path)


def contours_figure(co: Coefficients, parameters: float, data: float, cost: str) -> Any:
    """Where each sparsity is the best one, in non-zeros and dense-run data, with the budget asked about as a cross."""
    import numpy as np

    figure, axes = _axes("non-zero parameters", "tokens or images of a dense run of equal compute")
    axes.set_yscale("log")
    n_X = np.geomspace(parameters / 30, parameters * 30, 60)
    for sparsity in CONTOURS:
        axes.plot(n_X, contour(co, sparsity, n_X, cost), label=f"S = {sparsity:g}")
    axes.plot([parameters], [data], "kx")
    axes.set_title(f"best sparsity, {cost} cost")
    axes.legend()
    return figure
