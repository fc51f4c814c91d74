"""One step of training a block: round, run there and back, and go down the gradients.

The block runs with its matrices as plain tensors. What they are made of, and what their gradients do to that, is each
matrix's own: one kernel (`fused`), or autograd. Between the two the gradients of several processes are added up. What
is the same every time becomes a CUDA graph: the whole step where kernels do all of it, else the run there and back.
Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from featherweight.errors import FallbackWarning
from featherweight.train import fused
from featherweight.train.adam import adam_
from featherweight.train.compiled import Compiled
from featherweight.train.trainable import Trainable

Run = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
EAGER = 3  # runs before one is captured: libraries set themselves up in the first
WORTH_COMPILING = 1e15  # operations of a block's training, seconds of a GPU


class Processes(Protocol):
    """Those that train together, each on its own sequences."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum_(self, tensor: Tensor) -> None:
        """Puts in a tensor's place its sum over all of them."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def sum_(self, tensor: Tensor) -> None:
        """Nothing to add."""


ALONE = Alone()


class Stepper:
    """The matrices of a block in training, in place of the module's own weights while `placed`."""

    def __init__(
        self, module: nn.Module, layers: Mapping[str, Trainable], run: Run, loss: Loss, processes: Processes
    ) -> None:
        self.module, self.layers, self.processes = module, layers, processes
        owned = [module.get_parameter(f"{path}.weight") for path in layers]
        self.leaves = [torch.empty_like(weight, requires_grad=True) for weight in owned]
        self.averages = [
            [(torch.zeros_like(p), torch.zeros_like(p)) for p in (*layer.weights, *layer.steps)]
            for layer in layers.values()
        ]
        self.run, self.loss = run, loss
        self.at_once = processes.size == 1 and self._by_kernels()
        self.replayed = Replayed(self._whole_step if self.at_once else self.there_and_back, self.leaves)

    def _by_kernels(self) -> bool:
        return all(fused.usable(layer) for layer in self.layers.values())

    @contextmanager
    def placed(self, tokens: int = 0) -> Iterator[None]:
        """The module with the matrices in training in place of its weights, in their dtype and layout.

        Where so many `tokens` are to be trained on that it pays, its forward is compiled for as long.
        """
        own: list[tuple[nn.Module, nn.Parameter]] = []
        operations = 6 * tokens * sum(leaf.numel() for leaf in self.leaves)
        try:
            if self.leaves[0].is_cuda and operations > WORTH_COMPILING:
                self.module.__dict__["forward"] = Compiled(self.module.forward)
            for path, leaf in zip(self.layers, self.leaves, strict=True):
                owner = self.module.get_submodule(path)
                weight = owner._parameters.pop("weight")
                assert weight is not None
                own.append((owner, weight))
                owner.__dict__["weight"] = leaf
            yield
        finally:
            self.module.__dict__.pop("forward", None)
            for owner, weight in own:
                owner.__dict__.pop("weight", None)
                owner._parameters["weight"] = weight

    @torch.no_grad()
    def write(self, pace: Tensor, soft: bool) -> None:
        """Rounds: the matrices as they are trained at this moment, or, without `soft`, with whole codes (`pace` says
        the same to the kernels)."""
        for layer, leaf in zip(self.layers.values(), self.leaves, strict=True):
            matrix_RC = leaf.detach().T if layer.transposed else leaf.detach()
            if not fused.write_values(layer, matrix_RC, pace):
                matrix_RC.copy_(layer.values(soft))

    def step(self, inputs_STD: Tensor, targets_STD: Tensor, pace: Tensor, progress: float) -> None:
        """One step on one batch, the matrices written anew first."""
        for layer in self.layers.values():
            layer.harden(progress)
        if self.at_once and not self._by_kernels():  # one has failed: from here on numbers come from Python too
            self.at_once, self.replayed = False, Replayed(self.there_and_back, self.leaves)
        if self.at_once:
            self.replayed(inputs_STD, targets_STD, pace)
            return
        self.write(pace, soft=True)
        self.replayed(inputs_STD, targets_STD)
        for leaf in self.leaves:
            assert leaf.grad is not None
            self.processes.sum_(leaf.grad)
        self._descend(pace)

    def _whole_step(self, inputs_STD: Tensor, targets_STD: Tensor, pace: Tensor) -> None:
        """Where all that changes from step to step is in tensors, so that a graph can hold all of it."""
        self.write(pace, soft=True)
        self.there_and_back(inputs_STD, targets_STD)
        self._descend(pace)

    def there_and_back(self, inputs_STD: Tensor, targets_STD: Tensor) -> None:
        """The block's run on one batch; each matrix has its gradient then."""
        for leaf in self.leaves:
            leaf.grad = None
        with torch.enable_grad():
            (self.loss(self.run(inputs_STD), targets_STD) / self.processes.size).backward()  # type: ignore[no-untyped-call]
        for leaf in self.leaves:  # an expert that was sent no token has no gradient
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def _descend(self, pace: Tensor) -> None:
        for layer, leaf, averages in zip(self.layers.values(), self.leaves, self.averages, strict=True):
            assert leaf.grad is not None
            gradient_RC = leaf.grad.T if layer.transposed else leaf.grad
            if not fused.step(layer, averages, gradient_RC, pace):
                _plain_step(layer, averages, gradient_RC, pace)


def _plain_step(layer: Trainable, averages: fused.Averages, gradient_RC: Tensor, pace: Tensor) -> None:
    parameters = [*layer.weights, *layer.steps]
    with torch.enable_grad():
        gradients = torch.autograd.grad(layer.values(soft=True), parameters, gradient_RC.float())
    with torch.no_grad():
        for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            rate = pace[0] if number < len(layer.weights) else pace[1]
            adam_(parameter, gradient, *averages[number], rate, pace[2])
    layer.tidy()


class Replayed:
    """A function of tensors that leaves gradients in `leaves`: as it is a few times, then as a CUDA graph.

    Where it cannot be captured (a family that looks at numbers on the way), one FallbackWarning, and it runs as it is.
    """

    def __init__(self, function: Callable[..., None], leaves: list[Tensor]) -> None:
        self.function, self.leaves = function, leaves
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls, self.refused = 0, not leaves[0].is_cuda

    def __call__(self, *arguments: Tensor) -> None:
        self.calls += 1
        if self.graph is None and self.calls > EAGER and not self.refused:
            self._capture(*arguments)
        if self.graph is None:
            self.function(*arguments)
            return
        for held, argument in zip(self.held, arguments, strict=True):
            held.copy_(argument)
        for leaf, gradient in zip(self.leaves, self.gradients, strict=True):
            leaf.grad = gradient
        self.graph.replay()

    def _capture(self, *arguments: Tensor) -> None:
        self.held = [argument.clone() for argument in arguments]
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may use the GPU meanwhile: the one that writes shards, and NCCL's, which asks after its sums
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.function(*self.held)
        except RuntimeError as error:
            self.refused = True
            reason = str(error).strip().splitlines()[0][:200]
            warnings.warn(
                f"this block cannot be captured as a CUDA graph ({reason}): its steps are started one by one, slower.",
                FallbackWarning,
                stacklevel=2,
            )
            return
        self.graph = graph
        self.gradients = [leaf.grad for leaf in self.leaves]
