"""What lies between the products of a token: torch, and Triton (interpreted, or on a GPU), against exact sums."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from featherweight.kernels import decode
from featherweight.kernels.decode import ACTIVATIONS, Heads, Memory, Norm, attend, gate, join

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in tests on a CPU Triton interprets (conftest)


def norm(width: int) -> Norm:
    return Norm(torch.randn(width, device=DEVICE), 1e-5)


def memory(keys: int, length: int, width: int, rotary: int, position: int) -> Memory:
    held = (torch.randn(1, keys, length, width, device=DEVICE) for _ in range(2))
    angles = torch.rand(length, rotary // 2, device=DEVICE).mul(6).repeat(1, 2)
    return Memory(*held, angles.cos(), angles.sin(), torch.tensor([position], device=DEVICE))


@pytest.mark.parametrize("width", [48, 256])
@pytest.mark.parametrize("parts", ["gain", "delta+gain", "delta+post+gain", "delta+post"])
def test_residual_and_norms_in_one_launch(width: int, parts: str) -> None:
    x_TD = torch.randn(3, width, device=DEVICE)
    delta_TD = torch.randn(3, width, device=DEVICE) if "delta" in parts else None
    post, gain = norm(width) if "post" in parts else None, norm(width) if "gain" in parts else None
    got = decode.join_by_triton(x_TD, delta_TD, post, gain)
    exact = x_TD.double()
    if delta_TD is not None:
        exact = exact + (delta_TD.double() if post is None else normed(delta_TD, post))
    torch.testing.assert_close(got[0], exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], (exact if gain is None else normed(exact, gain)).float(), rtol=1e-5, atol=1e-5)
    for mine, cpus in zip(got, (each.to(DEVICE) for each in on_cpu(x_TD, delta_TD, post, gain)), strict=True):
        torch.testing.assert_close(mine, cpus, rtol=1e-5, atol=1e-5)


def normed(x_TD: Tensor, by: Norm) -> Tensor:
    wide = x_TD.double()
    return wide / (wide.square().mean(-1, keepdim=True) + by.eps).sqrt() * by.gain_D.double()


def on_cpu(x_TD: Tensor, delta_TD: Tensor | None, post: Norm | None, gain: Norm | None) -> tuple[Tensor, Tensor]:
    norms = (None if each is None else Norm(each.gain_D.cpu(), each.eps) for each in (post, gain))
    return join(x_TD.cpu(), None if delta_TD is None else delta_TD.cpu(), *norms)


def test_nothing_to_add_and_no_norm_is_the_row_itself() -> None:
    x_TD = torch.randn(1, 16, device=DEVICE)
    assert all(torch.equal(each, x_TD) for each in decode.join_by_triton(x_TD, None, None, None))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gates(name: str) -> None:
    y_TJ = 4 * torch.randn(1, 2 * 1100, device=DEVICE)
    want = ACTIVATIONS[name](y_TJ[:, :1100].double()) * y_TJ[:, 1100:].double()
    for got in (gate(y_TJ, name), decode.gate_by_triton(y_TJ, name)):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


# query heads, key heads, width, rotary width, positions, how many tokens are there, window, norms
CASES = [
    (4, 2, 16, 16, 40, 0, 1000, False),  # nothing before it
    (4, 2, 16, 16, 100, 32, 1000, True),  # whole tiles
    (3, 1, 24, 12, 80, 79, 1000, True),  # the last position, ragged heads, half of them turned
    (2, 2, 16, 8, 200, 150, 5000, False),  # more tiles than splits
    (4, 2, 16, 16, 100, 77, 20, False),  # a window that begins inside of a tile
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_one_token(
    case: tuple[int, int, int, int, int, int, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SPLITS", 4)
    monkeypatch.setattr(decode, "KEYS", 16)
    queries, keys, width, rotary, length, position, window, norms = case
    both = (norm(width), norm(width)) if norms else (None, None)
    heads, held = Heads(queries, keys, width, 0.3, window, *both), memory(keys, length, width, rotary, position)
    before, qkv_J = copy.deepcopy(held), torch.randn((queries + 2 * keys) * width, device=DEVICE)
    got_J = decode.attend_by_triton(qkv_J, heads, held)
    again_J = decode.attend_by_triton(qkv_J, heads, held)
    torch.testing.assert_close(got_J, again_J, rtol=0, atol=0)
    want_J, key_HW = brute_force(qkv_J, heads, before)
    torch.testing.assert_close(got_J.double(), want_J, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(held.keys[0, :, position].double(), key_HW, rtol=1e-4, atol=1e-5)
    others = torch.arange(length, device=DEVICE) != position
    assert torch.equal(held.keys[:, :, others], before.keys[:, :, others]), "no other key is written"
    values = qkv_J.view(-1, width)[queries + keys :]
    assert torch.equal(held.values[0, :, position], values) and int(held.position) == position


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_by_torch(
    case: tuple[int, int, int, int, int, int, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
    queries, keys, width, rotary, length, position, window, norms = case
    both = (norm(width), norm(width)) if norms else (None, None)
    heads, held = Heads(queries, keys, width, 0.3, window, *both), memory(keys, length, width, rotary, position)
    qkv_J = torch.randn((queries + 2 * keys) * width)
    want_J, key_HW = brute_force(qkv_J, heads, held)
    torch.testing.assert_close(attend(qkv_J, heads, held).double(), want_J, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(held.keys[0, :, position].double(), key_HW, rtol=1e-4, atol=1e-5)


def brute_force(qkv_J: Tensor, heads: Heads, held: Memory) -> tuple[Tensor, Tensor]:
    """Head by head and key by key in float64: what comes out, and the keys of this token."""
    at, rotary = int(held.position), held.cos_LW.shape[1]
    rows = qkv_J.double().view(-1, heads.width)

    def turned(x_W: Tensor, by: Norm | None) -> Tensor:
        x_W = (x_W if by is None else normed(x_W, by)).clone()
        before = x_W.clone()
        for low in range(rotary // 2):
            high = low + rotary // 2
            x_W[low] = before[low] * held.cos_LW[at, low] - before[high] * held.sin_LW[at, low]
            x_W[high] = before[high] * held.cos_LW[at, high] + before[low] * held.sin_LW[at, high]
        return x_W

    own = [turned(rows[heads.queries + index], heads.k_norm) for index in range(heads.keys)]
    out = []
    for index in range(heads.queries):
        group = index * heads.keys // heads.queries
        seen = slice(max(0, at - heads.window + 1), at)
        keys_LW = torch.cat((held.keys[0, group, seen].double(), own[group].unsqueeze(0)))
        values_LW = torch.cat((held.values[0, group, seen].double(), rows[heads.queries + heads.keys + group, None]))
        scores_L = keys_LW @ turned(rows[index], heads.q_norm) * heads.scale
        out.append(scores_L.softmax(0) @ values_LW)
    return torch.cat(out), torch.stack(own)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernels_compile_without_a_gpu(arch: int, tmp_path: Path) -> None:
    """By Triton itself, in a process of its own: here it is interpreting."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = str(Path(__file__).parent / "compile_decode.py")
    ran = subprocess.run([sys.executable, program, str(arch)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    made = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [each["kernel"] for each in made] == ["join"] * 2 + ["gate"] * 3 + ["attend", "likeliest", "attend"]
    for each in made:
        assert each["shared"] <= 48 << 10 and (each["mma"] > 0) == (each["kernel"] == "attend")
        assert each["waits"] == (arch >= 90), "one wait for the kernel in front, where GPUs have it"


@pytest.mark.parametrize("vocabulary", [1, 1000, 1024, 5000])
def test_the_likeliest_token_is_the_first_of_equals(vocabulary: int) -> None:
    logits_V = torch.randn(vocabulary, device=DEVICE)
    for most in (None, 9.0):
        if most is not None:
            logits_V[vocabulary // 2 :] = most
        for by in (decode.likeliest, decode.likeliest_by_triton):
            token = torch.full((1, 1), -1, device=DEVICE)
            by(logits_V, token)
            assert int(token) == int((logits_V == logits_V.max()).nonzero()[0])
