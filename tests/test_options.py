"""compress with every format and option, wherever hidden states live, on checkpoints laid out in odd ways."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featherweight import api
from featherweight.errors import RequestError
from featherweight.linear import CompressedLinear
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.load import load_dense
from featherweight.models.tree import build
from featherweight.stream import compress as pipeline
from featherweight.stream import hidden as hidden_states
from runs import (
    Seen,
    featherweight,
    journal,
    logits,
    model_files,
    put_weights,
    recipe,
    same_bytes,
    shards,
    tensors_of,
    watching,
)
from tiny import add_tokenizer, make, token_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("one"), num_hidden_layers=1))


# --- formats


BOUNDS = {2: 0.65, 3: 0.35, 4: 0.17, 8: 0.011}  # |W - V| / |W| of a random matrix


def assert_loads(out: Path, seen: list[Seen], stored_bits: int, symmetric: bool, group_size: int | None) -> Any:
    """What is loaded is what was solved, code for code; returns the model."""
    model = api.load(out, "cpu", torch.float32, kernel="dense")
    for block, layers in zip(seen, model.model.layers, strict=True):
        for path, solution in block.solutions.items():
            layer = layers.get_submodule(path)
            assert isinstance(layer, CompressedLinear)
            grid = layer.rule
            assert (grid.stored_bits, grid.symmetric, grid.group_size) == (stored_bits, symmetric, group_size)
            assert torch.equal(layer.solution().codes_RC, solution.codes_RC)
            assert torch.equal(layer.weight, solution.values())
    assert torch.isfinite(logits(model, token_ids(1, 16))).all()
    return model


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq_v2"])
def test_formats(
    format: str, symmetric: bool, bits: int, method: str, one_block: Path, tmp_path: Path, text: Path
) -> None:
    chosen = recipe(text, format=format, symmetric=symmetric, bits=bits, method=method)
    with watching() as seen:
        api.compress(one_block, tmp_path / "out", chosen)
    assert_loads(tmp_path / "out", seen, bits, symmetric, 32)
    for path, weight_RC in seen[0].weights.items():
        error = float((weight_RC - seen[0].solutions[path].values()).norm() / weight_RC.norm())
        # To lower the loss GPTQ moves weights further than rounding does.
        assert error < BOUNDS[bits] * (1 if method == "rtn" else 1.6), path
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if format == "compressed-tensors":
        assert not (tmp_path / "out" / "quantize_config.json").exists() and config["ignore"] == ["lm_head"]
    else:
        assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
        assert (config["bits"], config["sym"], config["group_size"]) == (bits, symmetric, 32)
        assert config["checkpoint_format"] == format
    assert all((row["loss"] is None) == (method == "rtn") for row in journal(tmp_path / "out"))


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_row_groups_and_ternary(format: str, one_block: Path, tmp_path: Path, text: Path) -> None:
    with watching() as seen:
        api.compress(one_block, tmp_path / "row", recipe(text, format=format, group_size=None))
    assert_loads(tmp_path / "row", seen, 4, True, None)
    assert all(solution.scales_RG.shape[1] == 1 for solution in seen[0].solutions.values())
    with watching() as seen:
        result = api.compress(one_block, tmp_path / "ternary", recipe(text, format=format, bits=1.58))
    model = assert_loads(tmp_path / "ternary", seen, 2, True, 32)
    codes_RC = model.model.layers[0].mlp.up_proj.solution().codes_RC
    assert codes_RC.unique().tolist() == [1, 2, 3]
    assert 2 < result.bits_per_weight < 5


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_odd_widths(bits: int, one_block: Path, tmp_path: Path, text: Path) -> None:
    with watching() as seen:
        api.compress(one_block, tmp_path / "out", recipe(text, bits=bits, symmetric=False, method="rtn"))
    assert_loads(tmp_path / "out", seen, bits, False, 32)
    with pytest.raises(RequestError, match=rf"layers\.0\.self_attn\.q_proj wants {bits} bits, and gptq has 2, 3, 4"):
        api.compress(one_block, tmp_path / "no", recipe(text, bits=bits, format="gptq"))
    assert not (tmp_path / "no").exists()


# --- options


OPTIONS: dict[str, dict[str, Any]] = {
    "true-sequential": {"true_sequential": True},
    "target": {"target": "original"},
    "full-pull": {"target": "original", "pull": 1.0},
    "sequential-target": {"target": "original", "true_sequential": True},
    "no-sinks": {"sink_share": 0.0},
    "mse": {"search": "mse"},
    "hessian": {"search": "hessian"},
    "no-mirror": {"search": "hessian", "mirror": False},
    "pivot": {"order": "pivot"},
    "natural": {"order": "natural"},
    "updated": {"order": "natural", "scales_from": "updated"},
    "damping": {"damping": 0.01},
    "refine": {"refine": 1},
    "refine-twice": {"refine": 2},
    "seed": {"seed": 1},
    "samples": {"samples": 5},
    "rtn": {"method": "rtn"},
}


@pytest.fixture(scope="module")
def by_option(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model compressed with each option, and by default."""
    folder = tmp_path_factory.mktemp("options")
    for name, changes in {"default": {}, **OPTIONS}.items():
        api.compress(llama, folder / name, recipe(text, **changes))
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_does_something_that_loads(option: str, by_option: dict[str, Path]) -> None:
    same = [name for name, folder in by_option.items() if shards(folder) == shards(by_option[option])]
    assert same == [option]
    ids_ST = token_ids(2, 24)
    model = api.load(by_option[option], "cpu", torch.float32, kernel="dense")
    original = logits(api.load(by_option["default"], "cpu", torch.float32, kernel="dense"), ids_ST)
    likeness = torch.cosine_similarity(logits(model, ids_ST).flatten(0, 1), original.flatten(0, 1)).mean()
    assert likeness > 0.75


