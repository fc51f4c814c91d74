"""One layer of any module: solved with or without a leading axis, and what there is to say of the result.

Shapes: E problems of one shape (groups of a convolution), R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featherweight.core.problem import Factor, LayerProblem, loss_R
from featherweight.core.rules import Grid, Pattern, Rule
from featherweight.core.solution import AnySolution, Solution, SparseSolution
from featherweight.core.solve import Choices, solve
from featherweight.stream.unfold import Layer


@dataclass(frozen=True)
class LayerReport:
    """One compressed weight.

    Attributes:
        name, kind, shape: of the first module that holds it; the shape is the parameter's own.
        rule: what the weight obeys now.
        loss: mean squared error of the layer's output, summed over outputs: tr(D H D^T) of the stored values, H as
            measured; times `tokens` it is the sum over all inputs (patches) the layer saw.
        relative_loss: the same over tr(W H W^T).
        bits_per_weight: codes, scales, zeros and masks as a file needs them (pruned floats in the weight's own dtype).
        sparsity: the share of weights that are zero.
        tokens: inputs (for a convolution: patches) seen.
        tied: other parameters that are the same weight, and so changed with it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rule: Rule
    loss: float
    relative_loss: float
    bits_per_weight: float
    sparsity: float
    tokens: int
    tied: tuple[str, ...] = ()


def solve_layer(problem: LayerProblem, rule: Rule, choices: Choices, factor: Factor | None = None) -> AnySolution:
    """The solution of one layer; problems with a leading axis one by one where the method takes no such axis.

    `factor` is the problem's in the chosen order, where the caller has it.
    """
    greedy = choices.method == "obq" and not isinstance(rule, Pattern)
    masked = not isinstance(rule, Grid) and choices.method != "rtn" and (choices.mask != "admm" or choices.swaps > 0)
    if problem.weight_RC.dim() == 2 or not (greedy or masked):
        return solve(problem, rule, choices, factor)
    parts = [
        solve(replace(problem, weight_RC=weight_RC, hessian_CC=hessian_CC), rule, choices)
        for weight_RC, hessian_CC in zip(problem.weight_RC, problem.hessian_CC, strict=True)
    ]
    return _stacked(parts)


def _stacked(parts: Sequence[AnySolution]) -> AnySolution:
    """Solutions of equal shape as one with a leading axis; the damping is the largest of theirs."""

    def stack(field: str) -> Tensor:
        return torch.stack([getattr(part, field) for part in parts])

    first, damping = parts[0], max(part.damping for part in parts)
    if isinstance(first, SparseSolution):
        fields = {name: stack(name) for name in ("values_RC", "keep_RC", "loss_R")}
    else:
        fields = {name: stack(name) for name in ("codes_RC", "scales_RG", "zeros_RG", "loss_R")}
        if first.keep_RC is not None:
            fields["keep_RC"] = stack("keep_RC")
    return replace(first, damping=damping, **fields)  # type: ignore[arg-type]


def report_row(layer: Layer, problem: LayerProblem, solution: AnySolution, rule: Rule) -> LayerReport:
    """The report of a layer whose weight holds the solution's values by now."""
    stored_RC = layer.matrix()
    loss = float(loss_R(problem, stored_RC).double().sum())
    energy = float(loss_R(problem, torch.zeros_like(stored_RC)).double().sum())
    dtype = layer.parameter.dtype
    return LayerReport(
        layer.name,
        layer.kind,
        tuple(layer.parameter.shape),
        rule,
        loss,
        loss / energy if energy else 0.0,
        stored_bits(solution, dtype),
        float((stored_RC == 0).double().mean()),
        problem.tokens,
        layer.tied,
    )


def stored_bits(solution: AnySolution, dtype: torch.dtype) -> float:
    """Bits per weight that a file needs: values or codes that are kept, their places, scales and zeros.

    The places of N:M sparsity are indices of ceil(log2 M) bits (or a bit per weight, whichever is less), those of
    unstructured sparsity a bit per weight (per block).
    """
    pattern = solution.pattern
    kept = 1.0 if solution.keep_RC is None else float(solution.keep_RC.double().mean())
    places = 0.0
    if pattern is not None:
        mask = 1.0 / pattern.block
        places = min(mask, kept * (pattern.of - 1).bit_length()) if pattern.of else mask
    if isinstance(solution, Solution):
        scales = solution.scales_RG.numel() / solution.codes_RC.numel() * 8 * solution.scales_RG.dtype.itemsize
        zeros = 0.0 if solution.grid.symmetric else solution.zeros_RG.numel() / solution.codes_RC.numel()
        return kept * solution.grid.stored_bits + places + scales + zeros * solution.grid.stored_bits
    return kept * 8 * dtype.itemsize + places
