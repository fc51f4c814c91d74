"""`featherweight bench qat` at toy size: every figure is there, and what follows from others does."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from featherweight.bench_cli import app
from featherweight.benchmarks import flow, qat, shapes
from featherweight.train.tuned_linear import TunedLinear

TOY = shapes.Shapes(64, 192, 2, 4, 2, 16, 256)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.NAMED, "toy", TOY)
    for module, name, value in (
        (flow, "HELD", 6),
        (flow, "WARM", 1),
        (qat, "WARM", 1),
        (qat, "MICRO_TOKENS", {"cpu": 64}),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(qat, "peak_tflops", lambda device: 1.0)
    first = ["qat"] if len(app.registered_commands) > 1 else []  # typer drops the name of an only command
    sizes = {"--group-size": "32", "--tokens": "8", "--tuned-tokens": "32"}
    ran = CliRunner().invoke(app, [*first, "--shapes", "toy", *(word for pair in sizes.items() for word in pair)])
    assert ran.exit_code == 0, ran.output
    report = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("{")))
    block, whole = report["block_ap"], report["e2e_qp"]
    weights = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192
    assert block["tflops"] == pytest.approx(6 * weights * 16 / block["step_ms"] / 1e9)
    assert block["steps_minutes"] == pytest.approx(2 * 4096 * block["step_ms"] / 6e4)
    assert block["with_passes_minutes"] > block["steps_minutes"] and not block["captured"]
    for place in ("memory", "files"):
        minutes = (8192 * block[f"from_{place}_ms"] + 8192 * block[f"pass_from_{place}_ms"]) / 6e4
        assert block[f"minutes_from_{place}"] == pytest.approx(minutes)
        share = 1 - block["with_passes_minutes"] / minutes
        assert block[f"idle_share_from_{place}"] == pytest.approx(share) and block["peak_host_bytes"] > 0
    assert whole["minutes"] == pytest.approx(4096 / whole["shape"][0] * whole["micro_batch_ms"] / 6e4)


def test_random_models_are_what_is_trained() -> None:
    torch.manual_seed(0)
    grid = qat.Grid(2, 32, symmetric=False, search="minmax", scale_dtype=torch.bfloat16)
    model = qat.random_packed(TOY, grid, 8, torch.device("cpu"))
    layers = [module for module in model.modules() if isinstance(module, TunedLinear)]
    assert len(layers) == 14 and not any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(8)[None]).logits.isfinite().all())
    block, run = qat.random_block(TOY, 8, torch.device("cpu"))
    layer = qat._layer(next(module for _, module in qat._linears(block)), grid, "rounding")
    values_RC, start_RC = layer.values().detach(), layer.start.values()
    assert torch.equal(values_RC, start_RC) and run(torch.randn(2, 8, 64).bfloat16()).shape == (2, 8, 64)
