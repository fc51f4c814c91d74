"""Mixtures of experts taken apart: what transformers keeps in 3-D parameters becomes one Linear a matrix.

Everything that walks Linears (the tree, hooks, compressed layers) then sees experts like any other matrix. How a family
acts and gates is its own code still: the module's `_apply_gate`, as transformers' experts interface defines it.

Shapes: E experts, T tokens, K experts a token goes to, D width, I inner width, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Activate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """How a module keeps the matrices of its experts.

    Attributes:
        gated: `gate_up_proj` holds gate and up, else `up_proj` holds up alone; `down_proj` is always there.
        transposed: E x inputs x outputs, else E x outputs x inputs.
        interleaved: gate and up take turns, row by row; else up comes after gate.
        bias: every parameter has one beside it, NAME_bias, E x outputs.
        by_rows: the module is called with E x T inputs, zero where a token does not go, and no routing.
        one_hot: it is called with T x 1 x E ones and zeros where others are with numbers of experts.
        files: of a module that holds an expert a module: what file and module call the matrices that are here
            `up_proj` and `down_proj`; the experts are called expert_0, expert_1, ...
    """

    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    by_rows: bool = False
    one_hot: bool = False
    files: tuple[str, str] | None = None

    @property
    def up(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    def leaves(self, parameter: str) -> tuple[str, ...]:
        """The matrices in a parameter, in the order they lie in it."""
        return ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)

    def rows(self, number: int, rows: int, leaves: tuple[str, ...]) -> tuple[int, int | None, int]:
        """Start, stop and step of one matrix's `rows` outputs among those of all `leaves` of a parameter."""
        if self.interleaved:
            return number, None, len(leaves)
        return number * rows, (number + 1) * rows, 1

    def parameters(self) -> set[str]:
        """Names of all parameters such a module has."""
        weights = {self.up, "down_proj"}
        return weights | {f"{name}_bias" for name in weights} if self.bias else weights


# Modules that transformers' experts interface does not describe, by class.
UNDESCRIBED = {"Llama4TextExperts": Layout(transposed=True, by_rows=True)}
APART = {"SwitchTransformersExperts": Layout(gated=False, one_hot=True, files=("wi", "wo"))}


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module with fused experts; None for others, and for one that holds more."""
    found = UNDESCRIBED.get(type(module).__name__)
    if found is None and {"has_gate", "is_transposed", "is_concatenated", "has_bias"} <= vars(module).keys():
        says = vars(module)
        found = Layout(says["has_gate"], says["is_transposed"], not says["is_concatenated"], says["has_bias"])
    held = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return found if found is not None and held == found.parameters() else None


class Expert(nn.Module):
    """y = down(act(up x)), or down(act(gate x, up x))."""

    def __init__(self, layout: Layout, width: int, inner: int, dtype: torch.dtype, activate: Activate) -> None:
        super().__init__()
        if layout.gated:
            self.gate_proj = nn.Linear(width, inner, layout.bias, "meta", dtype)
        self.up_proj = nn.Linear(width, inner, layout.bias, "meta", dtype)
        self.down_proj = nn.Linear(inner, width, layout.bias, "meta", dtype)
        self.layout, self.activate = layout, activate
        self.gated: Callable[[Tensor, Tensor], Tensor] | None = None  # the same of gate and up apart, where known

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.inner(x))
        return output

    def inner(self, x: Tensor) -> Tensor:
        """What `down_proj` is given."""
        if not self.layout.gated:
            return self.activate(self.up_proj(x))
        both = (self.gate_proj(x), self.up_proj(x))
        if self.gated is not None:
            return self.gated(*both)
        joined = torch.stack(both, -1).flatten(-2) if self.layout.interleaved else torch.cat(both, -1)
        return self.activate(joined)


@dataclass(frozen=True)
class Routed:
    """A batch on its way through the experts.

    Attributes:
        inputs_TD: what the experts see.
        expert_TK: int64, where each token goes; E or more is nowhere.
        share_TK: what the outputs are multiplied by; None where they are taken as they are.
        scale_TK: what the inputs are multiplied by; None for 1.
    """

    inputs_TD: Tensor
    expert_TK: Tensor
    share_TK: Tensor | None = None
    scale_TK: Tensor | None = None

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that go to an expert, and which of their K choices it is."""
        return torch.where(self.expert_TK == expert)  # type: ignore[return-value]

    def dealt(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """`of` each of the experts 0 .. count - 1, at the price of one sort and one word from the device."""
        flat_N = self.expert_TK.flatten()
        order_N = flat_N.argsort(stable=True)
        sizes = flat_N.clamp(max=count).bincount(minlength=count + 1)[:count].tolist()
        token_N = order_N // self.expert_TK.shape[-1]
        parts = (each[: sum(sizes)].split(sizes) for each in (token_N, order_N % self.expert_TK.shape[-1]))
        return list(zip(*parts, strict=True))

    def inputs(self, token_N: Tensor, choice_N: Tensor) -> Tensor:
        """What the expert is given for these tokens, N x D."""
        inputs_ND = self.inputs_TD[token_N]
        return inputs_ND if self.scale_TK is None else inputs_ND * self.scale_TK[token_N, choice_N].unsqueeze(-1)


class Experts(nn.Module):
    """Experts "0", "1", ..., called as the module in whose place they are."""

    def __init__(self, experts: Sequence[nn.Module], layout: Layout) -> None:
        super().__init__()
        self.layout, self.count = layout, len(experts)
        self.together: Callable[[Routed], Tensor | None] | None = None  # all at once, where something can
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def __len__(self) -> int:
        return self.count

    def expert(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))

    def routed(self, hidden: Tensor, expert_TK: Tensor | None = None, share_TK: Tensor | None = None) -> Routed:
        """What the module was called with, whichever way its family calls it."""
        if self.layout.by_rows:
            return _by_rows(hidden.view(len(self), -1, hidden.shape[-1]))
        assert expert_TK is not None
        if self.layout.one_hot:  # a row of zeros: the expert it would go to is full
            expert_TK = torch.where(expert_TK.any(-1), expert_TK.argmax(-1), len(self))
        return Routed(hidden, expert_TK, share_TK)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, *routing = (*args, *kwargs.values())
        routed = self.routed(hidden, *routing)
        if self.together is not None and (at_once_TD := self.together(routed)) is not None:
            return at_once_TD
        outputs = torch.zeros_like(hidden)
        for index, (token_N, choice_N) in enumerate(routed.dealt(len(self))):
            if not len(token_N):
                continue
            output_ND = self.expert(index)(routed.inputs(token_N, choice_N))
            if routed.share_TK is not None:
                output_ND = output_ND * routed.share_TK[token_N, choice_N].unsqueeze(-1)
            row_N = token_N + index * len(routed.inputs_TD) if self.layout.by_rows else token_N
            outputs[row_N] += output_ND.to(outputs.dtype)  # each row once: `index_add_` would add word by word on a GPU
        return outputs


