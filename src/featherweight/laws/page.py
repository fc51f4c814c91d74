"""A fit as one HTML file that needs nothing else: coefficients, settings and pictures. No script, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from featherweight.errors import RequestError
from featherweight.laws import picture
from featherweight.laws.forms import Coefficients
from featherweight.laws.points import Points

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem;text-align:left}"
    "svg{max-width:100%;height:auto}"
)


def check(path: Path) -> None:
    """Raises RequestError, before any long work, when no page can be written there or matplotlib is missing."""
    picture.check(path, ".html", "the report is a page")


def write(
    path: Path,
    settings: Mapping[str, Any],
    found: Mapping[str, Any],
    runs: Points,
    co: Coefficients,
    draws: Sequence[Coefficients],
) -> None:
    """Writes the page. `found` is the last line of `laws fit`; `settings` what it was asked, by name."""
    check(path)
    spans = found.get("intervals") or {}
    rows = [(name, _number(value), _span(spans.get(name))) for name, value in found["coefficients"].items()]
    parts = [
        "<h1>Scaling law</h1>",
        "<p>L(S, N, D) = (a_S (1 - S)^b_S + c_S) N^-b_N + (a_D / D)^b_D + c, fitted to "
        f"{len(runs)} runs; objective {_number(found['objective'])}.</p>",
        _table(("coefficient", "value", "95 % interval"), rows),
        *_errors(found),
        "<h2>Loss against non-zeros</h2>",
        picture.inline(picture.losses_figure(runs, co, draws)),
        *_contours(runs, co),
        "<h2>Settings</h2>",
        _table(("setting", "value"), [(name, str(value)) for name, value in settings.items()]),
    ]
    head = f'<meta charset="utf-8"><title>Scaling law</title><style>{STYLE}</style>'
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror or error}): give another name.") from error


def _contours(runs: Points, co: Coefficients) -> list[str]:
    """The picture of best sparsities about the largest run, for a law that sees sparsity."""
    if not (co.a_S > 0 and co.b_S > 0):
        return []
    figure = picture.contours_figure(co, float(runs.parameters_P.max()), float(runs.data_P.max()), "gradual")
    return ["<h2>Best sparsity</h2>", picture.inline(figure)]


def _errors(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each check that was made."""
    named = {"leave_one_out": "Each run from all the others", "extrapolation": "The largest size from the others"}
    return [
        f"<p>{said}: {found[name]['mean']:.2%} mean error, {found[name]['largest']:.2%} at most.</p>"
        for name, said in named.items()
        if name in found
    ]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _span(span: Sequence[float] | None) -> str:
    return "-" if span is None else f"{_number(span[0])} to {_number(span[1])}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in columns)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
