"""Calibration and evaluation text: from a file, a hub data set or the package itself, to windows of token ids."""

from featherweight.data.tasks import Item, read_task
from featherweight.data.text import bos_of, calibration_text, documents, encoder, read_text, tokens
from featherweight.data.windows import calibration_windows, digest, evaluation_windows

__all__ = [
    "Item",
    "bos_of",
    "calibration_text",
    "calibration_windows",
    "digest",
    "documents",
    "encoder",
    "evaluation_windows",
    "read_task",
    "read_text",
    "tokens",
]