def _by_rows(rows_ETD: Tensor) -> Routed:
    """Inputs that were multiplied by the router's scores, zero for most, as tokens and where they go."""
    goes_TE = rows_ETD.any(-1).T
    experts, choices = len(rows_ETD), max(int(goes_TE.sum(-1).max()), 1)
    expert_TK = goes_TE.to(torch.int8).topk(choices, -1, sorted=True).indices
    expert_TK = torch.where(goes_TE.gather(-1, expert_TK), expert_TK, experts)
    inputs_TD = rows_ETD.sum(0)
    if choices == 1:
        return Routed(inputs_TD, expert_TK)
    # all rows of a token are multiples of one another, and so of their sum
    norm_TE = (rows_ETD * inputs_TD).sum(-1).T / inputs_TD.square().sum(-1, keepdim=True)
    return Routed(inputs_TD, expert_TK, scale_TK=norm_TE.gather(-1, expert_TK.clamp(max=experts - 1)))


def take_apart(model: nn.Module) -> None:
    """Puts `Experts` in the place of every module of a model (on meta) that holds experts in a way we know."""
    for path, module in list(model.named_modules()):
        if (layout := APART.get(type(module).__name__)) is not None:
            model.set_submodule(path, _from_apart(module, layout))
        elif (layout := layout_of(module)) is not None:
            model.set_submodule(path, _from_fused(module, layout))


def _from_fused(module: nn.Module, layout: Layout) -> Experts:
    down = module.get_parameter("down_proj")
    width, inner = down.shape[-2:] if not layout.transposed else (down.shape[-1], down.shape[-2])
    for name in list(module._parameters):
        module._parameters[name] = None  # the experts call the module's functions, and hold its weights from now on
    activate = _activation(module, layout)
    return Experts([Expert(layout, width, inner, down.dtype, activate) for _ in range(len(down))], layout)


def _from_apart(module: nn.Module, layout: Layout) -> Experts:
    assert layout.files is not None
    first: Any = module.get_submodule("expert_0")
    up = first.get_submodule(layout.files[0])
    inner, width = up.weight.shape
    count = sum(1 for _ in module.children())
    return Experts([Expert(layout, width, inner, up.weight.dtype, first.act) for _ in range(count)], layout)


def _activation(module: Any, layout: Layout) -> Activate:
    """What the family does between up and down: its own function, or the usual one where it has none."""
    if not layout.gated:
        act: Activate = module.act_fn
        return act
    own: Activate | None = getattr(module, "_apply_gate", None)

    def activate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        activated: Tensor = module.act_fn(gate) * up
        return activated

    return own or activate


def find_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Every `Experts` of a model with its path."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            yield path, module


def router_paths(model: nn.Module) -> set[str]:
    """Paths of the modules that decide where tokens go and how much of it counts; they stay as they are.

    They are found beside the experts: modules whose matrices all have one output, or one for each expert.
    """
    found = set()
    for path, experts in find_experts(model):
        parent = path.rpartition(".")[0]
        for name, child in model.get_submodule(parent).named_children():
            inside = {inner: weight.shape[0] for inner, weight in child.named_parameters() if weight.dim() == 2}
            if child is not experts and set(inside.values()) <= {1, len(experts)}:
                found |= {f"{parent}.{name}.{inner}".rpartition(".")[0] for inner in inside}
    return found
