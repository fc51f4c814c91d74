"""How good a model is and how big: perplexity, KL to a dense one, zero-shot accuracy, bits per weight, and its text."""

from featherweight.evaluate.accuracy import ZeroShot, zero_shot
from featherweight.evaluate.generate import generate
from featherweight.evaluate.perplexity import Evaluation, evaluate
from featherweight.evaluate.size import bits_per_weight

__all__ = ["Evaluation", "ZeroShot", "bits_per_weight", "evaluate", "generate", "zero_shot"]
