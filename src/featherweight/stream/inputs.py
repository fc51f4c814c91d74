"""What the matrices of one block see: which are fed the same tensor, where they write, and the sums over all tokens.

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.errors import FeatherweightError
from featherweight.models.tree import Matrix
from featherweight.recipe import Recipe
from featherweight.stream.guide import normalised
from featherweight.stream.hidden import HiddenStates

PROBE_TOKENS = 64  # enough to see which way tensors go in a block
Tick = Callable[[float], None]


@dataclass(frozen=True)
class BlockView:
    """A block as a solver sees it.

    Attributes:
        module: the block on the device with its original weights, less what `put` has replaced.
        matrices: what is to be compressed in it.
        run: one batch of hidden states through the module.
        inputs: the hidden states the compressed model brings to this block; None where the method needs none.
        dense: those the original model brings, where the recipe's target asks for them; `collect` replaces them by the
            original block's outputs.
        batch: sequences in one forward pass.
        originals: the weights that `put` has replaced.
        weights: how much each token counts for a matrix, by its path: S x T, in any unit; all alike without.
    """

    module: nn.Module
    matrices: tuple[Matrix, ...]
    run: Callable[[Tensor], Tensor]
    inputs: HiddenStates | None
    dense: HiddenStates | None
    batch: int
    originals: dict[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] | None = None

    def weight(self, matrix: Matrix) -> Tensor:
        """The matrix as R x C float32 (a Conv1D keeps it the other way round)."""
        weight = self.parameter(matrix.path).detach()
        return (weight.T if matrix.transposed else weight).float()

    def put(self, matrix: Matrix, values_RC: Tensor) -> None:
        """Replaces the weights of a matrix by those of its solution."""
        parameter = self.parameter(matrix.path)
        self.originals.setdefault(matrix.path, parameter.data)
        parameter.data = (values_RC.T if matrix.transposed else values_RC).to(parameter).contiguous()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The block with all its original weights, for as long as this lasts."""
        current = {path: self.parameter(path).data for path in self.originals}
        for path, weight in self.originals.items():
            self.parameter(path).data = weight
        try:
            yield
        finally:
            for path, weight in current.items():
                self.parameter(path).data = weight

    def parameter(self, path: str) -> nn.Parameter:
        """The module's own weight, laid out as the module has it."""
        return self.module.get_parameter(f"{path}.weight")


@dataclass(frozen=True)
class Group:
    """Matrices that are fed the same tensor (q, k, v; gate and up), and where they write.

    Attributes:
        first: whether they are the first to run in the block: what attention compares is made of their outputs.
        writes: "middle" where the only matrix adds its output to the block's input, "end" where that sum is the
            block's output; "" where the output goes through anything else before it reaches the residual stream.
    """

    matrices: tuple[Matrix, ...]
    first: bool = False
    writes: Literal["", "middle", "end"] = ""

    @property
    def path(self) -> str:
        """What stands for the group: its first matrix."""
        return self.matrices[0].path


class GroupSums:
    """H of a group's inputs, and what the way back to the original model has in common with them."""

    def __init__(self, group: Group, drift: bool, sinks: bool, device: torch.device) -> None:
        columns = group.matrices[0].columns
        self.hessian = HessianSum(columns, device)
        self.gap = CrossSum(group.matrices[0].rows if group.writes else columns, columns, device) if drift else None
        self.sinks = GroupSums(group, drift, False, device) if sinks else None

    def add(self, inputs_STC: Tensor, gap: Tensor | None) -> None:
        """One batch of inputs and, for the same tokens, how far they or the residual stream are from the original's."""
        self.hessian.add(inputs_STC)
        if self.gap is not None:
            assert gap is not None
            self.gap.add(gap, inputs_STC)
        if self.sinks is not None and inputs_STC.dim() == 3:
            self.sinks.add(inputs_STC[:, :1], None if gap is None else gap[:, :1])

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


def input_groups(view: BlockView) -> list[Group]:
    """The groups of a block in the order they run; where they write is found only if there is a dense stream."""
    seen: list[tuple[Tensor, list[Matrix]]] = []

    def note(matrix: Matrix, inputs: Tensor) -> None:
        for tensor, matrices in seen:
            if tensor is inputs or (tensor.data_ptr() == inputs.data_ptr() and tensor.shape == inputs.shape):
                matrices.append(matrix)
                return
        seen.append((inputs, [matrix]))

    assert view.inputs is not None
    _, hidden_STD = next(view.inputs.batches(1))
    hidden_STD = hidden_STD[:, :PROBE_TOKENS]
    with torch.no_grad(), _hooks(_on_input(view, matrix.path, partial(note, matrix)) for matrix in view.matrices):
        view.run(hidden_STD)
    missed = {m.name for m in view.matrices} - {m.name for _, matrices in seen for m in matrices}
    if missed:
        raise FeatherweightError(
            f"{min(missed)} was never run by its block: it cannot be calibrated; ignore it or use --method rtn."
        )
    groups = [Group(tuple(matrices), first=not number) for number, (_, matrices) in enumerate(seen)]
    return groups if view.dense is None else _find_writers(view, groups, hidden_STD)


