"""Weights of 2, 3, 4 or 8 bits by 16-bit activations on NVIDIA GPUs (Ampere and later), in the kernel's own order.

Up to `TOKENS` tokens a launch go through `csrc/wna16.cu`, which reads each weight once; many tokens through a dense
product with weights made floats for the length of the call. Codes of five to seven bits are widened to eight.

The operator `featherweight::wna16` is what torch.compile and CUDA graphs see. On a CPU it computes the same product
from the same bytes, slowly: for tests.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes); blocks as `wna16_layout` has them.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import FallbackWarning
from featherweight.formats import parts
from featherweight.formats.base import Format, Grid, Rule, Solution
from featherweight.kernels import wna16_layout
from featherweight.kernels.base import Case, Kernel, Restorable, Run, require_input, require_no_backward
from featherweight.kernels.reference import Reference
from featherweight.kernels.wna16_layout import GROUPS, SCALE_DTYPES, WIDTHS, Layout, extent
from featherweight.kernels.wna16_plan import TOKENS, Device, Plan, choose, most_tokens, shares
from featherweight.native import nvrtc
from featherweight.native.launch import Module

DTYPES = (torch.float16, torch.bfloat16)
OLDEST = (8, 0)
DENSE_ABOVE = 64
"""Tokens from which weights are made floats first: two launches of 32 read them twice, four would take longer."""


@dataclass(frozen=True)
class WNA16(Kernel):
    """Weights stay packed in the GPU's memory, repacked once into the kernel's order."""

    name: str = "wna16"

    def refusal(self, case: Case) -> str | None:
        grid, pattern = parts(case.rule)
        if grid is None:
            return f"it multiplies by codes, and the weights are floats, pruned ({pattern})"
        width = grid.group_size or case.columns
        if case.device.type != "cuda" or torch.version.hip:
            return f"it runs on NVIDIA GPUs, and the layer is on {case.device.type}"
        if case.dtype not in DTYPES:
            return f"it takes {' or '.join(map(str, DTYPES))}, and the activations are {case.dtype}"
        if width % GROUPS[0]:
            return f"it needs groups of a multiple of {GROUPS[0]}, and they have {width}"
        return nvrtc.device_refusal(case.device, OLDEST)

    def broken(self, case: Case) -> str | None:
        try:
            kernels(torch.device("cuda", case.device.index or 0), case.dtype, Layout(4, GROUPS[-1], case.dtype, False))
        except nvrtc.CompileError as error:
            return str(error)
        return None

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        solution = format.unpack(tensors, rule)
        assert isinstance(solution, Solution)
        rows, columns = solution.codes_RC.shape
        weights, layout = repack(solution)
        if not loaded(self.name, weights, lambda: kernels(weights.device, dtype, layout)):
            return Reference().prepare(format, rule, tensors, dtype)
        register()
        static = (rows, layout.bits, layout.group, layout.scales, layout.zeros)

        def run(x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
            require_no_backward(self.name, x_TC)
            require_input(x_TC, columns, dtype, weights.device)
            return torch.ops.featherweight.wna16(x_TC, weights, bias_R, *static)

        grid, groups = solution.grid, solution.scales_RG.shape[1]
        return Restorable(run, lambda: restored(weights, layout, grid, (rows, columns, groups)))


def loaded(name: str, weights: Tensor, load: Callable[[], object]) -> bool:
    """Whether a kernel is there for weights that are ready to be read; where it does not compile, a FallbackWarning."""
    if weights.is_cuda:
        try:
            load()
        except nvrtc.CompileError as error:
            message = f"{name} gives way to the reference kernel: {error}"
            warnings.warn(message, FallbackWarning, stacklevel=3)
            return False
        torch.cuda.synchronize(weights.device)  # a launch reads weights before it waits for the kernels in front
    return True


def narrowed(solution: Solution) -> tuple[int, Tensor, Tensor]:
    """The widest groups there is a layout for, and scales and zeros of as many: equal ones where groups were wider."""
    width = solution.codes_RC.shape[1] // solution.scales_RG.shape[1]
    group = next(g for g in reversed(GROUPS) if width % g == 0)
    times = width // group
    return group, solution.scales_RG.repeat_interleave(times, 1), solution.zeros_RG.repeat_interleave(times, 1)


def repack(solution: Solution) -> tuple[Tensor, Layout]:
    """The blocks of a solution, and what they hold.

    Codes of a width that has no layout get the next, symmetric ones moved so that its middle code stands for zero;
    groups wider than 128 become several with equal scales.
    """
    codes_RC, grid = solution.codes_RC, solution.grid
    group, scales_RG, zeros_RG = narrowed(solution)
    bits = next(b for b in WIDTHS if b >= grid.stored_bits)
    layout = Layout(bits, group, scales_RG.dtype, not grid.symmetric)
    assert layout.scales in SCALE_DTYPES
    if grid.symmetric:
        codes_RC = codes_RC + (layout.middle - grid.middle)
    return wna16_layout.pack(codes_RC, scales_RG, zeros_RG, layout), layout


def restored(weights: Tensor, layout: Layout, grid: Grid, shape: tuple[int, int, int]) -> Solution:
    """The solution that `repack` made `weights` of: of so many rows, columns and groups of a row."""
    rows, columns, groups = shape
    codes_RC, scales_RG, zeros_RG = wna16_layout.unpack(weights, rows, columns, layout)
    step = scales_RG.shape[1] // groups
    scales_RG, zeros_RG = (each[:, ::step].contiguous() for each in (scales_RG, zeros_RG))
    if grid.symmetric:
        codes_RC, zeros_RG = codes_RC - (layout.middle - grid.middle), torch.full_like(zeros_RG, grid.middle)
    return Solution(codes_RC, scales_RG, zeros_RG, grid, torch.zeros(rows, device=weights.device))


class Params(ctypes.Structure):
    """The struct Params of csrc/wna16.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "x", "y", "bias")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "columns", "blocks", "tiles", "chunks")),
        *((name, ctypes.c_int) for name in ("tiles_each", "tiles_more", "row_warps", "warp_splits", "stages", "chunk")),
        *((name, ctypes.c_int) for name in ("own", "owned", "x_stride", "part_bytes")),
        *((name, ctypes.c_int) for name in ("at_barriers", "at_x", "at_sums", "at_partials")),
        *((name, ctypes.c_uint32) for name in ("by_row_warps", "by_splits", "by_owned")),
        ("hold", ctypes.c_int),
    )


