"""What a solver is handed: which matrices share an input, where they write, and the sums over all tokens.

Shapes: T tokens (all sequences), D width, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight import api
from featherweight.core.problem import LayerProblem
from featherweight.core.solution import Solution
from featherweight.models.blocks import BlockRunner
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.load import load_dense
from featherweight.models.tree import build
from featherweight.recipe import Recipe
from featherweight.stream import compress as pipeline
from featherweight.stream import layerwise as solver
from featherweight.stream.hidden import HiddenStates
from featherweight.stream.inputs import BlockView, Group, GroupSums, input_groups
from runs import logits, recipe, weight_of
from tiny import FAMILIES, add_tokenizer, make, token_ids

CPU = torch.device("cpu")
NORMED = {"gemma2", "gemma3", "olmo2", "opt-projected"}  # a norm between the matrices and the residual stream
SCALED = {"granite"}  # a factor


@dataclass(frozen=True)
class Handed:
    """What a group of matrices with one input was solved with, and what came of it."""

    group: Group
    names: tuple[str, ...]
    hessian_CC: Tensor
    gap: Tensor | None
    solutions: dict[str, Solution]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Handed]:
    """Every group solved in the test, in order."""
    found: list[Handed] = []
    solve = solver.solve_group

    def noting(view: Any, group: Group, sums: GroupSums, *rest: Any) -> dict[str, Solution]:
        hessian_CC = sums.hessian.mean().clone()
        weight_RC = torch.cat([view.weight(matrix) for matrix in group.matrices])
        gap = sums.gap_mean(weight_RC, hessian_CC)
        solutions = solve(view, group, sums, *rest)
        found.append(Handed(group, tuple(m.name for m in group.matrices), hessian_CC, gap, solutions))
        return solutions

    monkeypatch.setattr(solver, "solve_group", noting)
    return found


def heard(model: Any, paths: Iterable[str], ids_ST: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into each of these modules and what comes out, S x T x width."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            answer = output[0] if isinstance(output, tuple) else output
            found[path] = (
                inputs.reshape(*ids_ST.shape, -1).clone(),
                answer.reshape(*ids_ST.shape, -1).clone(),
            )

        return model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    handles = [listen(path) for path in paths]
    logits(model, ids_ST)
    for handle in handles:
        handle.remove()
    return found


def expected_gap(now: Any, before: Any, block: str, path: str, group: Group) -> Tensor:
    """How far what the group is to make up for is from the original model's, S x T x (C or R)."""
    if group.writes == "end":
        return before[block][1] - now[block][1]
    if group.writes == "middle":
        return (before[block][0] + before[path][1]) - (now[block][0] + now[path][1])
    return before[path][0] - now[path][0]


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 2e-3 * expected.norm()


def after_stages(handed: list[Handed], chosen: Recipe) -> list[list[Handed]]:
    """The groups of one block that are compressed when each of them is collected."""
    if chosen.true_sequential:
        return [handed[:number] for number in range(len(handed))]
    if chosen.target == "original":
        return [handed[:-1] if number + 1 == len(handed) else [] for number in range(len(handed))]
    return [[] for _ in handed]


# olmo2 and opt-projected have no norm in front of q, k and v: these see the hidden states themselves.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"true_sequential": True},
        {"target": "original"},
        {"target": "original", "true_sequential": True},
        {"target": "original", "sink_share": 0.3},
        {"sink_share": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "opt-projected", "falcon-new", "gemma3"])
def test_sums_are_those_of_the_inputs(
    family: str, changes: dict[str, Any], tmp_path: Path, text: Path, handed: list[Handed]
) -> None:
    """H of the last block's matrices: the blocks before it are compressed, its own matrices as far as their stage
    comes earlier. The gap: from there to the original model."""
    source = add_tokenizer(make(family, tmp_path / "source"))
    chosen = recipe(text, **{"sink_share": 0.0, **changes})
    api.compress(source, tmp_path / "out", chosen)
    ids_ST = pipeline.calibration_ids(source, chosen)
    assert ids_ST is not None
    last = build(Checkpoint.open(source)).blocks[-1]
    drifted, original = (load_dense(source, CPU, torch.float32) for _ in range(2))
    paths = {matrix.name: f"{last.module}.{matrix.path}" for matrix in last.matrices}
    own = [group for group in handed if group.names[0] in paths]
    for group in handed:
        if group not in own:
            put(drifted, {name: name for name in group.names}, group)
    before = heard(original, [last.module, *paths.values()], ids_ST)
    dense = {path: weight_of(original.get_submodule(path)).clone() for path in paths.values()}
    assert {name for group in own for name in group.names} == paths.keys()
    for group, done in zip(own, after_stages(own, chosen), strict=True):
        for path, weight in dense.items():
            weight_of(drifted.get_submodule(path)).data.copy_(weight)
        for earlier in done:
            put(drifted, paths, earlier)
        now = heard(drifted, [last.module, *paths.values()], ids_ST)
        path = paths[group.names[0]]
        x_STC, gap = now[path][0], expected_gap(now, before, last.module, path, group.group)
        weight_ST = torch.ones(ids_ST.shape)
        if group.group.first and chosen.sink_share:
            size_ST = x_STC.square().sum(-1)
            others, sinks = size_ST[:, 1:].sum(), size_ST[:, 0].sum()
            weight_ST[:, 0] = max(1.0, float(chosen.sink_share / (1 - chosen.sink_share) * others / sinks))
        weighted_STC = x_STC * weight_ST.unsqueeze(-1)
        tokens = ids_ST.numel()
        close(group.hessian_CC, weighted_STC.flatten(0, 1).T @ x_STC.flatten(0, 1) / tokens)
        assert (group.gap is None) == (chosen.target == "drifted")
        if group.gap is not None:
            close(group.gap, gap.flatten(0, 1).T @ weighted_STC.flatten(0, 1) / tokens)