def changed(one: Path, other: Path, block: int) -> set[str]:
    """Inner names of the matrices of a block that differ between two folders."""
    before, after = tensors_of(one), tensors_of(other)
    names = [n for n in before if n.startswith(f"model.layers.{block}.") and n.endswith(".weight_packed")]
    differing = (name for name in names if not torch.equal(before[name], after[name]))
    return {name.removeprefix(f"model.layers.{block}.").removesuffix(".weight_packed") for name in differing}


QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}


@pytest.mark.parametrize("option", ["true-sequential", "target"])
def test_what_runs_first_does_not_depend_on_what_comes_before(option: str, by_option: dict[str, Path]) -> None:
    """Nothing has drifted yet in front of q, k and v of block 0, and all but down with the original target."""
    first = changed(by_option["default"], by_option[option], 0)
    assert not first & QKV
    assert first == {"mlp.down_proj"} if option == "target" else "mlp.down_proj" in first
    assert changed(by_option["default"], by_option[option], 1) & QKV


def test_no_pull_is_no_target(llama: Path, text: Path, tmp_path: Path, by_option: dict[str, Path]) -> None:
    api.compress(llama, tmp_path / "out", recipe(text, target="original", pull=0.0, true_sequential=True))
    assert shards(tmp_path / "out") == shards(by_option["true-sequential"])


def test_same_request_same_bytes(llama: Path, text: Path, tmp_path: Path, by_option: dict[str, Path]) -> None:
    again = recipe(text)
    assert again.digest() != recipe(text, seed=1).digest()
    api.compress(llama, tmp_path / "out", again)
    assert model_files(tmp_path / "out") == model_files(by_option["default"])


def test_rounding_needs_neither_tokenizer_nor_text(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "source")
    api.compress(source, tmp_path / "out", recipe(tmp_path / "absent.txt", method="rtn"))
    assert_loads_same_count(tmp_path / "out", 14)


def test_rounding_minds_no_window_length(tmp_path: Path) -> None:
    """No window is ever cut: the default of 2048 tokens does not matter to a model of 128 positions."""
    from featherweight.recipe import Recipe

    source = make("llama", tmp_path / "source")
    api.compress(source, tmp_path / "out", Recipe(method="rtn", group_size=32))
    assert_loads_same_count(tmp_path / "out", 14)


def assert_loads_same_count(out: Path, matrices: int) -> None:
    model = api.load(out)
    assert sum(isinstance(module, CompressedLinear) for module in model.modules()) == matrices


# --- where hidden states live, and how they are batched


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot set room aside")
def test_hidden_states_on_disk_have_their_room_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "free_memory_bytes", lambda: 0)
    states = hidden_states.HiddenStates((64, 64, 64), torch.float32, CPU, tmp_path / "scratch")
    assert (tmp_path / "scratch").stat().st_blocks * 512 >= 64**3 * 4
    states.close()


