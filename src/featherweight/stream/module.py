"""Compressing any nn.Module with batches of the user's own: encoders, encoder-decoders, convolutional networks.

Nothing is known of the module but its layers. What they see is collected by hooks while the module runs on the
batches; a forward pass is the only way to get from one layer to the next, so layers that are given the very same
tensor are collected together, and a pass ends where the last of them is reached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Rule, parts
from featherweight.core.solution import AnySolution
from featherweight.core.solve import Choices
from featherweight.errors import RequestError
from featherweight.stream import norms
from featherweight.stream.feed import (
    Batches,
    Enough,
    Feed,
    Sightings,
    at_rest,
    check_batches,
    hooked,
    undone_on_error,
    watch,
    working_copy,
)
from featherweight.stream.onelayer import LayerReport, report_row, solve_layer
from featherweight.stream.unfold import InputSum, Layer, find_layers

Passes = Literal["sequential", "one"]
BatchNorms = Literal["shift", "reset", "keep"]
Tell = Callable[[int, int, str], None]
ROW = Grid(group_size=None)


@dataclass(frozen=True)
class ModuleResult:
    """What `compress_module` made.

    Attributes:
        module: the module with compressed values in its (still dense) weights.
        solutions: layer name -> its codes, or its sparse values; a convolution's columns are ordered kernel positions
            first, input channels innermost, and one with groups has a leading axis of them.
        report: a row per compressed weight, in order of execution.
        left: parameters of two or more axes that stay dense -> why.
        readings: how often the batches were read.
    """

    module: nn.Module
    solutions: dict[str, AnySolution]
    report: list[LayerReport]
    left: dict[str, str]
    readings: int


def compress_module(
    module: nn.Module,
    batches: Batches,
    rule: Rule = ROW,
    choices: Choices | None = None,
    *,
    rules: Mapping[str, Rule] | None = None,
    skip: str | Sequence[str] = (),
    passes: Passes = "one",
    damping: float = 0.01,
    batchnorm: BatchNorms = "shift",
    correct: bool = False,
    inplace: bool = False,
    tell: Tell | None = None,
) -> ModuleResult:
    """Quantizes or prunes every Linear, Conv1d, Conv2d, Conv3d and transformers Conv1D of a module.

    Args:
        batches: read several times: each item a tensor, a tuple of arguments or a mapping of named arguments. Padding
            counts like any other input: batch sequences of one length.
        rule: for all layers; the default is 4 bits with a scale for each row.
        choices: how layers are solved, see `core.solve.Choices`.
        rules: pattern -> rule, for layers that are to have another; the first pattern that matches a layer counts.
        skip: patterns of layers to leave dense. A pattern is a layer's name, the name of a module around it, or a
            regular expression for the whole name.
        passes: "one" takes all inputs from the dense module (one reading, all Hessians in memory at once), as OBC does;
            "sequential" solves each layer on the inputs that the compressed layers before it make (a reading for each
            distinct input tensor, only its Hessian in memory).
        damping: added to the diagonal of H, relative to its mean.
        batchnorm: "shift" moves the running statistics of batch norms by as much as compression moves those of the
            batches; "reset" replaces them by those of the batches, as OBC does: best only where the batches are many
            and are what the module was trained on, and each must hold several samples, of mixed classes; "keep" leaves
            them.
        correct: give the outputs of every LayerNorm the dense module's mean and spread again, channel by channel, as
            OBC does; they are absorbed into its weight and bias.
        inplace: change `module` itself; otherwise a deep copy is changed and `module` is left as it is. After an
            error `module` is as it was either way, its modes and hooks included.
        tell: hears (layers done, of how many, what is done now).

    Raises RequestError for batches that can be read only once, patterns that match nothing, rules that do not fit a
    layer's inputs, layers that no batch reaches, and modules with nothing to compress.
    """
    check_batches(batches)
    if passes not in ("sequential", "one"):
        raise RequestError(f'passes must be "sequential" or "one", not {passes!r}.')
    if batchnorm not in ("shift", "reset", "keep"):
        raise RequestError(f'batchnorm must be "shift", "reset" or "keep", not {batchnorm!r}.')
    working = module if inplace else working_copy(module)
    plan = _plan(working, rule, rules or {}, [skip] if isinstance(skip, str) else list(skip))
    job = _Job(working, batches, plan, choices or Choices(), damping, tell or (lambda done, total, what: None))
    changed = [*(layer.parameter for layer in plan.layers), *_norm_tensors(working)]
    with undone_on_error(changed if inplace else ()), at_rest(working):
        return job.run(passes, batchnorm, correct)


@dataclass(frozen=True)
class _Plan:
    """What is compressed to what, and what is not."""

    layers: list[Layer]
    rules: dict[str, Rule]
    left: dict[str, str]


def _plan(module: nn.Module, rule: Rule, rules: Mapping[str, Rule], skip: list[str]) -> _Plan:
    """Finds the layers and checks every pattern and rule against them."""
    unused = {*skip, *rules}

    def matched(name: str, patterns: Sequence[str]) -> str | None:
        hits = [pattern for pattern in patterns if _matches(pattern, name)]
        unused.difference_update(hits)
        return hits[0] if hits else None

    layers, skipped = find_layers(module, lambda name: matched(name, skip) is not None)
    chosen = {}
    for layer in layers:
        pattern = matched(layer.name, list(rules))
        chosen[layer.name] = rule if pattern is None else rules[pattern]
    if unused:
        some = ", ".join(layer.name for layer in layers[:4])
        raise RequestError(
            f"the pattern {sorted(unused)[0]!r} matches none of the {len(layers) + len(skipped)} layers "
            f"({some}, ...): give a name, the module around it, or a regular expression for the whole name."
        )
    if not layers:
        raise RequestError("the module has no Linear, Conv or Conv1D layer that is not skipped: nothing to compress.")
    for layer in layers:
        _check(layer, chosen[layer.name])
    return _Plan(layers, chosen, _left(module, layers, skipped))


def _matches(pattern: str, name: str) -> bool:
    try:
        return name == pattern or name.startswith(f"{pattern}.") or re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise RequestError(
            f"the pattern {pattern!r} is no regular expression ({error}): for anything, write .* and not *."
        ) from error


def _check(layer: Layer, rule: Rule) -> None:
    """Raises RequestError where the rule does not fit the layer's inputs."""
    grid, pattern = parts(rule)
    if grid is not None and grid.group_size and layer.columns % grid.group_size:
        raise RequestError(
            f"{layer.name} has {layer.columns} inputs, which the group size {grid.group_size} does not divide: use "
            "group_size=None (a scale for each row), another size, a rule of its own (rules=), or skip it."
        )
    if pattern is not None:
        try:
            pattern.check(layer.columns, layer.name)
        except RequestError as error:
            raise RequestError(f"{str(error).rstrip('.')}, or skip it.") from error


