"""The kernels of training against autograd and torch's own Adam, interpreted on a CPU, and compiled without a GPU.

Shapes: S sequences, T tokens, D width, R outputs, C inputs, G groups, N inputs of one group.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import featherweight.train
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.solution import Solution
from featherweight.core.solve import solve
from featherweight.core.sweep import round_to_nearest
from featherweight.errors import FallbackWarning
from featherweight.train import adam, fused, triton_tried
from featherweight.train.sequences import Sequences
from featherweight.train.step import ALONE, Replayed, Stepper, _plain_step
from featherweight.train.trainable import NEAR, OnGrid, Trainable, TrainedGrid, TrainedRounding, beginning

pytest.importorskip("triton", reason="Triton has no build for this platform")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in tests on a CPU Triton interprets (conftest)
STEPS = 6
PACES = adam.paces(STEPS, 0.01, 0.02, torch.device(DEVICE))


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of this device go to the kernels, which have not failed."""
    monkeypatch.setattr(triton_tried, "failed", [])
    monkeypatch.setattr(fused, "usable", lambda layer: isinstance(layer, OnGrid) and not triton_tried.failed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def started(grid: Grid, rows: int = 6, columns: int = 96, masked: bool = False) -> tuple[Solution, Tensor]:
    problem = LayerProblem(drawn(rows, columns), torch.eye(columns, device=DEVICE), 1, 0.01)
    start = solve(problem, Joint(grid, Pattern(0.5))) if masked else round_to_nearest(problem, grid)
    assert isinstance(start, Solution)
    return start, problem.weight_RC


def layer_of(kind: str, grid: Grid, **more: Any) -> OnGrid:
    start, weight_RC = started(grid, **more)
    if kind == "rounding":
        return TrainedRounding(start, weight_RC)
    latent_RC = weight_RC if kind == "absolute" else beginning(start, weight_RC, NEAR)
    return TrainedGrid(start, latent_RC, 1, relative=kind == "steps")


GRIDS = {
    "2 asymmetric": Grid(2, 32, symmetric=False, scale_dtype=torch.bfloat16),
    "4 symmetric, odd groups": Grid(4, 24, scale_dtype=torch.float16),
    "3 asymmetric, rows": Grid(3, None, symmetric=False, scale_dtype=torch.float32),
}
KINDS = ("steps", "absolute", "rounding")


def shaken(layer: OnGrid) -> OnGrid:
    """Anywhere but where it began, clipped weights and zeros beyond their bounds among them."""
    with torch.no_grad():
        layer.latent_RGN += 0.7 * drawn(*layer.latent_RGN.shape, seed=1)
        layer.scale_RG1 *= 1 + 0.2 * drawn(*layer.scale_RG1.shape, seed=2)
        if layer.trains_zeros:
            layer.zero_RG1 += 2 * drawn(*layer.zero_RG1.shape, seed=3)
    layer.tidy()
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "grid",
    [pytest.param(g, id=name, marks=() if name.startswith("2") else pytest.mark.slow) for name, g in GRIDS.items()],
)
def test_values_and_gradients_are_autograds(grid: Grid, kind: str) -> None:
    for masked in (False, True):
        layer = shaken(layer_of(kind, grid, masked=masked))
        for step in (0, STEPS - 1):  # soft roundings, and whole ones
            layer.harden(step / STEPS)
            values_RC = torch.full((6, 96), torch.nan, device=DEVICE)
            assert fused.write_values(layer, values_RC, PACES[step])
            torch.testing.assert_close(values_RC, layer.values(soft=True).detach(), rtol=2e-6, atol=1e-6)
            found, expected = gradients(layer, PACES[step])
            for one, other in zip(found, expected, strict=True):
                assert float((one - other).norm()) <= 1e-5 * float(other.norm())
                assert float(other.norm()) > 0


