"""What the matrices of one block see: the sums over all tokens of their inputs.

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.core.products import times
from featherweight.recipe import Recipe
from featherweight.stream.ending import without_outputs
from featherweight.stream.groups import BlockView, Group, hooks, input_groups, on_input
from featherweight.stream.guide import normalised
from featherweight.stream.parallel import World

__all__ = ["BlockView", "Group", "GroupSums", "Tick", "collect", "input_groups"]

Tick = Callable[[float], None]
WHOLE = slice(None)


class GroupSums:
    """H of a group's inputs, and what the way back to the original model has in common with them."""

    def __init__(self, group: Group, drift: bool, sinks: bool, device: torch.device) -> None:
        columns = group.matrices[0].columns
        self.hessian = HessianSum(columns, device)
        self.gap = CrossSum(group.matrices[0].rows if group.writes else columns, columns, device) if drift else None
        self.sinks = GroupSums(group, drift, False, device) if sinks else None
        self.writes = bool(group.writes)
        self.without = False  # whether the gap is that of the stream without the group's own outputs

    def add(self, inputs_STC: Tensor, gap: Tensor | None) -> None:
        """One batch of inputs and, for the same tokens, how far they or the residual stream are from the original's."""
        self.hessian.add(inputs_STC)
        if self.gap is not None:
            assert gap is not None
            self.gap.add(gap, inputs_STC)
        if self.sinks is not None and inputs_STC.dim() == 3:
            self.sinks.add(inputs_STC[:, :1], None if gap is None else gap[:, :1])

    def parts(self) -> list[HessianSum | CrossSum]:
        """The sums that this is made of, in the same order in all processes."""
        sinks = [] if self.sinks is None else self.sinks.parts()
        return [self.hessian, *([] if self.gap is None else [self.gap]), *sinks]

    def gap_mean(self, weight_RC: Tensor, hessian_CC: Tensor, rows: slice = WHOLE) -> Tensor | None:
        """How far the original is, as a mean; the group's outputs are W X, so what they leave of it is known from H.

        Where the group writes to the residual stream, of these `rows`, whose weights are given.
        """
        if self.gap is None:
            return None
        mean = self.gap.mean(rows if self.writes else WHOLE)
        return mean - times(weight_RC, hessian_CC) if self.without else mean

    def weigh_sinks(self, share: float) -> None:
        """Repeats the windows' first tokens until they hold this share of H's trace, if they do not hold it yet."""
        if self.sinks is None:
            return
        total, held = float(self.hessian.sum_CC.trace()), float(self.sinks.hessian.sum_CC.trace())
        if not 0 < held < share * total:
            return
        more = share / (1 - share) * (total - held) / held - 1
        self.hessian.sum_CC += more * self.sinks.hessian.sum_CC
        if self.gap is not None and self.sinks.gap is not None:
            self.gap.sum_RC += more * self.sinks.gap.sum_RC


