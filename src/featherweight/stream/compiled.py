"""Norms, gates and rotations on a CPU by C (`native/pieces.c`): bfloat16, in one pass over memory each.

Shapes: N rows, D width, I inner width; S sequences, T tokens, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.native import pieces, run

LEAST_WORK = 1 << 14  # numbers for each thread, below which waking it takes longer


def usable(*tensors: Tensor) -> bool:
    """Whether C may do it: bfloat16 on a CPU where a compiler was found, no gradients."""
    alike = all(tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 for tensor in tensors)
    return alike and tensors[0].numel() > 0 and not torch.is_grad_enabled() and bool(pieces())


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, plus_one: bool, early: bool) -> Tensor:
    """`fused.rms_norm`."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    found, width = torch.empty_like(x), x.shape[-1]
    sizes = (width, torch.tensor(eps, dtype=torch.float32), int(plus_one), int(early))
    _run("rms_norm", (x, weight_D, found, *sizes), x.numel() // width, x.numel())
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`fused.gated`."""
    gate_NI, up_NI = gate.flatten(0, -2), up.flatten(0, -2)
    found = torch.empty_like(gate, memory_format=torch.contiguous_format)
    rows, width = gate_NI.shape
    _run("gate", (gate_NI, up_NI, found, width, gate_NI.stride(0), up_NI.stride(0)), rows, gate.numel())
    return found


def rotated(x_SHTD: Tensor, cos_STD: Tensor, sin_STD: Tensor, found_SHTD: Tensor) -> Tensor:
    """`fused.rotated`, written to what lies in memory as x does."""
    sequences, heads, tokens, width = x_SHTD.shape
    strides = (x_SHTD.stride(0), x_SHTD.stride(2), x_SHTD.stride(1), 0 if len(cos_STD) == 1 else tokens * width)
    angles = (cos_STD.contiguous(), sin_STD.contiguous())
    arguments = (x_SHTD, found_SHTD, *angles, tokens, heads, width, *strides)
    _run("rotate", arguments, sequences * tokens, x_SHTD.numel())
    return found_SHTD


def _run(name: str, arguments: tuple[Tensor | int, ...], count: int, work: int) -> None:
    run(name, arguments, count, work // LEAST_WORK, pieces())
