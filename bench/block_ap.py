"""Trained recipes on one model, with and without E2E-QP: perplexity and KL on several texts, rows in parallel.

    python bench/block_ap.py MODEL --calibration wiki.txt --calibration web.txt --text wiki.test.raw --text other.txt \
        --samples 256 --tokens 1024 --parallel 4 --row "best_2bit" --row "best_2bit --epochs 4 + tune --rate 0.001"

A row is a recipe's name with fields of the recipe as options (as in bench/accuracy.py); after "+ tune" come fields of
`Tuning`: the folder is then tuned towards the dense model and evaluated again. The row "dense" is the model itself.
Every row is a process of its own, so many at a time. One JSON object a row on stdout as it is done, the last line holds
them all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accuracy import recipe_of

from featherweight import Tuning, api, data
from featherweight.evaluate import evaluate, zero_shot
from featherweight.models.load import load_tokenizer


def tuning_of(options: str, args: argparse.Namespace) -> Tuning:
    """`--field value` as a Tuning on as much text as calibration had."""
    words = options.split()
    changes = {name.removeprefix("--"): json.loads(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    return replace(Tuning(), **{"samples": args.samples, "tokens": args.tokens, **changes})


def measure(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Perplexity and KL of a folder on every text, accuracy on every task."""
    tokenizer = load_tokenizer(args.model)
    bos = data.bos_of(tokenizer)
    model, dense = (api.load(folder, args.device, kernel="dense") for folder in (out, args.model))
    found: dict[str, Any] = {}
    for text in args.text:
        ids_ST = data.evaluation_windows(data.tokens(tokenizer, [text]), args.context, bos)[: args.windows]
        result = evaluate(model, ids_ST, dense, batch=args.eval_batch)
        found[Path(text).name] = {"perplexity": round(result.perplexity, 3), "kl_nats": round(result.kl_nats or 0, 5)}
    for task in args.task:
        right = zero_shot(model, data.encoder(tokenizer), data.read_task(task)[: args.items], bos)
        found[Path(task).stem] = {"accuracy": round(right.accuracy, 4), "error": round(right.error, 4)}
    return found


def run_row(args: argparse.Namespace) -> dict[str, Any]:
    """One row in this process."""
    row, (compressing, _, tuning) = args.row[0], args.row[0].partition("+ tune")
    if row == "dense":
        return {"row": row, "texts": measure(args, Path(args.model))}
    recipe = recipe_of(compressing).but(calibration=tuple(args.calibration), samples=args.samples, tokens=args.tokens)
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        result = api.compress(args.model, scratch / "out", recipe, args.device)
        journal = [json.loads(line) for line in (scratch / "out" / "journal.jsonl").read_text().splitlines()]
        blocks = {line["block"]: line for line in journal if "block_loss" in line}.values()
        report: dict[str, Any] = {
            "row": row,
            "texts": measure(args, scratch / "out"),
            "bits_per_weight": round(result.bits_per_weight, 4),
            "compress_s": round(result.seconds, 1),
            "peak_memory_bytes": result.peak_memory_bytes,
            "block_loss": [[round(line[k], 5) for k in ("block_loss_before", "block_loss")] + [line["epoch"]]
                           for line in blocks],
        }  # fmt: skip
        if tuning:
            settings = tuning_of(tuning, args)
            tuned = api.tune(
                scratch / "out", args.calibration, against=args.model, settings=settings, device=args.device
            )
            report |= {"tuned": tuned, "tuned_texts": measure(args, scratch / "out")}
        return report
    finally:
        shutil.rmtree(scratch)


def start_row(row: str) -> dict[str, Any]:
    """One row in a process of its own."""
    began = time.perf_counter()
    arguments = [sys.executable, __file__, *without_rows(sys.argv[1:]), "--row", row, "--one"]
    ran = subprocess.run(arguments, capture_output=True, text=True)
    wall = round(time.perf_counter() - began, 1)
    if ran.returncode:
        found = {"row": row, "failed": ran.stderr.strip().splitlines()[-1:]}
    else:
        found = json.loads(ran.stdout.splitlines()[-1])
    found["wall_s"] = wall
    print(json.dumps(found), flush=True)
    return found


def without_rows(arguments: list[str]) -> list[str]:
    """The command's arguments but for its rows."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument == "--row":
            skip = argument == "--row" and not skip
            continue
        kept.append(argument)
    return kept


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("model")
    ask.add_argument("--calibration", action="append", required=True)
    ask.add_argument("--text", action="append", required=True)
    ask.add_argument("--row", action="append", required=True)
    ask.add_argument("--task", action="append", default=[], help="zero-shot questions (.jsonl)")
    ask.add_argument("--items", type=int, help="only the first so many of each")
    ask.add_argument("--samples", type=int, default=256)
    ask.add_argument("--tokens", type=int, default=1024)
    ask.add_argument("--context", type=int, default=2048)
    ask.add_argument("--windows", type=int, help="only the first so many of each text")
    ask.add_argument("--eval-batch", type=int, default=4)
    ask.add_argument("--parallel", type=int, default=4)
    ask.add_argument("--threads", type=int, default=2, help="CPU threads of each row")
    ask.add_argument("--device", default="auto")
    ask.add_argument("--scratch", default=tempfile.gettempdir())
    ask.add_argument("--one", action="store_true", help="run the one row here")
    args = ask.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(run_row(args)), flush=True)
        return
    with ThreadPoolExecutor(args.parallel) as pool:
        done = list(pool.map(start_row, args.row))
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"model": Path(args.model).name, "machine": machine, "rows": done}))


if __name__ == "__main__":
    main()
