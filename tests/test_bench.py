"""`featherweight bench kernels` and `bench generate`, small and on a CPU: what they measure, print and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.benchmarks import generate, kernels, peers, shapes, timing
from featherweight.benchmarks.shapes import Shapes
from featherweight.benchmarks.timing import MOST_COPIES, copies, excess_error, median_us
from featherweight.core.rules import Grid
from featherweight.errors import RequestError
from featherweight.formats import by_name
from featherweight.kernels.w4a16_hopper import W4A16Hopper
from featherweight.kernels.wna16 import WNA16
from featherweight.linear import CompressedLinear
from runs import featherweight

CPU = torch.device("cpu")


def test_times_are_of_one_call_and_copies_exceed_the_cache() -> None:
    calls: list[int] = []
    us = median_us([lambda i=i: calls.append(i) for i in range(4)], CPU)  # type: ignore[misc]
    assert 0 < us < 1e3 and len(calls) % 4 == 0 and len(calls) >= 24 and set(calls) == {0, 1, 2, 3}
    assert copies(1e9, CPU) == 2 and copies(1e6, CPU) * 1e6 > 4 * 32e6 and copies(1, CPU) == MOST_COPIES


def test_the_error_is_what_exceeds_one_rounding() -> None:
    exact = torch.randn(50, 50, dtype=torch.float64)
    assert excess_error(exact.bfloat16(), exact) == 0.0
    off = (exact * 1.01).float()
    assert excess_error(off, exact) == pytest.approx(0.01, rel=1e-3)


def test_layers_of_models_and_bare_sizes() -> None:
    found = kernels.layers(["llama-3-8b", "256x512"])
    assert found["llama-3-8b gate_up"] == (4096, 2 * 14336) and found["256x512"] == (256, 512)
    for wrong in ("llama-9", "256x", "x5", "0x5"):
        with pytest.raises(RequestError, match=rf"no shapes {wrong}: choose llama-2-7b"):
            kernels.layers([wrong])


def test_stored_bytes_are_those_of_the_format() -> None:
    for grid in (Grid(4, 128), Grid(3, 64, False), Grid(8, None)):
        tensors = by_name("compressed-tensors").pack(kernels.draw(64, 256, grid, torch.bfloat16, CPU))
        held = sum(tensor.nbytes for name, tensor in tensors.items() if name != "weight_shape")
        assert kernels.stored_bytes(256, 64, grid, torch.bfloat16) == held


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks that need not be measured, and two copies of each weight."""
    monkeypatch.setattr(kernels, "read_gbps", lambda device: 10.0)
    monkeypatch.setattr(kernels, "peak_tflops", lambda device: 0.5)
    monkeypatch.setattr(kernels, "copies", lambda nbytes, device: 2)