@torch.no_grad()
def _find_writers(view: BlockView, groups: list[Group], hidden_STD: Tensor) -> list[Group]:
    """Finds the matrices that add to the residual stream, by putting noise in the place of their outputs.

    "end": the noise of the block's last matrix must come out of the block as it is. "middle": with the last one
    silent, so must that of another, and with both silent the block must return its input.
    """
    last, width = groups[-1], hidden_STD.shape[-1]
    if not _may_write(last, width):
        return groups
    noise_STD = torch.randn(hidden_STD.shape, generator=torch.Generator().manual_seed(0)).to(hidden_STD)
    noise_STD *= hidden_STD.float().square().mean().sqrt()
    silence_STD = torch.zeros_like(noise_STD)
    silent = _run_with(view, {last.path: silence_STD}, hidden_STD)
    noisy = _run_with(view, {last.path: noise_STD}, hidden_STD)
    if not _same(noisy - silent, noise_STD, silent):
        return groups
    found = {last.path: replace(last, writes="end")}
    for group in groups[:-1]:
        if _may_write(group, width):
            silent = _run_with(view, {last.path: silence_STD, group.path: silence_STD}, hidden_STD)
            noisy = _run_with(view, {last.path: silence_STD, group.path: noise_STD}, hidden_STD)
            if _same(noisy - silent, noise_STD, silent) and _same(silent, hidden_STD, silent):
                found[group.path] = replace(group, writes="middle")
    return [found.get(group.path, group) for group in groups]


def _may_write(group: Group, width: int) -> bool:
    return len(group.matrices) == 1 and group.matrices[0].rows == width


def _run_with(view: BlockView, outputs: dict[str, Tensor], hidden_STD: Tensor) -> Tensor:
    """The block's output where some matrices, by path, are made to answer with what is given."""
    with _hooks(
        view.module.get_submodule(path).register_forward_hook(
            # a copy each time: some families add to it in place
            lambda _, __, output, answer=answer: answer.reshape(output.shape).clone()
        )
        for path, answer in outputs.items()
    ):
        return view.run(hidden_STD)


def _same(one_STD: Tensor, other_STD: Tensor, scale_STD: Tensor) -> bool:
    """Whether two tensors are equal, but for the rounding of sums as large as `scale`, at nearly every element."""
    room_STD = 4 * torch.finfo(scale_STD.dtype).eps * (scale_STD.abs() + other_STD.abs())
    return float(((one_STD - other_STD).abs() <= room_STD).float().mean()) > 0.99


@torch.no_grad()
def collect(view: BlockView, stages: list[list[Group]], number: int, recipe: Recipe, tick: Tick) -> list[GroupSums]:
    """The sums of every group of one stage over all sequences.

    The original block runs beside the compressed one in the stages that have a gap to measure inside it. In the last
    of those, its outputs take the place of the original model's hidden states: what a last matrix that writes aims at.
    """
    assert view.inputs is not None
    device, dense, groups = view.inputs.device, view.dense, stages[number]
    sums = {g.path: GroupSums(g, dense is not None, g.first and recipe.sink_share > 0, device) for g in groups}
    beside = [n for n, stage in enumerate(stages) if any(group.writes != "end" for group in stage)] or [0]
    at_end = any(group.writes == "end" for group in groups)
    roots = {} if view.weights is None else {g.path: _roots(view.weights, g, recipe.guide) for g in groups}
    sequences = view.inputs.states_STD.shape[0]
    for at, hidden_STD in view.inputs.batches(view.batch):
        target_STD = dense_STD = None if dense is None else dense.states_STD[at].to(device)
        original: dict[str, _Heard] = {}
        if dense_STD is not None and number in beside:
            with view.undone():
                original, target_STD = _hear(view, groups, dense_STD, whole=at_end or number == beside[-1])
        now, output_STD = _hear(view, groups, hidden_STD, whole=dense is not None and at_end)
        for group in groups:
            inputs, gap = now[group.path].inputs, None
            if group.writes == "end" and target_STD is not None and output_STD is not None:
                gap = target_STD - output_STD
            elif group.writes == "middle" and dense_STD is not None:
                gap = (dense_STD - hidden_STD) + (original[group.path].written - now[group.path].written)
            elif dense_STD is not None:
                gap = original[group.path].inputs - inputs
            if view.weights is not None:
                root = roots[group.path][at].to(inputs).reshape(*inputs.shape[:-1], 1)
                inputs, gap = inputs * root, None if gap is None else gap * root
            sums[group.path].add(inputs, gap)
        if dense is not None and target_STD is not None and number == beside[-1]:
            dense.states_STD[at] = target_STD  # only now: what was heard may be a view of the states
        tick(at.stop / sequences)
    for group in groups:
        sums[group.path].weigh_sinks(recipe.sink_share)
    return [sums[group.path] for group in groups]


def _roots(weights: Mapping[str, Tensor], group: Group, power: float) -> Tensor:
    """What each token's inputs (S x T) are multiplied by so that it counts as it matters to the group as a whole."""
    return normalised(torch.stack([weights[matrix.path] for matrix in group.matrices]).sum(0), power).sqrt()


@dataclass(frozen=True)
class _Heard:
    """What went into a group in one pass, and what it wrote to the residual stream (empty for all but "middle")."""

    inputs: Tensor
    written: Tensor


class _Enough(Exception):
    """Raised in a hook: nothing that the rest of the block computes is needed."""


def _hear(
    view: BlockView, groups: list[Group], hidden_STD: Tensor, whole: bool
) -> tuple[dict[str, _Heard], Tensor | None]:
    """Runs a batch through the block and keeps what these groups see; not `whole`, it stops there without an output."""
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
        return on_output(group) if group.writes == "middle" else _on_input(view, group.path, partial(note, group.path))

    with _hooks(listen(group) for group in groups):
        try:
            return found, view.run(hidden_STD)
        except _Enough:
            return found, None


def _on_input(view: BlockView, path: str, hear: Callable[[Tensor], None]) -> RemovableHandle:
    """Calls `hear` with the input of a matrix whenever it is about to run."""
    return view.module.get_submodule(path).register_forward_pre_hook(lambda _, args: hear(args[0]))


@contextmanager
def _hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keeps hooks for a while."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()
