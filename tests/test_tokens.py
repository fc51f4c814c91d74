"""Embedding and head, rounded: stored, loaded and run in every family, and by transformers where it can."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.pytorch_utils import Conv1D

import runs
import tiny
from featherweight import api
from featherweight.core.rules import Grid
from featherweight.errors import RequestError
from featherweight.formats import FORMATS
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.load import load_dense
from featherweight.models.tokens import token_matrices
from featherweight.models.tree import build

FAMILIES = ("llama", "gemma3", "gpt2", "bloom", "opt-projected", "qwen3", "falcon-old")
IDS = torch.arange(12).view(2, 6) * 7 % 128


def rounded(folder: Path, out: Path, text: Path, **changes: object) -> Path:
    api.compress(folder, out, runs.recipe(text, **{"bits": 8, "embedding_bits": 8, **changes}), "cpu")
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored_is_what_runs(family: str, tmp_path: Path, text: Path) -> None:
    """The loaded model is the dense one with the stored values in place, scaled rows, tied heads and all."""
    folder = tiny.add_tokenizer(tiny.make(family, tmp_path / "dense"))
    out = rounded(folder, tmp_path / "out", text)
    model, reference = api.load(out, "cpu", kernel="reference"), load_dense(folder, "cpu")
    with torch.no_grad():
        for path, module in model.named_modules():
            if hasattr(module, "solution"):
                twin = reference.get_submodule(path)
                twin.weight.copy_(module.weight.T if isinstance(twin, Conv1D) else module.weight)
        found, wanted = model(IDS).logits, reference(IDS).logits
        assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
        assert torch.allclose(api.load(out, "cpu", kernel="dense")(IDS).logits, found, atol=1e-4)
    names = {matrix.name for matrix in token_matrices(build(Checkpoint.open(folder)))}
    listed = {row["name"]: row["bits"] for row in api.inspect(out)["matrices"]}
    assert names and all(listed[name] == 8 for name in names)
    assert not names & {name.removesuffix(".weight") for name in Checkpoint.open(out).names}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["compressed-tensors", "sparse"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_are_those_of_the_whole(name: str, symmetric: bool, bits: int) -> None:
    from featherweight.core.problem import LayerProblem
    from featherweight.core.sweep import round_to_nearest

    weight_RC = torch.randn(37, 64, generator=torch.Generator().manual_seed(0))
    grid, format = Grid(bits, 32, symmetric), FORMATS[name]
    solution = round_to_nearest(LayerProblem(weight_RC, torch.eye(64), 0, 0.0, "embedding"), grid)
    index_N = torch.tensor([36, 0, 5, 5])
    rows = format.unpack_rows(format.pack(solution), grid, index_N, 64)
    assert torch.equal(rows.values(), solution.values()[index_N])


@pytest.mark.parametrize(
    ("family", "tied", "sparsity"),
    [("llama", True, None), ("llama", False, None), ("llama", True, "0.5"), ("gemma3", True, "0.5")],
)
def test_transformers_loads_it(family: str, tied: bool, sparsity: str | None, tmp_path: Path, text: Path) -> None:
    folder = tiny.add_tokenizer(tiny.make(family, tmp_path / "dense", tie_word_embeddings=tied))
    out = rounded(folder, tmp_path / "out", text, sparsity=sparsity)
    ours = api.load(out, "cpu", kernel="reference")
    how = {} if sparsity else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(out, **how)
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, ours(IDS).logits, atol=1e-4)
    if sparsity:
        theirs.save_pretrained(tmp_path / "again")
        again = api.load(tmp_path / "again", "cpu", kernel="reference")
        assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_the_stream_begins_with_what_is_stored(tmp_path: Path, text: Path, llama: Path) -> None:
    """Two bits in the embedding change what the first block is solved for."""
    plain = runs.recipe(text, bits=4)
    api.compress(llama, tmp_path / "apart", plain, "cpu")
    api.compress(llama, tmp_path / "known", plain.but(embedding_bits=2), "cpu")
    apart, known = (load_file(sorted((tmp_path / name).glob("*.safetensors"))[1]) for name in ("apart", "known"))
    key = "model.layers.0.mlp.down_proj.weight_packed"
    assert not torch.equal(apart[key], known[key])


def test_a_run_that_was_cut_short_ends_alike(tmp_path: Path, text: Path, llama: Path) -> None:
    whole = rounded(llama, tmp_path / "whole", text)
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("config.json", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        (tmp_path / "cut" / name).unlink()
    again = rounded(llama, tmp_path / "cut", text)
    assert runs.model_files(again) == runs.model_files(whole)
    rows = api.inspect(again)["matrices"]
    assert {row["name"] for row in rows} >= {"model.embed_tokens"} and len(rows) == 15


def test_a_size_counts_them(tmp_path: Path, text: Path, llama: Path) -> None:
    recipe = runs.recipe(text, embedding_bits=8, size_bytes=80_000)
    found = api.compress(llama, tmp_path / "out", recipe, "cpu")
    assert 0.98 * 80_000 <= found.bytes <= 80_000


def test_refusals(tmp_path: Path, text: Path, llama: Path) -> None:
    with pytest.raises(RequestError, match=r"embed_tokens.*8 bits.*gptq.*16"):
        rounded(llama, tmp_path / "gptq", text, format="gptq")
    with pytest.raises(RequestError, match="bits must be one of"):
        runs.recipe(text, embedding_bits=9)
    with pytest.raises(RequestError, match=r"embed_tokens has 32 inputs.*64"):
        odd = tiny.make("opt-projected", tmp_path / "projected")
        rounded(tiny.add_tokenizer(odd), tmp_path / "odd", text, group_size=64)
