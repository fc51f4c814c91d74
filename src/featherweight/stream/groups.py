"""What runs in a block: the block as a solver sees it, which of its matrices are fed the same tensor, and where they
write.

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featherweight.core.solution import AnySolution
from featherweight.errors import FeatherweightError
from featherweight.models.experts import find_experts
from featherweight.models.offload import apart_in
from featherweight.models.tree import Matrix
from featherweight.stream.ending import Ending
from featherweight.stream.hidden import HiddenStates
from featherweight.stream.parallel import ALONE, World
from featherweight.stream.phases import Phases

FACTOR = 0.5  # what a column counts in the factor, in rows; it takes 0.33 (an H100), but few rows more than their share
PROBE_TOKENS = 64  # enough to see which way tensors go in a block


@dataclass(frozen=True)
class Kept:
    """A solved matrix as its shard will hold it, when its solution is no longer held.

    Attributes:
        tensors: by suffix, on the CPU.
        line: the journal's.
        values: makes the weights that the tensors stand for, R x C.
    """

    tensors: dict[str, Tensor]
    line: dict[str, Any]
    values: Callable[[], Tensor]


Solved = AnySolution | Kept


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
        settled: the paths of matrices whose weights are already those of the solutions that the block ends up with.
        weights: how much each token counts for a matrix, by its path: S x T, in any unit; all alike without.
        world: the processes among which the sequences are split.
        phases: what is told where the time goes.
        ending: keeps the end of the last pass over `inputs`, which it then writes over; None where they stay.
        keep: packs a solved matrix of an expert that is apart (`models.offload`) at once, and says how to have its
            values again; None where experts are held.
        special_ST: which of the block's own tokens are special, bool; None where all tokens are alike.
        carries: half of the states' tokens are what an encoder returned, behind the block's own.
        alike: the groups that were found in the blocks before, by how those are made.
        ready: returns once the solver's kernels are there, which are compiled beside the first block's pass.
    """

    module: nn.Module
    matrices: tuple[Matrix, ...]
    run: Callable[[Tensor], Tensor]
    inputs: HiddenStates | None
    dense: HiddenStates | None
    batch: int
    originals: dict[str, Tensor] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    weights: Mapping[str, Tensor] | None = None
    world: World = ALONE
    phases: Phases = field(default_factory=lambda: Phases(torch.device("cpu")))
    ending: Ending | None = None
    keep: Callable[[Matrix, AnySolution], Kept] | None = None
    special_ST: Tensor | None = None
    carries: bool = False
    alike: dict[Hashable, list[Group]] = field(default_factory=dict)
    ready: Callable[[], None] = lambda: None

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
        apart = apart_in(self.module).values()
        for expert in apart:
            expert.undone = True
        for path, weight in self.originals.items():
            self.parameter(path).data = weight
        try:
            yield
        finally:
            for expert in apart:
                expert.undone = False
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

    @property
    def rows_cost(self) -> float:
        """What the sweep of all its rows takes, to be compared."""
        return float(sum(matrix.rows for matrix in self.matrices) * self.matrices[0].columns ** 2)

    def cost(self) -> float:
        """What solving it takes, to be compared: the sweep of the rows, and the factor."""
        return self.rows_cost + FACTOR * self.matrices[0].columns ** 3


def input_groups(view: BlockView) -> list[Group]:
    """The groups of a block's matrices in the order they run; where they write is found if there is a dense stream.

    Matrices of experts are not among them: not all are run by every batch (`stream.experts`). Blocks that are made
    alike are looked at once.
    """
    make = _make(view)
    if make not in view.alike:
        view.alike[make] = _agreed(view, _found(view))
    matrices = {matrix.path: matrix for matrix in view.matrices}
    return [replace(g, matrices=tuple(matrices[m.path] for m in g.matrices)) for g in view.alike[make]]