@torch.no_grad()
def collect(view: BlockView, stages: list[list[Group]], number: int, recipe: Recipe, tick: Tick) -> list[GroupSums]:
    """The sums of every group of one stage over all sequences.

    The original block runs beside the compressed one in the stages that have a gap to measure inside it. In the last
    of those, its outputs take the place of the original model's hidden states: what a last matrix that writes aims at.
    Where that is a stage of its own, the matrix is left out of the pass, whose end is kept in `view.ending`.
    """
    assert view.inputs is not None
    device, dense, groups = view.inputs.device, view.dense, stages[number]
    sums = {g.path: GroupSums(g, dense is not None, g.first and recipe.sink_share > 0, device) for g in groups}
    beside = [n for n, stage in enumerate(stages) if any(group.writes != "end" for group in stage)] or [0]
    end = groups[0] if len(groups) == 1 and groups[0].writes == "end" and dense is not None else None
    keeps = end is not None and view.ending is not None and view.ending.takes(end.matrices[0].columns)
    roots = {} if view.weights is None else {g.path: _roots(view.weights, g, recipe.guide, view.world) for g in groups}
    sequences = view.inputs.states_STD.shape[0]
    for at, hidden_STD in view.inputs.batches(view.batch):
        target_STD = dense_STD = None if dense is None else dense.states_STD[at].to(device)
        original: dict[str, _Heard] = {}
        if dense_STD is not None and number in beside:
            with view.undone():
                original, target_STD = _hear(view, groups, dense_STD, whole=end is not None or number == beside[-1])
        now, stream_STD = _hear(view, groups, hidden_STD, whole=end is not None, end=end)
        for group in groups:
            inputs, gap = now[group.path].inputs, None
            if end is not None and group is end and target_STD is not None and stream_STD is not None:
                bias = view.module.get_submodule(end.path)._parameters.get("bias")
                gap = target_STD - stream_STD if bias is None else target_STD - (stream_STD + bias)
            elif group.writes == "middle" and dense_STD is not None:
                gap = (dense_STD - hidden_STD) + (original[group.path].written - now[group.path].written)
            elif dense_STD is not None:
                gap = original[group.path].inputs - inputs
            if view.weights is not None:
                root = roots[group.path][at].to(inputs).reshape(*inputs.shape[:-1], 1)
                inputs, gap = inputs * root, None if gap is None else gap * root
            with view.phases("hessian"):
                sums[group.path].add(inputs, gap)
        if keeps and end is not None and stream_STD is not None:
            assert view.ending is not None
            view.ending.keep(end.path, at, now[end.path].inputs, stream_STD)
        if dense is not None and target_STD is not None and number == beside[-1]:
            dense.states_STD[at] = target_STD  # only now: what was heard may be a view of the states
        tick(at.stop / sequences)
    add_up([part for each in sums.values() for part in each.parts()], view.world)
    for group in groups:
        sums[group.path].weigh_sinks(recipe.sink_share)
        sums[group.path].without = group is end
    return [sums[group.path] for group in groups]


def add_up(parts: list[HessianSum | CrossSum], world: World) -> None:
    """Puts in the place of sums over this process's sequences those over all; their tokens are one message."""
    for part, tokens in zip(parts, world.add_up_each([part.tokens for part in parts]), strict=True):
        world.sum_(part.sum_CC if isinstance(part, HessianSum) else part.sum_RC)
        part.tokens = tokens


def _roots(weights: Mapping[str, Tensor], group: Group, power: float, world: World) -> Tensor:
    """What each token's inputs (S x T) are multiplied by so that it counts as it matters to the group as a whole."""
    return normalised(torch.stack([weights[matrix.path] for matrix in group.matrices]).sum(0), power, world).sqrt()


@dataclass(frozen=True)
class _Heard:
    """What went into a group in one pass, and what it wrote to the residual stream (empty for all but "middle")."""

    inputs: Tensor
    written: Tensor


class _Enough(Exception):
    """Raised in a hook: nothing that the rest of the block computes is needed."""


def _hear(
    view: BlockView, groups: list[Group], hidden_STD: Tensor, whole: bool, end: Group | None = None
) -> tuple[dict[str, _Heard], Tensor | None]:
    """Runs a batch through the block and keeps what these groups see; not `whole`, it stops there without an output.

    With `end`, the output is the residual stream without what that group's matrix adds to it.
    """
    found: dict[str, _Heard] = {}
    nothing = hidden_STD.new_empty(0)

    def note(path: str, inputs: Tensor, written: Tensor = nothing) -> None:
        found[path] = _Heard(inputs, written)
        if len(found) == len(groups) and not whole:
            raise _Enough

    def on_output(group: Group) -> RemovableHandle:
        return view.module.get_submodule(group.path).register_forward_hook(
            lambda _, args, output: note(group.path, args[0], output.clone())  # some families add to it in place
        )

    def listen(group: Group) -> RemovableHandle:
        return on_output(group) if group.writes == "middle" else on_input(view, group.path, partial(note, group.path))

    last = nullcontext() if end is None else without_outputs(view.module.get_submodule(end.path))
    with view.phases("forward"), last, hooks(listen(group) for group in groups):
        try:
            return found, view.run(hidden_STD)
        except _Enough:
            return found, None
