"""What transformers' blocks do between their products, with fewer passes over memory.

Families write norms, rotary positions and gated units in eager torch, up to eight kernels each, which together take as
long as half the products. A piece is recognised by what it computes: it is run on small random tensors on the CPU, and
where it does what a formula here says, to the bit, a Triton kernel takes its place, or a loop in C on a CPU
(`compiled`). Other pieces, other dtypes and passes that need gradients stay as they are.

Shapes: N rows, D width, I inner width; S sequences, T tokens, H heads.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.triton_tried import tried
from featherweight.models.experts import Expert, Experts
from featherweight.models.pieces import epsilon_of
from featherweight.stream import compiled
from featherweight.stream.grouped import Grouped

KINDS = (torch.float16, torch.bfloat16)
WIDEST, NORM_TILE, GATE_TILE = 1 << 14, 4096, 2048  # of a norm's row; elements of a program
ROTATION = "apply_rotary_pos_emb"  # what transformers' families call theirs
LEAVES = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_failed: list[str] = []  # why, once one has
_found: dict[Any, Any] = {}  # what the modules and functions of this process were recognised as


def fuse(block: nn.Module) -> None:
    """Gives a block's norms and gated units their kernels, where it has any we know; a copy of the block keeps them."""
    for module in block.modules():
        if isinstance(module, Experts) and _is_gate(module):
            for expert in module.children():
                if isinstance(expert, Expert):
                    expert.gated = gated
            module.together = Grouped(module, gated)
        elif (norm := _norm_of(module)) is not None:
            module.__dict__["forward"] = MethodType(partial(_norm_forward, norm=norm), module)
        elif set(module._modules) == LEAVES and _gates(module):
            module.__dict__["forward"] = MethodType(_gated_forward, module)


