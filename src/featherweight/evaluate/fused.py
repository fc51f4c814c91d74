"""One token of a decoder in few launches: what its blocks compute, found in the modules and checked against them.

A block is taken apart into norms, q/k/v, attention, a gated MLP and residuals by the names nearly all families give
them; what was found is then held against what the block's own modules make of a token, each block by itself and the
logits in the end, right after the prompt and at the last position there is memory for (where windows, and all that
depends on the position, show). Where anything differs nothing is taken, so there is no file for a family. Caps on
scores and logits, which would show in large ones only, are refused by their name.

Shapes: T tokens (one), D width, J everything q/k/v make, V vocabulary, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.kernels.decode import ACTIVATIONS, Heads, Memory, Norm, attend, gate, join
from featherweight.merged import together
from featherweight.models.pieces import activation_of, rms_norm_of

QKV = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
# Norms before and after attention, before and after the MLP, by what families call them.
NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", None, "post_attention_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
TOLERANCE_EPS = 4.0  # of the dtype: what a block adds may differ by so much, relative to all of it
LEAST_TOLERANCE = 1e-4


class NotFound(Exception):
    """Why a model's token cannot be put together from pieces, in a few words."""


@dataclass(frozen=True)
class Block:
    """One block: its norms (None where it has none), products, heads, and keys and values."""

    norms: tuple[Norm | None, ...]
    qkv: Callable[[Tensor], Tensor]
    heads: Heads
    memory: Memory
    out: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]

    def __call__(self, x_TD: Tensor, delta_TD: Tensor | None, post: Norm | None) -> tuple[Tensor, Tensor, Norm | None]:
        """What has been added up, what is still to be added, and the norm of that, before and after the block."""
        before, after, before_mlp, after_mlp = self.norms
        x_TD, normed_TD = join(x_TD, delta_TD, post, before)
        attended_J = attend(self.qkv(normed_TD).flatten(), self.heads, self.memory)
        x_TD, normed_TD = join(x_TD, self.out(attended_J.unsqueeze(0)), after, before_mlp)
        return x_TD, self.mlp(normed_TD), after_mlp

    def alone(self, x_TD: Tensor) -> Tensor:
        """The block's output."""
        return join(*self(x_TD, None, None), None)[0]


@dataclass(frozen=True)
class Step:
    """The logits (V) of a token (1 x 1), whose keys and values are put at `position`, which then moves on."""

    embed: nn.Module
    blocks: tuple[Block, ...]
    norm: Norm
    head: nn.Module
    position: Tensor

    def __call__(self, token: Tensor) -> Tensor:
        x_TD, delta_TD, post = self.embed(token).flatten(0, 1), None, None
        for block in self.blocks:
            x_TD, delta_TD, post = block(x_TD, delta_TD, post)
        _, normed_TD = join(x_TD, delta_TD, post, self.norm)
        self.position.add_(1)
        logits_V: Tensor = self.head(normed_TD)[0]
        return logits_V


