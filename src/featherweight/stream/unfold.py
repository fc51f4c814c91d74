"""Layers of any module as matrices: the weights they hold, and the inputs those weights meet.

A convolution is a matrix that meets patches of its input. Its columns are taken kernel position by kernel position,
input channels innermost, so that neighbours in a group or an N:M pattern are channels, as sparse kernels want them.

Shapes: E problems of one shape (the groups of a convolution), R outputs, C inputs, T tokens or patches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.core.hessian import HessianSum
from featherweight.errors import RequestError

PATCH_ELEMENTS = 1 << 23  # of unfolded inputs in memory at a time
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """One weight that several modules may share.

    Attributes:
        name: of the first module that holds it.
        kind: "Linear", "Conv1d", "Conv2d", "Conv3d" or "Conv1D" (transformers' transposed linear layer).
        modules: all modules that multiply by it; they are of one kind and one geometry.
        tied: the other parameters' names that are the same weight, embeddings included.
    """

    name: str
    kind: str
    modules: tuple[nn.Module, ...]
    tied: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        weight = self.modules[0].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def problems(self) -> int:
        """E: the groups of a convolution; 1 for everything else."""
        module = self.modules[0]
        return module.groups if isinstance(module, CONVOLUTIONS) else 1

    @property
    def columns(self) -> int:
        """C: what one output is a sum of."""
        shape = self.parameter.shape
        return shape[0] if self.kind == "Conv1D" else shape[1:].numel()

    @property
    def geometry(self) -> tuple[object, ...]:
        """Layers of one geometry that are given the same tensor meet the same inputs."""
        module = self.modules[0]
        if not isinstance(module, CONVOLUTIONS):
            return ()
        at = (module.kernel_size, module.stride, module.padding, module.dilation)
        return (*at, module.groups, module.padding_mode)

    def matrix(self) -> Tensor:
        """A float32 copy of the weight, R x C, or E x R x C where a convolution has groups."""
        weight = self.parameter.detach()
        if self.kind == "Conv1D":
            weight = weight.T
        elif weight.dim() > 2:
            weight = weight.movedim(1, -1).flatten(1)
        if self.problems > 1:
            weight = weight.unflatten(0, (self.problems, -1))
        return weight.to(torch.float32, copy=True).contiguous()

    def put(self, values: Tensor) -> None:
        """Writes values in the shape of `matrix` into the weight, in place and in its own dtype."""
        weight = self.parameter
        if self.kind == "Conv1D":
            values = values.T
        elif weight.dim() > 2:
            kernel_last = weight.movedim(1, -1).shape
            values = values.reshape(kernel_last).movedim(-1, 1)
        with torch.no_grad():
            weight.copy_(values)

    def inputs(self, given: Tensor) -> Iterator[Tensor]:
        """What the matrix meets when the module is given a tensor: T x C, or E x T x C, piece by piece."""
        module = self.modules[0]
        if not isinstance(module, CONVOLUTIONS):
            yield given.reshape(-1, given.shape[-1])
            return
        for part in _pieces(_windows(module, given)):
            x_TKI = part.flatten(len(module.kernel_size) + 1, -2).flatten(0, len(module.kernel_size))
            if self.problems == 1:
                yield x_TKI.flatten(1)
            else:
                yield x_TKI.unflatten(-1, (self.problems, -1)).permute(2, 0, 1, 3).flatten(2)


class InputSum:
    """X^T X / T of one layer's inputs, added up call by call; C x C, or E x C x C."""

    def __init__(self, layer: Layer) -> None:
        device, self.layer = layer.parameter.device, layer
        self.whole = HessianSum(layer.columns, device) if layer.problems == 1 else None
        self.sum_ECC = torch.zeros(layer.problems, layer.columns, layer.columns, device=device)
        self.tokens = 0

    def add(self, given: Tensor) -> None:
        for x in self.layer.inputs(given):
            self.tokens += x.shape[-2]
            if self.whole is not None:
                self.whole.add(x)
            else:
                x_ETC = x.float()
                self.sum_ECC.baddbmm_(x_ETC.mT, x_ETC)

    def mean(self) -> Tensor:
        return self.sum_ECC / max(self.tokens, 1) if self.whole is None else self.whole.mean()


def find_layers(module: nn.Module, skipped: Callable[[str], bool]) -> tuple[list[Layer], list[str]]:
    """Every weight of a supported layer, once each, in the order of the module tree, and the names to be skipped.

    A weight that any skipped layer shares is skipped. Raises RequestError where a weight that is not skipped is no
    plain floating-point parameter.
    """
    names: dict[object, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(_identity(parameter), []).append(name)
    found: dict[tuple[object, str], list[tuple[str, nn.Module]]] = {}
    left: list[str] = []
    kept_out: set[object] = set()
    for name, child in module.named_modules():
        kind = _kind(child)
        if kind is not None and skipped(name):
            left.append(name)
            kept_out.update(_identity(weight) for weight in child.parameters(recurse=False))
        elif kind is not None:
            found.setdefault((_identity(_weight(child, name or kind)), kind), []).append((name, child))
    layers = []
    for (identity, kind), holders in found.items():
        if identity in kept_out:
            left += [name for name, _ in holders]
            continue
        name = holders[0][0]
        tied = tuple(other for other in names[identity] if other != f"{name}.weight".lstrip("."))
        layer = Layer(name, kind, tuple(child for _, child in holders), tied)
        if any(Layer(name, kind, (child,)).geometry != layer.geometry for child in layer.modules):
            raise RequestError(f"{name} shares its weight with a convolution of another geometry: skip it.")
        layers.append(layer)
    return layers, left


def _kind(module: nn.Module) -> str | None:
    """The supported kind a module is of; subclasses count as their base."""
    for kind in (nn.Linear, *CONVOLUTIONS):
        if isinstance(module, kind):
            return kind.__name__
    transformers = sys.modules.get("transformers.pytorch_utils")  # not loaded: no module can be one of its
    return "Conv1D" if transformers is not None and isinstance(module, transformers.Conv1D) else None


def _weight(module: nn.Module, name: str) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or not weight.is_floating_point():
        raise RequestError(
            f"{name} has no plain floating-point weight: remove its parametrization or quantization, run a lazy module "
            "once, or take it out of the module."
        )
    return weight


def _identity(weight: Tensor) -> object:
    """The same for tensors that are the same memory."""
    if nn.parameter.is_lazy(weight):
        return id(weight)
    return (weight.device, weight.data_ptr(), weight.shape, weight.stride()) if weight.numel() else id(weight)


def _windows(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, given: Tensor) -> Tensor:
    """A view of the padded input as batch x output positions x kernel positions x input channels."""
    axes = len(conv.kernel_size)
    x = given if given.dim() == axes + 2 else given.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    around = _padding(conv.kernel_size, conv.dilation, conv.padding)
    if any(around):
        x = F.pad(x, around, mode=mode)
    for axis in range(axes):
        dilation = conv.dilation[axis]
        reach = dilation * (conv.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, conv.stride[axis])[..., ::dilation]
    return x.movedim(1, -1)


def _padding(kernel: Sequence[int], dilation: Sequence[int], padding: str | Sequence[int]) -> list[int]:
    """What F.pad is to add, last axis first; "same" pads the odd element at the end, as torch does."""
    around: list[int] = []
    for axis in reversed(range(len(kernel))):
        if isinstance(padding, str):
            total = dilation[axis] * (kernel[axis] - 1) if padding == "same" else 0
            around += [total // 2, total - total // 2]
        else:
            around += [padding[axis], padding[axis]]
    return around


def _pieces(windows: Tensor) -> Iterator[Tensor]:
    """The windows by as many images as fit, or by rows of one image's output where one is too large."""
    one_image = windows[:1].numel()
    if one_image <= PATCH_ELEMENTS:
        yield from windows.split(max(1, PATCH_ELEMENTS // max(one_image, 1)))
        return
    rows = max(1, PATCH_ELEMENTS // windows[:1, :1].numel())
    for image in windows.split(1):
        yield from image.split(rows, 1)
