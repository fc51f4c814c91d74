"""Layouts on disk: one file each, found by name. A format packs a solution into named tensors and unpacks it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from featherweight.core.rules import parts
from featherweight.errors import RequestError
from featherweight.formats.base import AnySolution, Format, Grid, Rule, Rules, Solution
from featherweight.formats.compressed_tensors import CompressedTensors
from featherweight.formats.dense import Dense
from featherweight.formats.efficientqat import EfficientQat
from featherweight.formats.gptq import Gptq
from featherweight.formats.sparse import Sparse
from featherweight.formats.sub1 import Sub1

__all__ = [
    "FORMATS",
    "AnySolution",
    "Format",
    "Grid",
    "Rule",
    "Rules",
    "Solution",
    "Sub1",
    "by_name",
    "config_of",
    "from_config",
    "parts",
]

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        CompressedTensors(),
        Gptq("gptq", zero_offset=1),
        Gptq("gptq_v2", zero_offset=0),
        Sparse(),
        Sub1(),
        Dense(),
    )
}
OWN = ("sparse", "sub1")  # what quant_method "featherweight" may be followed by


def by_name(name: str) -> Format:
    """The format called `name`; RequestError lists the known ones."""
    if name not in FORMATS:
        raise RequestError(f"there is no format {name}: choose {', '.join(FORMATS)}.")
    return FORMATS[name]


def config_of(config: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a checkpoint's config.json, None of a dense one.

    RequestError where there is none and the names of its tensors say that matrices are packed as in GPTQ's and
    EfficientQAT's files: those differ in what a zero means, so it is not guessed.
    """
    found: Mapping[str, Any] | None = config.get("quantization_config")
    packed = None if found is not None else next((name for name in names if name.endswith(".qweight")), None)
    if packed is not None:
        raise RequestError(
            f"config.json has no quantization_config, and {packed} is packed: add one, of GPTQ's files as in their "
            'quantize_config.json with "quant_method": "gptq", of EfficientQAT\'s own {"quant_method": "efficientqat", '
            '"bits": 2, "group_size": 64}, say.'
        )
    return found


def from_config(quantization_config: Mapping[str, Any]) -> tuple[Format, Rules]:
    """The format and rules that a checkpoint's `quantization_config` names; RequestError if we cannot read it."""
    method = quantization_config.get("quant_method")
    if method == "gptq":
        name = quantization_config.get("checkpoint_format") or quantization_config.get("format") or "gptq"
        format = by_name(str(name))
    elif method == "efficientqat":
        format = EfficientQat()
    elif method == "compressed-tensors":
        format = by_name(str(method))
    elif method == "featherweight":
        name = quantization_config.get("format")
        if name not in OWN:
            raise RequestError(
                f"quantization_config.format is {name}, and {' or '.join(OWN)} is read: update featherweight."
            )
        format = by_name(name)
    else:
        raise RequestError(
            f"quantization_config.quant_method is {method}, and compressed-tensors, gptq, efficientqat "
            "or featherweight is read."
        )
    return format, format.read(quantization_config)