@contextmanager
def rotations(model: nn.Module) -> Iterator[None]:
    """While this lasts, the families of a model's modules turn queries and keys by one kernel each."""
    before: dict[ModuleType, Callable[..., Any]] = {}
    for home in {sys.modules[type(module).__module__] for module in model.modules()}:
        own = vars(home).get(ROTATION)
        if own is not None and _rotates(own):
            before[home] = own
    try:
        for home, own in before.items():
            setattr(home, ROTATION, partial(_rotated_pair, own))
        yield
    finally:
        for home, own in before.items():
            setattr(home, ROTATION, own)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, plus_one: bool, early: bool) -> Tensor | None:
    """x / sqrt(mean x^2 + eps), times weight or 1 + weight; None where neither Triton nor C can."""
    if compiled.usable(x, weight_D):
        return compiled.rms_norm(x, weight_D, eps, plus_one, early)
    width = x.shape[-1]
    if width > WIDEST or not usable(x, weight_D):
        return None
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = 1 << (width - 1).bit_length()
    rows, each = x.numel() // width, max(1, NORM_TILE // tile)

    def launch() -> None:
        from featherweight.stream import triton_pieces

        constants = {"PLUS_ONE": plus_one, "EARLY": early, "TILE": tile, "ROWS": each}
        triton_pieces.rms_norm[(-(-rows // each),)](x.contiguous(), weight_D, found, rows, width, eps, **constants)

    return found if _tried(launch) else None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape; rows (the last axis) may lie apart."""
    if gate.stride(-1) == up.stride(-1) == 1 and compiled.usable(gate, up):
        return compiled.gated(gate, up)
    if not (usable(gate, up) and gate.stride(-1) == up.stride(-1) == 1):
        return F.silu(gate) * up
    gate_NI, up_NI = gate.flatten(0, -2), up.flatten(0, -2)
    found = torch.empty_like(gate, memory_format=torch.contiguous_format)

    def launch() -> None:
        from featherweight.stream import triton_pieces

        rows, width = gate_NI.shape
        programs = (rows, -(-width // GATE_TILE))
        triton_pieces.gate[programs](gate_NI, up_NI, found, width, gate_NI.stride(0), up_NI.stride(0), TILE=GATE_TILE)

    return found if _tried(launch) else F.silu(gate) * up


def rotated(x_SHTD: Tensor, cos_STD: Tensor, sin_STD: Tensor) -> Tensor | None:
    """x cos + (-x2, x1) sin, with x1 and x2 the halves of the last axis; None where neither Triton nor C can."""
    sequences, heads, tokens, width = x_SHTD.shape
    alike = cos_STD.shape == sin_STD.shape and cos_STD.shape[1:] == (tokens, width) and not width % 2
    tensors, in_c = (x_SHTD, cos_STD, sin_STD), compiled.usable(x_SHTD, cos_STD, sin_STD)
    if not (alike and len(cos_STD) in (1, sequences) and (in_c or usable(*tensors))):
        return None
    found = torch.empty_like(x_SHTD)
    if found.stride() != x_SHTD.stride() or x_SHTD.stride(-1) != 1:
        return None
    if in_c:
        return compiled.rotated(*tensors, found)

    def launch() -> None:
        from featherweight.stream import triton_pieces

        strides = (x_SHTD.stride(0), x_SHTD.stride(2), x_SHTD.stride(1), 0 if len(cos_STD) == 1 else tokens * width)
        pairs, tile = 1 << (width // 2 - 1).bit_length(), 1 << (heads - 1).bit_length()
        angles = (cos_STD.contiguous(), sin_STD.contiguous())
        # products and sums are not joined: each rounds by itself, as torch's do
        constants = {"HALF": width // 2, "PAIRS": pairs, "HEADS": tile, "enable_fp_fusion": False}
        triton_pieces.rotate[(sequences * tokens,)](x_SHTD, found, *angles, tokens, heads, *strides, **constants)

    return found if _tried(launch) else None


def usable(*tensors: Tensor) -> bool:
    """Whether a kernel may do it: one half-precision dtype on a GPU, and no gradients, until one has failed."""
    return all(tensor.is_cuda for tensor in tensors) and not _failed and _plain(tensors)


def _plain(tensors: tuple[Tensor, ...]) -> bool:
    first = tensors[0]
    alike = all(tensor.dtype == first.dtype for tensor in tensors)
    return alike and first.dtype in KINDS and first.numel() > 0 and not torch.is_grad_enabled()


def _tried(launch: Callable[[], None]) -> bool:
    return tried(launch, _failed, "norms, rotations and gates are left to torch, in more passes over memory")


def _norm_forward(self: nn.Module, x: Tensor, norm: tuple[float, bool, bool]) -> Tensor:
    weight = self._parameters["weight"]
    assert weight is not None
    found = rms_norm(x, weight, *norm)
    return type(self).forward(self, x) if found is None else found


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        answer: Tensor = type(self).forward(self, x)
        return answer
    output: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
    return output


def _rotated_pair(
    own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if not args and not kwargs and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3:
        turned = rotated(q, cos, sin), rotated(k, cos, sin)
        if turned[0] is not None and turned[1] is not None:
            return turned
    return own(q, k, cos, sin, *args, **kwargs)


def _norm_of(module: nn.Module) -> tuple[float, bool, bool] | None:
    """Which norm a module is: its epsilon, whether it is 1 + weight, and rounded before that too; None for others."""
    eps = epsilon_of(module)
    if eps is None or set(module._parameters) != {"weight"} or module._buffers or module._modules:
        return None

    def find() -> tuple[float, bool, bool] | None:
        probe, x_ND, weight_D = _copied(module), 1e-3 * _random(5, 48), _random(48)
        probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight_D, requires_grad=False)}
        says_ND = probe(x_ND)
        normed_ND = x_ND.float() * torch.rsqrt(x_ND.float().pow(2).mean(-1, keepdim=True) + eps)
        formulas = {
            (False, True): weight_D * normed_ND.to(x_ND.dtype),
            (False, False): (weight_D.float() * normed_ND).to(x_ND.dtype),
            (True, False): ((1.0 + weight_D.float()) * normed_ND).to(x_ND.dtype),
        }
        return next(((eps, *kind) for kind, formula in formulas.items() if _equal(formula, says_ND)), None)

    found: tuple[float, bool, bool] | None = _known((type(module), eps), find)
    return found


def _gates(module: nn.Module) -> bool:
    """Whether a module is down(silu(gate x) * up x)."""

    def find() -> bool:
        probe, x_ND = _copied(module), _random(5, 16)
        shapes = {"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}
        layers = {name: nn.Linear(*shape, dtype=x_ND.dtype) for name, shape in shapes.items()}
        for layer in layers.values():
            layer.weight.copy_(_random(*layer.weight.shape))
        probe.__dict__["_modules"] = {**module._modules, **layers}
        inner_NI = F.silu(layers["gate_proj"](x_ND)) * layers["up_proj"](x_ND)
        return _equal(layers["down_proj"](inner_NI), probe(x_ND))

    return bool(_known((type(module), type(module.act_fn)), find))


def _is_gate(experts: Experts) -> bool:
    """Whether experts are down(silu(gate x) * up x)."""
    first = experts.expert(0)
    if not (isinstance(first, Expert) and experts.layout.gated):
        return False
    gate_NI, up_NI = _random(5, 24), _random(5, 24)
    both = (gate_NI, up_NI)
    joined = torch.stack(both, -1).flatten(-2) if experts.layout.interleaved else torch.cat(both, -1)
    with torch.no_grad():
        return _equal(F.silu(gate_NI) * up_NI, first.activate(joined))


def _rotates(own: Callable[..., Any]) -> bool:
    """Whether a function is x cos + (-x2, x1) sin of both its first arguments, S x H x T x D."""

    def find() -> bool:
        both, angles = (_random(2, 3, 5, 8), _random(2, 1, 5, 8)), (_random(1, 5, 8), _random(1, 5, 8))
        cos, sin = (angle.unsqueeze(1) for angle in angles)
        says = own(*both, *angles)
        turned = [x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in both]
        return len(says) == 2 and all(_equal(*pair) for pair in zip(turned, says, strict=True))

    return bool(_known(own, find))


def _known(key: Any, find: Callable[[], Any]) -> Any:
    """What is found once for each key; None where a stranger's code fails on what it is tried with."""
    if key not in _found:
        try:
            with torch.no_grad():
                _found[key] = find()
        except Exception:  # it asks for something else than these tensors, so it is none of what is known here
            _found[key] = None
    return _found[key]


def _copied(module: nn.Module) -> nn.Module:
    """The same module, ready to be given other weights."""
    probe = copy.copy(module)
    probe.__dict__.pop("forward", None)
    return probe


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(torch.bfloat16)


def _equal(ours: Tensor, theirs: Any) -> bool:
    return isinstance(theirs, Tensor) and theirs.dtype == ours.dtype and torch.equal(ours, theirs)