def _make(view: BlockView) -> Hashable:
    """What a block has in common with those that are made alike: its modules, what they are set to, and its matrices.

    Whole numbers are left out, which say where in the model a module is; the shapes that others stand for are not. A
    scalar among the weights is looked at: a block may multiply by it what it writes.
    """
    modules = []
    for path, module in view.module.named_modules():
        settings = [(name, value) for name, value in vars(module).items() if type(value) in (bool, str, float)]
        modules.append((path, type(module), *sorted(settings)))
    weights = [*view.module.named_parameters(), *view.module.named_buffers()]
    shapes = [(name, float(weight) if weight.numel() == 1 else weight.shape) for name, weight in weights]
    matrices = [(matrix.path, matrix.rows, matrix.columns) for matrix in view.matrices]
    return view.carries, view.dense is None, tuple(matrices), tuple(modules), tuple(shapes)


def _found(view: BlockView) -> list[Group]:
    """The groups as a sequence of this process shows them."""
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
    with torch.no_grad(), hooks(on_input(view, matrix.path, partial(note, matrix)) for matrix in view.matrices):
        view.run(hidden_STD)
    missed = {m.name for m in view.matrices} - {m.name for _, matrices in seen for m in matrices}
    if missed:
        raise FeatherweightError(
            f"{min(missed)} was never run by its block: it cannot be calibrated; ignore it or use --method rtn."
        )
    groups = [Group(tuple(matrices), first=not number) for number, (_, matrices) in enumerate(seen)]
    return groups if view.dense is None or view.carries or not groups else _find_writers(view, groups, hidden_STD)


def _agreed(view: BlockView, groups: list[Group]) -> list[Group]:
    """The groups as process 0 finds them: each looks at a sequence of its own, and all must take the same."""
    matrices = {matrix.path: matrix for matrix in view.matrices}
    said = view.world.first([[[matrix.path for matrix in g.matrices], g.first, g.writes] for g in groups])
    return [Group(tuple(matrices[path] for path in paths), first, writes) for paths, first, writes in said]


@torch.no_grad()
def _find_writers(view: BlockView, groups: list[Group], hidden_STD: Tensor) -> list[Group]:
    """Finds the matrices that add to the residual stream, by putting noise in the place of their outputs.

    "end": the noise of the block's last matrix must come out of the block as it is. "middle": with the last one
    silent, so must that of another, and with both silent the block must return its input. Experts are silent
    throughout; a last matrix that is not beside them (as shared experts are) runs before them, so it is no end.
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
    beside = [path.rpartition(".")[0] + "." for path, _ in find_experts(view.module)]
    ends = not beside or last.path.startswith(tuple(beside))
    found = {last.path: replace(last, writes="end" if ends else "middle")}
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
    """The block's output where some matrices, by path, are made to answer with what is given, and experts nothing."""
    answering = [
        view.module.get_submodule(path).register_forward_hook(
            # a copy each time: some families add to it in place
            lambda _, __, output, answer=answer: answer.reshape(output.shape).clone()
        )
        for path, answer in outputs.items()
    ]
    silent = [
        experts.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        for _, experts in find_experts(view.module)
    ]
    with hooks([*answering, *silent]):
        return view.run(hidden_STD)


def _same(one_STD: Tensor, other_STD: Tensor, scale_STD: Tensor) -> bool:
    """Whether two tensors are equal, but for the rounding of sums as large as `scale`, at nearly every element."""
    room_STD = 4 * torch.finfo(scale_STD.dtype).eps * (scale_STD.abs() + other_STD.abs())
    return float(((one_STD - other_STD).abs() <= room_STD).float().mean()) > 0.99


def on_input(view: BlockView, path: str, hear: Callable[[Tensor], None]) -> RemovableHandle:
    """Calls `hear` with the input of a matrix whenever it is about to run."""
    return view.module.get_submodule(path).register_forward_pre_hook(lambda _, args: hear(args[0]))


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keeps hooks for a while."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()
