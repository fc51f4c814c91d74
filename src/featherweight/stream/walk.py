"""One walk over the original model, block by block, with what solves any of its matrices for any option.

Shapes: S sequences, T tokens, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight import data
from featherweight.core.problem import Factor, LayerProblem, loss_R
from featherweight.core.rules import Grid
from featherweight.core.solve import Choices, solve
from featherweight.errors import RequestError
from featherweight.models import tree as trees
from featherweight.models.blocks import BlockRunner
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.tree import Block, Matrix
from featherweight.plan.database import Measured, Row
from featherweight.plan.options import Option, fitting, kept_weights, menu
from featherweight.recipe import Recipe
from featherweight.stream.calibration import BATCH_TOKENS, Tell, calibration_ids, window_length
from featherweight.stream.device import compute_dtype, pick_device
from featherweight.stream.experts import expert_sums, mixtures_of, without_experts
from featherweight.stream.hidden import HiddenStates
from featherweight.stream.inputs import BlockView, collect, input_groups
from featherweight.stream.parallel import ALONE, World

Keep = Callable[[str, str, Tensor], None]


def quick(recipe: Recipe) -> Choices:
    """The solver's settings unless told otherwise: the recipe's order, nothing polished afterwards."""
    return Choices(order=recipe.order, scales_from=recipe.scales_from, refine=0)


class Walk:
    """One pass over the original model, block by block."""

    def __init__(
        self,
        model: str | Path,
        recipe: Recipe,
        options: Sequence[Option] | None,
        device: str,
        choices: Choices | None,
        beside: Path,
        tell: Tell | None,
        world: World = ALONE,
    ) -> None:
        self.device = pick_device(device)
        self.tree = trees.build(Checkpoint.open(resolve(model)))
        if len(self.tree.lists) > 1:
            raise RequestError(f"{model} has an encoder and a decoder: sensitivities are measured in decoders alone.")
        self.recipe = recipe.but(tokens=window_length(recipe, self.tree), target="drifted")
        self.options = tuple(options) if options is not None else menu(scale_dtype=self.tree.dtype)
        self.choices = choices or quick(recipe)
        self.dtype = compute_dtype(self.tree.dtype, self.device)
        self.world = world
        end = f".{world.rank}.scratch" if world.size > 1 else ".scratch"
        self.scratch = beside.with_name(beside.name + end)
        self.tell: Tell = tell or (lambda done, total, what: None)
        labels = [option.label for option in self.options]
        if len(set(labels)) != len(labels):
            raise RequestError("two options have one label: labels must differ.")
        for block in self.tree.blocks:
            for matrix in block.matrices:
                fitting(self.options, matrix.columns, matrix.name)
        ids_ST = world.first_tensor(lambda: calibration_ids(self.tree.checkpoint.path, self.recipe))
        if ids_ST is None:
            raise RequestError(f"sensitivities need calibration text, and {recipe.method} reads none: use gptq.")
        self.ids_ST = ids_ST

    def header(self) -> dict[str, Any]:
        """What a database's numbers follow from."""
        recipe = self.recipe
        return {
            "model": self.tree.checkpoint.fingerprint(),
            "ids_sha256": data.digest(self.ids_ST),
            "recipe": {"damping": recipe.relative_damping, "sink_share": recipe.sink_share},
            "choices": asdict(self.choices),
            "options": {option.label: str(option.rule) for option in self.options},
        }

    def blocks(self, wanted: Callable[[Block], bool]) -> Iterator[tuple[Block, Solver]]:
        """The wanted blocks, each with what solves its matrices (of several processes, those that fall to this one);
        stops after the last of them."""
        last = max((block.index for block in self.tree.blocks if wanted(block)), default=-1)
        if last < 0:
            return
        runner = BlockRunner(self.tree, self.device, self.dtype)
        ids_ST = self.ids_ST[self.world.split(len(self.ids_ST))]
        batch = max(1, BATCH_TOKENS[self.device.type] // ids_ST.shape[1])
        shape = (*ids_ST.shape, runner.embed(ids_ST[:1]).shape[-1])
        place = (self.dtype, self.device, self.scratch, self.world.size)
        hidden = HiddenStates((shape[0], shape[1], shape[2]), *place)
        try:
            hidden.fill(batch, lambda at: runner.embed(ids_ST[at]))
            runner.release()
            for block in self.tree.blocks[: last + 1]:
                module = runner.load(block.index)

                def run(states: Tensor, index: int = block.index, module: torch.nn.Module = module) -> Tensor:
                    return runner.run(index, module, states)

                if wanted(block):
                    view = BlockView(module, block.matrices, run, hidden, None, batch, world=self.world)
                    yield block, self._solver(view)
                if block.index < last:
                    for at, states in hidden.batches(batch):
                        hidden.states_STD[at] = run(states)
                runner.unload(block.index)
                self.tell(block.index + 1, len(self.tree.blocks), f"block {block.index + 1}")
        finally:
            hidden.close()

    def _solver(self, view: BlockView) -> Solver:
        mixtures = mixtures_of(view)
        rest = without_experts(view, mixtures)
        groups = input_groups(rest)
        sums = collect(rest, [groups], 0, self.recipe, lambda share: None)
        owners = self.world.deal([group.cost() for group in groups])
        inputs = [
            Inputs(view, group.matrices, each.hessian.mean(), each.hessian.tokens)
            for group, each, owner in zip(groups, sums, owners, strict=True)
            if owner == self.world.rank
        ]
        for mixture in mixtures:
            for matrices, each in expert_sums(view, mixture, self.recipe):
                inputs.append(Inputs(view, matrices, each.hessian_CC, each.tokens))
        return Solver(inputs, self.options, self.recipe, self.choices)


@dataclass(frozen=True)
class Inputs:
    """Matrices that are fed the same tensor, and its H."""

    view: BlockView
    matrices: tuple[Matrix, ...]
    hessian_CC: Tensor
    tokens: int


class Solver:
    """Solves the matrices of one block for any option."""

    def __init__(self, inputs: list[Inputs], options: Sequence[Option], recipe: Recipe, choices: Choices) -> None:
        self.inputs, self.recipe, self.choices = inputs, recipe, choices
        self.options = {option.label: option for option in options}
        self.factors: dict[str, Factor] = {}
        self.solutions: dict[tuple[str, str], list[tuple[Tensor, float]]] = {}

    def rows(self, block: Block, inputs: Inputs, keep: Keep | None) -> list[Row]:
        """What the matrices of one input are under every option; `keep` is handed the values."""
        measured: dict[str, dict[str, Measured]] = {matrix.name: {} for matrix in inputs.matrices}
        problems = {matrix.name: self._problem(inputs, (matrix,)) for matrix in inputs.matrices}
        energies = {
            name: float(loss_R(p, torch.zeros_like(p.weight_RC)).double().sum()) for name, p in problems.items()
        }
        for option in fitting(self.options.values(), inputs.matrices[0].columns):
            for matrix, (values_RC, loss) in zip(inputs.matrices, self._solved(inputs, option), strict=True):
                energy = energies[matrix.name] or 1.0
                error = float(loss_R(problems[matrix.name], values_RC).double().sum())
                measured[matrix.name][option.label] = Measured(
                    loss,
                    loss / energy,
                    error / energy,
                    option.bytes(matrix.rows, matrix.columns),
                    kept_weights(option.rule, matrix.rows, matrix.columns),
                )
                if keep is not None:
                    keep(matrix.name, option.label, values_RC)
        return [
            Row(
                block.index,
                m.name,
                m.path,
                inputs.matrices[0].path,
                m.rows,
                m.columns,
                energies[m.name],
                measured[m.name],
            )
            for m in inputs.matrices
        ]

    def has(self, names: Sequence[str]) -> bool:
        """Whether this process solves these matrices, which are given the same tensor."""
        return any(matrix.name in names for inputs in self.inputs for matrix in inputs.matrices)

    def values(self, names: Sequence[str], label: str) -> dict[str, Tensor]:
        """The weights, R x C float32, of some matrices of the block under one option."""
        found: dict[str, Tensor] = {}
        for inputs in self.inputs:
            if any(matrix.name in names for matrix in inputs.matrices):
                key = (inputs.matrices[0].path, label)
                if key not in self.solutions:
                    self.solutions[key] = self._solved(inputs, self.options[label])
                solved = self.solutions[key]
                found |= {
                    m.name: values for m, (values, _) in zip(inputs.matrices, solved, strict=True) if m.name in names
                }
        return found

    def _solved(self, inputs: Inputs, option: Option) -> list[tuple[Tensor, float]]:
        """Values and certificate of every matrix of one input: rounding solves them as one, pruning each by itself,
        since zeros compete over a matrix."""
        if option.rule is None:
            return [(inputs.view.weight(matrix), 0.0) for matrix in inputs.matrices]
        first = inputs.matrices[0].path
        if first not in self.factors:
            self.factors[first] = self._problem(inputs, inputs.matrices[:1]).factor(self.choices.order)
        together = [inputs.matrices] if isinstance(option.rule, Grid) else [(matrix,) for matrix in inputs.matrices]
        found = []
        for matrices in together:
            solution = solve(self._problem(inputs, matrices), option.rule, self.choices, self.factors[first])
            start = 0
            for matrix in matrices:
                part = solution.rows(start, start + matrix.rows)
                found.append((part.values(), part.certificate))
                start += matrix.rows
        return found

    def _problem(self, inputs: Inputs, matrices: Sequence[Matrix]) -> LayerProblem:
        weight_RC = torch.cat([inputs.view.weight(matrix) for matrix in matrices])
        name = " + ".join(matrix.name for matrix in matrices)
        return LayerProblem(weight_RC, inputs.hessian_CC, inputs.tokens, self.recipe.relative_damping, name)