@dataclass
class Seen:
    """What modules were given and gave in one step of the model's own."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    turns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # cos and sin that a block was given
    rotary: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]] = field(default_factory=list)


@torch.no_grad()
def find(model: Any, cache: Any, token: Tensor, forward: Callable[[Tensor], Tensor]) -> Step:
    """The step of a model, checked at the next position and at the last one there is memory for.

    Args:
        cache: transformers' static one, which holds a prompt; left as it was, but for keys and values of positions that
            are yet to be written.
        token: any (1 x 1).
        forward: the model's own step: logits of a token.

    Raises NotFound where this is no model of known pieces, or does anything beside them.
    """
    paths = [path for path, module in model.named_modules() if _attention(module) is not None]
    if not paths:
        raise NotFound("no block has q_proj, k_proj, v_proj and o_proj")
    capped = [name for name, value in model.config.get_text_config().to_dict().items() if "softcap" in name and value]
    if capped:
        raise NotFound(f"{capped[0]} is set")
    counters = [layer.cumulative_length for layer in cache.layers]
    start, last = int(counters[0]), cache.layers[0].keys.shape[2] - 1
    position = counters[0].clone()
    step = None
    try:
        for at in sorted({start, last}):
            for counter in counters:
                counter.fill_(at)
            with _watch(model, paths) as seen:
                want_V = forward(token).clone()
            step = step or _found(model, cache, seen, paths, position)
            position.fill_(at)
            _check(step, seen, paths, token, want_V)
    finally:
        for counter in (*counters, position):
            counter.fill_(start)
    assert step is not None
    return step


def _found(model: Any, cache: Any, seen: Seen, paths: list[str], position: Tensor) -> Step:
    """What a model seems to be, by what its modules were given."""
    if not set(paths) <= set(seen.outputs):
        raise NotFound("not every block was called")
    tables: dict[int, tuple[Tensor, Tensor]] = {}
    blocks = tuple(_block(model.get_submodule(path), cache, seen, path, position, tables) for path in paths)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    return Step(embed, blocks, _final_norm(seen, paths), head, position)


def _attention(module: nn.Module) -> Any:
    """The child that attends, of a block."""
    return next((child for child in module.children() if all(hasattr(child, name) for name in (*QKV, "o_proj"))), None)


@contextmanager
def _watch(model: nn.Module, paths: list[str]) -> Iterator[Seen]:
    """Notes what blocks, and modules outside of them, are given and give."""
    seen, inside = Seen(), tuple(f"{path}." for path in paths)

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            if isinstance(output, tuple) and len(output) == 2 and path not in paths:
                seen.rotary.append((module, args, kwargs, output))
            output = output[0] if isinstance(output, tuple) else output
            if given is not None and isinstance(output, Tensor):
                seen.modules[path], seen.inputs[path], seen.outputs[path] = module, given, output
            if path in paths and isinstance(kwargs.get("position_embeddings"), tuple):
                seen.turns[path] = kwargs["position_embeddings"]

        return hook

    watched = [(path, module) for path, module in model.named_modules() if path and not path.startswith(inside)]
    handles = [module.register_forward_hook(note(path), with_kwargs=True) for path, module in watched]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _block(
    module: Any, cache: Any, seen: Seen, path: str, position: Tensor, tables: dict[int, tuple[Tensor, Tensor]]
) -> Block:
    attention = _attention(module)
    layer = cache.layers[attention.layer_idx]
    if path not in seen.turns:
        raise NotFound(f"{path} is given no rotary embedding")
    turn = seen.turns[path]
    if id(turn[0]) not in tables:
        tables[id(turn[0])] = _table(seen, turn, layer.keys.shape[2])
    memory = Memory(layer.keys, layer.values, *tables[id(turn[0])], position)
    return Block(
        _norms(module, path),
        together([getattr(attention, name) for name in QKV]),
        _heads(attention, layer, path),
        memory,
        attention.o_proj,
        _mlp(module, attention, path),
    )


def _norms(module: nn.Module, path: str) -> tuple[Norm | None, ...]:
    there = {name for name, child in module.named_children() if "norm" in name}
    names = next((row for row in NORMS if {name for name in row if name} == there), None)
    if names is None:
        raise NotFound(f"{path} has other norms: {', '.join(sorted(there))}")
    return tuple(None if name is None else _norm(module, name, path) for name in names)


def _norm(module: nn.Module, name: str, path: str) -> Norm:
    found = rms_norm_of(getattr(module, name))
    if found is None:
        raise NotFound(f"{path}.{name} is no RMSNorm")
    return Norm(*found)


def _heads(attention: Any, layer: Any, path: str) -> Heads:
    width, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    rows = [getattr(attention, name).out_features for name in QKV]
    children = {name for name, _ in attention.named_children()}
    if attention._parameters or not children <= {*QKV, "o_proj", "q_norm", "k_norm"}:
        raise NotFound(f"{path} attends with more than q, k, v and o")
    if not isinstance(width, int) or not isinstance(scale, float) or rows[1] != rows[2]:
        raise NotFound(f"{path} attends in another way")
    if layer.keys.shape[1] * width != rows[1] or rows[0] % rows[1] or attention.o_proj.in_features != rows[0]:
        raise NotFound(f"{path} has heads of other widths")
    q_norm, k_norm = (
        _norm(attention, name, path) if isinstance(getattr(attention, name, None), nn.Module) else None
        for name in ("q_norm", "k_norm")
    )
    if (q_norm is None) != (k_norm is None) or any(each and len(each.gain_D) != width for each in (q_norm, k_norm)):
        raise NotFound(f"{path} has norms over more than a head")
    window = getattr(layer, "window", layer.keys.shape[2])
    return Heads(rows[0] // width, rows[1] // width, width, scale, window, q_norm, k_norm)


def _mlp(module: nn.Module, attention: nn.Module, path: str) -> Callable[[Tensor], Tensor]:
    """The block's only other child that is no norm: gate and up as one product where it is a gated MLP."""
    others = [child for name, child in module.named_children() if child is not attention and "norm" not in name]
    if len(others) != 1:
        raise NotFound(f"{path} has {len(others)} modules beside attention and norms")
    mlp: Any = others[0]
    activation = activation_of(getattr(mlp, "act_fn", None), ACTIVATIONS)
    if activation is None or {name for name, _ in mlp.named_children()} - {"act_fn"} != set(GATED):
        return lambda x_TD: _first(mlp(x_TD.unsqueeze(0))).squeeze(0)
    both, down = together([mlp.gate_proj, mlp.up_proj]), mlp.down_proj
    return lambda x_TD: down(gate(both(x_TD), activation))


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _table(seen: Seen, turn: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions, L x rotary width, from the module that made them for one."""
    for module, args, kwargs, output in seen.rotary:
        if output[0] is not turn[0]:
            continue
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        numbers = [each for each in tensors if not each.is_floating_point()]
        if len(numbers) != 1 or numbers[0].shape != (1, 1):
            break
        every = torch.arange(length, device=turn[0].device).unsqueeze(0)
        with_every = [every if each is numbers[0] else each for each in args]
        named = {name: every if each is numbers[0] else each for name, each in kwargs.items()}
        cos_LW, sin_LW = (each[0].contiguous() for each in module(*with_every, **named))
        at = int(numbers[0])
        if torch.equal(cos_LW[at], turn[0][0, 0]) and torch.equal(sin_LW[at], turn[1][0, 0]):
            return cos_LW, sin_LW
    raise NotFound("the rotary embedding depends on more than the position")


def _final_norm(seen: Seen, paths: list[str]) -> Norm:
    last = seen.outputs[paths[-1]]
    for path, given in seen.inputs.items():
        if given is last and path not in paths and (found := rms_norm_of(seen.modules[path])) is not None:
            return Norm(*found)
    raise NotFound("what follows the last block is no RMSNorm")


def _check(step: Step, seen: Seen, paths: list[str], token: Tensor, want_V: Tensor) -> None:
    """Every block, and the logits, against what the model's own modules made."""
    given = step.embed(token)
    for path, block in zip(paths, step.blocks, strict=True):
        if not torch.equal(seen.inputs[path], given):
            raise NotFound(f"{path} is not given what comes before it")
        given = seen.outputs[path]
        x_TD, want_TD = seen.inputs[path].flatten(0, 1), given.flatten(0, 1)
        _require_near(block.alone(x_TD), want_TD, x_TD, path)
    _, normed_TD = join(given.flatten(0, 1), None, None, step.norm)
    _require_near(step.head(normed_TD)[0], want_V, torch.zeros_like(want_V), "the head")


def _require_near(got: Tensor, want: Tensor, start: Tensor, what: str) -> None:
    """What was added to `start`, up to the dtype's roundings."""
    eps = torch.finfo(want.dtype).eps
    allowed = max(TOLERANCE_EPS * eps, LEAST_TOLERANCE) * (want - start).float().norm() + eps * want.float().norm()
    error = (got.float() - want.float()).norm()
    if not bool(error <= allowed):
        raise NotFound(f"{what} computes something else: off by {float(error):.2g}, allowed are {float(allowed):.2g}")