def gradients(layer: OnGrid, pace: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of every parameter, by the kernel (a step's part in averages that were zero) and by autograd."""
    upstream_RC, parameters = drawn(6, 96, seed=4), [*layer.weights, *layer.steps]
    expected = torch.autograd.grad(layer.values(soft=True), parameters, upstream_RC)
    averages = zeros_for(layer)
    before = [parameter.detach().clone() for parameter in parameters]
    assert fused.step(layer, averages, upstream_RC, pace)
    for parameter, value in zip(parameters, before, strict=True):
        parameter.data = value
    return [mean / 0.1 for mean, _ in averages], list(expected)


def zeros_for(layer: Trainable) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros_like(p.data), torch.zeros_like(p.data)) for p in (*layer.weights, *layer.steps)]


@pytest.mark.parametrize("kind", ["steps", pytest.param("absolute", marks=pytest.mark.slow), "rounding"])
def test_steps_are_those_of_torch(kind: str) -> None:
    """In bfloat16, in a module's layout, with a mask: the kernel, ours by autograd, and torch.optim.AdamW."""
    grid = GRIDS["2 asymmetric"]
    layers = [layer_of(kind, grid, masked=True) for _ in range(3)]
    averages = [zeros_for(layer) for layer in layers]
    theirs = layers[2]
    groups = [{"params": theirs.weights, "first": 0.01}, {"params": theirs.steps, "first": 0.02}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(STEPS):
        gradient_RC = drawn(96, 6, seed=step).bfloat16().T
        for layer in layers:
            layer.harden(step / STEPS)
        assert fused.step(layers[0], averages[0], gradient_RC, PACES[step])
        _plain_step(layers[1], averages[1], gradient_RC, PACES[step])
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * adam.cosine(step / STEPS)
        optimizer.zero_grad()
        theirs.values(soft=True).backward(gradient_RC.float())
        optimizer.step()
        theirs.tidy()
    for one, other, third in zip(*([*layer.weights, *layer.steps] for layer in layers), strict=True):
        torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other, third, rtol=1e-4, atol=1e-5)
    matrix_CR = torch.empty(96, 6, dtype=torch.bfloat16, device=DEVICE)
    assert fused.write_values(layers[0], matrix_CR.T, PACES[-1])
    # the interpreter's cast to bfloat16 cuts off
    torch.testing.assert_close(matrix_CR.T.float(), layers[0].solution().values(), rtol=2**-7, atol=0)


def test_groups_wider_than_a_tile() -> None:
    layer = shaken(layer_of("steps", Grid(2, None, symmetric=False, scale_dtype=torch.float32), rows=3, columns=1100))
    values_RC = torch.empty(3, 1100, device=DEVICE)
    assert fused.write_values(layer, values_RC, PACES[0])
    torch.testing.assert_close(values_RC, layer.values().detach())
    upstream_RC, parameters = drawn(3, 1100, seed=4), [*layer.weights, *layer.steps]
    expected = torch.autograd.grad(layer.values(), parameters, upstream_RC)
    averages = zeros_for(layer)
    assert fused.step(layer, averages, upstream_RC, PACES[0])
    for (mean, _), other in zip(averages, expected, strict=True):
        torch.testing.assert_close(mean / 0.1, other, rtol=1e-4, atol=1e-5)


def test_what_is_no_number_stays_none() -> None:
    layer = layer_of("steps", GRIDS["2 asymmetric"])
    layer.latent_RGN.data[1, 0, 3] = torch.nan
    values_RC = torch.zeros(6, 96, device=DEVICE)
    assert fused.write_values(layer, values_RC, PACES[0])
    assert values_RC.isnan().nonzero().tolist() == [[1, 3]]


