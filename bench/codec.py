"""Bits a weight and weights a second of the codec, on independent ternary weights, against their entropy.

    PYTHONPATH=src python bench/codec.py

Every matrix is encoded as `codec.encode` chooses and by each code alone; all bytes count (header, lengths of rows,
checksums). "qmoe" is the original's layout without the two bfloat16 a row (its least and greatest weight) that no
figure here contains: 16-bit codewords of its own dictionary and 32 bits of offset a row. Speeds are those of one thread
by its processor time, the best of --repeats, checksums verified; with --device cuda or more --threads by the clock. A
table goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.codec import decode, dictionary, encode
from featherweight.codec.encoded import KINDS
from featherweight.codec.entropy import entropy_bits

SHAPES = ("2048x768", "768x2048", "2080x6144")
ZERO_SHARES = (0.5, 0.8, 0.857, 0.885, 0.92, 0.95)


def draw(rows: int, columns: int, zero_share: float, device: str) -> Tensor:
    """Levels 0 (with the probability `zero_share`), 1 and 2 (equally often), uint8 of shape (R, C)."""
    chance = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    return ((chance > zero_share).to(torch.uint8) + (chance > (1 + zero_share) / 2).to(torch.uint8)).to(device)


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """The least time that `work` took, after one run to warm up."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    work()
    found = []
    for _ in range(repeats):
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - start)
    return min(found)


def measure(rows: int, columns: int, zero_share: float, repeats: int, device: str) -> dict[str, float | str]:
    codes, weights = draw(rows, columns, zero_share, device), rows * columns
    chosen = encode(codes)
    on_device = encode(codes, ("runs",))
    table = dictionary.dictionary(16, dictionary.ORIGINAL_ZERO_SHARE, codes.device)
    codewords = int((dictionary.walk(codes, table)[1:] >= dictionary.NEW).sum()) + rows
    row: dict[str, float | str] = {
        "shape": f"{rows}x{columns}",
        "zero_share": zero_share,
        "entropy": -zero_share * math.log2(zero_share) - (1 - zero_share) * math.log2((1 - zero_share) / 2),
        "entropy_of_sample": entropy_bits(codes),
        "kind": f"{chosen.header.kind} {chosen.header.bits}",
        "bits_per_weight": chosen.bits_per_weight,
        **{kind: encode(codes, (kind,)).bits_per_weight for kind in KINDS},
        "qmoe": (16 * codewords + 32 * rows) / weights,
    }
    work: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(codes),
        "encode_runs": lambda: encode(codes, ("runs",)),
        "encode_dictionary": lambda: dictionary.encode(codes, table),
        "decode": lambda: decode(chosen, "the matrix"),
        "decode_runs": lambda: decode(on_device, "the matrix"),
    }
    for name, job in work.items():
        row[f"{name}_mweights_per_s"] = weights / seconds(job, repeats, device) / 1e6
    return row


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--shapes", default=",".join(SHAPES))
    ask.add_argument("--zero-shares", default=",".join(map(str, ZERO_SHARES)))
    ask.add_argument("--repeats", type=int, default=5)
    ask.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where codes are encoded")
    ask.add_argument("--threads", type=int, default=1)
    asked = ask.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for shape in asked.shapes.split(","):
        for zero_share in map(float, asked.zero_shares.split(",")):
            row = measure(*map(int, shape.split("x")), zero_share, asked.repeats, asked.device)
            if not rows:
                print(" | ".join(row), file=sys.stderr)
            cells = [f"{value:.4g}" if isinstance(value, float) else value for value in row.values()]
            print(" | ".join(cells), file=sys.stderr)
            rows.append(row)
    print(json.dumps({"device": asked.device, "threads": asked.threads, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