@dataclass
class Kernels:
    """csrc/wna16.cu for one device, dtype and layout.

    Attributes:
        early: whether launches may start before the kernel in front has ended.
    """

    device: torch.device
    layout: Layout
    module: Module
    limits: Device
    early: bool = True
    _loaded: set[str] = field(default_factory=set)

    def load(self) -> None:
        """Everything that a call must not do: code onto the device, limits raised. Raises CompileError."""
        for width in range(8, TOKENS + 1, 8):
            self.module.function(f"wna16_{width}", self.limits.block_bytes)
        self.module.function("wna16_dequantize")

    def product(self, x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int) -> Tensor:
        """y_TR for contiguous x_TC of any number of rows."""
        tokens, extents = len(x_TC), extent(rows, x_TC.shape[1])
        most = most_tokens(*extents, self.layout, self.limits)
        if tokens > DENSE_ABOVE or most == 0:
            return self.dense(x_TC, weights, bias_R, rows)
        y_TR = x_TC.new_empty(tokens, rows)
        sizes = shares(tokens, most)
        for x, y, size in zip(x_TC.split(sizes), y_TR.split(sizes), sizes, strict=True):
            plan = choose(size, *extents, self.layout, self.limits)
            assert plan is not None
            self.launch(plan, x, weights, bias_R, y)
        return y_TR

    def launch(self, plan: Plan, x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, y_TR: Tensor) -> None:
        """One launch: y_TR of at most `TOKENS` tokens."""
        tiles, blocks = extent(y_TR.shape[1], x_TC.shape[1])
        params = Params(
            *(weights.data_ptr(), x_TC.data_ptr(), y_TR.data_ptr(), None if bias_R is None else bias_R.data_ptr()),
            *(plan.tokens, y_TR.shape[1], x_TC.shape[1], blocks, tiles, -(-blocks // plan.chunk)),
            *divmod(tiles, plan.clusters),
            *(plan.row_warps, plan.warp_splits, plan.stages, plan.chunk, plan.own),
            *(plan.owned, plan.x_stride, plan.part_bytes),
            *(plan.at_barriers, plan.at_x, plan.at_sums, plan.at_partials),
            *(2**31 // divisor + 1 for divisor in (plan.row_warps, plan.parts, plan.owned)),
            -1 if plan.hold is None else plan.hold,
        )
        clusters = self.limits.has_clusters
        self.module.launch(
            *(f"wna16_{plan.width}", plan.clusters * plan.size, plan.warps * 32, plan.bytes, params),
            cluster=plan.size if clusters else 0,
            early=self.early and clusters,
        )

    def dense(self, x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int) -> Tensor:
        """y_TR by the library's product, with the weights made floats.

        For an odd number of rows with a bias it rounds before it adds (bfloat16: an error of 2e-3), so then a row of
        the padding comes too.
        """
        if bias_R is None or rows % 2 == 0:
            return functional.linear(x_TC, self.dequantize(weights, x_TC, rows), bias_R)
        weight_RC = self.dequantize(weights, x_TC, rows + 1)
        return functional.linear(x_TC, weight_RC, functional.pad(bias_R, (0, 1)))[:, :rows].contiguous()

    def dequantize(self, weights: Tensor, like: Tensor, rows: int) -> Tensor:
        """The weights V_RC as floats."""
        (tiles, blocks), columns = extent(rows, like.shape[1]), like.shape[1]
        weight_RC = torch.empty(rows, columns, dtype=like.dtype, device=like.device)
        params = Params(weights.data_ptr(), None, weight_RC.data_ptr(), None, 0, rows, columns, blocks, tiles)
        self.module.launch("wna16_dequantize", -(-tiles * blocks // 8), 256, 0, params, cluster=0, early=False)
        return weight_RC


def macros(dtype: torch.dtype, layout: Layout) -> tuple[str, ...]:
    """What csrc/wna16.cu is compiled with."""
    return (
        f"BF16={int(dtype == torch.bfloat16)}",
        f"BITS={layout.bits}",
        f"GROUP={layout.group}",
        f"SCALE={SCALE_DTYPES.index(layout.scales)}",
        f"ZEROS={int(layout.zeros)}",
        f"SPARSE={int(layout.sparse)}",
    )


@cache
def kernels(device: torch.device, dtype: torch.dtype, layout: Layout) -> Kernels:
    """Compiled (or from the cache) and loaded. Raises CompileError."""
    properties = torch.cuda.get_device_properties(device)
    arch = nvrtc.arch(properties.major, properties.minor)
    module = Module(device, nvrtc.cubin("kernels/wna16", macros(dtype, layout), arch))
    processors = properties.multi_processor_count
    block_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    sizes: tuple[tuple[int, int], ...] = ((1, processors),)
    if properties.major >= 9:
        sizes = tuple((n, module.clusters("wna16_32", 256, block_bytes, n)) for n in (1, 2, 4, 8))
    limits = Device(processors, block_bytes, properties.shared_memory_per_multiprocessor, sizes)
    made = Kernels(device, layout, module, limits)
    made.load()
    return made


@cache
def register() -> torch.library.Library:
    """Make the operator known to torch, once; the library must stay alive."""
    library = torch.library.Library("featherweight", "DEF")
    library.define(
        "wna16(Tensor x, Tensor weights, Tensor? bias, int rows, int bits, int group, ScalarType scales, bool zeros)"
        " -> Tensor"
    )
    library.impl("wna16", _on_cuda, "CUDA")
    library.impl("wna16", _on_cpu, "CPU")
    torch.library.register_fake("featherweight::wna16", _shape, lib=library)
    return library


def _on_cuda(x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, *stored: Any) -> Tensor:
    return product(kernels(x_TC.device, x_TC.dtype, Layout(*stored)), x_TC, weights, bias_R, rows)


def _on_cpu(x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, *stored: Any) -> Tensor:
    return reference(x_TC, weights, bias_R, rows, Layout(*stored))


def product(made: Any, x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int) -> Tensor:
    """`made.product` of any leading axes, from rows that begin where 16 bytes do."""
    flat_TC = x_TC.reshape(-1, x_TC.shape[-1]).contiguous()
    if flat_TC.data_ptr() % 16:
        flat_TC = flat_TC.clone()
    with torch.cuda.device(x_TC.device):
        y_TR: Tensor = made.product(flat_TC, weights, bias_R, rows)
    return y_TR.view(*x_TC.shape[:-1], rows)


def reference(x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, layout: Layout) -> Tensor:
    """The same of weights in blocks on a CPU, in float64."""
    codes_RC, scales_RG, zeros_RG = wna16_layout.unpack(weights, rows, x_TC.shape[-1], layout)
    grouped = codes_RC.unflatten(-1, (-1, layout.group)).double() - zeros_RG.unsqueeze(-1)
    weight_RC = (grouped * scales_RG.unsqueeze(-1)).flatten(-2)
    bias = None if bias_R is None else bias_R.double()
    return functional.linear(x_TC.double(), weight_RC, bias).to(x_TC.dtype)


def _shape(x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, *stored: Any) -> Tensor:
    return x_TC.new_empty(*x_TC.shape[:-1], rows)
