"""`featherweight laws`: make runs, fit a scaling law to them, and ask it for the best sparsity or model of a size."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight import console
from featherweight.errors import RequestError

app = typer.Typer(no_args_is_help=True, help="Scaling laws of sparse and low-bit models: fit, optimum, plan, sweep.")

Plot = Annotated[Path | None, typer.Option(help="Also write a picture, FILE.svg (needs the extra laws).")]
Seed = Annotated[int, typer.Option(help="Of the random starts and the resamples.")]
Law = Annotated[str, typer.Option(help="t5, vit, or a file with the JSON last line of laws fit.")]


@app.command()
def fit(
    data: Annotated[str, typer.Argument(help="CSV with sparsity, nonzero_parameters, data, loss; or t5 or vit.")],
    objective: Annotated[str, typer.Option(help="Huber on the log loss or on the raw loss.")] = "log",
    bootstraps: Annotated[int, typer.Option(help="Resamples for the 95 % intervals; 0 for none.")] = 200,
    delta: Annotated[float | None, typer.Option(help="Huber's delta: 1e-3 on log loss, 1e-2 on raw.")] = None,
    form: Annotated[str, typer.Option(help="joint, or chinchilla for dense runs alone.")] = "joint",
    starts: Annotated[int, typer.Option(help="Random starts.")] = 12,
    check: Annotated[bool, typer.Option("--check", help="Leave-one-out and extrapolation error too.")] = False,
    seed: Seed = 0,
    plot: Plot = None,
    report: Annotated[Path | None, typer.Option(help="Also write a page, FILE.html (needs the extra laws).")] = None,
) -> None:
    """Fit the law to the runs in DATA."""
    from featherweight.laws import checks, forms, page, picture
    from featherweight.laws.fit import fit as fitted_to
    from featherweight.laws.fit import huber_delta

    if form not in ("joint", "chinchilla"):
        raise RequestError(f"form {form!r}: take joint or chinchilla.")
    _at_least(bootstraps, 0, "bootstraps")
    if plot is not None:
        picture.check(plot)
    if report is not None:
        page.check(report)
    runs = _points(data)
    found = fitted_to(runs, objective, delta, starts, seed, form)
    with console.progress() as tell:
        draws = checks.bootstrap(runs, found, bootstraps, seed, delta, tell) if bootstraps else ()
    intervals = checks.intervals(draws) if draws else None
    values = {"coefficients": forms.as_dict(found.coefficients), "objective": found.objective, "intervals": intervals}
    last: dict[str, Any] = {**values, "points": len(runs)}
    if check:
        last["leave_one_out"] = asdict(checks.leave_one_out(runs, found, delta))
        last["extrapolation"] = asdict(checks.extrapolation(runs, found, seed, delta))
    if plot is not None:
        picture.losses(plot, runs, found.coefficients, draws)
    if report is not None:
        settings = {"data": data, "objective": objective, "form": form, "Huber delta": huber_delta(objective, delta),
                    "starts": starts, "bootstraps": bootstraps, "seed": seed}  # fmt: skip
        page.write(report, settings, last, runs, found.coefficients, draws)
    _fit_table(last)
    console.last_line(last)


@app.command()
def optimum(
    parameters: Annotated[str, typer.Option(help="Non-zero parameters, as 85M.")],
    tokens: Annotated[str, typer.Option(help="Budget: the tokens (or images) a dense run would see, as 50B.")],
    law: Law = "t5",
    plot: Plot = None,
) -> None:
    """The sparsity worth training at PARAMETERS non-zeros and the compute of a dense run over TOKENS."""
    from featherweight.laws import picture
    from featherweight.laws.optimum import COSTS, chinchilla_data
    from featherweight.laws.optimum import optimum as best

    n, d = (
        console.quantity("parameters", parameters, console.COUNTS),
        console.quantity("tokens", tokens, console.COUNTS),
    )
    co = _coefficients(law)
    if plot is not None:
        picture.check(plot)
    found = [asdict(best(co, n, d, cost)) for cost in COSTS]
    multiple = d / chinchilla_data(co, n)
    if plot is not None:
        picture.contours(plot, co, n, d, "gradual")
    console.say(f"{multiple:.3g} times the compute at which {n:.3g} parameters are the best dense size")
    console.table(tuple(found[0]), [list(row.values()) for row in found])
    console.last_line({"parameters": n, "tokens": d, "chinchilla_multiple": multiple, "optima": found})


@app.command()
def plan(
    bytes: Annotated[str, typer.Option(help="Room for the weights, as 8GB or 8GiB.")],
    tokens: Annotated[str, typer.Option(help="Training tokens, as 2T.")],
    data: Annotated[str, typer.Option(help="The runs to fit: t5, vit or a CSV.")] = "t5",
    objective: Annotated[str, typer.Option(help="Huber on the log loss or on the raw loss.")] = "log",
    bits: Annotated[list[int] | None, typer.Option(help="Only these widths; repeatable.")] = None,
    bootstraps: Annotated[int, typer.Option(help="Resamples for the intervals.")] = 100,
    seed: Seed = 0,
) -> None:
    """The best (sparsity, bits, size) that fits in BYTES, trained on TOKENS, and how sure that is."""
    from featherweight.laws import checks
    from featherweight.laws import plan as planning
    from featherweight.laws.fit import fit as fitted_to

    size, d = console.quantity("bytes", bytes, console.BYTES), console.quantity("tokens", tokens, console.COUNTS)
    widths = planning.checked_bits(bits)
    planning.check_budget(size, d, widths)
    _at_least(bootstraps, 1, "bootstraps")
    runs = _points(data)
    found = fitted_to(runs, objective, seed=seed)
    with console.progress() as tell:
        draws = checks.bootstrap(runs, found, bootstraps, seed, tell=tell)
    rows = [asdict(candidate) for candidate in planning.plan(found.coefficients, draws, size, d, widths)]
    beyond = rows[0]["effective_parameters"] / float(runs.parameters_P.max())
    longer = d / float(runs.data_P.max())
    reach = f"The law holds at {beyond:.3g} times the non-zeros and {longer:.3g} times the data of the runs fitted."
    assumptions = [*planning.ASSUMPTIONS, reach]
    shown = ("sparsity", "bits", "parameters", "loss", "interval", "best_in")
    console.table(shown, [[row[name] for name in shown] for row in rows[:8]])
    for line in assumptions:
        console.say(f"assumed: {line}")
    console.last_line({"best": rows[0], "candidates": rows, "assumptions": assumptions})


@app.command()
def sweep(
    out: Annotated[Path, typer.Argument(help="Folder for runs.csv; repeat the command to go on with it.")],
    text: Annotated[list[str] | None, typer.Option(help="A file to train on, as bytes; repeatable.")] = None,
    sizes: Annotated[str, typer.Option(help="Width x blocks, widths multiples of 64.")] = "128x4,256x4,384x4,640x4",
    sparsities: Annotated[str, typer.Option(help="Shares of zeros, and N:M patterns.")] = "0,0.5,0.75,0.875,2:4",
    durations: Annotated[str, typer.Option(help="Bytes each run sees.")] = "16MB,32MB,64MB",
    windows: Annotated[int, typer.Option(help="Windows in a step.")] = 16,
    window: Annotated[int, typer.Option(help="Bytes in a window.")] = 256,
    rate: Annotated[float, typer.Option(help="Learning rate at width 256; it falls as width^-1/2.")] = 2e-3,
    evaluation_bytes: Annotated[str, typer.Option(help="The most held-out bytes to predict.")] = "1MiB",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="bfloat16, float32, or auto: bfloat16 on a GPU.")] = "auto",
    compile: Annotated[bool | None, typer.Option(help="Compile the step; by default on a GPU only.")] = None,
    micro_batches: Annotated[int, typer.Option(help="Parts of a step, for less memory.")] = 1,
    stop_after: Annotated[float | None, typer.Option(help="Seconds after which to put the work on file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for the trained models, as checkpoints.")] = None,
    bootstraps: Annotated[int, typer.Option(help="Resamples for the 95 % intervals; 0 for none.")] = 200,
    seed: Annotated[int, typer.Option(help="Of first weights, windows and resamples.")] = 0,
) -> None:
    """Train a grid of small sparse models on TEXT and fit the law to them."""
    from featherweight.laws import finding, ledger
    from featherweight.laws import sweep as sweeping

    _at_least(bootstraps, 0, "bootstraps")
    finding.check()
    grid = sweeping.Sweep(
        tuple(_size(part) for part in sizes.split(",")),
        tuple(sparsities.split(",")),
        tuple(console.quantity("duration", part, console.BYTES) for part in durations.split(",")),
        windows,
        window,
        rate,
        evaluation_bytes=int(console.quantity("evaluation bytes", evaluation_bytes, console.BYTES)),
        seed=seed,
    )
    way = sweeping.Way(device, precision, compile, stop_after, micro_batches=micro_batches, save=save)
    try:
        with console.progress() as tell:
            found = sweeping.run(grid, out, text or [], way, tell)
    except KeyboardInterrupt:
        console.say(f"stopped; finished runs and the last minute's checkpoint are in {out}: repeat to go on.")
        raise typer.Exit(1) from None
    last = asdict(found)
    if found.done:
        rows = ledger.read_rows(out / ledger.CSV)
        key = {"bootstraps": bootstraps, "seed": seed, "losses": [row["loss"] for row in rows]}
        last["law"] = finding.kept(out / ledger.LAW, key, lambda: finding.finding(rows, bootstraps, seed))
        _sweep_table(last["law"])
    for warning in found.warnings:
        console.say(f"warning: {warning}")
    console.last_line(last)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})x(\d{1,4})", text.strip())
    if found is None:
        raise RequestError(f"size {text!r}: give width x blocks, as 256x4.")
    return int(found[1]), int(found[2])


def _sweep_table(law: dict[str, Any]) -> None:
    rows = [[f"{row['sparsity']:g}", row["gain"], row["interval"], row["paper"]] for row in law.get("gains", ())]
    rows += [[row["pattern"], row["gain"], row["interval"], None] for row in law.get("grouped_gains", ())]
    console.table(("sparsity", "gain per non-zero", "95 % interval", "published (T5)"), rows)
    if found := law.get("extrapolation"):
        console.say(f"largest size from the others: {found['mean']:.2%} mean error, {found['largest']:.2%} at most")
    for line in law["unknown"]:
        console.say(f"unknown: {line}")


def _points(data: str) -> Any:
    from featherweight.laws import points

    return points.published(data) if data in points.SHIPPED and not Path(data).exists() else points.read(data)


def _coefficients(law: str) -> Any:
    """Published ones by name, or those in a file whose last line `laws fit` wrote."""
    from featherweight.laws.forms import NAMES, PUBLISHED, Coefficients

    if law in PUBLISHED:
        return PUBLISHED[law]
    try:
        values = json.loads(Path(law).read_text(encoding="utf-8").strip().splitlines()[-1])["coefficients"]
        found = Coefficients.of(values[name] for name in NAMES)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestError(f"law {law!r}: take t5, vit or a file with the JSON last line of laws fit.") from error
    if not all(math.isfinite(value) and value >= 0 for value in found.as_tuple()):
        raise RequestError(f"law {law!r}: every coefficient must be finite and not below 0.")
    return found


def _at_least(value: int, least: int, name: str) -> None:
    if value < least:
        raise RequestError(f"{value} {name} asked for: at least {least} is needed.")


def _fit_table(last: dict[str, Any]) -> None:
    spans = last["intervals"] or {}
    rows = [[name, value, spans.get(name)] for name, value in last["coefficients"].items()]
    console.table(("coefficient", "value", "95 % interval"), rows)
    for name in ("leave_one_out", "extrapolation"):
        if name in last:
            found = last[name]
            console.say(f"{name}: {found['mean']:.2%} mean, {found['largest']:.2%} at most, {found['runs']} runs")
