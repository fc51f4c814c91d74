"""Compressed layers that are given the same input, multiplied as one matrix.

Shapes: R outputs, C inputs, T tokens (any leading axes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight.formats import AnySolution, Solution, by_name
from featherweight.kernels import Restorable, Run, pick
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
        self._bias_R: Tensor | None = None
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
                biases: list[Tensor] = [each.bias for each in self.layers if each.bias is not None]
                self._bias_R = torch.cat(biases) if biases else None
                if isinstance(self._run, Restorable):
                    self._release(self._run.solution)
        return True

    def _release(self, solution: Callable[[], Solution]) -> None:
        """Let the layers' own tensors go: each is made of its rows of the whole where it is asked for."""
        start = 0
        for layer, size in zip(self.layers, self.sizes, strict=True):
            layer.release(partial(_rows, solution, start, start + size))
            start += size

    def whole(self, x_TC: Tensor) -> Tensor:
        """The rows of all layers side by side, after `prepare`."""
        assert self._run is not None
        return self._run(x_TC, self._bias_R)

    def part(self, layer: CompressedLinear, x_TC: Tensor) -> Tensor:
        """The rows of one layer, after `prepare`."""
        last = self._last
        if last is None or last[0] is not x_TC:
            self._last = last = (x_TC, self.whole(x_TC).split(self.sizes, dim=-1))
        if layer is self.layers[-1]:
            self._last = None  # nothing is kept beyond the last of them
        index = next(number for number, each in enumerate(self.layers) if each is layer)
        return last[1][index]

    def forget(self) -> None:
        self._run = self._last = self._bias_R = None


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


def together(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """x_TC -> the outputs of all layers side by side, T x the sum of their rows.

    One product where `merge` made them one, or where they are dense and alike: then their weights become views of one
    matrix, the same values under the same names. Else each multiplies by itself.
    """
    first = layers[0]
    merged = first._merged if isinstance(first, CompressedLinear) else None
    if merged is not None and tuple(layers) == merged.layers and merged.prepare():
        whole: Callable[[Tensor], Tensor] = merged.whole
        return whole
    dense = [layer for layer in layers if type(layer) is nn.Linear]
    kinds = {(layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in dense}
    if len(dense) < len(layers) or len(kinds) > 1:
        return lambda x_TC: torch.cat([layer(x_TC) for layer in layers], dim=-1)
    weight_RC, biases = _one_matrix(dense), [layer.bias for layer in dense if layer.bias is not None]
    bias_R = torch.cat([bias.detach() for bias in biases]) if biases else None
    return lambda x_TC: functional.linear(x_TC, weight_RC, bias_R)


def _one_matrix(layers: Sequence[nn.Linear]) -> Tensor:
    """Their weights below one another, of which each layer's is from now on a view."""
    weights = [layer.weight.detach() for layer in layers]
    first = weights[0]
    starts = list(accumulate((each.numel() for each in weights[:-1]), initial=first.storage_offset()))
    shared = len({each.untyped_storage().data_ptr() for each in weights}) == 1
    if shared and [each.storage_offset() for each in weights] == starts and all(map(Tensor.is_contiguous, weights)):
        return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))
    weight_RC = torch.cat(weights)
    for layer, part_RC in zip(layers, weight_RC.split([len(each) for each in weights]), strict=True):
        layer.weight.data = part_RC
    return weight_RC


def _siblings(model: nn.Module) -> Iterator[list[CompressedLinear]]:
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, CompressedLinear) for layer in layers):
                yield layers  # type: ignore[misc]


def _rows(solution: Callable[[], Solution], start: int, stop: int) -> Solution:
    return solution().rows(start, stop)


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
