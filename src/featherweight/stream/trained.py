"""The block solver that trains: whatever the layer-wise solvers find is where Block-AP begins.

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from featherweight.core.rules import Rule
from featherweight.core.solution import AnySolution, Solution
from featherweight.core.solve import Choices
from featherweight.errors import FallbackWarning, FeatherweightError, RequestError
from featherweight.models.tree import Matrix
from featherweight.recipe import Recipe
from featherweight.stream.groups import Kept
from featherweight.stream.inputs import BlockView, Tick
from featherweight.stream.layerwise import layerwise
from featherweight.stream.parallel import World
from featherweight.train.block_ap import Outcome, Schedule, block_ap, held_out_loss
from featherweight.train.sequences import Sequences
from featherweight.train.trainable import NEAR, Trainable, TrainedFloats, TrainedGrid, TrainedRounding, beginning

START = 0.2  # of a block's work is finding where to begin


def trained(
    view: BlockView, rules: Mapping[str, Rule], recipe: Recipe, choices: Choices, tick: Tick
) -> dict[str, AnySolution]:
    """Solves a block layer by layer (`recipe.start`), then trains all its matrices together; solutions by path.

    Inputs are those the compressed model brings, targets the outputs of the original block on the original model's
    inputs. What is kept is the state with the least held-out loss, the start among them; where a loss is not finite it
    is the start, with a FallbackWarning and a mark in the journal, or a RequestError (`recipe.diverged`). `loss_R` of
    every solution is tr(D H D^T) as the held-out sequences have it: H undamped, of the trained block's inputs; D to the
    original weights.
    """
    start = _start(view, rules, recipe, choices, lambda share: tick(START * share))
    view.ready()  # steps are captured as graphs, which bear no other thread's work
    layers = {m.path: _trainable(view, m, start[m.path], recipe, choices) for m in view.matrices}
    schedule = _schedule(recipe)
    assert view.inputs is not None and view.dense is not None
    states = view.inputs.states_STD, view.dense.states_STD
    held_out = len(_part(recipe.held_out_samples, view.world))
    sequences = Sequences(*states, held_out=held_out, device=view.inputs.device)

    def told(share: float) -> None:
        tick(START + (1 - START) * share)

    outcome = block_ap(view.module, view.run, layers, sequences, schedule, told, view.world)
    if not outcome.finite:
        _tell_diverged(view, recipe)
    solutions = outcome.solutions if outcome.epoch else start
    for matrix in view.matrices:
        view.put(matrix, solutions[matrix.path].values())
    _check(view, outcome, held_out_loss(view.run, sequences, schedule, view.world))
    return _measured(view, solutions, sequences, schedule, outcome)


def _part(count: int, world: World) -> range:
    """This process's part of `count` things in a row."""
    part = world.split(count)
    return range(part.start, part.stop)


def dealt(ids_ST: Tensor, recipe: Recipe, world: World) -> Tensor:
    """The windows in the order in which each process's part of them, a run, ends with its share of the held-out ones.

    RequestError where a process would have nothing to train on, or the sequences of a step cannot be shared evenly.
    """
    if world.size == 1 or not recipe.trains:
        return ids_ST
    if recipe.batch % world.size:
        raise RequestError(
            f"{world.size} processes were to share steps of {recipe.batch} sequences evenly: use --batch "
            f"{-(-recipe.batch // world.size) * world.size}."
        )
    training, order = recipe.samples - recipe.held_out_samples, []
    taken = 0
    for rank in range(world.size):
        each = World(rank, world.size)
        held = _part(recipe.held_out_samples, each)
        count = len(_part(recipe.samples, each)) - len(held)
        if count < recipe.batch // world.size:
            raise RequestError(
                f"process {rank} of {world.size} has {count} sequences to train on and a step takes "
                f"{recipe.batch // world.size} from each: raise --samples or lower --batch."
            )
        order += [*range(taken, taken + count), *(training + number for number in held)]
        taken += count
    return ids_ST[order]


def _schedule(recipe: Recipe) -> Schedule:
    alike = recipe.units == "steps"
    rates = recipe.first_weight_rate, recipe.scale_rate
    return Schedule(recipe.epochs, recipe.batch, *rates, alike, recipe.seed)