@pytest.mark.parametrize("target", ["drifted", "original"])
def test_hidden_states_on_disk_give_the_same_bytes(
    target: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_option: dict[str, Path]
) -> None:
    monkeypatch.setattr(hidden_states, "free_memory_bytes", lambda: 0)
    with watching() as seen:
        api.compress(llama, tmp_path / "out", recipe(text, target=target))
    assert [block.place for block in seen] == ["disk", "disk"]
    expected = by_option["default" if target == "drifted" else "target"]
    assert model_files(tmp_path / "out") == model_files(expected)  # the scratch file is gone, too


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["device", "memory", "disk"])
def test_a_pass_there_and_back_on_a_gpu(place: hidden_states.Place, tmp_path: Path) -> None:
    """More batches than are on their way at a time, the last of them smaller."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: its streams and pinned memory are what is tested")
    device = torch.device("cuda", 0)
    first_STD = torch.randn(21, 64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    states = hidden_states.HiddenStates((21, 64, 256), torch.bfloat16, device, tmp_path / "scratch", place=place)
    states.states_STD.copy_(first_STD)
    expected_STD = first_STD.to(device)
    for _ in range(3):
        states.advance(2, lambda states_STD: torch.tanh(states_STD) * 2)
        expected_STD = torch.tanh(expected_STD) * 2
    assert torch.equal(states.states_STD.to(device), expected_STD)
    states.close()


def test_batches_do_not_matter(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_option: dict[str, Path]
) -> None:
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", {"cpu": 3 * 32})  # three windows and one
    api.compress(llama, tmp_path / "out", recipe(text))
    one, other = tensors_of(tmp_path / "out"), tensors_of(by_option["default"])
    for name in (name for name in one if name.endswith("weight_packed")):
        assert (one[name].view(torch.uint8) == other[name].view(torch.uint8)).float().mean() > 0.97, name
    for row, before in zip(journal(tmp_path / "out"), journal(by_option["default"]), strict=True):
        assert row["loss"] == pytest.approx(before["loss"], rel=0.02)


def test_a_bos_is_put_in_front_of_every_window(tmp_path: Path, text: Path) -> None:
    with_bos = add_tokenizer(make("llama", tmp_path / "bos"), bos=True)
    without = add_tokenizer(make("llama", tmp_path / "plain"))
    one, other = (pipeline.calibration_ids(source, recipe(text)) for source in (with_bos, without))
    assert one is not None and other is not None and one.shape == other.shape == (4, 32)
    assert (one[:, 0] == 1).all() and (one[:, 1:] != 1).all() and (other != 1).all()


# --- checkpoints that are not laid out the usual way


def test_shards_of_the_source_do_not_matter(
    tmp_path: Path, text: Path, llama: Path, by_option: dict[str, Path]
) -> None:
    source = add_tokenizer(make("llama", tmp_path / "source", max_shard_size="80KB", intermediate_size=256))
    assert len(list(source.glob("*.safetensors"))) > 3
    api.compress(source, tmp_path / "out", recipe(text))
    assert shards(tmp_path / "out") == shards(by_option["default"])


def test_bfloat16(tmp_path: Path, text: Path) -> None:
    source = add_tokenizer(make("llama", tmp_path / "source", dtype=torch.bfloat16))
    with watching() as seen:
        api.compress(source, tmp_path / "out", recipe(text))
    model = assert_loads(tmp_path / "out", seen, 4, True, 32)
    assert model.model.layers[0].mlp.up_proj.get_buffer("weight_scale").dtype == torch.bfloat16
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    kept = before.keys() & after.keys()
    assert len(kept) > 4 and all(same_bytes(before[name], after[name]) for name in kept)
    assert api.load(tmp_path / "out", dtype=torch.bfloat16)(token_ids(1, 8)).logits.dtype == torch.bfloat16


def test_names_without_the_prefix_and_tensors_no_one_uses(tmp_path: Path, text: Path) -> None:
    source = add_tokenizer(make("gpt2", tmp_path / "source"))
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    api.compress(source, tmp_path / "out", recipe(text))
    after = tensors_of(tmp_path / "out")
    assert "h.0.attn.c_attn.weight_packed" in after and same_bytes(after["h.0.attn.bias"], tensors["h.0.attn.bias"])
    model = api.load(tmp_path / "out", "cpu", torch.float32, kernel="dense")
    other = load_dense(source, CPU, torch.float32)
    assert put_weights(other, model) == 8
    torch.testing.assert_close(logits(model, token_ids(2, 12)), logits(other, token_ids(2, 12)), rtol=1e-5, atol=1e-5)


def test_templates_in_a_folder_stay_in_it(tmp_path: Path, llama: Path) -> None:
    source = make("llama", tmp_path / "source", num_hidden_layers=1)
    side = {"chat_template.jinja": "{{ a }}", "additional_chat_templates/tool.jinja": "{{ b }}", "LICENSE": "free"}
    for name, content in side.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    (source / ".git").mkdir()
    api.compress(source, tmp_path / "out", recipe(tmp_path, method="rtn"))
    found = model_files(tmp_path / "out")
    assert {name: found[name].decode() for name in side if name in found} == side
    assert "pytorch_model.bin" not in found and len(found) == len(side) + 5


def test_shards_may_be_read_by_whoever_may_read_the_config(by_option: dict[str, Path]) -> None:
    out = by_option["default"]
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in out.iterdir() if path.name[0] != "."}
    assert len(set(modes.values())) == 1, modes


def test_a_compressed_model_is_not_compressed_again(by_option: dict[str, Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="quantized already"):
        api.compress(by_option["default"], tmp_path / "out", recipe(text))
    assert not (tmp_path / "out").exists()


def test_progress_only_goes_forward(llama: Path, text: Path, tmp_path: Path) -> None:
    heard: list[tuple[float, float]] = []
    api.compress(llama, tmp_path / "out", recipe(text), tell=lambda done, total, _what: heard.append((done, total)))
    assert {total for _, total in heard} == {2} and heard[-1][0] == 2
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert {0, 1, 2} < {done for done, _ in heard}


# --- the embedded model


def test_the_embedded_model_through_the_command_line(tmp_path: Path) -> None:
    ran = featherweight(
        "compress", "feather-tiny", tmp_path / "out", "--method", "rtn", "--bits", 4, "--group-size", 64, "--tokens", 64
    )
    assert ran.code == 0, ran.err
    assert ran.last["matrices"] == sum(len(b.matrices) for b in build(Checkpoint.open(resolve("feather-tiny"))).blocks)
    assert 4 < ran.last["bits_per_weight"] < 4.5
