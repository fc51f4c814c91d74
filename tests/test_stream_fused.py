"""The kernels between a block's products against what transformers' families compute, interpreted where there is no
GPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from featherweight.models.experts import take_apart
from featherweight.stream import fused, grouped
from featherweight.stream.grouped import Grouped
from tiny import make

pytest.importorskip("triton", reason="Triton has no build for this platform")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in tests on a CPU Triton interprets (conftest)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off, not rounds it


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors of this device go to the kernels; returns a word for each launch."""
    ran: list[str] = []
    tried = fused._tried

    def counted(launch) -> bool:  # type: ignore[no-untyped-def]
        ran.append("kernel")
        return tried(launch)

    monkeypatch.setattr(fused, "_failed", [])
    monkeypatch.setattr(fused, "_tried", counted)
    monkeypatch.setattr(fused, "usable", lambda *tensors: not fused._failed and fused._plain(tensors))
    return ran


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but where the order of a sum tips a rounding."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert float((ours != theirs).float().mean()) < 0.02
    assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-6)


def skeleton(family: str, tmp_path: Path) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(make(family, tmp_path / family))
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).to(DEVICE).eval()
    take_apart(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "experts" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


FUSED = {
    "llama": {"input_layernorm", "post_attention_layernorm", "mlp"},
    "qwen3": {"input_layernorm", "post_attention_layernorm", "mlp", "self_attn.q_norm", "self_attn.k_norm"},
    "gemma2": {
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    },
    "gpt2": set(),
}  # fmt: skip


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_a_family_is_recognised_and_computes_the_same(family: str, tmp_path: Path, launches: list[str]) -> None:
    model = skeleton(family, tmp_path)
    ids_ST = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain = model(ids_ST, use_cache=False).logits
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    for block in blocks:
        fused.fuse(block)
    found = {name for name, module in blocks[0].named_modules() if "forward" in module.__dict__}
    assert found == FUSED[family]
    with fused.rotations(model):
        ours = model(ids_ST, use_cache=False).logits
    assert torch.allclose(ours.float(), plain.float(), rtol=0, atol=0.03 * float(plain.float().std()))
    assert bool(launches) == (family != "gpt2")
    home = sys.modules[type(blocks[0]).__module__]
    assert family == "gpt2" or not hasattr(getattr(home, fused.ROTATION), "func")  # its own once more


@torch.no_grad()
def test_norms_of_every_kind(launches: list[str]) -> None:
    x_STD, weight_D = drawn(3, 5, 96), drawn(96, seed=1)
    normed_STD = x_STD.float() * torch.rsqrt(x_STD.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    for plus_one, early in ((False, True), (False, False), (True, False)):
        factor_D = weight_D.float() + 1 if plus_one else weight_D.float()
        rounded_STD = normed_STD.to(DTYPE).float() if early else normed_STD
        found = fused.rms_norm(x_STD, weight_D, 1e-5, plus_one, early)
        assert found is not None
        close(found, (rounded_STD * factor_D).to(DTYPE))
    assert len(launches) == 3


@torch.no_grad()
def test_gates_of_rows_that_lie_apart(launches: list[str]) -> None:
    both_NI = drawn(6, 2 * 40)
    gate_NI, up_NI = both_NI.chunk(2, -1)
    close(fused.gated(gate_NI, up_NI), nn.functional.silu(gate_NI) * up_NI)
    assert launches


@torch.no_grad()
def test_rotation_by_sequence_and_for_all(launches: list[str]) -> None:
    x_SHTD = drawn(2, 5, 3, 12).transpose(1, 2)  # 3 heads, 5 tokens
    for count in (1, 2):
        cos, sin = drawn(count, 5, 12, seed=2), drawn(count, 5, 12, seed=3)
        found = fused.rotated(x_SHTD, cos, sin)
        assert found is not None
        turned = torch.cat([-x_SHTD[..., 6:], x_SHTD[..., :6]], -1)
        close(found, x_SHTD * cos.unsqueeze(1) + turned * sin.unsqueeze(1))
    assert fused.rotated(x_SHTD, cos[..., :8], sin[..., :8]) is None  # a part of the head only: left to the family


def test_gradients_go_by_the_familys_own_way(tmp_path: Path, launches: list[str]) -> None:
    block = skeleton("llama", tmp_path).model.layers[0]
    fused.fuse(block)
    for module in (block.input_layernorm, copy.deepcopy(block).mlp):
        x_ND = drawn(3, 64).requires_grad_()
        module(x_ND).sum().backward()
        assert x_ND.grad is not None
    assert not launches


@torch.no_grad()
def test_a_copy_has_its_own_weights(tmp_path: Path, launches: list[str]) -> None:
    block = skeleton("llama", tmp_path).model.layers[0]
    fused.fuse(block)
    other = copy.deepcopy(block)
    other.input_layernorm.weight.zero_()
    assert not other.input_layernorm(drawn(3, 64)).any() and block.input_layernorm(drawn(3, 64)).any()
    assert launches


@torch.no_grad()
def test_experts_together_are_the_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokens go nowhere, and one expert has none."""
    monkeypatch.setattr(grouped, "_failed", [])
    monkeypatch.setattr(Grouped, "_fits", lambda self, routed: True)
    config = AutoConfig.from_pretrained(make("qwen3-moe", tmp_path / "moe"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE)
    take_apart(model)
    block = model.model.layers[0]
    experts = block.mlp.experts
    experts.to_empty(device=DEVICE)  # they were taken apart on meta
    for weight in experts.parameters():
        weight.copy_(0.3 * drawn(*weight.shape))
    x_TD = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    expert_TK = torch.tensor([[0, 1], [1, 3], [3, 4], [0, 3]]).repeat(10, 1).to(DEVICE)  # 4 is nowhere
    share_TK = torch.rand(40, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    one_by_one = experts(x_TD, expert_TK, share_TK)
    fused.fuse(block)
    assert isinstance(experts.together, Grouped)
    together = experts(x_TD, expert_TK, share_TK)
    assert not grouped._failed
    scale = float(one_by_one.float().std())
    assert torch.allclose(together.float(), one_by_one.float(), rtol=2**-6, atol=2**-7 * scale)


def test_experts_of_another_kind_run_one_after_the_other(tmp_path: Path) -> None:
    """No GPU, biases, inputs multiplied by the router: what `Grouped` leaves alone."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(make("qwen3-moe", tmp_path / "moe")))
    take_apart(model)
    experts = model.model.layers[0].mlp.experts
    fused.fuse(model.model.layers[0])
    x_TD = torch.randn(4, 64)
    assert experts.together is not None
    assert experts.together(experts.routed(x_TD, torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))) is None
