"""What lies between the products of one token: residuals and norms, gates, attention, each in one launch.

On a GPU they are Triton's (`triton_decode`), elsewhere plain torch computes the same: what the kernels are tested
against. Nothing here knows a model family; `models.pieces` finds these pieces in one.

Shapes: T tokens, D width of the model, I inner width, H heads, W width of a head, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
GATE_TILE = 1024
SPLITS = 32  # of the keys, at most
KEYS, ATTEND_WARPS = 128, 8  # of a tile
LIKELIEST_TILE = 1024
JOIN_COLUMNS = 256  # of a warp
PDL_FROM = 9  # compute capability


@dataclass(frozen=True)
class Norm:
    """y = x / sqrt(mean(x^2) + eps) * gain_D, gain in float32 (Zhang and Sennrich 2019, RMSNorm)."""

    gain_D: Tensor
    eps: float

    def __call__(self, x_TD: Tensor) -> Tensor:
        wide = x_TD.float()
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale * self.gain_D).to(x_TD.dtype)


@dataclass(frozen=True)
class Heads:
    """How one layer attends.

    Attributes:
        queries, keys: heads of either; width of each.
        scale: of a score; window: tokens that are seen.
        q_norm, k_norm: of every head before it is turned, or None.
    """

    queries: int
    keys: int
    width: int
    scale: float
    window: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class Memory:
    """Keys and values of a layer (1 x H x L x W), what turns them (L x rotary width), and how many tokens are there."""

    keys: Tensor
    values: Tensor
    cos_LW: Tensor
    sin_LW: Tensor
    position: Tensor  # int64, one element


def join(x_TD: Tensor, delta_TD: Tensor | None, post: Norm | None, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """x + post(delta) and the norm of that sum; without `norm` the sum twice, without `delta` nothing is added."""
    if x_TD.is_cuda:
        return join_by_triton(x_TD, delta_TD, post, norm)
    sum_TD = x_TD
    if delta_TD is not None:
        sum_TD = x_TD + (delta_TD if post is None else post(delta_TD))
    return sum_TD, sum_TD if norm is None else norm(sum_TD)


def gate(y_TJ: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, for gate and up side by side (T x 2I): T x I."""
    if y_TJ.is_cuda:
        return gate_by_triton(y_TJ, activation)
    gate_TI, up_TI = y_TJ.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate_TI) * up_TI


def attend(qkv_J: Tensor, heads: Heads, memory: Memory) -> Tensor:
    """One token's attention, H W values: its key and value (heads of queries, keys and values one after another in
    `qkv_J`, not yet turned) are put into the memory at its position, and all it sees is looked at. The position stays.
    """
    if qkv_J.is_cuda:
        return attend_by_triton(qkv_J, heads, memory)
    at = int(memory.position)
    q_HW, k_HW, v_HW = qkv_J.view(-1, heads.width).split((heads.queries, heads.keys, heads.keys))
    cos_W, sin_W = memory.cos_LW[at], memory.sin_LW[at]
    memory.keys[0, :, at] = _turned(k_HW if heads.k_norm is None else heads.k_norm(k_HW), cos_W, sin_W)
    memory.values[0, :, at] = v_HW
    seen = slice(max(0, at + 1 - heads.window), at + 1)
    q_HW = _turned(q_HW if heads.q_norm is None else heads.q_norm(q_HW), cos_W, sin_W)
    grouped = q_HW.view(heads.keys, -1, heads.width).float()
    scores = grouped @ memory.keys[0, :, seen].float().transpose(1, 2) * heads.scale
    return (scores.softmax(-1) @ memory.values[0, :, seen].float()).to(qkv_J.dtype).flatten()


def likeliest(logits_V: Tensor, token: Tensor) -> None:
    """Put the likeliest token's number, the first of equals, into `token` (int64, one element)."""
    if logits_V.is_cuda:
        likeliest_by_triton(logits_V, token)
    else:
        token.copy_(logits_V.argmax())


