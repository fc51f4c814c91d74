"""The demonstration: the embedded model at 4, 3 and 2 bits, rounded and compensated, and what each costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from featherweight import api, data
from featherweight.evaluate import evaluate
from featherweight.models.checkpoint import EMBEDDED
from featherweight.models.load import load_tokenizer
from featherweight.recipe import Recipe
from featherweight.recipes import by_name
from featherweight.stream.compress import Tell

CONTEXT = 512
BITS = (4, 3, 2)
METHODS = ("rtn", "gptq")


def recipe(method: str, bits: int) -> Recipe:
    """Symmetric groups of 128; plain rounding on the min-max grid against the default method."""
    base = by_name("papers.rtn" if method == "rtn" else "default")
    return base.but(bits=bits, group_size=128, samples=32, tokens=CONTEXT)


def run(device: str = "auto", tell: Tell | None = None) -> dict[str, Any]:
    """Compresses, evaluates and compares; returns {"dense_perplexity", "rows": [...]}, see `demo`'s JSON line."""
    tokenizer = load_tokenizer(EMBEDDED)
    tokens_T = data.tokens(tokenizer, ["builtin:evaluation"])
    ids_ST = data.evaluation_windows(tokens_T, CONTEXT, data.bos_of(tokenizer))
    dense = api.load(EMBEDDED, device)
    dense_perplexity = evaluate(dense, ids_ST, batch=4).perplexity
    rows = []
    with tempfile.TemporaryDirectory(prefix="featherweight-demo-") as scratch:
        for number, (bits, method) in enumerate((bits, method) for bits in BITS for method in METHODS):
            began = time.perf_counter()

            def told(
                done: float, total: float, what: str, number: int = number, bits: int = bits, method: str = method
            ) -> None:
                if tell is not None:
                    tell(number + 0.8 * done / total, len(BITS) * len(METHODS), f"{method}, {bits} bits")

            out = Path(scratch) / f"{method}-{bits}"
            result = api.compress(EMBEDDED, out, recipe(method, bits), device, told)
            seconds = time.perf_counter() - began
            found = evaluate(api.load(out, device, kernel="dense"), ids_ST, dense, batch=4)
            rows.append(
                {
                    "method": method,
                    "bits": bits,
                    "bits_per_weight": result.bits_per_weight,
                    "perplexity": found.perplexity,
                    "kl_nats": found.kl_nats,
                    "seconds": round(seconds, 2),
                }
            )
    return {"dense_perplexity": dense_perplexity, "rows": rows}
