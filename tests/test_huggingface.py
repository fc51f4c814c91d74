"""Folders in our own layout, through `featherweight.load` and through transformers' from_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import featherweight
from featherweight.api import inspect
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Joint, Pattern, Rule
from featherweight.core.solve import Choices, solve
from featherweight.errors import RequestError
from featherweight.formats import FORMATS, Format
from featherweight.kernels import dequantize
from featherweight.linear import CompressedLinear
from tiny import make, token_ids

SPARSE = FORMATS["sparse"]
GRID = Grid(bits=4, group_size=32, scale_dtype=torch.bfloat16)
TWO_OF_FOUR = Pattern(keep=2, of=4)
# One kind of matrix each, so that every way of storing one is in the folder.
RULES: dict[str, Rule] = {
    "q_proj": Pattern(0.5),
    "k_proj": TWO_OF_FOUR,
    "v_proj": GRID,
    "o_proj": Joint(replace(GRID, symmetric=False), Pattern(0.5)),
    "gate_proj": Joint(GRID, TWO_OF_FOUR),
    "up_proj": Joint(replace(GRID, bits=3), Pattern(keep=4, of=8)),
    "down_proj": Pattern(0.25, block=4),
}


def solved(weight_RC: Tensor, rule: Rule) -> Any:
    columns = weight_RC.shape[1]
    inputs_TC = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(1))
    problem = LayerProblem(weight_RC.float(), inputs_TC.T @ inputs_TC / len(inputs_TC), len(inputs_TC))
    return solve(problem, rule, Choices(method="rtn"))


def compressed(source: Path, folder: Path, rules: dict[str, Rule], format: Format = SPARSE) -> dict[str, Tensor]:
    """A folder in a format, from a dense one; returns the dense tensors of what it holds."""
    tensors = load_file(source / "model.safetensors")
    dense = dict(tensors)
    by_name = {}
    for full in [name for name in tensors if name.rpartition(".")[0].rpartition(".")[2] in rules]:
        name = full.removesuffix(".weight")
        by_name[name] = rule = rules[name.rpartition(".")[2]]
        packed = format.pack(solved(tensors.pop(full), rule), name, torch.bfloat16)
        dense[full] = dequantize(format.unpack(packed, rule, name), torch.bfloat16)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    quantization = format.config(by_name, ["lm_head"])
    config |= {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse folder, and in `dense` under it the same weights as an ordinary checkpoint."""
    place = tmp_path_factory.mktemp("sparse")
    source = make("llama", place / "source", dtype=torch.bfloat16)
    dense = compressed(source, place / "out", RULES)
    (place / "out" / "dense").mkdir()
    save_file(dense, place / "out" / "dense" / "model.safetensors", metadata={"format": "pt"})
    (place / "out" / "dense" / "config.json").write_text((source / "config.json").read_text())
    return place / "out"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, 24)).logits


def layers(model: nn.Module) -> int:
    return sum(isinstance(module, CompressedLinear) for module in model.modules())


