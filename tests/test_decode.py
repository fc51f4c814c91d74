"""Token by token in memory of fixed size, as on a GPU, here without its graphs: against transformers' own loop."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import featherweight
from featherweight.errors import FallbackWarning
from featherweight.evaluate import read_bytes
from featherweight.evaluate.decode import Decoder, unsuited
from featherweight.linear import CompressedLinear
from featherweight.recipe import Recipe
from tiny import make, token_ids

writing = importlib.import_module("featherweight.evaluate.generate")  # the room gives the name to its function


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(make("llama", tmp_path_factory.mktemp("llama"))).eval()


def config(**changes: Any) -> GenerationConfig:
    usual = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return GenerationConfig(**{**usual, **changes})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
@pytest.mark.filterwarnings("ignore:tokens take the model's own modules")
def test_the_same_tokens_as_transformers(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make(family, tmp_path)).eval()
    assert unsuited(model) is None
    ids = token_ids(1, 9)
    want, times = writing._by_transformers(model, ids, config(), seed=0)
    new, ours = writing._by_graph(model, ids, config(), seed=0)
    assert new == want and len(new) == len(times) == len(ours) == 12
    assert times == sorted(times) and ours == sorted(ours) and ours[0] > 0


def test_it_stops_at_the_end_of_text_and_samples_by_seed(model: Any) -> None:
    ids = token_ids(1, 9)
    new, _ = writing._by_graph(model, ids, config(), seed=0)
    ended, _ = writing._by_graph(model, ids, config(eos_token_id=[1, new[4]]), seed=0)
    assert ended == new[: new.index(new[4]) + 1]
    hot = config(do_sample=True, temperature=3.0)
    drawn = [writing._by_graph(model, ids, hot, seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_logits_are_those_of_the_whole_text(model: Any) -> None:
    ids_T = token_ids(1, 20)[0]
    decoder = Decoder(model, 20)
    decoder.begin(ids_T[:12])
    for at in range(12, 20):
        got = decoder.next(ids_T[at])
    torch.testing.assert_close(got, model(ids_T.unsqueeze(0)).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_the_likeliest_follow_one_another(model: Any) -> None:
    ids_T = token_ids(1, 12)[0]
    told, free = Decoder(model, 20), Decoder(model, 20)
    token = told.begin(ids_T).argmax()
    free.begin(ids_T)
    for _ in range(6):
        assert free.token is not None and int(free.token) == int(token)
        token = told.next(token).argmax()
        free.next()


def test_states_that_are_no_keys_are_left_to_transformers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make("nemotron-h", tmp_path))
    assert "not all kept in place" in str(unsuited(model))


def test_a_step_that_fails_is_told_and_made_up_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no graph\nof this")

    monkeypatch.setattr(writing, "Decoder", fails)
    ids = token_ids(1, 9)
    with pytest.warns(FallbackWarning, match="transformers' own loop generates, since a CUDA graph fails: no graph$"):
        new, _ = writing._by_graph(model, ids, config(), seed=0)
    assert new == writing._by_transformers(model, ids, config(), seed=0)[0]


def test_what_a_token_reads(model: Any, tmp_path: Path, text: Path) -> None:
    """Everything but the embedding; its twin, the head, is a product and counts."""
    whole = sum(tensor.numel() * tensor.itemsize for name, tensor in model.state_dict().items() if "embed" not in name)
    assert read_bytes(model) == whole
    recipe = Recipe(group_size=32, samples=2, tokens=32, calibration=(str(text),), method="rtn")
    featherweight.compress(make("llama", tmp_path / "dense"), tmp_path / "out", recipe)
    compressed = featherweight.load(tmp_path / "out", "cpu", torch.float32)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    layers = [module for module in compressed.modules() if isinstance(module, CompressedLinear)]
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.buffers())
    assert read_bytes(compressed) == whole - 4 * matrices + stored and stored < matrices


def test_experts_count_as_often_as_they_are_chosen(tmp_path: Path) -> None:
    folder = make("mixtral", tmp_path)
    fused = AutoModelForCausalLM.from_pretrained(folder)
    apart = featherweight.load(folder, "cpu", torch.float32)
    experts = sum(p.nbytes for name, p in fused.named_parameters() if ".experts." in name)
    total = sum(tensor.nbytes for name, tensor in fused.state_dict().items() if "embed" not in name)
    assert read_bytes(fused) == read_bytes(apart) == total - experts // 2  # two of four
