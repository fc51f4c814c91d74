"""Whether, and how, a slab of columns, a search for scales or a pass over memory is one kernel; where not, the callers'
own loops, or torch, do it. Slabs are solved by CUDA C++, or where that cannot be compiled by Triton.

Shapes: E layers of one shape, C columns, N columns of a slab, R rows; of searches G groups of a row and N inputs of a
group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from featherweight.core.rules import Grid
from featherweight.core.triton_tried import tried

ROWS, TILE = 16, 32  # of a program, and columns of them that it holds at a time: one warp's registers
WIDEST, TILE_WEIGHTS = 4096, 2048  # inputs of a group that a program can hold, and weights that it does hold
ROOMY = ((8, 0), (9, 0))  # A100s and H100s, whose programs can have 160 KB; those of GPUs for games have 100
TRIANGLE, STRIP = 128, 8  # columns of a block that is inverted in one go, and of a program
APART, TURNED = (32, 64), 64  # rows and columns of a program that takes numbers apart, and that turns them
KINDS = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}  # of scales, as `triton_scales` names them
WITHOUT_CUDA = "slabs of columns are solved by Triton, several times slower"
_failed: list[str] = []  # why, once it has
_cuda_failed: list[str] = []  # likewise of CUDA C++: Triton goes on


def sweep_slab(
    pull_ENR: Tensor,
    root_ECC: Tensor,
    weight_ECR: Tensor,
    scale_EGR: Tensor,
    zero_EGR: Tensor,
    group_EC: Tensor,
    keep_ECR: Tensor | None,
    moved_ENR: Tensor,
    code_ECR: Tensor,
    loss_ER: Tensor,
    at: slice,
    levels: tuple[int, int],
) -> bool:
    """Rounds `sweep`'s columns `at`: writes their codes (uint8) and what they moved by, and adds to the losses.

    False, and nothing written, where the loop has to do it.

    `levels` are the lowest and the highest code; `keep_ECR` is 1 where a weight may differ from zero.
    """
    if not usable(weight_ECR):
        return False
    _, columns, rows = weight_ECR.shape
    sizes = (rows, columns, scale_EGR.shape[1], at.start, at.stop - at.start, *levels)
    read = {"matrix": root_ECC, "scale": scale_EGR, "zero": zero_EGR, "group": group_EC, "keep": keep_ECR}
    written = {"found": moved_ENR, "codes": code_ECR, "total": loss_ER}
    if _cuda("sweep_slab", {"given": pull_ENR, "value": weight_ECR, **read, **written}, sizes):
        return True
    tensors = (pull_ENR, root_ECC, weight_ECR, scale_EGR, zero_EGR, group_EC, keep_ECR, moved_ENR, code_ECR, loss_ER)
    return _launch(lambda kernels: kernels.sweep_slab, tensors, sizes, HAS_KEEP=keep_ECR is not None)


def descend_slab(
    pull_ENR: Tensor,
    hessian_ECC: Tensor,
    value_ECR: Tensor,
    scale_EGR: Tensor,
    zero_EGR: Tensor,
    free_ECR: Tensor | None,
    delta_ECR: Tensor,
    code_ECR: Tensor,
    gain_ER: Tensor,
    at: slice,
    levels: tuple[int, int],
    price_E: Tensor | None = None,
) -> bool:
    """Decides `refine.descend`'s columns `at` again: brings what is left of them, and their codes, up to date, and
    adds to `gain` what the losses fall by. `pull` is used up.

    False, and nothing written, where the loop has to do it.
    """
    if not usable(value_ECR):
        return False
    _, columns, rows = value_ECR.shape
    sizes = (rows, columns, scale_EGR.shape[1], at.start, at.stop - at.start, *levels)
    read = {"matrix": hessian_ECC, "scale": scale_EGR, "zero": zero_EGR, "keep": free_ECR, "value": value_ECR}
    written = {"delta": delta_ECR, "found": pull_ENR, "codes": code_ECR, "total": gain_ER}
    name = "descend_slab" if price_E is None else "descend_slab_priced"
    if _cuda(name, {"given": pull_ENR, "price": price_E, **read, **written}, sizes):
        return True
    tensors = (pull_ENR, hessian_ECC, value_ECR, scale_EGR, zero_EGR, free_ECR, price_E, delta_ECR, code_ECR, gain_ER)
    has = {"HAS_FREE": free_ECR is not None, "HAS_PRICE": price_E is not None}
    return _launch(lambda kernels: kernels.descend_slab, tensors, sizes, **has)


def usable(tensor: Tensor) -> bool:
    """On a GPU, float32 or codes, until it has failed once."""
    return tensor.is_cuda and tensor.dtype in (torch.float32, torch.uint8) and not _failed


def roomy(device: torch.device) -> bool:
    """Whether it is a GPU that is known to have much memory for a program."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ROOMY


