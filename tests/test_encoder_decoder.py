"""Encoder-decoders in the stream: Switch Transformers (experts), T5 and BART, from a folder to one that loads and is
measured.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featherweight import api
from featherweight.errors import RequestError
from featherweight.evaluate.generate import generate
from featherweight.linear import CompressedLinear
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.encoder_decoder import EncoderDecoderRunner, runner_of
from featherweight.models.load import load_dense, load_tokenizer
from featherweight.models.tree import build, matrices_left
from featherweight.models.windows import model_inputs
from featherweight.stream.tune import tune
from runs import journal, recipe, same_bytes, tensors_of
from tiny import add_tokenizer, token_ids

SMALL: dict[str, Any] = {"vocab_size": 128, "d_model": 32, "decoder_start_token_id": 0}
T5 = {"d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
SPARSE = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 16}
BART = {
    "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "switch": ("SwitchTransformers", T5 | SPARSE),
    "t5": ("T5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("Bart", BART),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    made = {}
    for family, (name, sizes) in FAMILIES.items():
        made[family] = folder = tmp_path_factory.mktemp(family) / "source"
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SMALL, **sizes)
        made_of = {"Bart": "BartForConditionalGeneration"}.get(name, f"{name}ForConditionalGeneration")
        getattr(transformers, made_of)(config).eval().save_pretrained(folder)
        add_tokenizer(folder)
    return made


def ours(text: Path, **changes: Any) -> Any:
    return recipe(text, **{"samples": 4, "tokens": 48, "target": "original", "group_size": 16, **changes})


@pytest.mark.parametrize("family", ["switch", pytest.param("t5", marks=pytest.mark.slow), "bart"])
def test_blocks_one_at_a_time_are_the_model(family: str, folders: dict[str, Path]) -> None:
    model, ids_ST = load_dense(folders[family]), token_ids(3, 25)
    runner = runner_of(build(Checkpoint.open(folders[family])), "cpu", torch.float32)
    assert isinstance(runner, EncoderDecoderRunner)
    states = runner.embed(ids_ST)
    for index in range(len(runner.blocks)):
        if index == runner.turn:
            states = runner.embed(ids_ST, states)
        states = runner.run(index, runner.load(index), states)
        runner.unload(index)
    part: Any = model.get_decoder()
    norm = getattr(part, "final_layer_norm", nn.Identity())  # behind the last block of the T5s
    with torch.no_grad():
        encoded = model(**model_inputs(model, ids_ST)).encoder_last_hidden_state
        decoded = part(
            input_ids=model_inputs(model, ids_ST)["decoder_input_ids"], encoder_hidden_states=encoded
        ).last_hidden_state
        assert torch.equal(states[:, 12:], encoded) and torch.equal(norm(states[:, :12]), decoded)


@pytest.mark.parametrize(("family", "changes"), [
    ("switch", {}),
    pytest.param("switch", {"bits": 1.58, "format": "sub1", "target": "drifted"}, marks=pytest.mark.slow),
    pytest.param("t5", {}, marks=pytest.mark.slow),
    pytest.param("bart", {"method": "rtn"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_every_matrix_of_both_is_compressed_and_loads(
    family: str, changes: dict[str, Any], folders: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    source, out = folders[family], tmp_path / "out"
    result = api.compress(source, out, ours(text, **changes))
    dense, loaded = load_dense(source), api.load(out)
    linears = {name for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    left = {name for name in linears if "router" in name or name == "lm_head"}
    names = {row["name"] for row in journal(out)}
    assert names == linears - left and result.matrices == len(names)
    assert set(matrices_left(build(Checkpoint.open(source)))) == left
    layers = [module for module in loaded.modules() if isinstance(module, CompressedLinear)]
    assert len(layers) == len(names)
    if family == "switch":
        assert "encoder.block.1.layer.1.mlp.experts.expert_3.wo" in names
        routed = [row["tokens"] for row in journal(out) if ".experts." in row["name"] and row["name"].endswith(".wi")]
        assert len(routed) == 8 and sum(routed) <= 2 * 4 * 24  # a token to one expert, or to none where that is full
    inputs = model_inputs(dense, token_ids(2, 32))
    with torch.no_grad():
        before, after = (each(**inputs).logits.flatten(0, 1) for each in (dense, loaded))
    assert torch.cosine_similarity(before, after).mean() > (0.9 if not changes.get("bits") else 0.4)
    found = api.evaluate(out, text=[str(text)], context=48, against=source, limit=8)
    assert found["tokens"] % 24 == 0 and 0 < found["kl_nats"] < 20


def test_a_killed_run_goes_on_in_the_decoder(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    api.compress(folders["switch"], whole, ours(text))
    shutil.copytree(whole, resumed)
    (resumed / "config.json").unlink()
    sorted(resumed.glob("*.safetensors"))[-1].unlink()
    api.compress(folders["switch"], resumed, ours(text))
    one, other = tensors_of(whole), tensors_of(resumed)
    assert one.keys() == other.keys() and all(same_bytes(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_what_a_decoder_reads_shows_in_the_sums(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Cross attention is calibrated on what the compressed encoder returns: another encoder, other keys."""
    changed = shutil.copytree(folders["t5"], tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"][:16] *= 100
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    losses = []
    for source in (folders["t5"], changed):
        api.compress(source, tmp_path / f"out{len(losses)}", ours(text, target="drifted"))
        losses.append({row["name"]: row["loss"] for row in journal(tmp_path / f"out{len(losses)}")})
    cross = [name for name in losses[0] if name.endswith("EncDecAttention.k")]
    assert len(cross) == 2 and all(losses[1][name] > 10 * losses[0][name] for name in cross)
    inside = [name for name in losses[0] if name.startswith("encoder.")]
    assert all(losses[1][name] == losses[0][name] for name in inside)


@pytest.mark.parametrize(("changes", "said"), [
    ({"guide": 0.5}, "leave out weights of tokens"),
    ({"method": "block-ap", "bits": 4}, "leave out training"),
    ({"average_bits": 4.0}, "leave out a budget"),
])  # fmt: skip
def test_what_decoders_alone_can_have_is_refused(
    changes: dict[str, Any], said: str, folders: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=said):
        api.compress(folders["t5"], tmp_path / "out", ours(text, **changes))


def test_what_goes_on_with_a_text_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    api.compress(folders["t5"], tmp_path / "out", api.Recipe(method="rtn", bits=4, group_size=16))
    loaded, tokenizer = api.load(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    with pytest.raises(RequestError, match="answers a text and does not go on with it"):
        generate(loaded, tokenizer, "some text", 2)
    with pytest.raises(RequestError, match="tune trains decoders alone"):
        tune(tmp_path / "out", [], device="cpu")
    written = loaded.generate(input_ids=token_ids(1, 8), decoder_start_token_id=0, max_new_tokens=3, min_new_tokens=3)
    assert written.shape == (1, 4)


def test_a_decoder_that_begins_with_nothing(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["t5"], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    with pytest.raises(RequestError, match="names no decoder_start_token_id"):
        api.compress(folder, tmp_path / "out", ours(text))


def test_fewer_experts_than_config_says(folders: dict[str, Path], text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["switch"], tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 3}))
    with pytest.raises(RequestError, match="4 experts on disk and config"):
        api.compress(folder, tmp_path / "out", ours(text))
