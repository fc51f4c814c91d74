"""Experts that stay in the files: the same logits, no more bytes than asked for, less memory than the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featherweight import api
from featherweight.errors import RequestError
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.experts import find_experts
from featherweight.models.offload import Remote, Shelf, nbytes_of
from runs import logits
from tiny import add_tokenizer, make, token_ids

ROUND = {"method": "rtn", "bits": 1.58, "group_size": None, "format": "sub1"}


def shelf_of(model: Any) -> Shelf:
    experts = next(experts for _, experts in find_experts(model))
    first = experts.expert(0)
    assert isinstance(first, Remote)
    return first.shelf


OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "llama4")]


@pytest.fixture(scope="module", params=["gpt-oss", *OTHERS])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture, rounded to ternary: experts one by one on disk, or fused there and with biases."""
    folder = tmp_path_factory.mktemp(request.param)
    dtype = torch.bfloat16 if request.param == "gpt-oss" else torch.float32
    source = add_tokenizer(make(request.param, folder / "source", dtype=dtype))
    api.compress(source, folder / "out", api.Recipe(**ROUND))
    return folder / "out"


def test_experts_in_the_files_answer_alike(out: Path) -> None:
    whole, left = api.load(out, "cpu", torch.float32), api.load(out, "cpu", torch.float32, expert_bytes=4_000)
    torch.testing.assert_close(logits(left, token_ids(2, 12)), logits(whole, token_ids(2, 12)))
    shelf = shelf_of(left)
    assert 0 < shelf.held_bytes <= 4_000 and shelf.fetched > 2  # more than are held
    assert sum(nbytes_of(expert) for expert, _ in shelf._held.values()) == shelf.held_bytes
    experts = sum(nbytes_of(experts) for _, experts in find_experts(whole))
    assert nbytes_of(left) == nbytes_of(whole) - experts


def test_enough_room_fetches_each_once(out: Path) -> None:
    left = api.load(out, "cpu", torch.float32, expert_bytes=1 << 30)
    logits(left, token_ids(2, 12))
    first = shelf_of(left).fetched
    logits(left, token_ids(2, 12))
    assert shelf_of(left).fetched == first <= 2 * 4


def test_those_not_used_for_longest_make_room() -> None:
    shelf = Shelf(limit_bytes=3 * 40)
    fetched: list[str] = []

    def fetch(name: str) -> nn.Module:
        fetched.append(name)
        return nn.Linear(10 if name != "large" else 100, 1, bias=False)

    for name in ("a", "b", "c", "a", "d", "a", "b"):  # d makes room by b, which is then fetched again in c's place
        shelf.get(name, lambda name=name: fetch(name))  # type: ignore[misc]
    assert fetched == ["a", "b", "c", "d", "b"] and shelf.held_bytes == 120
    shelf.get("large", lambda: fetch("large"))
    assert shelf.held_bytes == 400 and list(shelf._held) == ["large"]  # what is used is held whatever its size


