"""Blocks whose experts stay in the files while they are compressed: the same bytes, and less memory than a block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight import api
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.experts import find_experts
from featherweight.models.offload import Apart, apart_in
from featherweight.models.tree import build
from featherweight.recipe import Recipe
from featherweight.stream import compress as pipeline
from featherweight.stream import experts as solver
from featherweight.stream import portions
from runs import journal, recipe, same_bytes, tensors_of
from test_offload import PROGRAM, large_mixture
from tiny import add_tokenizer, make

SOME = {"samples": 4, "tokens": 32, "group_size": 16}
FAMILIES = [pytest.param(family, marks=pytest.mark.slow) for family in ("gpt-oss", "llama4", "qwen2-moe")]


def made(family: str, folder: Path) -> Path:
    dtype = torch.bfloat16 if family == "gpt-oss" else torch.float32
    return add_tokenizer(make(family, folder / "source", dtype=dtype))


@pytest.mark.parametrize("family", ["mixtral", *FAMILIES])
@pytest.mark.parametrize("changes", [
    {"target": "original"},
    pytest.param({"target": "drifted", "bits": 1.58, "format": "sub1"}, marks=pytest.mark.slow),
    pytest.param({"method": "rtn"}, marks=pytest.mark.slow),
    pytest.param({"bits": 16, "sparsity": "2:4", "format": "dense"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_portions_make_the_same_bytes(
    family: str, changes: dict[str, Any], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts fused or one by one on disk, with biases or without, called one way or another; killed and resumed."""
    source, chosen = made(family, tmp_path), recipe(text, **SOME, **changes)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "room_for_experts", lambda *_: None)
        api.compress(source, tmp_path / "whole", chosen, memory="low")
    for module in (solver, portions):
        monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 4096})
    held: list[int] = []
    taken_out = solver.taken_out

    def watched(experts: Any, numbers: Any) -> Any:
        held.append(sum(not isinstance(each, Apart) for each in experts.children()))
        return taken_out(experts, numbers)

    for module in (solver, portions):
        monkeypatch.setattr(module, "taken_out", watched)
    api.compress(source, tmp_path / "low", chosen, memory="low")
    assert held and not any(held), "no expert is in memory but those that are being solved"
    whole, low = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "low")
    assert whole.keys() == low.keys() and all(same_bytes(whole[name], low[name]) for name in whole)
    timeless = [[{k: v for k, v in row.items() if k != "block_seconds"} for row in journal(tmp_path / out)]
                for out in ("whole", "low")]  # fmt: skip
    assert timeless[0] == timeless[1]
    (tmp_path / "low" / "config.json").unlink()
    sorted((tmp_path / "low").glob("*.safetensors"))[-1].unlink()
    api.compress(source, tmp_path / "low", chosen, memory="low")
    again = tensors_of(tmp_path / "low")
    assert whole.keys() == again.keys() and all(same_bytes(whole[name], again[name]) for name in whole)


def test_when_experts_are_taken_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, cpu = build(Checkpoint.open(made("mixtral", tmp_path))), torch.device("cpu")
    inside = [m for m in tree.blocks[0].matrices if ".experts." in m.path]
    floats = 4 * sum(matrix.rows * matrix.columns for matrix in inside)

    def room(free: int, low: bool = False, **changes: Any) -> int | None:
        monkeypatch.setattr(portions, "free_memory_bytes", lambda: free)
        return portions.room_for_experts(tree, Recipe(**changes), cpu, torch.float32, low)

    assert room(4 * floats) is None and room(4 * floats - 4) == floats - 1
    assert room(40 * floats, low=True) is not None
    assert room(floats, method="block-ap") is None
    runner = pipeline.runner_of(tree, cpu, torch.float32, expert_bytes=1)
    block = runner.load(0)
    count = sum(len(experts) for _, experts in find_experts(block))
    assert len(apart_in(block)) == count > 0 and not any(".experts." in name for name, _ in block.named_parameters())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is anonymous memory on Linux alone")
def test_a_block_larger_than_the_memory_compresses_and_runs(tmp_path: Path) -> None:
    """Four blocks, each twice the limit; what one has become is held twice while its shard is written."""
    limit = 128 << 20
    source = large_mixture(tmp_path / "source", 8 * limit, blocks=4)
    said = {}
    for what in ("compress", "run"):
        program = PROGRAM.replace('but(method="rtn"), "cpu")', 'but(method="rtn"), "cpu", memory="low")')
        command = [sys.executable, "-c", program, str(source), str(tmp_path / "out"), str(limit), what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
        said[what] = json.loads(done.stdout.splitlines()[-1])
        assert said[what]["peak_bytes"] <= limit, (what, said[what])
    assert said["run"]["finite"] and said["run"]["fetched"] > 0
