"""A checkpoint of ours, read by the compressed-tensors package inside transformers."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import Solution
from featherweight.formats import FORMATS
from featherweight.kernels import dequantize

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

FORMAT = FORMATS["compressed-tensors"]
VERSION = tuple(int(part) for part in importlib.metadata.version("compressed-tensors").split(".")[:2])
DENSE_SINCE = (0, 18)


def round_to_nearest(weight_RC: Tensor, grid: Grid) -> Solution:
    grouped = weight_RC.float().unflatten(1, (-1, grid.width(weight_RC.shape[1])))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if grid.symmetric else high - low
    scales = (span / grid.top).to(grid.scale_dtype)
    zeros = torch.full_like(low, grid.middle) if grid.symmetric else (-low / scales.float()).round().clamp(0, grid.top)
    codes = grid.encode(grouped, scales.float()[..., None], zeros[..., None]).to(torch.uint8).flatten(1)
    return Solution(codes, scales, zeros.to(torch.uint8), grid, torch.zeros(len(codes)))


def tiny_llama(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    # Not `.to(dtype)`, which would round the rotary frequencies too, as no loader does.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def write(model: nn.Module, usual: Grid, folder: Path, others: dict[str, Grid] | None = None) -> None:
    """Save `model` compressed, `others` by the end of their names, and leave the dequantised weights in it."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rules: dict[str, Rule] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rules[name] = grid = (others or {}).get(name.rpartition(".")[2], usual)
            solution = round_to_nearest(module.weight.data, grid)
            packed = FORMAT.pack(solution, name)
            module.weight.data = dequantize(FORMAT.unpack(packed, grid, name), module.weight.dtype)
            tensors.pop(f"{name}.weight")
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": FORMAT.config(rules, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, symmetric: bool) -> tuple[nn.Module, dict[str, object]]:
    """As a user would; since 0.18 an asymmetric checkpoint, its own included, only loads with `dequantize`.

    (0.18.0 and 0.20.0 build their empty modules with unpacked zeros, which the packed ones on disk do not fit.)
    """
    how = {}
    if not symmetric and VERSION >= DENSE_SINCE:
        how["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)


@pytest.mark.parametrize(("size", "dtype"), [(32, torch.bfloat16), (None, torch.float32)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_computes_the_same_logits(
    bits: int, symmetric: bool, size: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    if bits == 3 and VERSION < DENSE_SINCE:
        pytest.skip("compressed-tensors before 0.18 leaves gaps between codes of 3 bits")
    model, grid = tiny_llama(dtype), Grid(bits=bits, group_size=size, symmetric=symmetric, scale_dtype=dtype)
    tokens = torch.arange(0, 120, 5)[None]
    dense = model(tokens).logits
    write(model, grid, tmp_path)
    expected = model(tokens).logits
    loaded, info = load(tmp_path, symmetric)
    # `missing` and `unexpected` keys are where a wrong name would otherwise be replaced by random weights.
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    logits = loaded.eval()(tokens).logits
    assert torch.equal(logits, expected)
    assert not torch.equal(dense, expected)


def test_transformers_loads_a_rule_for_each_matrix(tmp_path: Path) -> None:
    model, usual = tiny_llama(torch.bfloat16), Grid(bits=4, group_size=32, scale_dtype=torch.bfloat16)
    others = {"down_proj": replace(usual, bits=8), "v_proj": replace(usual, bits=2, group_size=16)}
    write(model, usual, tmp_path, others)
    tokens = torch.arange(0, 120, 5)[None]
    expected = model(tokens).logits
    loaded, info = load(tmp_path, True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(loaded.eval()(tokens).logits, expected)
