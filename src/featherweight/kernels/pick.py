"""Which kernel serves a layer, and why not the others."""

from __future__ import annotations

import torch

from featherweight.errors import RequestError
from featherweight.formats.base import Format, Rule
from featherweight.kernels.base import Case, Kernel
from featherweight.kernels.cpu_int4 import CpuInt4
from featherweight.kernels.reference import Dense, Reference
from featherweight.kernels.sparse24 import Sparse24
from featherweight.kernels.sub1 import Sub1Tiles
from featherweight.kernels.sub1_cuda import Sub1Cuda
from featherweight.kernels.tiles import Dequantize
from featherweight.kernels.triton_linear import TritonLinear
from featherweight.kernels.w4a16_hopper import W4A16Hopper
from featherweight.kernels.wna16 import WNA16

ALL: tuple[Kernel, ...] = (
    Sub1Cuda(),
    Sub1Tiles(),
    CpuInt4(),
    Sparse24(),
    WNA16(),
    W4A16Hopper(),
    TritonLinear(),
    Dequantize(),
    Reference(),
    Dense(),
)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in ALL}
AUTO = ("sub1-cuda", "sub1-tiles", "cpu-int4", "sparse24", "w4a16-hopper", "wna16", "triton", "dequantize", "reference")
"""The order of "auto". Never dense: it gives back the memory that compressing saved, so it has to be asked for; nor
cpu-int4 for sub1, whose codes it would hold in two to six times their bytes. (What a race checker says of w4a16-hopper,
and why it is here all the same: bench/results/2026-11-22-h100-w4a16-hopper.md, "Checked at night".)"""


def reasons(
    format: Format, rule: Rule, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, str | None]:
    """Of every kernel, by name, why it does not take this layer; None when it does."""
    case = Case(format, rule, rows, columns, dtype, torch.device(device))
    return {name: kernel.refusal(case) for name, kernel in KERNELS.items()}


def pick(
    format: Format,
    rule: Rule,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device | str,
    wanted: str = "auto",
) -> Kernel:
    """The kernel `wanted`, or for "auto" the first of AUTO that takes the layer.

    Raises RequestError for a name that is not known, or a kernel that does not take this layer.
    """
    if wanted != "auto" and wanted not in KERNELS:
        raise RequestError(f"there is no kernel {wanted}: choose auto, {', '.join(KERNELS)}.")
    refusals = reasons(format, rule, rows, columns, dtype, device)
    if wanted == "auto":
        return next(KERNELS[name] for name in AUTO if refusals[name] is None)
    if refusals[wanted] is not None:
        fits = " or ".join(name for name, why in refusals.items() if why is None)
        raise RequestError(f"the kernel {wanted} does not take this layer: {refusals[wanted]}; choose {fits}.")
    return KERNELS[wanted]


def machine(
    format: Format, rule: Rule, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, str | None]:
    """As `reasons`, with kernels that take the layer tried on this machine: why they would fail, None if they run."""
    case = Case(format, rule, rows, columns, dtype, torch.device(device))
    return {name: kernel.refusal(case) or kernel.broken(case) for name, kernel in KERNELS.items()}