@pytest.mark.parametrize("writes", ["", "middle"])
def test_a_full_pull_is_least_squares(writes: Any, tmp_path: Path) -> None:
    """No weights are nearer to what is wanted, on the inputs as they are; half a pull goes half of the way."""
    draw = torch.Generator().manual_seed(0)
    x_TC, wanted_TC = (torch.randn(200, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    weight_RC, off_TR = torch.randn(6, 12, dtype=torch.float64), torch.randn(200, 6, dtype=torch.float64)
    problem = LayerProblem(weight_RC, x_TC.T @ x_TC / 200, 200, damping=0.0)
    gap = (off_TR if writes else wanted_TC - x_TC).T @ x_TC / 200
    target_TR = x_TC @ weight_RC.T + off_TR if writes else wanted_TC @ weight_RC.T
    best_RC = torch.linalg.lstsq(x_TC, target_TR).solution.T
    group, factor = Group((), writes=writes), problem.factor()
    torch.testing.assert_close(solver.undo_drift(problem, factor, group, gap, 1.0), best_RC)
    half_RC = solver.undo_drift(problem, factor, group, gap, 0.5)
    torch.testing.assert_close(half_RC, (weight_RC + best_RC) / 2)


def put(model: Any, paths: dict[str, str], group: Handed) -> None:
    """Gives a whole model the solved weights of a group."""
    for matrix in group.group.matrices:
        path = paths[matrix.name]
        weight_of(model.get_submodule(path)).data.copy_(group.solutions[matrix.path].values())


def test_matrices_with_one_input_are_solved_together(
    llama: Path, tmp_path: Path, text: Path, handed: list[Handed]
) -> None:
    api.compress(llama, tmp_path / "out", recipe(text))
    inner = [{name.rpartition(".")[2] for name in group.names} for group in handed]
    assert inner == 2 * [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert [group.group.first for group in handed] == 2 * [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_writers_are_found(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The attention's and the MLP's last matrix write to the residual stream, unless something is in between."""
    tree = build(Checkpoint.open(make(family, tmp_path / "source")))
    runner, ids_ST = BlockRunner(tree, CPU, dtype), token_ids(2, 24)
    width = runner.embed(ids_ST).shape[-1]
    states = HiddenStates((2, 24, width), dtype, CPU, tmp_path / "scratch")
    states.fill(2, lambda at: runner.embed(ids_ST[at]))
    module = runner.load(0)
    view = BlockView(module, tree.blocks[0].matrices, lambda x: runner.run(0, module, x), states, states, 2)
    writes = [group.writes for group in input_groups(view) if group.matrices[0].rows == width and not group.first]
    assert writes == (["", ""] if family in NORMED | SCALED else ["middle", "end"])


def test_blocks_made_alike_are_looked_at_once(tmp_path: Path) -> None:
    """What differs but in its weights and its number is looked at; what is found has each block's own names."""
    tree = build(Checkpoint.open(make("llama", tmp_path / "source")))
    runner, ids_ST = BlockRunner(tree, CPU, torch.float32), token_ids(2, 24)
    width = runner.embed(ids_ST).shape[-1]
    states = HiddenStates((2, 24, width), torch.float32, CPU, tmp_path / "scratch")
    states.fill(2, lambda at: runner.embed(ids_ST[at]))
    alike: dict[Any, list[Group]] = {}
    runs: list[int] = []

    def groups_of(index: int, scaled: bool = False) -> list[Group]:
        module = runner.load(index)
        if scaled:
            module.mlp.down_proj.register_buffer("scale", torch.tensor(2.0))
            module.mlp.down_proj.register_forward_hook(lambda own, _, output: output * own.scale)

        def run(states_STD: Tensor) -> Tensor:
            runs.append(index)
            return runner.run(index, module, states_STD)

        return input_groups(BlockView(module, tree.blocks[index].matrices, run, states, states, 2, alike=alike))

    first, second = groups_of(0), groups_of(1)
    assert set(runs) == {0}
    assert [group.writes for group in first] == [group.writes for group in second] == ["", "middle", "", "end"]
    assert [m for group in second for m in group.matrices] == list(tree.blocks[1].matrices)
    assert [group.writes for group in groups_of(1, scaled=True)][-1] == "end"  # noise is put behind the factor
    assert set(runs) == {0, 1}


def test_what_is_put_can_be_undone_for_a_while(tmp_path: Path) -> None:
    tree = build(Checkpoint.open(make("gpt2", tmp_path / "source")))  # Conv1D: kept the other way round
    module = BlockRunner(tree, CPU, torch.float32).load(0)
    matrix = tree.blocks[0].matrices[0]
    view = BlockView(module, tree.blocks[0].matrices, lambda x: x, None, None, 1)
    before = view.weight(matrix).clone()
    for value in (1.0, 2.0):
        view.put(matrix, torch.full_like(before, value))
        assert (view.weight(matrix) == value).all()
        with view.undone():
            assert torch.equal(view.weight(matrix), before)
        assert (view.weight(matrix) == value).all()