class Line(torch.nn.Module):
    """One matrix, the wrong way round as in a Conv1D, and one the right way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(96, 6, bias=False, device=DEVICE), torch.nn.Module()
        self.second.weight = torch.nn.Parameter(drawn(6, 96, seed=8))

    def forward(self, hidden_STD: Tensor) -> Tensor:
        found: Tensor = torch.tanh(self.first(hidden_STD)) @ self.second.weight
        return found


def stepped(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The values of a module's two matrices after some steps; its own weights are as they were."""
    monkeypatch.setattr(triton_tried, "failed", [] if kernels else ["on purpose"])
    module = Line()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    layers: dict[str, Trainable] = {
        "first": layer_of("rounding", Grid(2, 32, symmetric=False, scale_dtype=torch.float32)),
        "second": layer_of("steps", Grid(3, 3, symmetric=False, scale_dtype=torch.float32), rows=96, columns=6),
    }
    layers["second"].transposed = True
    stepper = Stepper(module, layers, module, torch.nn.functional.mse_loss, ALONE)
    with stepper.placed():
        for step in range(STEPS):
            inputs_STD, targets_STD = drawn(4, 5, 96, seed=step), drawn(4, 5, 96, seed=100 + step)
            stepper.step(inputs_STD, targets_STD, PACES[step], step / STEPS)
        stepper.write(PACES[-1], soft=False)
        values = [leaf.detach().clone() for leaf in stepper.leaves]
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
    return values


def test_a_module_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = stepped(True, monkeypatch), stepped(False, monkeypatch)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_failure_is_told_once_and_torch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = stepped(False, monkeypatch)
    monkeypatch.setitem(sys.modules, "featherweight.train.triton_grid", None)
    monkeypatch.delattr(featherweight.train, "triton_grid", raising=False)
    with pytest.warns(FallbackWarning, match="Triton cannot run here .*: training is done by torch alone") as told:
        fast = stepped(True, monkeypatch)
    assert len(told) == 1
    assert all(torch.equal(one, other) for one, other in zip(fast, slow, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(False, monkeypatch)


@pytest.mark.gpu
def test_sequences_and_graphs_on_a_gpu() -> None:
    """From pinned memory, from any memory and on the device, with a CUDA graph and without: the same values."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: streams, pinned memory and graphs are what is tested")
    states_STD, found = torch.randn(40, 5, 96), []
    for place, bring in (("cuda", Tensor.cuda), ("pinned", Tensor.pin_memory), ("plain", Tensor.clone)):
        held_STD = bring(states_STD)
        module = Line()
        layers: dict[str, Trainable] = {"first": layer_of("steps", Grid(2, 32, symmetric=False))}
        stepper = Stepper(module, layers, module.first, torch.nn.functional.mse_loss, ALONE)
        stepper.replayed.refused = place == "cuda"
        sequences = Sequences(held_STD, bring(states_STD[..., :6].contiguous()), 0, torch.device("cuda"))
        with stepper.placed():
            for pair in sequences.batches(torch.arange(40).split(3)):
                stepper.step(*pair, PACES[0], 0.0)
        assert (stepper.replayed.graph is None) == (place == "cuda")
        found.append(stepper.leaves[0].detach().clone())
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.gpu
def test_a_whole_step_as_one_graph_on_a_gpu() -> None:
    """The same bits as with kernels and run started one by one, for layers of both kinds and rates that change."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: graphs are what is tested")
    found = []
    for at_once in (True, False):
        module = Line()
        layers: dict[str, Trainable] = {
            "first": layer_of("rounding", Grid(2, 32, symmetric=False, scale_dtype=torch.float32)),
            "second": layer_of("steps", Grid(3, 3, symmetric=False, scale_dtype=torch.float32), rows=96, columns=6),
        }
        layers["second"].transposed = True
        stepper = Stepper(module, layers, module, torch.nn.functional.mse_loss, ALONE)
        assert stepper.at_once
        if not at_once:
            stepper.at_once, stepper.replayed = False, Replayed(stepper.there_and_back, stepper.leaves)
        table = adam.paces(20, 0.01, 0.02, torch.device("cuda"))
        with stepper.placed():
            for step in range(20):
                inputs_STD, targets_STD = drawn(4, 5, 96, seed=step), drawn(4, 5, 96, seed=100 + step)
                stepper.step(inputs_STD, targets_STD, table[step], step / 20)
            assert stepper.replayed.graph is not None
            stepper.write(table[-1], soft=False)
        found.append([leaf.detach().clone() for leaf in stepper.leaves])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