@pytest.mark.parametrize("kernel", ["reference", "dense", "auto"])
def test_load_runs_every_rule(folder: Path, kernel: str) -> None:
    expected = logits(featherweight.load(folder / "dense", "cpu", torch.bfloat16))
    model = featherweight.load(folder, "cpu", torch.bfloat16, kernel)
    assert layers(model) == 2 * len(RULES)
    if kernel == "auto":  # cpu-int4 rounds scales, not weights, to bfloat16
        torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.1)
    else:
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "dense"])
def test_mixed_rules_load_from_other_formats_too(name: str, tmp_path: Path) -> None:
    """A pattern with a grid is stored as plain codes there, and anything as floats in a dense folder."""
    format = FORMATS[name]
    grid = replace(GRID, scale_dtype=format.scale_dtype(torch.bfloat16))
    rules: dict[str, Rule] = {
        "q_proj": grid,
        "o_proj": replace(grid, bits=8, group_size=None, symmetric=False, search="minmax"),
        "gate_proj": Joint(grid, TWO_OF_FOUR),
        "down_proj": TWO_OF_FOUR if name == "dense" else replace(grid, bits=2),
    }
    source = make("llama", tmp_path / "source", dtype=torch.bfloat16)
    dense = compressed(source, tmp_path / "out", rules, format)
    (tmp_path / "plain").mkdir()
    save_file(dense, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text((source / "config.json").read_text())
    model = featherweight.load(tmp_path / "out", "cpu", torch.bfloat16, "reference")
    assert layers(model) == (0 if name == "dense" else 8)
    assert torch.equal(logits(model), logits(featherweight.load(tmp_path / "plain", "cpu", torch.bfloat16)))
    if name != "dense":
        rows = {row["name"]: row for row in inspect(tmp_path / "out")["matrices"]}
        assert rows["model.layers.1.self_attn.o_proj"]["bits"] == 8
        assert rows["model.layers.1.mlp.gate_proj"]["sparsity"] is None


def test_inspect_reports_each_rule(folder: Path) -> None:
    found = inspect(folder)
    assert found["format"] == "sparse" and len(found["matrices"]) == 2 * len(RULES)
    fields = ("bits", "group_size", "symmetric", "sparsity")
    assert {row["name"].rpartition(".")[2]: tuple(row[f] for f in fields) for row in found["matrices"]} == {
        "q_proj": (16, None, None, 0.5),
        "k_proj": (16, None, None, "2:4"),
        "v_proj": (4, 32, True, None),
        "o_proj": (4, 32, False, 0.5),
        "gate_proj": (4, 32, True, "2:4"),
        "up_proj": (3, 32, True, "4:8"),
        "down_proj": (16, None, None, 0.25),
    }
    rows = {row["name"].rpartition(".")[2]: row for row in found["matrices"]}
    assert rows["q_proj"]["bytes"] == 64 * 64 * 2 * 9 // 16 + 16  # and 16 for the shape
    assert rows["gate_proj"]["bytes"] == 128 * 64 * (3 + 16 / 32) / 8 + 16


def test_transformers_loads_it_saves_it_and_loads_it_again(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = logits(featherweight.load(folder, "cpu", torch.bfloat16))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert layers(model) == 2 * len(RULES) and not any(p.is_meta for p in model.state_dict().values())
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "config.json").read_text())["quantization_config"]
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before) and set(before) == set(after)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_transformers_computes_in_another_dtype_from_the_same_bytes(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = next(module for module in model.modules() if isinstance(module, CompressedLinear))
    assert layer.dtype == torch.float32 and layer.weight_values.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), logits(featherweight.load(folder, "cpu", torch.float32)))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_families_with_biases_and_transposed_weights(family: str, tmp_path: Path) -> None:
    """Conv1D stores its weight the other way round; ours is R x C like any other."""
    from transformers import AutoModelForCausalLM

    source = make(family, tmp_path / "source", dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    kinds = ("c_attn", "c_proj", "c_fc") if family == "gpt2" else ("fc1", "fc2", "q_proj")
    rules: dict[str, Rule] = {}
    for full in [n for n in tensors if n.endswith(".weight") and n.split(".")[-2] in kinds and tensors[n].ndim == 2]:
        name, weight = full.removesuffix(".weight"), tensors.pop(full)
        rules[name] = TWO_OF_FOUR
        packed = SPARSE.pack(solved(weight.T if family == "gpt2" else weight, TWO_OF_FOUR), name)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    (tmp_path / "out").mkdir()
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": SPARSE.config(rules)}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert layers(model) == len(rules) > 0
    assert torch.equal(logits(model), logits(featherweight.load(tmp_path / "out", "cpu")))


def test_damage_is_a_sentence_in_both_loaders(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_values"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for load in (AutoModelForCausalLM.from_pretrained, featherweight.load):
        with pytest.raises(RequestError, match=r"weight_mask keeps 2048 weights, and .*weight_values holds 2047"):
            logits(load(tmp_path))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"q_proj\.weight_values is in none of the checkpoint's files"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


PROGRAM = """
import sys
{first}
assert ("torch" in sys.modules) == {early}, "import featherweight imports no torch and no transformers"
{second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
layers = sum(type(module).__name__ == "CompressedLinear" for module in model.modules())
assert layers == int(sys.argv[2]), layers
import transformers.quantizers.auto as tables
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("featherweight")]
assert "exec_module" not in vars(tables.__spec__.loader)
"""
ORDERS = {
    "featherweight first": ("import featherweight", "import transformers", False),
    "transformers first": ("from transformers import AutoModelForCausalLM", "import featherweight", True),
}


@pytest.mark.parametrize("order", [pytest.param("featherweight first", marks=pytest.mark.slow), "transformers first"])
def test_either_import_may_come_first(order: str, folder: Path) -> None:
    first, second, early = ORDERS[order]
    program = PROGRAM.format(first=first, second=second, early=early)
    command = [sys.executable, "-c", program, str(folder), str(2 * len(RULES))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_other_formats_come_onto_our_kernels_where_they_are_asked_to(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    format = FORMATS[name]
    grid = replace(GRID, scale_dtype=format.scale_dtype(torch.bfloat16))
    rules: dict[str, Rule] = {kind: grid for kind in ("q_proj", "k_proj", "v_proj", "down_proj")}
    out = tmp_path / "out"
    compressed(make("llama", tmp_path / "source", dtype=torch.bfloat16), out, rules, format)
    expected = logits(featherweight.load(out, "cpu", torch.bfloat16))
    model, info = AutoModelForCausalLM.from_pretrained(
        out, config=featherweight.config(out), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert layers(model) == 8 and torch.equal(logits(model), expected)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj._merged is attention.v_proj._merged is not None
    model.save_pretrained(tmp_path / "again")
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == stored
    assert torch.equal(logits(featherweight.load(tmp_path / "again", "cpu", torch.bfloat16)), expected)


def test_a_config_of_ours_is_made_of_compressed_folders_alone(folder: Path) -> None:
    with pytest.raises(RequestError, match="has no quantization_config: it is not compressed"):
        featherweight.config(folder / "dense")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert featherweight.config(folder).quantization_config == stored, "a folder of our own needs nothing"
