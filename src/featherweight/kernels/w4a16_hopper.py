"""4-bit weights by 16-bit activations on Hopper, for any number of tokens, over one copy of the weights.

Few tokens go through `wna16`, more through `csrc/w4a16_hopper.cu`, which reads the same blocks, and where it should be
faster, through a dense product with weights made floats for the length of the call and rounded to the dtype of x.

The operator `featherweight::w4a16_hopper` is what torch.compile and CUDA graphs see. On a CPU it computes the same
product from the same bytes, slowly: for tests.

Shapes: R outputs, C inputs, T tokens (any leading axes); blocks as `wna16_layout` has them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch
from torch import Tensor

from featherweight.formats import parts
from featherweight.formats.base import Format, Rule, Solution
from featherweight.kernels import wna16
from featherweight.kernels.base import Case, Kernel, Restorable, Run, require_input, require_no_backward
from featherweight.kernels.reference import Reference
from featherweight.kernels.w4a16_hopper_plan import Plan, Tile, choose, lay_out, tiles
from featherweight.kernels.wna16_layout import Layout, extent
from featherweight.native import nvrtc
from featherweight.native.launch import Module

HOPPER = (9, 0)
BITS = 4
STREAMED, SPARSE_STREAMED = 32, 16
"""Tokens up to which `wna16` is faster; of 2:4 sparse weights, 17 to 31 were not measured."""
STREAMS = 64
"""Streams that may multiply at once."""


@dataclass(frozen=True)
class W4A16Hopper(Kernel):
    """Weights stay packed in the GPU's memory, in the order that `wna16` reads too."""

    name: str = "w4a16-hopper"

    def refusal(self, case: Case) -> str | None:
        why = wna16.WNA16().refusal(case)
        if why is not None:
            return why
        grid, _ = parts(case.rule)
        assert grid is not None
        if grid.stored_bits != BITS:
            return f"it multiplies by codes of {BITS} bits, and they have {grid.stored_bits}"
        found = torch.cuda.get_device_capability(case.device)
        if found != HOPPER:
            return f"it needs compute capability {HOPPER[0]}.{HOPPER[1]}, and the GPU has {found[0]}.{found[1]}"
        return None

    def broken(self, case: Case) -> str | None:
        device = torch.device("cuda", case.device.index or 0)
        try:
            kernels(device, case.dtype, Layout(BITS, 128, case.dtype, False))
        except nvrtc.CompileError as error:
            return str(error)
        return wna16.WNA16().broken(case)

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        solution = format.unpack(tensors, rule)
        assert isinstance(solution, Solution)
        rows, columns = solution.codes_RC.shape
        weights, layout = wna16.repack(solution)

        def load() -> None:
            kernels(weights.device, dtype, layout)
            wna16.kernels(weights.device, dtype, layout)

        if not wna16.loaded(self.name, weights, load):
            return Reference().prepare(format, rule, tensors, dtype)
        register()
        static = (rows, layout.group, layout.scales, layout.zeros)

        def run(x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
            require_no_backward(self.name, x_TC)
            require_input(x_TC, columns, dtype, weights.device)
            return torch.ops.featherweight.w4a16_hopper(x_TC, weights, bias_R, *static)

        grid, groups = solution.grid, solution.scales_RG.shape[1]
        return Restorable(run, lambda: wna16.restored(weights, layout, grid, (rows, columns, groups)))


class Params(ctypes.Structure):
    """The struct Params of csrc/w4a16_hopper.cu."""

    _fields_ = (
        ("x", ctypes.c_uint64 * 16),
        *((name, ctypes.c_void_p) for name in ("weights", "y", "bias", "partials", "counters")),
        *(
            (name, ctypes.c_int)
            for name in [
                *("tokens", "rows", "blocks", "tiles", "row_tiles", "token_tiles", "band"),
                *("whole", "shared", "sharers", "helped", "stages"),
                *("at_weights", "at_staging", "at_meeting", "at_barriers"),
            ]
        ),
    )


@dataclass
class Kernels:
    """csrc/w4a16_hopper.cu for one device, dtype and layout.

    Attributes:
        modules: a cubin for each tile.
        early: whether launches may start before the kernel in front has ended.
        counters: a row for each stream, 16 numbers a shared tile: how many CTAs have brought a warp's part, or summed
            up their share. A launch leaves zeros. Graphs captured on one stream must not run at once on several.
    """

    device: torch.device
    dtype: torch.dtype
    layout: Layout
    modules: Mapping[Tile, Module]
    processors: int
    block_bytes: int
    counters: Tensor
    early: bool = True
    _streams: dict[int, int] = field(default_factory=dict)

    def load(self) -> None:
        """Everything that a call must not do: code onto the device, limits raised. Raises CompileError."""
        for module in self.modules.values():
            module.function("w4a16_hopper", self.block_bytes)

    def product(self, x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int) -> Tensor:
        """y_TR for contiguous x_TC of any number of rows."""
        streamed = wna16.kernels(self.device, self.dtype, self.layout)
        tokens, columns = x_TC.shape
        if tokens <= (SPARSE_STREAMED if self.layout.sparse else STREAMED):
            return streamed.product(x_TC, weights, bias_R, rows)
        tile = choose(tokens, rows, columns, self.dtype, self.layout, self.processors)
        if tile is None:
            return streamed.dense(x_TC, weights, bias_R, rows)
        y_TR = x_TC.new_empty(tokens, rows)
        self.launch(self.plan(tile, tokens, rows, columns), x_TC, weights, bias_R, y_TR)
        return y_TR

    def plan(self, tile: Tile, tokens: int, rows: int, columns: int) -> Plan:
        return lay_out(tile, tokens, rows, columns, self.layout, self.processors, self.block_bytes)

    def launch(self, plan: Plan, x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, y_TR: Tensor) -> None:
        """One launch into y_TR."""
        partials = torch.empty(plan.partials_bytes, dtype=torch.uint8, device=self.device)
        tokens, columns = x_TC.shape
        across, down = extent(y_TR.shape[1], columns)[::-1]
        params = Params(
            tensor_map(x_TC.data_ptr(), tokens, columns, plan.tile.tokens, self.dtype == torch.bfloat16),
            weights.data_ptr(),
            y_TR.data_ptr(),
            None if bias_R is None else bias_R.data_ptr(),
            partials.data_ptr(),
            self.counters[self.stream_index()].data_ptr(),
            *(tokens, y_TR.shape[1], across, down, plan.row_tiles, plan.token_tiles, plan.band),
            *(plan.whole, plan.shared, plan.sharers, plan.helped),
            *(plan.stages, plan.at_weights, plan.at_staging, plan.at_meeting, plan.at_barriers),
        )
        self.modules[plan.tile].launch(
            *("w4a16_hopper", plan.grid, plan.tile.threads, plan.bytes, params),
            cluster=plan.tile.meet if plan.tile.meet > 1 else 0,
            early=self.early,
        )

    def stream_index(self) -> int:
        """The row of `counters` of the current stream."""
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        return self._streams.setdefault(stream, len(self._streams) % STREAMS)


@lru_cache(maxsize=4096)
def tensor_map(address: int, tokens: int, columns: int, box_tokens: int, bfloat: bool) -> ctypes.Array[ctypes.c_uint64]:
    """How the copy engine reads boxes of `box_tokens` x 64 columns out of x_TC, zeros beyond it: a CUtensorMap."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    encoded = nvrtc.driver_value(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bfloat else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            2,
            address,
            [driver.cuuint64_t(columns), driver.cuuint64_t(tokens)],
            [driver.cuuint64_t(columns * 2)],
            [driver.cuuint32_t(64), driver.cuuint32_t(box_tokens)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return (ctypes.c_uint64 * 16)(*(int(word) for word in encoded.opaque))


def macros(dtype: torch.dtype, layout: Layout, tile: Tile) -> tuple[str, ...]:
    """What csrc/w4a16_hopper.cu is compiled with."""
    more = {"SUMS": tile.sums, "TOKENS": tile.tokens, "WARPGROUPS": tile.warpgroups, "CTAS": tile.ctas}
    more |= {"MEET": tile.meet}
    return (*wna16.macros(dtype, layout), *(f"{name}={int(value)}" for name, value in more.items()))


@cache
def kernels(device: torch.device, dtype: torch.dtype, layout: Layout) -> Kernels:
    """Compiled (or from the cache) and loaded. Raises CompileError."""
    properties = torch.cuda.get_device_properties(device)
    arch = nvrtc.arch(properties.major, properties.minor)
    shapes = tiles(dtype, layout)
    with ThreadPoolExecutor() as pool:  # NVRTC takes seconds for each, and lets other threads run
        cubins = pool.map(lambda tile: nvrtc.cubin("kernels/w4a16_hopper", macros(dtype, layout, tile), arch), shapes)
    modules = {tile: Module(device, code) for tile, code in zip(shapes, cubins, strict=True)}
    block_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    processors = properties.multi_processor_count
    most = processors * max(tile.ctas for tile in shapes)
    counters = torch.zeros(STREAMS, most * 16, dtype=torch.int32, device=device)
    made = Kernels(device, dtype, layout, modules, processors, block_bytes, counters)
    made.load()
    return made


@cache
def register() -> torch.library.Library:
    """Make the operator known to torch, once; the library must stay alive."""
    library = torch.library.Library("featherweight", "FRAGMENT")
    library.define(
        "w4a16_hopper(Tensor x, Tensor weights, Tensor? bias, int rows, int group, ScalarType scales, bool zeros) "
        "-> Tensor"
    )
    library.impl("w4a16_hopper", _on_cuda, "CUDA")
    library.impl("w4a16_hopper", _on_cpu, "CPU")
    torch.library.register_fake("featherweight::w4a16_hopper", _shape, lib=library)
    return library


def _on_cuda(
    x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, group: int, scales: torch.dtype, zeros: bool
) -> Tensor:
    made = kernels(x_TC.device, x_TC.dtype, Layout(BITS, group, scales, zeros))
    return wna16.product(made, x_TC, weights, bias_R, rows)


def _on_cpu(
    x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, group: int, scales: torch.dtype, zeros: bool
) -> Tensor:
    wna16.register()
    return torch.ops.featherweight.wna16(x_TC, weights, bias_R, rows, BITS, group, scales, zeros)


def _shape(
    x_TC: Tensor, weights: Tensor, bias_R: Tensor | None, rows: int, group: int, scales: torch.dtype, zeros: bool
) -> Tensor:
    return x_TC.new_empty(*x_TC.shape[:-1], rows)
