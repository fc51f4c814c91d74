"""EfficientQAT's files, made by a packer in NumPy that follows nothing but the facts in the format's docstring.

Shapes: R outputs, C inputs, G groups.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featherweight import api
from featherweight.core.rules import Grid
from featherweight.errors import RequestError
from featherweight.formats import from_config
from featherweight.formats.efficientqat import EfficientQat
from featherweight.stream.tune import Tuning
from runs import tensors_of
from test_formats import random_solution
from tiny import add_tokenizer, make, write_text


def numpy_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Along axis 0, 32 // bits codes a word from the lowest bit up, one by one."""
    each = 32 // bits
    words = np.zeros((-(-len(codes) // each), codes.shape[1]), dtype=np.uint32)
    for i, row in enumerate(codes):
        words[i // each] |= row.astype(np.uint32) << np.uint32(bits * (i % each))
    return words.view(np.int32)


def published(
    weights: dict[str, np.ndarray], zeros: np.ndarray, scales: np.ndarray, bits: int
) -> dict[str, np.ndarray]:
    codes = weights["codes"]
    return {
        "qweight": numpy_words(codes.T, bits),
        "qzeros": np.ascontiguousarray(numpy_words(zeros, bits).T),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1])).astype(np.int32),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["block-ap", "e2e-qp"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_read_as_published(bits: int, dtype: type) -> None:
    """Neither inputs nor outputs fill their last word."""
    draw = np.random.default_rng(bits)
    rows, columns, size = 37, 96, 32
    codes = draw.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    zeros = draw.integers(0, 1 << bits, (rows, columns // size), dtype=np.uint8)
    scales = draw.random((rows, columns // size)).astype(dtype)
    tensors = {name: torch.from_numpy(a) for name, a in published({"codes": codes}, zeros, scales, bits).items()}
    assert tensors["qweight"].shape == (-(-columns // (32 // bits)), rows)
    format, rules = from_config({"quant_method": "efficientqat", "bits": bits, "group_size": size})
    solution = format.unpack(tensors, rules.of("q_proj"), "q_proj")
    steps = codes.reshape(rows, -1, size).astype(np.float32) - zeros[..., None].astype(np.float32)
    expected = (steps * scales[..., None].astype(np.float32)).reshape(rows, columns)
    np.testing.assert_array_equal(solution.values().numpy(), expected)
    back = format.pack(solution)
    assert tuple(back) == format.suffixes(rules.of("q_proj"))
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its matrices packed as published, and with a config of ours."""
    path = add_tokenizer(make("llama", tmp_path_factory.mktemp("eqat")))
    tensors, draw = tensors_of(path), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        codes, zeros = draw.integers(0, 8, (rows, columns)), draw.integers(0, 8, (rows, columns // 32))
        scales = (draw.random((rows, columns // 32)) * 0.05).astype(np.float16)
        packed = published({"codes": codes}, zeros, scales, 3)
        tensors |= {f"{name.removesuffix('weight')}{suffix}": torch.from_numpy(a) for suffix, a in packed.items()}
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    for index in path.glob("*.index.json"):
        index.unlink()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def configured(folder: Path, **settings: int) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if settings:
        config["quantization_config"] = {"quant_method": "efficientqat", **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_is_loaded_and_tuned(folder: Path, tmp_path: Path) -> None:
    path = configured(folder, bits=3, group_size=32)
    assert {row["bits"] for row in api.inspect(path)["matrices"]} == {3}
    ids_ST = torch.arange(12).view(1, 12)
    with torch.no_grad():
        plain = api.load(path, "cpu", torch.float32, kernel="reference")(input_ids=ids_ST).logits
        dense = api.load(path, "cpu", torch.float32, kernel="dense")(input_ids=ids_ST).logits
    torch.testing.assert_close(plain, dense)
    text, settings = write_text(tmp_path / "long.txt", words=3000), Tuning(8, 32, 0.25, batch=2, rate=0.01)
    report = api.tune(path, [str(text)], to=tmp_path / "out", settings=settings, device="cpu")
    assert report["cross_entropy"] < report["cross_entropy_before"]
    before, after = tensors_of(path), tensors_of(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("scales")
    }


def test_what_is_wrong_is_said(folder: Path) -> None:
    with pytest.raises(
        RequestError, match=r"has no quantization_config, and .*qweight is packed: add one, .*efficientqat"
    ):
        api.load(configured(folder), "cpu")
    with pytest.raises(
        RequestError, match=r"qweight has 13 words for 128 inputs, and at 4 bits 16 hold them: correct bits"
    ):
        api.inspect(configured(folder, bits=4, group_size=32))
    with pytest.raises(
        RequestError, match=r"scales has shape \(4, 64\), and its neighbours and the config ask for \(8, 64\)"
    ):
        api.inspect(configured(folder, bits=3, group_size=16))
    for settings, sentence in (({"bits": 5}, "bits is 5, .* 2, 3 or 4"), ({"bits": 3}, "group_size is None, .* or -1")):
        with pytest.raises(RequestError, match=sentence):
            from_config({"quant_method": "efficientqat", **settings})
    format = EfficientQat()
    with pytest.raises(RequestError, match="has asymmetric grids of 2, 3 or 4 bits"):
        format.pack(random_solution(Grid(4, 32)))
    assert format.read(format.config({"q": Grid(2, None, symmetric=False)})).default == Grid(2, None, symmetric=False)
