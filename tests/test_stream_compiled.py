"""Norms, gates, rotations and attention in C against what torch makes of them, bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight import native
from featherweight.stream import attention, compiled, fused


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


# ---- attention ------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["found", "vectors"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What this CPU attends by; where that is torch's matrix unit, then by vectors."""
    if request.param == "vectors":
        monkeypatch.setattr(native, "has_tiles", lambda: False)
        monkeypatch.setattr(attention, "native_attention", native.attention.__wrapped__)
    return attention.native_attention()


def heads(sequences: int, count: int, tokens: int, width: int, size: float = 1.0) -> Tensor:
    return drawn(sequences, tokens, count, width, size=size).transpose(1, 2)


@pytest.mark.parametrize(
    ("sequences", "queries", "keys", "tokens", "width"),
    [(2, 9, 3, 77, 64), (1, 4, 4, 32, 96), (3, 2, 1, 5, 32), (1, 2, 2, 1, 32), (1, 3, 1, 200, 128)],
)
def test_attention(sequences: int, queries: int, keys: int, tokens: int, width: int, library: Any) -> None:
    if library is None:
        return  # torch's own
    q, k, v = heads(sequences, queries, tokens, width, 3.0), *(heads(sequences, keys, tokens, width) for _ in "kv")
    v = v.flip(-2)
    assert attention.usable(q, k, v)
    ours = attention.attend(q, k, v, 0.2).transpose(1, 2).double()
    alike = {"is_causal": True, "enable_gqa": True, "scale": 0.2}
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **alike)
    theirs = F.scaled_dot_product_attention(q, k, v, **alike).double()
    assert float((ours - exact).norm()) <= 1.05 * float((theirs - exact).norm())


def test_attention_keeps_what_is_no_number_and_shows_it_to_no_query_before(library: Any) -> None:
    if library is None:
        return
    q, k, v = (heads(1, 2, 40, 32) for _ in "qkv")
    k[0, 1, 20, 3] = torch.nan
    found = attention.attend(q, k, v, 1.0).isnan().any(-1)[0]
    assert not found[:, 0].any() and not found[:20].any() and found[20:, 1].all()


def test_attention_that_c_does_not_do_is_left_to_torch(library: Any) -> None:
    q, k, v = (heads(1, 2, 8, 32) for _ in "qkv")
    refused = [
        (q.float(), k.float(), v.float()),
        (q, k[:, :, :4], v[:, :, :4]),
        (q[..., :16], k[..., :16], v[..., :16]),
        (q, k, v[..., :16]),
        (q[0], k[0], v[0]),
        (heads(1, 3, 8, 32), k, v),
    ]
    assert not any(attention.usable(*given) for given in refused)
    with torch.enable_grad():
        assert not attention.usable(q, k, v)


def test_models_attend_in_c_while_a_pass_lasts(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known

    own, module = known["sdpa"], torch.nn.Identity()
    q, k, v = (heads(1, 2, 8, 32) for _ in "qkv")
    mask, bias = torch.ones(8, 8, dtype=torch.bool).tril(), drawn(1, 2, 8, 8, size=4.0)
    with attention.in_c():
        assert (known["sdpa"] is own) == (library is None)
        plain, masked = known["sdpa"](module, q, k, v, None), known["sdpa"](module, q, k, v, mask, scaling=0.3)
        whole = known["sdpa"](module, q, k, v, None, is_causal=False)
        biased = known["sdpa"](module, q, k, v, None, position_bias=bias)
    assert known["sdpa"] is own
    for ours, theirs in (
        (plain, own(module, q, k, v, None)),
        (masked, own(module, q, k, v, mask, scaling=0.3)),
        (whole, own(module, q, k, v, None, is_causal=False)),
        (biased, own(module, q, k, v, None, position_bias=bias)),
    ):
        assert torch.allclose(ours[0].float(), theirs[0].float(), atol=0.02) and ours[1] is None
