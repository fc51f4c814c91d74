"""What a process pays for once on a GPU, done on other threads while the first tensors are read.

Triton hashes its own installation before its first kernel (half a second), CUDA brings a kernel to the GPU when it is
first asked for (up to 20 ms each), and the solver's kernels may have to be compiled (seconds). What fails here is left
to the block that needs it, which says so.

Shapes: T tokens, D width; R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from featherweight.core import fused, scales
from featherweight.core.hessian import HessianSum
from featherweight.core.problem import LayerProblem
from featherweight.core.products import left
from featherweight.core.refine import descend, refit_scales
from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import Solution
from featherweight.core.solve import Choices
from featherweight.core.sweep import WIDE_SLAB, sweep
from featherweight.core.triangle import BLOCK, root_
from featherweight.stream.fused import rms_norm

COMPILERS = 3  # threads
ROWS, COLUMNS = 64, 256  # of the layer that is solved for the sake of its kernels
MANY_ROWS = 1 << 16  # for which column loops are another kernel
FACTORED = 2 * BLOCK  # columns of the H that is factored for the sake of what CUDA loads
TOKENS, HEAD = 256, 64  # that go through a block's first operations, of heads so wide where no module says


@cache
def waking() -> Thread:
    """The thread on which Triton reads and hashes its own installation, once a process: 0.9 s with its imports.

    Of threads that want a kernel before it is done each would do the same again.
    """

    def wake() -> None:
        with suppress(Exception):  # no Triton, or one that keeps this elsewhere: the first kernel will do it
            from triton.runtime.cache import triton_key

            triton_key()

    thread = Thread(target=wake, name="waking", daemon=True)
    thread.start()
    return thread


class Rehearsal:
    """Threads that go through the first of everything from the beginning of the `with`; on a CPU, nothing."""

    def __init__(self, device: torch.device, dtype: torch.dtype, block: nn.Module, width: int) -> None:
        """`block` is one that is to come, as it is on meta, and `width` that of the hidden states."""
        self._device, self._sizes = device, (dtype, width, _head_width(block))
        self._pool = ThreadPoolExecutor(2, "rehearsal") if device.type == "cuda" else None
        self._norm: Future[None] | None = None
        self._solver: Future[None] | None = None

    def solver(self, rule: Rule, choices: Choices) -> None:
        """Has the solver's kernels made. Not while a model is: torch's default dtype is the model's then."""
        self._solver = self._begin(self._compile, rule, choices)

    def wait_for_triton(self) -> None:
        """Returns once Triton knows itself: threads that come before that do it over again, each for itself."""
        if self._norm is not None:
            wait([self._norm])

    def wait_for_solver(self) -> None:
        """Returns once the solver's kernels are made."""
        if self._solver is not None:
            wait([self._solver])

    def __enter__(self) -> Rehearsal:
        self._norm = self._begin(_norm, *self._sizes[:2])
        self._begin(_pass, *self._sizes)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _begin(self, work: Callable[..., None], *arguments: Any) -> Future[None] | None:
        return None if self._pool is None else self._pool.submit(self._run, work, *arguments)

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        with torch.cuda.device(self._device), torch.no_grad():  # neither is known to other threads than the first
            work(*arguments, self._device)

    def _compile(self, rule: Rule, choices: Choices, device: torch.device) -> None:
        self.wait_for_triton()
        compile_solver(rule, choices, device)


def _head_width(block: nn.Module) -> int:
    widths = (getattr(module, "head_dim", None) for module in block.modules())
    return next((width for width in widths if isinstance(width, int)), HEAD)


def _norm(dtype: torch.dtype, width: int, device: torch.device) -> None:
    """The first kernel of Triton."""
    waking().join()
    weight_D = torch.ones(width, dtype=dtype, device=device)
    rms_norm(weight_D.unsqueeze(0), weight_D, 1.0, False, True)


def _pass(dtype: torch.dtype, width: int, head: int, device: torch.device) -> None:
    """What torch has kernels for, in the order of a pass: tokens and their places, angles, attention, products, H."""
    ids_T = torch.arange(TOKENS, device=device)
    hidden_TD = F.embedding(ids_T, torch.ones(TOKENS, width, dtype=dtype, device=device))
    (torch.diff(ids_T, prepend=ids_T[:1] - 1) != 1).cumsum(-1).all().logical_not()
    frequencies_H = 1.0 / 1e4 ** (torch.arange(0, head, 2, device=device).float() / head)
    angles_TH = (frequencies_H[None, :, None] @ ids_T[None, None].float()).mT
    angles_TH = torch.cat([angles_TH, angles_TH], -1)
    (angles_TH.cos() * 1.0).to(dtype), (angles_TH.sin() * 1.0).to(dtype)
    heads = torch.ones(1, 1, TOKENS, head, dtype=dtype, device=device)
    F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    F.linear(hidden_TD, torch.ones(width, width, dtype=dtype, device=device)) + hidden_TD
    HessianSum(width, device).add(hidden_TD)


def compile_solver(rule: Rule, choices: Choices, device: torch.device) -> None:
    """Has what the first real layer needs compiled, on a small random one, one kernel a thread: it takes seconds, and
    the device has other work meanwhile.
    """
    if not isinstance(rule, Grid) or choices.method != "gptq" or not fused.usable(torch.empty(0, device=device)):
        return
    pieces = _pieces(rule, choices, device)
    torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(COMPILERS, "compiler") as pool:
        list(pool.map(lambda piece: _run_apart(piece, device), pieces))
    fused.try_again()  # if compiling beside other things has failed, the first layer may yet do it alone


def _pieces(grid: Grid, choices: Choices, device: torch.device) -> list[Callable[[], Any]]:
    """What of a solver is a kernel each, on a small layer."""
    width = grid.group_size or COLUMNS
    columns = -(-COLUMNS // width) * width
    draw = torch.Generator(device).manual_seed(0)
    weight_RC = torch.randn(ROWS, columns, generator=draw, dtype=torch.float32, device=device)
    problem = LayerProblem(weight_RC, torch.eye(columns, dtype=torch.float32, device=device), columns)
    shape, order = (ROWS, columns // width), FACTORED if device.type == "cuda" else COLUMNS
    fitted = (
        torch.ones(shape, dtype=grid.scale_dtype, device=device),
        torch.full(shape, grid.middle, dtype=torch.uint8, device=device),
    )
    codes_RC = torch.full_like(weight_RC, grid.middle, dtype=torch.uint8)
    solution = Solution(codes_RC, *fitted, grid, weight_RC.square().sum(-1))
    return [
        lambda: scales.fit(grid, weight_RC.unflatten(-1, (-1, width)), None, choices.lowest_zero),
        lambda: sweep(problem, grid, choices.order, fitted=fitted),
        lambda: fused.compile_slabs(device, MANY_ROWS, WIDE_SLAB),
        lambda: descend(weight_RC, problem.hessian_CC, solution),
        lambda: refit_scales(weight_RC, problem.hessian_CC, solution),
        lambda: [left(weight_RC.mT), left(weight_RC, torch.float16), left(weight_RC.mT, torch.float16)],
        lambda: root_(torch.eye(order, dtype=torch.float32, device=device)),
    ]


def _run_apart(work: Callable[[], Any], device: torch.device) -> None:
    stream = torch.cuda.Stream(device)
    with torch.no_grad(), torch.cuda.stream(stream):  # neither is known to other threads than the first
        work()
    stream.synchronize()
