"""feather-tiny-moe, the trained mixture of experts in the package: what its README says of it, and what compression
does to it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from featherweight import api, data
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.load import load_tokenizer
from featherweight.recipe import Recipe
from featherweight.recipes import by_name
from runs import journal

NAME = "feather-tiny-moe"
EXPERTS, LAYERS = 8, 4


def test_it_is_as_its_readme_says() -> None:
    """Perplexity on the whole embedded text, the share of choices that the least used expert gets, and the size."""
    folder = resolve(NAME)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    said = re.search(r"\*\*([\d.]+)\*\* .* between ([\d.]+)% and ([\d.]+)%", readme, re.DOTALL)
    assert said is not None
    model = api.load(NAME, "cpu")
    ids_ST = data.evaluation_windows(data.tokens(load_tokenizer(NAME), ["builtin:evaluation"]), 512)
    nats, counts = 0.0, torch.zeros(LAYERS, EXPERTS)
    with torch.no_grad():
        for some_ST in ids_ST.split(8):
            out = model(input_ids=some_ST, use_cache=False, output_router_logits=True)
            logits = out.logits[:, :-1].flatten(0, 1).float()
            nats += float(torch.nn.functional.cross_entropy(logits, some_ST[:, 1:].flatten(), reduction="sum"))
            for layer, scores_TE in enumerate(out.router_logits):
                counts[layer] += torch.bincount(scores_TE.topk(2).indices.flatten(), minlength=EXPERTS)
    perplexity = math.exp(nats / (len(ids_ST) * (ids_ST.shape[1] - 1)))
    assert perplexity == pytest.approx(float(said[1]), rel=0.01)
    shares = counts / counts.sum(1, keepdim=True)
    assert 100 * float(shares.min()) == pytest.approx(float(said[2]), abs=0.5)
    assert 100 * float(shares.max()) == pytest.approx(float(said[3]), abs=0.5)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000


def test_its_tokenizer_is_feather_tinys() -> None:
    assert (resolve(NAME) / "tokenizer.json").read_bytes() == (resolve("feather-tiny") / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_four_bits_of_every_expert(tmp_path: Path) -> None:
    """All matrices are there, no expert is starved on 16 samples, and little is lost."""
    recipe = Recipe(bits=4, group_size=64, refine=0, samples=16, tokens=256)
    result = api.compress(NAME, tmp_path / "out", recipe, "cpu")
    assert result.matrices == LAYERS * (4 + 3 * EXPERTS)
    lines = [line for line in journal(tmp_path / "out") if ".experts." in line.get("name", "")]
    assert len(lines) == LAYERS * 3 * EXPERTS and not any(line.get("starved") for line in lines)
    assert "model.layers.3.mlp.experts.7.down_proj.weight" in Checkpoint.open(resolve(NAME)).names
    found = api.evaluate(tmp_path / "out", context=512, against=NAME, limit=8, device="cpu")
    assert found["kl_nats"] < 0.05


@pytest.mark.slow
def test_ternary_experts_lose_less_than_by_rounding(tmp_path: Path) -> None:
    """Loss increase (nats over dense, held-out text): 0.74 of rounding's was measured, at equal bytes."""
    plain = Recipe(bits=1.58, group_size=64, samples=64, tokens=256)
    rows = {"rtn": plain.but(method="rtn"), "gptq": plain.but(damping=1.0, pull=0.0)}
    dense = api.evaluate(NAME, context=512, limit=16, device="cpu")["perplexity"]
    found = {}
    for name, recipe in rows.items():
        result = api.compress(NAME, tmp_path / name, recipe, "cpu")
        seen = api.evaluate(tmp_path / name, context=512, against=NAME, limit=16, device="cpu")
        found[name] = (math.log(seen["perplexity"] / dense), seen["kl_nats"], result.bytes)
    assert found["gptq"][0] < 0.85 * found["rtn"][0] and found["gptq"][1] < 0.85 * found["rtn"][1]
    assert found["gptq"][2] == found["rtn"][2]


@pytest.mark.nightly
def test_the_recipe_of_ternary_loses_two_fifths_of_what_rounding_loses(tmp_path: Path) -> None:
    """0.39 and 0.35 of rounding's loss increase were measured with two seeds, before `tune` (0.32 after it)."""
    ternary = by_name("sub1").but(samples=256, tokens=256)
    dense = api.evaluate(NAME, context=512, limit=16, device="cpu")["perplexity"]
    found = {}
    for method in ("rtn", "block-ap"):
        api.compress(NAME, tmp_path / method, ternary.but(method=method), "cpu")
        seen = api.evaluate(tmp_path / method, context=512, limit=16, device="cpu")["perplexity"]
        found[method] = math.log(seen / dense)
    assert found["block-ap"] < 0.45 * found["rtn"]