def _left(module: nn.Module, layers: list[Layer], skipped: list[str]) -> dict[str, str]:
    """Every matrix that stays dense, and why."""
    taken = {id(child.weight) for layer in layers for child in layer.modules}
    left = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 or id(parameter) in taken:
            continue
        owner = name.rpartition(".")[0]
        left[name] = "skipped" if owner in skipped else f"a {type(module.get_submodule(owner)).__name__} is no layer"
    return left


def _norm_tensors(module: nn.Module) -> Iterator[Tensor]:
    for batch_norm in norms.batch_norms(module):
        yield from batch_norm.buffers()
    for norm in norms.layer_norms(module).values():
        yield from norm.parameters()


class _Job:
    """One run of `compress_module`, after everything that can be checked was."""

    def __init__(
        self, module: nn.Module, batches: Batches, plan: _Plan, choices: Choices, damping: float, tell: Tell
    ) -> None:
        self.feed, self.plan, self.choices = Feed(module, batches), plan, choices
        self.damping, self.tell = damping, tell
        self.module, self.layers = module, {layer.name: layer for layer in plan.layers}
        self.solutions: dict[str, AnySolution] = {}
        self.report: list[LayerReport] = []

    def run(self, passes: Passes, batchnorm: BatchNorms, correct: bool) -> ModuleResult:
        layer_norms = norms.layer_norms(self.module) if correct else {}
        batch_norms = [] if batchnorm == "keep" else norms.batch_norms(self.module)
        keys: dict[nn.Module, str] = {child: layer.name for layer in self.plan.layers for child in layer.modules}
        keys |= {norm: f"norm {name}" for name, norm in layer_norms.items()}
        seen = watch(self.feed, keys)
        self._all_reached(seen)
        moments = norms.norm_moments(self.feed, layer_norms) if correct else {}
        dense = {name: found.values() for name, found in moments.items()}
        shifts = bool(batch_norms) and batchnorm == "shift"
        calls = norms.batch_norm_calls(self.feed, batch_norms) if shifts else []
        for stage in _stages(seen, self.layers, passes):
            sums = self._collect(stage, seen)
            for name in stage:
                self._solve(self.layers[name], *sums.pop(name))
        if shifts:
            norms.shift_batch_norms(self.feed, batch_norms, calls)
        elif batch_norms:
            norms.reset_batch_norms(batch_norms, norms.batch_statistics(self.feed, batch_norms))
        if correct:
            single = {name for name in layer_norms if f"norm {name}" in seen.single}
            norms.correct_layer_norms(self.feed, layer_norms, dense, single)
        return ModuleResult(self.module, self.solutions, self.report, self.plan.left, self.feed.readings)

    def _all_reached(self, seen: Sightings) -> None:
        missed = [name for name in self.layers if name not in seen.group]
        if missed:
            more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
            raise RequestError(
                f"the batches never reach {', '.join(missed[:4])}{more} ({len(missed)} of {len(self.layers)} layers): "
                "give batches that do, or skip them."
            )

    def _collect(self, stage: list[str], seen: Sightings) -> dict[str, tuple[Tensor, int]]:
        """H and the number of inputs of every layer of a stage, in one reading of the batches."""
        sums: dict[object, InputSum] = {}
        leader: dict[str, InputSum] = {}
        for name in stage:
            layer, shares = self.layers[name], name in seen.single
            key = (seen.group[name], layer.geometry, layer.columns) if shares else name
            leader[name] = sums.setdefault(key, InputSum(layer))
        early = all(name in seen.single for name in stage)
        waiting: set[int] = set()

        def hear(total: InputSum, given: Tensor) -> None:
            total.add(given)
            waiting.discard(id(total))
            if early and not waiting:
                raise Enough

        heard = {
            child: (lambda given, total=total: hear(total, given))
            for total in sums.values()
            for child in total.layer.modules
        }
        with hooked(heard):
            self.feed.run(lambda: waiting.update(id(total) for total in sums.values()))
        means = {id(total): total.mean() for total in sums.values()}
        return {name: (means[id(leader[name])], leader[name].tokens) for name in stage}

    def _solve(self, layer: Layer, hessian: Tensor, tokens: int) -> None:
        if not tokens:
            raise RequestError(
                f"the batches do not reach {layer.name} any more once the layers before it are compressed: "
                'use passes="one".'
            )
        self.tell(len(self.report), len(self.layers), layer.name)
        rule = self.plan.rules[layer.name]
        problem = LayerProblem(layer.matrix(), hessian, tokens, self.damping, layer.name)
        solution = solve_layer(problem, rule, self.choices)
        layer.put(solution.values())
        self.solutions[layer.name] = solution
        self.report.append(report_row(layer, problem, solution, rule))
        self.tell(len(self.report), len(self.layers), layer.name)


def _stages(seen: Sightings, layers: Mapping[str, Layer], passes: Passes) -> list[list[str]]:
    """Layers that are collected in one reading of the batches, in order of execution."""
    names = [key for key in seen.order if key in layers]
    if passes == "one":
        return [names]
    stages: dict[int, list[str]] = {}
    for name in names:
        stages.setdefault(seen.group[name], []).append(name)
    return list(stages.values())
