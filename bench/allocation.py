"""Does predicted damage rank allocations as measured KL does, and is non-uniform better than uniform at equal bytes?

    PYTHONPATH=src python bench/allocation.py MODEL --calibration wiki.txt --calibration web.txt --text wiki.test.raw \
        --device cuda

Measures the sensitivity database (all solved weights are kept in memory, in bfloat16), calibrates it on windows of the
calibration text, then compares KL on windows of --text for: random allocations of mixed sizes (Spearman against the
prediction), each uniform option of --uniform, and the allocation with the same bytes. Progress goes to stderr; the last
line of stdout is one JSON object. Weights are put into the dense model as they were solved on the original inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from featherweight import data
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.load import load_tokenizer
from featherweight.models.tree import build
from featherweight.plan import Database, allocate, allocate_milp, menu, predict
from featherweight.recipe import Recipe
from featherweight.stream.device import pick_device
from featherweight.stream.probe import Probe
from featherweight.stream.sensitivity import calibrate, measure


def ranks(numbers: list[float]) -> list[float]:
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return [float(order.index(n)) for n in range(len(numbers))]


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of ranks (no ties)."""
    a, b = (torch.tensor(ranks(numbers), dtype=torch.float64) for numbers in (one, other))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def random_allocation(database: Database, draw: random.Random, number: int, labels: list[str]) -> dict[str, str]:
    """Each fused group its own option: by turns any of a random few (other sizes), or any at all (about one size)."""
    groups: dict[str, list[str]] = {}
    for row in database.rows.values():
        groups.setdefault(row.fusion, []).append(row.name)
    few = draw.sample(labels, draw.randint(2, min(6, len(labels))))
    choices = {}
    for names in groups.values():
        options = [label for label in few if all(label in database.rows[name].options for name in names)]
        known = [label for label in labels if all(label in database.rows[name].options for name in names)]
        label = draw.choice(options if options and number % 2 == 0 else known)
        choices |= dict.fromkeys(names, label)
    return choices


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("model")
    ask.add_argument("--calibration", action="append", required=True)
    ask.add_argument("--text", action="append", required=True)
    ask.add_argument("--device", default="auto")
    ask.add_argument("--samples", type=int, default=64)
    ask.add_argument("--tokens", type=int, default=2048)
    ask.add_argument("--probe-windows", type=int, default=8, help="that losses are calibrated on")
    ask.add_argument("--probe-tokens", type=int, default=512)
    ask.add_argument("--test-windows", type=int, default=8, help="of --text, that KL is measured on")
    ask.add_argument("--test-tokens", type=int, default=1024)
    ask.add_argument("--allocations", type=int, default=20)
    ask.add_argument("--uniform", action="append", help="labels to beat at their bytes (default 3b-g64)")
    ask.add_argument("--unit", choices=("matrix", "group"), default="matrix", help="what is changed alone to calibrate")
    ask.add_argument("--bits", default="2,3,4,5,6,8", help="widths of the grids")
    ask.add_argument("--groups", default="32,64,128", help="group sizes of the grids")
    ask.add_argument("--patterns", action="store_true", help="sparsities too")
    ask.add_argument("--joint", action="store_true", help="sparse and 4 bits too")
    ask.add_argument("--asymmetric", action="store_true")
    ask.add_argument("--search", default="hessian")
    ask.add_argument("--damping", type=float, default=0.1)
    ask.add_argument("--unfused", action="store_true", help="q, k, v and gate, up may differ")
    ask.add_argument("--milp", action="store_true", help="check allocations with scipy")
    ask.add_argument("--database", type=Path, help="where to leave the database (must not exist)")
    ask.add_argument("--seed", type=int, default=0)
    args = ask.parse_args()
    if args.database is not None and args.database.exists():
        ask.error(f"{args.database} exists: solved weights are kept only of what this run measures")

    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:7.1f} s  {what}", file=sys.stderr, flush=True)

    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.model)
    tree = build(Checkpoint.open(resolve(args.model)))
    recipe = Recipe(
        calibration=tuple(args.calibration),
        samples=args.samples,
        tokens=args.tokens,
        damping=args.damping,
        symmetric=not args.asymmetric,
        seed=args.seed,
    )
    bits, sizes = ([int(n) for n in words.split(",")] for words in (args.bits, args.groups))
    options = menu(
        patterns=args.patterns,
        joint=args.joint,
        symmetric=not args.asymmetric,
        search=args.search,
        scale_dtype=tree.dtype,
        bits=bits,
        group_sizes=sizes,
    )
    say(f"{len(options)} options: {', '.join(option.label for option in options)}")
    kept: dict[tuple[str, str], Tensor] = {}

    def keep(name: str, label: str, values_RC: Tensor) -> None:
        kept[name, label] = values_RC.to(torch.bfloat16).cpu()

    def values(name: str, label: str) -> Tensor:
        return kept[name, label].to(device)

    with tempfile.TemporaryDirectory(prefix="featherweight-allocation-") as scratch:
        path = args.database or Path(scratch) / "database.jsonl"
        database = measure(
            args.model,
            path,
            recipe,
            options,
            args.device,
            keep=keep,
            tell=lambda done, total, what: say(f"{what} of {total}"),
        )
        measured_s = time.perf_counter() - began
        bos, encode = data.bos_of(tokenizer), data.encoder(tokenizer)
        text = data.calibration_text(tokenizer, recipe.calibration, False)
        probes_ST = data.calibration_windows(encode, text, args.probe_windows, args.probe_tokens, args.seed + 1, bos)
        calibrate(args.model, database, probes_ST, recipe, options, args.device, values=values, unit=args.unit)
        calibrated_s = time.perf_counter() - began - measured_s
    say(f"measured in {measured_s:.0f} s, calibrated in {calibrated_s:.0f} s")

    tests_ST = data.evaluation_windows(data.tokens(tokenizer, args.text), args.test_tokens, bos)
    step = max(1, len(tests_ST) // args.test_windows)
    probe = Probe(args.model, tests_ST[::step][: args.test_windows], device)

    def kl(choices: dict[str, str]) -> float:
        return probe.kl({name: values(name, label) for name, label in choices.items()})

    def size(choices: dict[str, str]) -> int:
        return sum(database.rows[name].options[label].bytes for name, label in choices.items())

    names = list(database.rows)
    weights = sum(row.rows * row.columns for row in database.rows.values())
    draw, rows = random.Random(args.seed), []
    for number in range(args.allocations):
        choices = random_allocation(database, draw, number, [option.label for option in options])
        rows.append({"bits": 8 * size(choices) / weights, "predicted": predict(database, choices), "kl": kl(choices)})
        say(json.dumps(rows[-1]))
    correlation = spearman([row["predicted"] for row in rows], [row["kl"] for row in rows])
    say(f"Spearman {correlation:.4f}")

    against = []
    for label in args.uniform or ["3b-g64"]:
        uniform = dict.fromkeys(names, label)
        layers = database.layers(fuse=not args.unfused)
        found = allocate(layers, size(uniform))
        row = {
            "uniform": label,
            "bits": 8 * size(uniform) / weights,
            "kl_uniform": kl(uniform),
            "predicted_uniform": predict(database, uniform),
            "bits_allocated": 8 * found.bytes / weights,
            "kl_allocated": kl(found.choices),
            "predicted_allocated": found.damage,
            "bound": found.bound,
            "labels": {one: list(found.choices.values()).count(one) for one in sorted(set(found.choices.values()))},
        }
        row["less"] = 1 - row["kl_allocated"] / row["kl_uniform"]
        if args.milp:
            row["milp"] = allocate_milp(layers, size(uniform)).damage
        against.append(row)
        say(json.dumps(row))
    print(
        json.dumps(
            {
                "model": args.model,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "options": [option.label for option in options],
                "measure_s": round(measured_s, 1),
                "calibrate_s": round(calibrated_s, 1),
                "spearman": correlation,
                "allocations": rows,
                "against": against,
            }
        )
    )


if __name__ == "__main__":
    main()
