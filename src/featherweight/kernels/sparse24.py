"""2:4 sparse weights of 4 bits by 16-bit activations on NVIDIA GPUs (Ampere and later), by their sparse tensor cores.

Of four neighbouring weights two codes and their places are read: 3 bits a weight and the scales. The blocks are those
of `wna16_layout`. Few tokens go through `csrc/wna16.cu` with another inner loop; more through `csrc/w4a16_hopper.cu`,
with another product, on Hopper, and through a dense product with weights made floats elsewhere, as in `wna16`.

The operator `featherweight::sparse24` is what torch.compile and CUDA graphs see. On a CPU it computes the same product
from the same bytes, slowly: for tests.

Shapes: R outputs, C inputs, T tokens (any leading axes).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning
from featherweight.formats import parts
from featherweight.formats.base import Format, Rule, Solution
from featherweight.kernels import w4a16_hopper, wna16, wna16_layout
from featherweight.kernels.base import Case, Kernel, Restorable, Run, require_input, require_no_backward
from featherweight.kernels.reference import Reference
from featherweight.kernels.wna16_layout import GROUPS, Layout
from featherweight.native import nvrtc

BITS = 4
KEEP, OF = 2, 4
COMPILERS = ((13, 0), (13, 5))
"""Versions of NVRTC whose sparse warpgroup products leave the places that they read alone: it does not know that they
are read late, and tests/test_sparse24_code.py looks at what it makes."""


@dataclass(frozen=True)
class Sparse24(Kernel):
    """Weights stay packed in the GPU's memory, half of them, repacked once into the kernel's order."""

    name: str = "sparse24"

    def refusal(self, case: Case) -> str | None:
        grid, pattern = parts(case.rule)
        if pattern is None or (pattern.keep, pattern.of) != (KEEP, OF):
            return f"it multiplies by weights of which {KEEP} of {OF} are kept, and they are {pattern or 'not pruned'}"
        if grid is not None and grid.stored_bits != BITS:
            return f"it multiplies by codes of {BITS} bits, and they have {grid.stored_bits}"
        return wna16.WNA16().refusal(case)

    def broken(self, case: Case) -> str | None:
        try:
            kernels(torch.device("cuda", case.device.index or 0), case.dtype, layout_of(GROUPS[-1], case.dtype, False))
        except nvrtc.CompileError as error:
            return str(error)
        return None

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        solution = format.unpack(tensors, rule)
        assert isinstance(solution, Solution)
        rows, columns = solution.codes_RC.shape
        weights, layout = repack(solution)
        if not wna16.loaded(self.name, weights, lambda: kernels(weights.device, dtype, layout)):
            return Reference().prepare(format, rule, tensors, dtype)
        register()
        static = (rows, layout.group, layout.scales, layout.zeros)

        def run(x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
            require_no_backward(self.name, x_TC)
            require_input(x_TC, columns, dtype, weights.device)
            return torch.ops.featherweight.sparse24(x_TC, weights, bias_R, *static)

        grid, pattern, groups = solution.grid, solution.pattern, solution.scales_RG.shape[1]

        def restored() -> Solution:
            codes = wna16.restored(weights, layout, grid, (rows, columns, groups))
            keep_RC = wna16_layout.kept(weights, rows, columns, layout)
            return codes if pattern is None else replace(codes, keep_RC=keep_RC, pattern=pattern)

        return Restorable(run, restored)


@cache
def kernels(device: torch.device, dtype: torch.dtype, layout: Layout) -> wna16.Kernels | w4a16_hopper.Kernels:
    """What multiplies any number of tokens, compiled and loaded. Raises CompileError."""
    streamed = wna16.kernels(device, dtype, layout)
    if torch.cuda.get_device_capability(device) != w4a16_hopper.HOPPER:
        return streamed
    if nvrtc.nvrtc_version() not in COMPILERS:
        known, found = (".".join(map(str, version)) for version in (COMPILERS[-1], nvrtc.nvrtc_version()))
        warnings.warn(
            f"sparse24 leaves many tokens to a dense product: NVRTC {known} is known to compile Hopper's sparse ones "
            f"rightly, and {found} is installed.",
            FallbackWarning,
            stacklevel=2,
        )
        return streamed
    return w4a16_hopper.kernels(device, dtype, layout)


def layout_of(group: int, scales: torch.dtype, zeros: bool) -> Layout:
    return Layout(BITS, group, scales, zeros, sparse=True)


def repack(solution: Solution) -> tuple[Tensor, Layout]:
    """The blocks of a solution, and what they hold; groups wider than 128 become several with equal scales.

    Raises RequestError where more than two of four neighbouring weights are not zero.
    """
    group, scales_RG, zeros_RG = wna16.narrowed(solution)
    layout = layout_of(group, scales_RG.dtype, not solution.grid.symmetric)
    return wna16_layout.pack(solution.codes_RC, scales_RG, zeros_RG, layout, solution.keep_RC), layout


@cache
def register() -> torch.library.Library:
    """Make the operator known to torch, once; the library must stay alive."""
    library = torch.library.Library("featherweight", "FRAGMENT")
    library.define(
        "sparse24(Tensor x, Tensor weights, Tensor? bias, int rows, int group, ScalarType scales, bool zeros) -> Tensor"
    )
    library.impl("sparse24", _on_cuda, "CUDA")
    library.impl("sparse24", _on_cpu, "CPU")
    torch.library.register_fake("featherweight::sparse24", _shape, lib=library)
    return library


def _on_cuda(
    x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, group: int, scales: torch.dtype, zeros: bool
) -> Tensor:
    made = kernels(x_TC.device, x_TC.dtype, layout_of(group, scales, zeros))
    return wna16.product(made, x_TC, weights, bias_R, rows)


def _on_cpu(
    x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, group: int, scales: torch.dtype, zeros: bool
) -> Tensor:
    return wna16.reference(x_TC, weights, bias_R, rows, layout_of(group, scales, zeros))


def _shape(
    x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, group: int, scales: torch.dtype, zeros: bool
) -> Tensor:
    return x_TC.new_empty(*x_TC.shape[:-1], rows)