def launched(launch: Callable[[], None]) -> bool:
    """Whether a kernel of Triton ran; where it could not, that is told once, and no other is tried."""
    return tried(launch, _failed, "columns are solved on the CPU, many times slower")


def try_again() -> None:
    """Forgets that a kernel has failed."""
    _failed.clear()
    _cuda_failed.clear()


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the most a scale of this dtype is allowed to be."""
    info = torch.finfo(dtype)
    return max(info.tiny, torch.finfo(torch.float32).tiny), info.max


def search(
    grid: Grid,
    weight_RGN: Tensor,
    importance: Tensor,
    ladder: Sequence[float],
    fine: Sequence[float],
    lowest_zero: int,
) -> tuple[Tensor, Tensor] | None:
    """`scales`' search by least weighted error: scales and zeros, R x G; None where torch has to do it.

    `importance` broadcasts over R: 1 x G x N, or E x 1 x G x N for layers.
    """
    width = weight_RGN.shape[-1]
    if not usable(weight_RGN) or width > WIDEST or grid.scale_dtype not in KINDS:
        return None
    weight_RGN = weight_RGN.contiguous()
    scale_RG = weight_RGN.new_empty(weight_RGN.shape[:-1])
    zero_RG = torch.full_like(scale_RG, grid.middle, dtype=torch.uint8)
    steps = torch.tensor([*ladder, *fine], device=weight_RGN.device)
    price = importance.expand(*weight_RGN.shape[:-3], 1, *weight_RGN.shape[-2:]).contiguous()
    tile = max(16, 1 << (width - 1).bit_length())
    layout = (scale_RG.numel(), scale_RG.shape[-2] * scale_RG.shape[-1], scale_RG.shape[-1], width, len(ladder))
    programs = (-(-scale_RG.numel() // (groups := max(1, TILE_WEIGHTS // tile))),)
    constants = {"FINE": len(fine), "KIND": KINDS[grid.scale_dtype], "TILE": tile, "GROUPS": groups}

    def launch() -> None:
        from featherweight.core import triton_scales as kernels

        least, most = bounds(grid.scale_dtype)
        if grid.symmetric:
            low, high = float(grid.bottom - grid.middle), float(grid.top - grid.middle)
            levels = 1.0 if grid.ternary else float(grid.middle)
            mirror = grid.mirror and not grid.ternary
            kernels.symmetric_search[programs](
                weight_RGN, price, steps, scale_RG, *layout, low, high, levels, least, most, MIRROR=mirror, **constants
            )
        else:
            kernels.asymmetric_search[programs](
                *(weight_RGN, price, steps, scale_RG, zero_RG, *layout),
                *(float(grid.top), float(lowest_zero), least, most),
                **constants,
            )

    return (scale_RG.to(grid.scale_dtype), zero_RG) if launched(launch) else None


def halves(matrix: Tensor, planes: Literal["left", "right", "apart"], dtype: torch.dtype) -> Tensor | None:
    """A matrix (with or without a leading axis) as first, what a dtype of 16 bits makes of it, and second, what that
    makes of the rest: "left" [first first second] side by side, "right" [first; second; first] one below the other,
    "apart" [first, second] along a new first axis. None where torch has to do it.
    """
    if not usable(matrix):
        return None
    stacked = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)
    layers, rows, columns = stacked.shape
    if planes == "apart":
        found = matrix.new_empty((2, *matrix.shape), dtype=dtype)
        steps = (rows * columns, columns, 0, layers * rows * columns)
    elif planes == "left":
        found = matrix.new_empty((*matrix.shape[:-1], 3 * columns), dtype=dtype)
        steps = (3 * rows * columns, 3 * columns, columns, 2 * columns)
    else:
        found = matrix.new_empty((*matrix.shape[:-2], 3 * rows, columns), dtype=dtype)
        steps = (3 * rows * columns, columns, 2 * rows * columns, rows * columns)

    return found if _take_apart(stacked, found, steps) else None


def halve_rows(matrix_EAB: Tensor, halves_EAB: Tensor, start: int) -> bool:
    """Puts rows of a matrix, from `start` on, into what `halves` ("right") made of all of it; False, and nothing done,
    where torch has to do it.
    """
    if not usable(matrix_EAB):
        return False
    assert halves_EAB.is_contiguous()
    rows, columns = halves_EAB.shape[1] // 3, halves_EAB.shape[2]
    steps = (3 * rows * columns, columns, 2 * rows * columns, rows * columns)
    return _take_apart(matrix_EAB, halves_EAB[:, start:], steps)


def _take_apart(given: Tensor, found: Tensor, steps: tuple[int, int, int, int]) -> bool:
    """`steps`: of `found`, from a layer and a row to the next, and where the first half is again and the second is."""
    layers, rows, columns = given.shape

    def launch() -> None:
        from featherweight.core import triton_passes as kernels

        programs = (-(-rows // APART[0]), -(-columns // APART[1]), layers)
        kernels.take_apart[programs](given, found, rows, columns, *given.stride(), *steps, ROWS=APART[0], SPAN=APART[1])

    return launched(launch)


def invert_diagonal(lower_ECC: Tensor, inverse_ECC: Tensor) -> bool:
    """Writes the inverses of a lower triangular matrix's blocks of TRIANGLE columns on the diagonal into zeros.

    False, and nothing written, where torch has to do it.
    """
    if not usable(lower_ECC):
        return False
    assert inverse_ECC.is_contiguous()
    layers, columns = lower_ECC.shape[:2]

    def launch() -> None:
        from featherweight.core import triton_passes as kernels

        programs = (TRIANGLE // STRIP, -(-columns // TRIANGLE), layers)
        kernels.invert_diagonal[programs](
            lower_ECC, inverse_ECC, columns, *lower_ECC.stride(), SPAN=TRIANGLE, STRIP=STRIP, num_warps=1
        )

    return launched(launch)


def turn(given: Tensor, place_EC: Tensor, back: bool = False) -> Tensor | None:
    """E x R x C as E x C x R with column c at place[c], or `back`; None where torch has to do it."""
    if not usable(given):
        return None
    given = given.contiguous()
    rows, columns = given.shape[:0:-1] if back else given.shape[1:]
    found = given.new_empty((len(given), *given.shape[:0:-1]))
    pair = (found, given) if back else (given, found)

    def launch() -> None:
        from featherweight.core import triton_passes as kernels

        programs = (-(-columns // TURNED), -(-rows // TURNED), len(given))
        kernels.turn[programs](*pair, place_EC.contiguous(), rows, columns, BACK=back, SPAN=TURNED)

    return found if launched(launch) else None


def _cuda(name: str, tensors: dict[str, Tensor | None], sizes: tuple[int, ...]) -> bool:
    """Runs a kernel of `csrc/slabs.cu`; False where Triton has to do it: with one warning where CUDA C++ cannot be
    compiled or launched, with none where a slab is wider than a multiprocessor's memory is large."""
    given = tensors["given"]
    assert given is not None
    chosen = None

    def launch() -> None:
        nonlocal chosen
        from featherweight.core import cuda_slabs

        chosen = cuda_slabs.plan(len(given), sizes[0], sizes[4], *cuda_slabs.limits(given.device))
        if chosen is not None:
            cuda_slabs.launch(name, tensors, sizes, chosen)

    if not given.is_cuda or _cuda_failed:
        return False
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    return tried(launch, _cuda_failed, WITHOUT_CUDA, "CUDA C++") and chosen is not None