def _turned(x_HW: Tensor, cos_W: Tensor, sin_W: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of the first columns of each head, halves of them paired."""
    rotary = len(cos_W)
    turn, rest = x_HW[:, :rotary], x_HW[:, rotary:]
    low, high = turn.chunk(2, dim=-1)
    return torch.cat((turn * cos_W + torch.cat((-high, low), -1) * sin_W, rest), -1)


def join_by_triton(
    x_TD: Tensor, delta_TD: Tensor | None, post: Norm | None, norm: Norm | None
) -> tuple[Tensor, Tensor]:
    """`join` as one launch."""
    from featherweight.kernels import triton_decode

    x_TD = x_TD.contiguous()
    tokens, width = x_TD.shape
    sum_TD = x_TD if delta_TD is None else torch.empty_like(x_TD)
    out_TD = sum_TD if norm is None else torch.empty_like(x_TD)
    if delta_TD is None and norm is None:
        return x_TD, x_TD
    tile = _power_of_two(width)
    triton_decode.join[(tokens,)](
        *(x_TD, x_TD if delta_TD is None else delta_TD.contiguous(), x_TD if post is None else post.gain_D),
        *(x_TD if norm is None else norm.gain_D, sum_TD, out_TD),
        *(0.0 if post is None else post.eps, 0.0 if norm is None else norm.eps),
        WIDTH=width,
        TILE=tile,
        HAS_DELTA=delta_TD is not None,
        HAS_POST=post is not None and delta_TD is not None,
        HAS_GAIN=norm is not None,
        num_warps=max(1, min(16, tile // JOIN_COLUMNS)),
        **_early(x_TD.device),
    )
    return sum_TD, out_TD


def gate_by_triton(y_TJ: Tensor, activation: str) -> Tensor:
    """`gate` as one launch."""
    from featherweight.kernels import triton_decode

    tokens, width = y_TJ.shape[0], y_TJ.shape[1] // 2
    out_TI = y_TJ.new_empty(tokens, width)
    triton_decode.gate[(tokens, -(-width // GATE_TILE))](
        y_TJ.contiguous(), out_TI, ACTIVATION=activation, WIDTH=width, TILE=GATE_TILE, **_early(y_TJ.device)
    )
    return out_TI


def attend_by_triton(qkv_J: Tensor, heads: Heads, memory: Memory) -> Tensor:
    """`attend` as one launch."""
    from featherweight.kernels import triton_decode

    group, capacity, pad = heads.queries // heads.keys, memory.keys.shape[2], max(16, _power_of_two(heads.width))
    splits = min(SPLITS, _power_of_two(-(-capacity // KEYS)))
    part, most, count = _scratch(qkv_J.device, heads.keys, group, pad, splits)
    out_J = qkv_J.new_empty(heads.queries * heads.width)
    q_norm, k_norm = heads.q_norm, heads.k_norm
    triton_decode.attend[(heads.keys, splits)](
        *(qkv_J.contiguous(), memory.cos_LW, memory.sin_LW),
        *(qkv_J if q_norm is None else q_norm.gain_D, qkv_J if k_norm is None else k_norm.gain_D),
        *(memory.keys, memory.values, memory.position, part, most, count, out_J, heads.scale),
        *(0.0 if q_norm is None else q_norm.eps, 0.0 if k_norm is None else k_norm.eps, capacity),
        min(heads.window, capacity),
        HEADS=heads.keys,
        GROUP=group,
        ROWS=max(16, _power_of_two(group)),
        DIM=heads.width,
        PAD=pad,
        WIDE=_power_of_two(group) * pad,
        ROTARY=memory.cos_LW.shape[1],
        BLOCK=KEYS,
        SPLITS=splits,
        NORM=q_norm is not None,
        num_warps=ATTEND_WARPS,
        **_early(qkv_J.device),
    )
    return out_J


def likeliest_by_triton(logits_V: Tensor, token: Tensor) -> None:
    """`likeliest` as one launch."""
    from featherweight.kernels import triton_decode

    parts = -(-len(logits_V) // LIKELIEST_TILE)
    triton_decode.likeliest[(parts,)](
        *(logits_V, *_likeliest_scratch(logits_V.device, parts), token),
        VOCAB=len(logits_V),
        TILE=LIKELIEST_TILE,
        PARTS=parts,
        PADDED=_power_of_two(parts),
        **_early(logits_V.device),
    )


@cache
def _likeliest_scratch(device: torch.device, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest of each part, where it is, and how many have ended."""
    at = torch.empty(parts, dtype=torch.int32, device=device)
    return torch.empty(parts, device=device), at, torch.zeros(1, dtype=torch.int32, device=device)


@cache
def _scratch(device: torch.device, keys: int, group: int, pad: int, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Parts, their greatest scores and sums, and how many have ended: one after another all launches use the same."""
    parts = keys * splits * group
    part, most = torch.empty(parts * pad, device=device), torch.empty(2 * parts, device=device)
    return part, most, torch.zeros(keys, dtype=torch.int32, device=device)


@cache
def _early(device: torch.device) -> dict[str, Any]:
    """What a launch is told: whether it may start before the kernel in front has ended."""
    early = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= PDL_FROM
    return {"PDL": True, "launch_pdl": True} if early else {"PDL": False}


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
