"""How good a model is and how big: perplexity, KL to a dense reference, bits per weight, and what it writes."""

from featherweight.evaluate.generate import Written, generate, write
from featherweight.evaluate.perplexity import Evaluation, evaluate
from featherweight.evaluate.size import bits_per_weight, read_bytes

__all__ = ["Evaluation", "Written", "bits_per_weight", "evaluate", "generate", "read_bytes", "write"]
