"""Accuracy of recipes on one model: perplexity and KL to the dense model, compressed and evaluated in one run.

    python bench/accuracy.py MODEL --calibration wiki.txt --calibration web.txt --text wiki.test.raw \
        --row "default --bits 4 --group-size 64" --row "papers.gptq --bits 3 --group-size 64 --asymmetric"

A row is a recipe's name with fields of the recipe as options (--bits 3, --asymmetric, --search mse, ...); --without
refit or --without descend takes that half out of each round of refinement. One JSON object a row on stdout as it is
done, the last line holds them all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from featherweight import api, data, recipes
from featherweight.core import refine
from featherweight.evaluate import evaluate
from featherweight.models.load import load_tokenizer


def recipe_of(row: str) -> recipes.Recipe:
    """`NAME --field value --flag` as a recipe."""
    name, *options = row.split()
    changes: dict[str, object] = {}
    while options:
        field = options.pop(0).removeprefix("--").replace("-", "_")
        if field == "asymmetric":
            changes["symmetric"] = False
        elif not options or options[0].startswith("--"):
            changes[field] = True
        else:
            text = options.pop(0)
            if field == "sparsity":  # text even where it reads like a number
                changes[field] = text
                continue
            try:
                changes[field] = json.loads(text)
            except json.JSONDecodeError:
                changes[field] = text
    return recipes.by_name(name).but(**changes)


@contextmanager
def without(half: str | None) -> Iterator[None]:
    """Takes scales ("refit") or codes ("descend") out of `refine`, for an ablation."""
    if half is None:
        yield
        return
    name = {"refit": "refit_scales", "descend": "descend"}[half]
    before = getattr(refine, name)
    setattr(refine, name, lambda weight_RC, hessian_CC, solution, *_: solution)
    try:
        yield
    finally:
        setattr(refine, name, before)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("model")
    ask.add_argument("--calibration", action="append", required=True)
    ask.add_argument("--text", action="append", required=True)
    ask.add_argument("--row", action="append", required=True)
    ask.add_argument("--samples", type=int, default=64)
    ask.add_argument("--tokens", type=int, default=2048)
    ask.add_argument("--context", type=int, default=2048)
    ask.add_argument("--windows", type=int, help="only the first so many")
    ask.add_argument("--device", default="auto")
    ask.add_argument("--seconds", type=float, default=1e9, help="start no row after this long")
    ask.add_argument("--scratch", default=tempfile.gettempdir())
    args = ask.parse_args()

    began = time.time()
    tokenizer = load_tokenizer(args.model)
    bos = data.bos_of(tokenizer)
    ids = data.evaluation_windows(data.tokens(tokenizer, args.text), args.context, bos)[: args.windows]
    dense = api.load(args.model, args.device)
    base = evaluate(dense, ids)
    print(json.dumps({"row": "dense", "perplexity": base.perplexity, "tokens": base.tokens, "bos": bos}), flush=True)
    done = []
    for row in args.row:
        if time.time() - began > args.seconds:
            print(f"out of time before {row}", file=sys.stderr)
            break
        options, _, half = row.partition(" --without ")
        recipe = recipe_of(options).but(calibration=tuple(args.calibration), samples=args.samples, tokens=args.tokens)
        out = Path(tempfile.mkdtemp(dir=args.scratch)) / "out"
        with without(half or None):
            result = api.compress(args.model, out, recipe, args.device)
        found = evaluate(api.load(out, args.device, kernel="dense"), ids, dense)
        shutil.rmtree(out.parent)
        done.append(
            {
                "row": row,
                "perplexity": round(found.perplexity, 3),
                "kl_nats": round(found.kl_nats or 0.0, 5),
                "top1_agreement": round(found.top1_agreement or 0.0, 4),
                "bits_per_weight": round(result.bits_per_weight, 4),
                "bytes": result.bytes,
                "compress_s": round(result.seconds, 1),
                "eval_s": round(found.seconds, 1),
                "peak_memory_bytes": result.peak_memory_bytes,
            }
        )
        print(json.dumps(done[-1]), flush=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"model": Path(args.model).name, "dense": base.perplexity, "machine": machine, "rows": done}))


if __name__ == "__main__":
    main()
