"""Compressed layers that are given the same input, multiplied as one matrix.

Shapes: R outputs, C inputs, T tokens (any leading axes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from featherweight.formats import AnySolution, Solution, by_name
from featherweight.kernels import Run, pick
from featherweight.linear import CompressedLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers of one parent that are given the same input, by what families call them."""
ALONE = ("reference", "dense", "dequantize", "sub1-tiles", "sub1-cuda")
"""Kernels that gain nothing from more rows at once."""


class Merged:
    """Layers with one input, multiplied as one matrix: the first that is called computes for all.

    The layers keep their tensors and names; only what the kernel makes of them is shared. Whoever is called with the
    very tensor that the last product was made of gets its rows of it; with any other, all are multiplied again: never
    wrong, only slower. (A tensor changed in place between two of the calls would go unnoticed; attention and MLPs of
    transformers call them one after another.)
    """

    def __init__(self, layers: Sequence[CompressedLinear]) -> None:
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        self._run: Run | None = None
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def fits(self) -> bool:
        """Whether they are alike, and one kernel that gains from it takes them together."""
        first = self.layers[0]
        same = ("format", "rule", "in_features", "dtype", "device", "wanted")
        kinds = {(*(getattr(each, name) for name in same), each.bias is None) for each in self.layers}
        if len(kinds) > 1 or first.kernel.name in ALONE:
            return False
        case = (first.format, first.rule, sum(self.sizes), first.in_features, first.dtype, first.device)
        return pick(*case, wanted=first.wanted).name == first.kernel.name

    def prepare(self) -> bool:
        """Have the kernel rearrange them together, once; False, and every layer alone again, if they fit no longer."""
        if self._run is None:
            if not self.fits():
                for layer in self.layers:
                    layer._merged = None
                return False
            first = self.layers[0]
            with torch.inference_mode(False), torch.no_grad():
                solution, codes = _stacked([layer.solution() for layer in self.layers]), by_name("compressed-tensors")
                self._run = first.kernel.prepare(codes, solution.grid, codes.pack(solution), first.dtype)
        return True

    def part(self, layer: CompressedLinear, x_TC: Tensor) -> Tensor:
        """The rows of one layer, after `prepare`."""
        last = self._last
        if last is None or last[0] is not x_TC:
            assert self._run is not None
            biases: list[Tensor] = [each.bias for each in self.layers if each.bias is not None]
            y_TR = self._run(x_TC, torch.cat(biases) if biases else None)
            self._last = last = (x_TC, y_TR.split(self.sizes, dim=-1))
        if layer is self.layers[-1]:
            self._last = None  # nothing is kept beyond the last of them
        index = next(number for number, each in enumerate(self.layers) if each is layer)
        return last[1][index]

    def forget(self) -> None:
        self._run = self._last = None


def merge(model: nn.Module) -> int:
    """Let compressed layers that are given the same input (q, k and v; gate and up) multiply as one where they are of
    one format, rule, dtype and kernel; returns how many products there are now for such layers.

    Module and tensor names, state dict and numbers stay: a kernel may add up a row's terms in another order, no more.
    """
    found = [Merged(layers) for layers in _siblings(model)]
    fitting = [merged for merged in found if merged.fits()]
    for merged in fitting:
        for layer in merged.layers:
            layer._merged, layer._run = merged, None
    return len(fitting)


def prepare(model: nn.Module) -> None:
    """Let the kernels of all compressed layers rearrange their weights now rather than in the first call."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.prepare()


def _siblings(model: nn.Module) -> Iterator[list[CompressedLinear]]:
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, CompressedLinear) for layer in layers):
                yield layers  # type: ignore[misc]


def _stacked(solutions: Sequence[AnySolution]) -> Solution:
    """Codes, scales and zeros below one another."""
    codes = [solution for solution in solutions if isinstance(solution, Solution)]
    assert len(codes) == len(solutions), "kernels that merge multiply by codes"
    return replace(
        codes[0],
        codes_RC=torch.cat([each.codes_RC for each in codes]),
        scales_RG=torch.cat([each.scales_RG for each in codes]),
        zeros_RG=torch.cat([each.zeros_RG for each in codes]),
        loss_R=torch.cat([each.loss_R for each in codes]),
        keep_RC=None,
        pattern=None,
    )
