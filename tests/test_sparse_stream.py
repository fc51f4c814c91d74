"""compress with zeros in it, alone and joined with rounding, and with tokens weighed by their gradients.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight import api
from featherweight.core.rules import Pattern
from featherweight.errors import RequestError
from featherweight.linear import CompressedLinear
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.load import load_dense
from featherweight.models.tree import build
from featherweight.stream.guide import normalised, token_weights
from featherweight.stream.parallel import World
from runs import featherweight, journal, logits, recipe, shards, watching
from tiny import add_tokenizer, make, token_ids

CPU = torch.device("cpu")
HALF, TWO_OF_FOUR = Pattern(0.5), Pattern(keep=2, of=4)
ASKED: dict[str, dict[str, Any]] = {
    "half": {"sparsity": "0.5", "bits": 16},
    "2:4": {"sparsity": "2:4", "bits": 16},
    "joint": {"sparsity": "0.5", "bits": 4},
    "joint 2:4": {"sparsity": "2:4", "bits": 4, "symmetric": False},
    "sparsegpt": {"sparsity": "0.5", "bits": 16, "mask": "sparsegpt", "resolve": 0},
    "wanda": {"sparsity": "0.5", "bits": 16, "mask": "wanda", "swaps": 1},
    "magnitude": {"sparsity": "0.5", "bits": 16, "method": "rtn"},
    "obs": {"sparsity": "2:4", "bits": 16, "mask": "obs"},
    "original": {"sparsity": "0.5", "bits": 4, "target": "original"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("sparse")))


@pytest.mark.parametrize("asked", ASKED)
def test_what_was_solved_is_what_loads(asked: str, source: Path, text: Path, tmp_path: Path) -> None:
    with watching() as seen:
        result = api.compress(source, tmp_path / "out", recipe(text, **ASKED[asked]))
    model = api.load(tmp_path / "out", "cpu", torch.float32, kernel="dense")
    zeros = total = 0
    for block, layers in zip(seen, model.model.layers, strict=True):
        for path, solution in block.solutions.items():
            layer = layers.get_submodule(path)
            assert isinstance(layer, CompressedLinear)
            assert torch.equal(layer.weight, solution.values())
            zeros, total = zeros + int((~solution.keep_RC).sum()), total + solution.keep_RC.numel()
    assert zeros == total / 2
    assert {row["sparsity"] for row in journal(tmp_path / "out")} == {ASKED[asked]["sparsity"]}
    found = api.inspect(tmp_path / "out")
    assert found["format"] == "sparse" and len(found["matrices"]) == result.matrices
    assert torch.isfinite(logits(model, token_ids(1, 16))).all()


def test_sizes_are_what_the_arithmetic_says(source: Path, text: Path, tmp_path: Path) -> None:
    """The checkpoint is float32: half of it and a bit a weight; 2:4 with int4 and float32 scales of 32."""
    whole = {"half": 16 + 1, "joint 2:4": 1 + 2 + 36 / 32}
    for asked, bits in whole.items():
        result = api.compress(source, tmp_path / asked[-1], recipe(text, **ASKED[asked]))
        shape = (
            8 * 16 * result.matrices / sum(row["shape"][0] * row["shape"][1] for row in journal(tmp_path / asked[-1]))
        )
        assert result.bits_per_weight == pytest.approx(bits + shape, rel=0.02)


@pytest.mark.parametrize(("family", "asked"), [("llama", "half"), ("llama", "joint 2:4"), ("gpt2", "2:4")])
def test_a_dense_folder_is_an_ordinary_checkpoint(family: str, asked: str, text: Path, tmp_path: Path) -> None:
    """--format dense, for engines that know of no sparsity: the values that the sparse folder stands for.

    GPT-2 holds its matrices as C x R, some of them square, where a wrong turn would fit and say nothing.
    """
    model = add_tokenizer(make(family, tmp_path / "model"))
    for name in ("sparse", "dense"):
        api.compress(model, tmp_path / name, recipe(text, **ASKED[asked], format=name))
    assert "quantization_config" not in Checkpoint.open(tmp_path / "dense").config
    plain = load_dense(tmp_path / "dense", CPU, torch.float32)
    ours = api.load(tmp_path / "sparse", "cpu", torch.float32, kernel="dense")
    ids_ST = token_ids(2, 24)
    assert torch.equal(logits(plain, ids_ST), logits(ours, ids_ST))


def test_integers_with_zeros_load_anywhere(source: Path, text: Path, tmp_path: Path) -> None:
    """--format compressed-tensors: the codes of a joint solution are ordinary codes."""
    api.compress(source, tmp_path / "sparse", recipe(text, **ASKED["joint"]))
    api.compress(source, tmp_path / "any", recipe(text, **ASKED["joint"], format="compressed-tensors"))
    ids_ST = token_ids(2, 24)
    one, other = (api.load(tmp_path / name, "cpu", torch.float32, kernel="dense") for name in ("sparse", "any"))
    assert torch.equal(logits(one, ids_ST), logits(other, ids_ST))


def test_stopped_and_resumed(source: Path, text: Path, tmp_path: Path) -> None:
    """The same bytes as in one go."""
    chosen = recipe(text, **ASKED["original"], guide=0.5)
    api.compress(source, tmp_path / "whole", chosen)

    def stop(done: float, total: float, what: str) -> None:
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.compress(source, tmp_path / "parts", chosen, tell=stop)
    api.compress(source, tmp_path / "parts", chosen)
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")


def test_through_the_command_line(source: Path, text: Path, tmp_path: Path) -> None:
    common = ("--calibration", str(text), "--samples", "4", "--tokens", "32")
    ran = featherweight("compress", source, tmp_path / "a", "--sparsity", "2:4", *common)
    assert ran.code == 0 and ran.last["matrices"] == 14
    assert '"bits": 16' in ran.err
    ran = featherweight(
        "compress", source, tmp_path / "b", "--sparsity", "0.25", "--bits", "4", "--group-size", "32", *common
    )
    assert ran.code == 0 and api.inspect(tmp_path / "b")["matrices"][0]["bits"] == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsity": "1.5"}, "sparsity must be at least 0 and less than 1, not 1.5"),
        ({"sparsity": "4:2"}, "N:M sparsity keeps 1 or more of at most 32 weights, not 4:2"),
        ({"sparsity": "most"}, "give a share of zeros such as 0.5, or kept weights as 2:4"),
        ({"sparsity": "2:5", "bits": 16}, "64 inputs, which 2:5 sparsity does not divide"),
        ({"bits": 16}, "16 bits without sparsity leave nothing to do"),
        ({"sparsity": "0.5", "bits": 16, "format": "gptq"}, "sparse"),
        ({"mask": "best"}, "mask must be admm, sparsegpt, wanda or obs, not 'best'"),
        ({"guide": 2.0}, "guide must lie between 0 and 1, not 2.0"),
    ],
    ids=str,
)
def test_what_cannot_be_had(changes: dict[str, Any], said: str, source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said.replace(".", r"\.")):
        api.compress(source, tmp_path / "out", recipe(text, **changes))
    assert not (tmp_path / "out").exists()


def test_token_weights_are_squared_gradients(source: Path, tmp_path: Path) -> None:
    """Against the gradient of each matrix's output taken one window at a time, labels drawn with the window's seed;
    and each of two processes finds those of its own windows."""
    tree, ids_ST = build(Checkpoint.open(source)), token_ids(3, 12)
    found = token_weights(tree, ids_ST, CPU, torch.float32, 7, lambda share: None)
    assert found.keys() == {matrix.name for matrix in tree.matrices}
    halves = [token_weights(tree, ids_ST, CPU, torch.float32, 7, lambda share: None, World(n, 2)) for n in range(2)]
    assert all(torch.equal(torch.cat([half[name] for half in halves]), found[name]) for name in found)
    model = load_dense(source, CPU, torch.float32)
    name = "model.layers.0.self_attn.o_proj"
    module = model.get_submodule(name)
    for sequence, ids_T in enumerate(ids_ST):
        outputs: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
        logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
        handle.remove()
        labels_T = torch.multinomial(
            logits_TV.softmax(-1), 1, generator=torch.Generator().manual_seed(7 + sequence)
        ).squeeze(-1)
        score = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
        (gradient,) = torch.autograd.grad(score, outputs)
        torch.testing.assert_close(found[name][sequence], gradient[0].square().mean(-1), rtol=1e-4, atol=1e-12)
    weights_ST = normalised(found[name], 0.5)
    assert float(weights_ST.mean()) == pytest.approx(1) and torch.equal(normalised(found[name], 0.0), torch.ones(3, 12))


def test_guided_sums_change_what_is_solved(source: Path, text: Path, tmp_path: Path) -> None:
    for name, changes in {"plain": {}, "none": {"guide": 0.0}, "half": {"guide": 0.5}, "full": {"guide": 1.0}}.items():
        api.compress(source, tmp_path / name, recipe(text, **changes))
    made = {name: shards(tmp_path / name) for name in ("plain", "none", "half", "full")}
    assert made["plain"] == made["none"] and made["plain"] != made["half"] != made["full"]
