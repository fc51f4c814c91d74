"""How good a model is and how big: perplexity, KL to a dense one, zero-shot accuracy, bits per weight, and its text."""

from featherweight.evaluate.accuracy import ZeroShot, zero_shot
from featherweight.evaluate.generate import Written, generate, write
from featherweight.evaluate.perplexity import Evaluation, evaluate
from featherweight.evaluate.size import bits_per_weight, read_bytes

__all__ = [
    "Evaluation",
    "Written",
    "ZeroShot",
    "bits_per_weight",
    "evaluate",
    "generate",
    "read_bytes",
    "write",
    "zero_shot",
]
