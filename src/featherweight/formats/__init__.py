"""Layouts on disk: one file each, found by name. A format packs a Solution into named tensors and unpacks it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featherweight.errors import RequestError
from featherweight.formats.base import Format, Grid, Solution
from featherweight.formats.compressed_tensors import CompressedTensors
from featherweight.formats.gptq import Gptq

__all__ = ["FORMATS", "Format", "Grid", "Solution", "by_name", "from_config"]

FORMATS: dict[str, Format] = {
    format.name: format for format in (CompressedTensors(), Gptq("gptq", zero_offset=1), Gptq("gptq_v2", zero_offset=0))
}


def by_name(name: str) -> Format:
    """The format called `name`; RequestError lists the known ones."""
    if name not in FORMATS:
        raise RequestError(f"there is no format {name}: choose {', '.join(FORMATS)}.")
    return FORMATS[name]


def from_config(quantization_config: Mapping[str, Any]) -> tuple[Format, Grid]:
    """The format and grid that a checkpoint's `quantization_config` names; RequestError if we cannot read it."""
    method = quantization_config.get("quant_method")
    if method == "gptq":
        name = quantization_config.get("checkpoint_format") or quantization_config.get("format") or "gptq"
        format = by_name(str(name))
    elif method == "compressed-tensors":
        format = by_name(str(method))
    else:
        raise RequestError(f"quantization_config.quant_method is {method}, and compressed-tensors or gptq is read.")
    return format, format.read(quantization_config)