def compile_slabs(device: torch.device, rows: int, columns: int) -> None:
    """Has `csrc/slabs.cu` compiled for slabs of so many rows and columns, if the GPU can run it."""

    def compile() -> None:
        from featherweight.core import cuda_slabs

        chosen = cuda_slabs.plan(1, rows, columns, *cuda_slabs.limits(device))
        if chosen is not None:
            cuda_slabs.module_of(device, chosen.rows, chosen.warps)

    if device.type == "cuda" and not _cuda_failed:
        tried(compile, _cuda_failed, WITHOUT_CUDA, "CUDA C++")


def _launch(
    pick: Callable[[Any], Any], tensors: Sequence[Tensor | None], sizes: tuple[int, ...], **constants: bool
) -> bool:
    """Runs a kernel over all rows and layers; False, with one warning, where Triton cannot.

    `sizes` begins with the rows; a tensor that is None is not read.
    """
    first = tensors[0]
    assert first is not None and all(tensor is None or tensor.is_contiguous() for tensor in tensors)

    def launch() -> None:
        from featherweight.core import triton_slabs

        kernel = pick(triton_slabs)[(-(-sizes[0] // ROWS), first.shape[0])]
        arguments = (first if tensor is None else tensor for tensor in tensors)
        kernel(*arguments, *sizes, TILE=TILE, ROWS=ROWS, num_warps=1, **constants)

    return launched(launch)
