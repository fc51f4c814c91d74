"""How good a model is and how big: perplexity, KL to a dense reference, bits per weight, and what it writes."""

from featherweight.evaluate.generate import generate
from featherweight.evaluate.perplexity import Evaluation, evaluate
from featherweight.evaluate.size import bits_per_weight

__all__ = ["Evaluation", "bits_per_weight", "evaluate", "generate"]