@pytest.mark.usefixtures("machine")
def test_bench_kernels() -> None:
    ran = featherweight("bench", "kernels", "--shapes", "128x64", "--m", "1,40", "--device", "cpu")
    assert ran.code == 0, ran.err
    rows = ran.last["rows"]
    assert [(row["kernel"], row["tokens"]) for row in rows] == [
        (name, tokens) for tokens in (1, 40) for name in ("dense", "cpu-int4", "dequantize")
    ]
    for row in rows:
        assert row["of_read"] == pytest.approx(row["gbps"] / 10) and row["of_peak"] == pytest.approx(
            row["tflops"] / 0.5
        )
        assert row["kernel"] == "dense" or row["error"] < 5e-3
    assert "128x64, cpu-int4, 40 tokens" in ran.err and ran.last["bits"] == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--shapes", "llama-9"), "no shapes llama-9"),
        (("--m", "1,x"), "--m '1,x': give whole numbers"),
        (("--group-size", "big"), "a number or 'row'"),
        (("--dtype", "float32"), "bfloat16 or float16, not float32"),
        (("--kernel", "marlin"), "no kernel marlin: choose from"),
        (("--shapes", "100x64"), "group size 128 does not divide"),
        (("--shapes", "128x64", "--kernel", "triton"), "kernel triton does not take this layer"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_requests_that_cannot_be_benched(options: tuple[str, ...], said: str) -> None:
    ran = featherweight("bench", "kernels", "--m", "1", "--device", "cpu", *options)
    assert ran.code == 2 and said in ran.error


@pytest.mark.usefixtures("machine")
def test_peers_are_timed_and_their_failures_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def works(rows: int, columns: int, group: int, dtype: torch.dtype, count: int) -> list[peers.Product]:
        weights = [torch.randn(columns, rows, dtype=dtype) for _ in range(count)]
        return [lambda x, w=w: x @ w for w in weights]  # type: ignore[misc]

    def fails(*_: object) -> list[peers.Product]:
        raise OSError("no such library")

    monkeypatch.setattr(peers, "importable", lambda *_: [("good", works), ("bad", fails)])
    rows = list(kernels._layer(128, 64, kernels.Plan(Grid(4, 128), (1,), torch.bfloat16, CPU, ("cpu-int4",))))
    assert [row["kernel"] for row in rows] == ["bad", "dense", "cpu-int4", "good"]
    assert rows[3]["us"] > 0 and rows[0] == {"kernel": "bad", "failed": "OSError: no such library"}


def test_contenders_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def measured(calls: list[Any], device: torch.device) -> float:
        order.append(calls[0])
        return float(len(order))

    monkeypatch.setattr(timing, "median_us", measured)
    assert timing.in_turn({"a": ["a"], "b": ["b"]}, CPU) == {"a": 3.0, "b": 4.0}  # type: ignore[list-item]
    assert order == ["a", "b"] * timing.TURNS


def test_peers_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(peers, "find_spec", lambda package: package in ("torch", "humming") or None)
    assert [name for name, _ in peers.importable(cuda, 4, torch.bfloat16)] == ["tinygemm", "humming"]
    assert [name for name, _ in peers.importable(cuda, 4, torch.float16)] == ["humming"]
    assert list(peers.importable(cuda, 3, torch.bfloat16)) == list(peers.importable(CPU, 4, torch.bfloat16)) == []


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(shapes.NAMED, "tiny", Shapes(128, 256, 3, 4, 2, 32, 100))
    return "tiny"


def test_bench_generate(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate.timing, "read_gbps", lambda device: 20.0)
    options = ("--context", 8, "--tokens", 16, "--blocks", 2, "--group-size", 64, "--asymmetric", "--device", "cpu")
    ran = featherweight("bench", "generate", "--shapes", tiny, *options)
    assert ran.code == 0, ran.err
    dense, ours = ran.last["rows"]
    assert (dense["weights"], ours["weights"]) == ("bfloat16", "4 bits") and ours["kernels"] == ["cpu-int4"]
    assert ran.last["speedup"] == pytest.approx(ours["tokens_per_s"] / dense["tokens_per_s"])
    assert ran.last["blocks"] == 2 and not dense["graph"]
    assert dense["fused"] and ours["fused"], "both in the same launches"
    assert ours["share_of_read"] == pytest.approx(ours["read_gbps"] / 20)
    linears = 2 * (128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 256)
    assert dense["read_bytes"] == 2 * (linears + 100 * 128 + 5 * 128)


def test_random_models_whose_stored_weights_are_let_go(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what a kernel holds in its own order is no weight that is still to be drawn."""
    monkeypatch.setattr(WNA16, "refusal", lambda self, case: None)
    monkeypatch.setattr(W4A16Hopper, "refusal", lambda self, case: "not here")
    model = generate.build(generate.Plan(tiny, Grid(4, 64), CPU, kernel="wna16"), compressed=True)
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert all(tensor.is_meta for module in layers for tensor in module.buffers())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())


def test_random_models_are_like_trained_ones(tiny: str) -> None:
    model = generate.build(generate.Plan(tiny, Grid(4, 64), CPU, head_bits=8), compressed=True)
    compressed = {path: module for path, module in model.named_modules() if isinstance(module, CompressedLinear)}
    assert len(compressed) == 3 * 7 + 1 and compressed["lm_head"].rule.bits == 8  # type: ignore[union-attr]
    for module in compressed.values():
        assert float(module.weight.float().std()) == pytest.approx(module.in_features**-0.5, rel=0.15)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0.1


def test_what_is_not_benched(tiny: str) -> None:
    with pytest.raises(RequestError, match=r"has 128 experts, and models of 0"):
        generate.build(generate.Plan("qwen3-30b-a3b", Grid(), CPU), compressed=True)
    assert "16 or more after 1 or more" in featherweight("bench", "generate", "--tokens", 8, "--device", "cpu").error


def test_the_help_names_both() -> None:
    assert {"kernels", "generate"} <= set(featherweight("bench", "--help").out.split())


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    monkeypatch.chdir(tmp_path)
    generate.build(generate.Plan(tiny, Grid(4, 64), CPU, blocks=1), compressed=False)
    assert list(tmp_path.iterdir()) == []
