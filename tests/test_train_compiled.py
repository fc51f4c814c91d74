"""Blocks through torch.compile, and blocks that keep or find again what they computed; the compiler is made up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import FallbackWarning
from featherweight.train.compiled import Compiled
from featherweight.train.keeping import Keeping


def test_compiled_where_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **_: lambda *given: ("fast", forward(*given)))
    compiled = Compiled(lambda value: value + 1)
    assert compiled(1) == ("fast", 2) and compiled(2) == ("fast", 3)
    with torch.no_grad():
        assert compiled(1) == 2


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            raise RuntimeError("unsupported: a look at a number\n\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    compiled = Compiled(lambda value: value + 1)
    with pytest.warns(
        FallbackWarning, match=r"cannot be compiled \(unsupported: a look at a number\): it runs as it is"
    ):
        assert compiled(1) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(2) == 3


class Counted(nn.Linear):
    """A block that knows how often it ran."""

    ran = 0

    def forward(self, hidden_STD: Tensor) -> Tensor:
        self.ran += 1
        return torch.tanh(super().forward(hidden_STD))


def test_a_block_without_room_runs_again() -> None:
    """On a CPU there is none; gradients are those of a block left alone."""
    torch.manual_seed(0)
    inputs_STD, gradients = torch.randn(2, 3, 4), []
    for keeping in (False, True):
        torch.manual_seed(1)
        block = Counted(4, 4)
        if keeping:
            Keeping([block], torch.device("cpu"), compile=False)
        block(inputs_STD).square().sum().backward()
        assert block.ran == 1 + keeping and block.weight.grad is not None
        gradients.append(block.weight.grad)
        with torch.no_grad():
            block(inputs_STD)
        assert block.ran == 2 + keeping
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
