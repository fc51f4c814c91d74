"""All experts of a layer in one launch on one NVIDIA GPU: entropy-coded ternary matrices beside the same in bfloat16.

    PYTHONPATH=src python bench/sub1_experts.py [--shape 6144x2048] [--experts 64] [--zero-share 0.885] [--tokens 1 8]

Independent ternary weights, one scale a row; every expert is sent --tokens tokens of its own. bfloat16 is the fastest
of torch.bmm and torch's grouped product over the same weights. One timing rule for all: a CUDA graph of launches over
two copies of the weights in turn, more than the L2 cache holds, replayed; the median of the replays, divided by the
launches. "bound" is what 26 instructions a lane and weight, as counted in the code of QMoE's kernel, take at 128 a
cycle and multiprocessor. The error is the relative Frobenius distance from the float64 product, beyond that of rounding
the output once. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from featherweight.benchmarks.timing import excess_error, median_us
from featherweight.codec import encode
from featherweight.kernels.sub1_bank import Bank, Entry, moved

QMOE_INSTRUCTIONS, LANES = 26, 128
DTYPE, GPU = torch.bfloat16, torch.device("cuda", 0)


def draw(rows: int, columns: int, zero_share: float) -> Tensor:
    """Symbols 0 (with the probability `zero_share`), 1 and 3 (equally often), on the GPU."""
    chance = torch.rand(rows, columns, device="cuda")
    return (chance > zero_share).to(torch.uint8) + 2 * (chance > (1 + zero_share) / 2).to(torch.uint8)


def experts(count: int, rows: int, columns: int, zero_share: float) -> tuple[list[Entry], Tensor]:
    """So many matrices as the kernel reads them, and in bfloat16: E x R x C."""
    entries, dense = [], torch.empty(count, rows, columns, dtype=DTYPE, device="cuda")
    for e in range(count):
        symbols_RC = draw(rows, columns, zero_share)
        scales_R1 = (torch.rand(rows, 1, device="cuda") * 0.02 + 0.01).to(DTYPE)
        torch.mul((symbols_RC.to(torch.int8) ^ 2) - 2, scales_R1, out=dense[e])
        entries.append(Entry.of(moved(encode(symbols_RC, ("runs", "bitmap")), scales_R1.device), scales_R1))
    return entries, dense


def copied(entry: Entry) -> Entry:
    encoded = entry.encoded
    stream = encoded.stream_N.clone()
    again = type(encoded)(encoded.header, stream, encoded.row_words_R, encoded.checksums_K)
    return Entry(again, entry.starts_R.clone(), entry.scales_RG.clone())


def exact_product(x_NC: Tensor, dense: Tensor, expert_N: Tensor) -> Tensor:
    """In float64, token by token."""
    return torch.stack([dense[e].double() @ x.double() for e, x in zip(expert_N.tolist(), x_NC, strict=True)])


def rivals(dense: list[Tensor], x_ETC: Tensor) -> Iterator[tuple[str, float]]:
    x_ECT = x_ETC.transpose(1, 2)
    yield "bmm", median_us([lambda w=w: torch.bmm(w, x_ECT) for w in dense], GPU)
    yield "bmm^T", median_us([lambda w=w: torch.bmm(x_ETC, w.transpose(1, 2)) for w in dense], GPU)
    tokens = x_ETC.shape[1]
    if hasattr(torch, "_grouped_mm"):
        offsets = torch.arange(1, len(x_ETC) + 1, device="cuda", dtype=torch.int32) * tokens
        flat = x_ETC.flatten(0, 1)
        try:
            yield (
                "grouped",
                median_us([lambda w=w: torch._grouped_mm(flat, w.transpose(1, 2), offsets) for w in dense], GPU),
            )
        except RuntimeError as error:  # not of every shape
            print("grouped_mm:", str(error)[:100])


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--shape", default="6144x2048")
    ask.add_argument("--experts", type=int, default=64)
    ask.add_argument("--zero-share", type=float, default=0.885)
    ask.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    asked = ask.parse_args()
    rows, columns = map(int, asked.shape.split("x"))
    entries, dense = experts(asked.experts, rows, columns, asked.zero_share)
    banks = [Bank.of([[e] for e in entries]), Bank.of([[copied(e)] for e in entries])]
    twice = [dense, dense.clone()]
    properties = torch.cuda.get_device_properties(0)
    clock_hz = torch.cuda.clock_rate() * 1e6
    weights = asked.experts * rows * columns
    bound_us = 1e6 * QMOE_INSTRUCTIONS * weights / (LANES * properties.multi_processor_count * clock_hz)
    nbytes = sum(tensor.nbytes for entry in entries for tensor in entry.tensors())
    found = []
    for tokens in asked.tokens:
        x_ETC = torch.randn(asked.experts, tokens, columns, device="cuda").to(DTYPE)
        expert_N = torch.arange(asked.experts, device="cuda").repeat_interleave(tokens)
        flat = x_ETC.flatten(0, 1)
        error = excess_error(banks[0].products(flat, expert_N, 1)[:, 0], exact_product(flat, dense, expert_N))
        ours = median_us([partial(bank.products, flat, expert_N, 1) for bank in banks], GPU)
        others = {name: round(us, 1) for name, us in rivals(twice, x_ETC)}
        best = min(others.values())
        found.append({"tokens": tokens, "us": round(ours, 1), "error": error, **others, "times": round(best / ours, 2)})
        print(found[-1], flush=True)
    header = entries[0].encoded.header
    print(
        json.dumps(
            {
                "gpu": properties.name,
                "shape": asked.shape,
                "experts": asked.experts,
                "code": f"{header.kind} {header.bits}",
                "bits_per_weight": 8 * nbytes / weights,
                "clock_mhz": clock_hz / 1e6,
                "qmoe_bound_us": bound_us,
                "rows": found,
            }
        )
    )


if __name__ == "__main__":
    main()
