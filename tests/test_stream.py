"""compress and load, end to end, for every family; what blocks and matrices are solved with.

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from featherweight import api
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.core.sweep import sweep
from featherweight.errors import FeatherweightError, RequestError
from featherweight.linear import CompressedLinear
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.load import load_dense
from featherweight.models.tree import build
from featherweight.stream import compress as pipeline
from featherweight.stream.solving import check_certificate
from runs import (
    Seen,
    journal,
    logits,
    model_files,
    put_weights,
    recipe,
    same_bytes,
    shards,
    tensors_of,
    watching,
    weight_of,
)
from tiny import FAMILIES, add_tokenizer, make, token_ids

CPU = torch.device("cpu")


# --- every family


@dataclass(frozen=True)
class Made:
    source: Path
    out: Path
    result: Any
    seen: list[Seen]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    source = add_tokenizer(make(request.param, folder / "source"))
    (source / "README.md").write_text("a tiny model\n")
    with watching() as seen:
        result = api.compress(source, folder / "out", recipe(text, target="original", pull=0.5))
    return Made(source, folder / "out", result, seen)


@pytest.fixture(scope="module")
def dense(made: Made) -> Any:
    return load_dense(made.source, CPU, torch.float32)


@pytest.fixture(scope="module")
def loaded(made: Made) -> Any:
    return api.load(made.out, "cpu", torch.float32, kernel="dense")


def matrices_of(model: Any, blocks_path: str) -> dict[str, nn.Module]:
    """Every Linear and Conv1D in the blocks, by module path."""
    return {
        f"{blocks_path}.{path}": module
        for path, module in model.get_submodule(blocks_path).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def test_every_matrix_is_compressed(made: Made, dense: Any, loaded: Any) -> None:
    tree = build(Checkpoint.open(made.source))
    expected = matrices_of(dense, tree.lists[0])
    found = {path for path, module in loaded.named_modules() if isinstance(module, CompressedLinear)}
    assert found == expected.keys() and len(found) >= 4 * len(tree.blocks)
    rows = journal(made.out)
    assert made.result.matrices == len(expected) == len(rows) == len({row["name"] for row in rows})
    on_disk = Checkpoint.open(made.out)
    assert all(f"{row['name']}.weight" not in on_disk for row in rows)
    assert all(f"{row['name']}.weight_packed" in on_disk and row["loss"] >= 0 for row in rows)
    stored = sum(on_disk.nbytes(n) for n in on_disk.names if n.rpartition(".")[2].startswith("weight_"))
    weights = sum(weight_of(module).numel() for module in expected.values())
    assert made.result.bits_per_weight == pytest.approx(8 * stored / weights)
    assert made.result.bytes == sum(map(len, shards(made.out).values()))


def test_everything_else_is_untouched(made: Made) -> None:
    before, after = tensors_of(made.source), tensors_of(made.out)
    matrices = {f"{row['name']}.weight" for row in journal(made.out)}
    kept = before.keys() - matrices
    assert kept and all(same_bytes(after[name], before[name]) for name in kept)
    packed = {name for name in after if name not in before}
    suffixes = ("weight_packed", "weight_scale", "weight_shape")
    assert packed == {f"{name.removesuffix('.weight')}.{suffix}" for name in matrices for suffix in suffixes}
    index = json.loads((made.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: path.name for path in made.out.glob("*.safetensors") for name in load_file(path)}


def test_the_small_files_come_along(made: Made) -> None:
    after = model_files(made.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert after.pop(name) == (made.source / name).read_bytes()
    config = json.loads(after.pop("config.json"))
    quantization = config.pop("quantization_config")
    assert config == json.loads((made.source / "config.json").read_text())
    assert quantization["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    del after["model.safetensors.index.json"]
    assert after.keys() == shards(made.out).keys() and len(after) == len(made.seen) + 1


def test_loads_as_the_solutions_say(made: Made, dense: Any, loaded: Any) -> None:
    blocks = loaded.get_submodule(build(Checkpoint.open(made.source)).lists[0])
    originals = dense.get_submodule(build(Checkpoint.open(made.source)).lists[0])
    assert len(made.seen) == len(blocks)
    for block, original, seen in zip(blocks, originals, made.seen, strict=True):
        for path, solution in seen.solutions.items():
            assert torch.equal(block.get_submodule(path).weight, solution.values())
            weight_RC = weight_of(original.get_submodule(path))
            assert torch.equal(seen.weights[path], weight_RC)
            error = (weight_RC - solution.values()).norm() / weight_RC.norm()
            assert 0.01 < error < 0.25


def test_logits_are_those_of_a_dense_model_with_these_weights(made: Made, dense: Any, loaded: Any) -> None:
    ids_ST = token_ids(2, 24)
    before = logits(dense, ids_ST)
    other = load_dense(made.source, CPU, torch.float32)
    assert put_weights(other, loaded) == made.result.matrices
    expected = logits(other, ids_ST)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(logits(loaded, ids_ST), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(api.load(made.out), ids_ST), expected, rtol=1e-4, atol=1e-4)
    # Near the original, and not it: a wrong index somewhere would leave nothing of it.
    assert not torch.equal(before, expected)
    likeness = torch.cosine_similarity(before.flatten(0, 1), expected.flatten(0, 1)).mean()
    assert likeness > 0.75
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (dense, loaded)]
    assert tied[0] == tied[1]


def test_unknown_experts_are_refused_before_anything_is_written(tmp_path: Path, text: Path) -> None:
    source = add_tokenizer(make("jetmoe", tmp_path / "source"))
    with pytest.raises(RequestError, match=r"layers\.0\.mlp\.\w+\.weight .*not supported"):
        api.compress(source, tmp_path / "out", recipe(text))
    assert not (tmp_path / "out").exists()


# --- what the solver is handed


def block_inputs(model: Any, path: str, ids_ST: Tensor) -> list[Tensor]:
    """What goes into each block of a whole model."""
    inputs: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    hooks = [b.register_forward_pre_hook(note, with_kwargs=True) for b in model.get_submodule(path)]
    logits(model, ids_ST)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.parametrize("target", ["drifted", "original"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_blocks_see_what_the_stored_blocks_before_them_make(
    family: str, target: str, tmp_path: Path, text: Path
) -> None:
    source = add_tokenizer(make(family, tmp_path / "source"))
    chosen = recipe(text, target=target)
    with watching() as seen:
        api.compress(source, tmp_path / "out", chosen)
    ids_ST = pipeline.calibration_ids(source, chosen)
    assert ids_ST is not None and ids_ST.shape == (4, 32)
    path = build(Checkpoint.open(source)).lists[0]
    drifted = block_inputs(api.load(tmp_path / "out", "cpu", torch.float32, kernel="dense"), path, ids_ST)
    original = block_inputs(load_dense(source, CPU, torch.float32), path, ids_ST)
    assert not torch.allclose(drifted[-1], original[-1], rtol=1e-3, atol=1e-3)
    for block, expected, dense_STD in zip(seen, drifted, original, strict=True):
        torch.testing.assert_close(block.hidden_STD, expected, rtol=1e-4, atol=1e-4)
        assert (block.dense_STD is None) == (target == "drifted")
        if block.dense_STD is not None:
            torch.testing.assert_close(block.dense_STD, dense_STD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("experts", [0, 3])
def test_a_claim_may_be_off_by_rounding_and_by_no_more(experts: int) -> None:
    """Relative to the loss, or to all that descent may have taken away; the last layer of a stack included."""
    stack = (experts,) if experts else ()
    torch.manual_seed(0)
    x_TC = torch.randn(*stack, 64, 32)
    x_TC[..., 0] *= 100  # one column has most of w H w^T
    problem = LayerProblem(torch.randn(*stack, 8, 32), x_TC.mT @ x_TC / 64, 64, 0.01, "layer")
    solution = sweep(problem, Grid(4, 16))
    energy, loss = (problem.weight_RC @ problem.damped() * problem.weight_RC).sum((-2, -1)), solution.loss_R.sum(-1)
    assert bool((energy > 1e3 * loss).all())

    def claimed(more: float) -> Solution:
        loss_R = solution.loss_R.clone()
        loss_R.view(-1, 8)[-1, 0] += more
        return replace(solution, loss_R=loss_R)

    last_energy, last_loss = float(energy.reshape(-1)[-1]), float(loss.reshape(-1)[-1])
    for within in (0.0, 5e-4 * last_loss, 0.5e-6 * last_energy):
        check_certificate(problem, claimed(within))
    for beyond in (4e-3 * last_loss + 2e-6 * last_energy, float("nan")):
        with pytest.raises(FeatherweightError, match=r"layer: the solver claims a loss of .* please report this"):
            check_certificate(problem, claimed(beyond))