def test_only_compressed_experts_stay(out: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not compressed, and only compressed experts stay in files"):
        api.load(out.parent / "source", "cpu", expert_bytes=1000)
    mixed = tmp_path / "mixed"
    shutil.copytree(out, mixed)
    name = next(name for name in Checkpoint.open(out).names if re.search(r"\.experts\.1\..*_header$", name))
    name = name.removesuffix(".weight_header")
    shard, tensors = next(
        (path, found) for path in mixed.glob("*.safetensors") if f"{name}.weight_scale" in (found := load_file(path))
    )
    rows, columns = tensors[f"{name}.weight_header"].view(torch.int32)[2:].tolist()
    for suffix in [each for each in tensors if each.startswith(f"{name}.weight_")]:
        tensors.pop(suffix)
    tensors[f"{name}.weight"] = torch.zeros(rows, columns)
    save_file(tensors, shard)
    index = mixed / "model.safetensors.index.json"
    places = {each: path.name for path in mixed.glob("*.safetensors") for each in load_file(path)}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(RequestError, match=r"experts\.1\.\w+_proj is not compressed, and only compressed experts stay"):
        api.load(mixed, "cpu", expert_bytes=1000)


def test_a_damaged_expert_is_named_when_it_is_fetched(out: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    for path in damaged.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if re.search(r"\.experts\.\d+\..*weight_stream$", name):
                tensors[name][-1] ^= 1 << 7
        save_file(tensors, path)
    model = api.load(damaged, "cpu", torch.float32, expert_bytes=1 << 20)
    with pytest.raises(RequestError, match=r"experts\.\d+\.\w+ is damaged in tile"):
        logits(model, token_ids(2, 12))


# ---- more than memory -----------------------------------------------------------------------------------------------
LIMIT_MIB, TIMES = 128, 8
PROGRAM = """
import json, sys, threading, time
from pathlib import Path

import torch
import transformers.models.qwen3_moe.modeling_qwen3_moe

from featherweight import api, recipes
import featherweight.formats, featherweight.mixture

torch.set_num_threads(1)
torch.empty(1000, 1000) @ torch.empty(1000, 1000)  # what libraries take at first


def anonymous():  # what is held beside mapped files, in KiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def watch():
    while True:
        seen.append(max(seen.pop(), anonymous()))
        time.sleep(0.01)


source, out, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = anonymous()
seen = [before]
threading.Thread(target=watch, daemon=True).start()
if sys.argv[4] == "compress":
    api.compress(source, out, recipes.by_name("sub1").but(method="rtn"), "cpu")
    said = {}
else:
    model = api.load(out, "cpu", torch.bfloat16, expert_bytes=limit // 8)
    with torch.no_grad():
        logits = model(torch.arange(3, 19)[None]).logits
    shelf = model.model.layers[0].mlp.experts.expert(0).shelf
    said = {"finite": bool(logits.isfinite().all()), "fetched": shelf.fetched, "held_bytes": shelf.held_bytes}
sys.stdout.write(json.dumps({"peak_bytes": 1024 * (seen[-1] - before), **said}))
"""


def large_mixture(folder: Path, nbytes: int, blocks: int | None = None, width: int = 256, experts: int = 16) -> Path:
    """A Qwen3-MoE of random weights, of so many experts a block and as many blocks as make so many bytes, or so many
    blocks and as many experts; one block is written at a time."""
    from transformers import Qwen3MoeConfig

    inner = 2 * width
    experts = experts if blocks is None else nbytes // (2 * blocks * 3 * width * inner)
    blocks = blocks or nbytes // (2 * experts * 3 * width * inner)
    config = Qwen3MoeConfig(
        hidden_size=width, intermediate_size=inner, moe_intermediate_size=inner, num_experts=experts, vocab_size=128,
        num_experts_per_tok=2, num_hidden_layers=blocks, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=64, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir()
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).bfloat16() / shape[-1] ** 0.5

    places: dict[str, str] = {}
    for number in range(-1, blocks):
        at = f"model.layers.{number}"
        tensors = {"model.embed_tokens.weight": some(128, width), "model.norm.weight": torch.ones(width).bfloat16()}
        if number >= 0:
            heads = {"q": (128, width), "k": (64, width), "v": (64, width), "o": (width, 128)}
            tensors = {f"{at}.self_attn.{name}_proj.weight": some(*shape) for name, shape in heads.items()}
            tensors |= {f"{at}.self_attn.{name}_norm.weight": torch.ones(32).bfloat16() for name in "qk"}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"{at}.{name}.weight": torch.ones(width).bfloat16() for name in norms}
            tensors[f"{at}.mlp.gate.weight"] = some(experts, width)
            for expert in range(experts):
                here = f"{at}.mlp.experts.{expert}"
                tensors |= {f"{here}.{name}_proj.weight": some(inner, width) for name in ("gate", "up")}
                tensors[f"{here}.down_proj.weight"] = some(width, inner)
        shard = f"model-{number + 1:05}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is anonymous memory on Linux alone")
def test_a_mixture_eight_times_the_memory_compresses_and_runs(tmp_path: Path) -> None:
    limit = LIMIT_MIB << 20
    source = large_mixture(tmp_path / "source", TIMES * limit)
    on_disk = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert on_disk > 0.98 * TIMES * limit
    said = {}
    for what in ("compress", "run"):
        command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "out"), str(limit), what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
        said[what] = json.loads(done.stdout.splitlines()[-1])
    for (
        what
    ) in said:  # beside Python and torch themselves; limits of the system count mapped files and reserved room too
        assert said[what]["peak_bytes"] <= limit, (what, said[what])
    assert said["run"]["finite"] and said["run"]["fetched"] > 0 and said["run"]["held_bytes"] <= limit // 8


GROUP_MIB = 512
GROUPS = {"memory": "memory.limit_in_bytes", "": "memory.max"}  # of versions 1 and 2, and how they are told a limit


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup with a limit of GROUP_MIB for all that its processes hold, files' pages included."""
    for version, limit in GROUPS.items():
        folder = Path("/sys/fs/cgroup") / version / f"featherweight-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / limit).write_text(str(GROUP_MIB << 20))
        except OSError:
            if folder.exists():
                folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("this user may not make a memory cgroup")


@pytest.mark.slow
def test_a_mixture_eight_times_a_cgroup_compresses_and_runs(tmp_path: Path, group: Path) -> None:
    """4.4 GB of disk; some minutes."""
    source = large_mixture(tmp_path / "source", TIMES * GROUP_MIB << 20, width=512, experts=4)
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > TIMES * GROUP_MIB << 20
    for what in ("compress", "run"):
        program = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "out"), str(LIMIT_MIB << 20), what]
        joins = "open(sys.argv[1], 'w').write('0'); os.execv(sys.argv[2], sys.argv[2:])"
        join = ["-c", f"import os, sys; {joins}", str(group / "cgroup.procs")]
        done = subprocess.run([sys.executable, *join, *program], capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, (what, done.returncode, done.stderr[-2000:])  # -9: killed for its memory
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["finite"] and said["fetched"] > 0
