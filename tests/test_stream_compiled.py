"""Norms, gates and rotations in C against what torch makes of them, bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.stream import compiled, fused


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(compiled, "LEAST_WORK", 1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def drawn(*shape: int, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))).bfloat16()


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but where the order of a sum, or e^x's last place, tips a rounding."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert float(((ours != theirs) & ~theirs.isnan()).float().mean()) < 1e-3
    assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("width", [7, 576])
def test_norms(plus_one: bool, width: int) -> None:
    x_NTD, weight_D = drawn(3, 11, width, size=3.0), drawn(width)
    normed_NTD = F.rms_norm(x_NTD.float(), (width,), eps=1e-5)
    late, early = (1.0 * plus_one + weight_D.float()) * normed_NTD, weight_D * normed_NTD.bfloat16()
    close(fused.rms_norm(x_NTD, weight_D, 1e-5, plus_one, early=False), late.bfloat16())
    if not plus_one:
        close(fused.rms_norm(x_NTD.mT.contiguous().mT, weight_D, 1e-5, plus_one, early=True), early)


def test_gates_of_rows_that_lie_apart_and_of_numbers_without_measure() -> None:
    both_STI = drawn(2, 9, 90, size=8.0)
    both_STI[0, 0, :5] = torch.tensor([float("nan"), float("inf"), -1e30, 1e30, -200.0])
    gate, up = both_STI.chunk(2, -1)
    close(fused.gated(gate, up), (F.silu(gate) * up))


@pytest.mark.parametrize("sequences", [1, 2])
def test_rotations(sequences: int) -> None:
    x_SHTD = drawn(2, 5, 3, 12).transpose(1, 2)
    cos, sin = drawn(sequences, 5, 12), drawn(sequences, 5, 12).flip(-1)
    turned = torch.cat([-x_SHTD[..., 6:], x_SHTD[..., :6]], -1)
    close(fused.rotated(x_SHTD, cos, sin), x_SHTD * cos.unsqueeze(1) + turned * sin.unsqueeze(1))


def test_gradients_and_other_numbers_are_left_to_torch() -> None:
    gate, up = drawn(4, 8), drawn(4, 8)
    assert not compiled.usable(gate.float()) and torch.equal(
        fused.gated(gate.half(), up.half()), F.silu(gate.half()) * up.half()
    )
    with torch.enable_grad():
        assert not compiled.usable(gate) and fused.rms_norm(gate, up[0], 1e-5, False, True) is None