def _start(
    view: BlockView, rules: Mapping[str, Rule], recipe: Recipe, choices: Choices, tick: Tick
) -> dict[str, AnySolution]:
    """The layer-wise solutions; `view.dense` then holds the original block's outputs."""
    solutions = layerwise(view, rules, replace(recipe, method=recipe.start), choices, tick)
    if recipe.start == "rtn":  # which runs nothing
        assert view.dense is not None
        view.dense.advance(view.batch, view.run)
    found = {path: solution for path, solution in solutions.items() if not isinstance(solution, Kept)}
    assert len(found) == len(solutions), "experts that are apart are not trained"
    return found


def _original(view: BlockView, matrix: Matrix) -> Tensor:
    """The matrix as R x C float32 before anything was put in its place."""
    with view.undone():
        return view.weight(matrix)


def _trainable(view: BlockView, matrix: Matrix, start: AnySolution, recipe: Recipe, choices: Choices) -> Trainable:
    relative = recipe.units == "steps"
    if not isinstance(start, Solution):
        layer: Trainable = TrainedFloats(start, choices.value_dtype, relative)
    else:
        weight_RC = _original(view, matrix)
        if recipe.tune == "rounding":
            layer = TrainedRounding(start, weight_RC)
        else:
            latent_RC = weight_RC if recipe.start == "rtn" else beginning(start, weight_RC, NEAR)
            layer = TrainedGrid(start, latent_RC, choices.lowest_zero, relative)
    layer.transposed = matrix.transposed
    return layer


def _tell_diverged(view: BlockView, recipe: Recipe) -> None:
    said = f"the block of {view.matrices[0].name} was trained to a loss that is not finite"
    if recipe.diverged == "error":
        raise RequestError(f"{said}: lower --weight-rate or --scale-rate, or use --diverged restore.")
    warnings.warn(
        f"{said}: it keeps the solution it began with; lower --weight-rate or --scale-rate.",
        FallbackWarning,
        stacklevel=2,
    )


def _check(view: BlockView, outcome: Outcome, actual: float) -> None:
    """The held-out loss that training claims against that of the values its codes stand for."""
    if outcome.finite and not abs(actual - outcome.best) <= 1e-3 * abs(actual) + 1e-12:
        raise FeatherweightError(
            f"the block of {view.matrices[0].name} claims a held-out loss of {outcome.best:.6g} and its codes have "
            f"{actual:.6g}: please report this."
        )


@torch.no_grad()
def _measured(
    view: BlockView,
    solutions: Mapping[str, AnySolution],
    sequences: Sequences,
    schedule: Schedule,
    outcome: Outcome,
) -> dict[str, AnySolution]:
    """The solutions with their layer losses on the held-out sequences, and with what the journal is to say."""
    deltas = {m.path: _original(view, m) - solutions[m.path].values() for m in view.matrices}
    losses = {m.path: torch.zeros(m.rows, device=sequences.device) for m in view.matrices}
    energies = {m.path: torch.zeros((), device=sequences.device) for m in view.matrices}
    tokens = dict.fromkeys(losses, 0)  # an expert sees those that are sent to it, which may be none
    originals = {m.path: _original(view, m) for m in view.matrices}

    def add(path: str, inputs_STC: Tensor) -> None:
        inputs_NC = inputs_STC.flatten(0, -2).float()
        losses[path] += (inputs_NC @ deltas[path].T).square().sum(0)
        energies[path] += (inputs_NC @ originals[path].T).square().sum()
        tokens[path] += len(inputs_NC)

    hooks = [
        view.module.get_submodule(m.path).register_forward_pre_hook(lambda _, args, path=m.path: add(path, args[0]))
        for m in view.matrices
    ]
    held_S = torch.arange(sequences.training, sequences.inputs_STD.shape[0])
    batches = held_S.split(schedule.batch) if len(held_S) else ()
    try:
        for at_S in batches:
            view.run(sequences.take(at_S)[0])
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for path, solution in solutions.items():
        for sums in (losses[path], energies[path]):
            view.world.sum_(sums)
        count = max(1, view.world.add_up(tokens[path]))
        loss_R, energy = losses[path] / count, float(energies[path]) / count
        metrics = {
            "relative_loss": float(loss_R.sum()) / energy if energy else 0.0,
            "block_loss": outcome.best,
            "block_loss_before": outcome.start,
            "epoch": outcome.epoch,
        }
        metrics |= {} if outcome.finite else {"not_finite": 1.0}
        found[path] = replace(solution, loss_R=loss_R, damping=0.0, metrics=metrics)
    return found
