"""Mixtures of experts end to end: found, calibrated, solved, stored under the names on disk, and run again.

Shapes: S sequences, T tokens, E experts, R outputs, C inputs, D width.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featherweight import api
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Pattern
from featherweight.core.solve import Choices, solve
from featherweight.core.sweep import round_to_nearest
from featherweight.errors import FallbackWarning, FeatherweightError, RequestError
from featherweight.linear import CompressedLinear
from featherweight.models.blocks import BlockRunner
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.experts import Experts, Layout, find_experts, take_apart
from featherweight.models.load import load_apart, load_dense
from featherweight.models.tree import build
from featherweight.stream import compress as pipeline
from featherweight.stream import experts as solver
from featherweight.stream import shard as shards_of
from featherweight.stream.layerwise import layerwise
from featherweight.stream.solving import solve_stack
from featherweight.stream.states import States
from runs import featherweight, journal, logits, model_files, recipe, same_bytes, tensors_of
from tiny import MOE_CONFIGS, MOE_FAMILIES, MORE_MOE_FAMILIES, add_tokenizer, make, token_ids

CPU = torch.device("cpu")
# per family: experts in a block, and matrices of a model: those outside experts (routers do not count) and theirs
# Kept as Qwen3-MoE keeps its experts: every so often is enough.
LIKE_OTHERS = ("qwen2-moe", "olmoe")
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in MOE_FAMILIES]
EXPERTS = {"deepseek-v3": 8, **dict.fromkeys(set(MOE_FAMILIES) - {"deepseek-v3"}, 4)}
MATRICES = {
    "mixtral": (2 * 4, 2 * 4 * 3),
    "qwen2-moe": (2 * (4 + 3), 2 * 4 * 3),
    "qwen3-moe": (2 * 4, 2 * 4 * 3),
    "olmoe": (2 * 4, 2 * 4 * 3),
    "deepseek-v3": (2 * 5 + 3 + 3, 8 * 3),
    "gpt-oss": (2 * 4, 2 * 4 * 3),
    "granite-moe": (2 * 4, 2 * 4 * 3),
    "llama4": (2 * (4 + 3), 2 * 4 * 3),
    "nemotron-h": (4 + 2, 4 * 2),
}
FUSED_ON_DISK = {"gpt-oss", "granite-moe", "llama4"}
# what transformers itself makes of our compressed-tensors files: these two it cannot fuse again
NO_MAPPING = {"gpt-oss", "granite-moe"}

pytestmark = pytest.mark.filterwarnings("ignore::featherweight.errors.FallbackWarning")


def calm(text: Path, **changes: Any) -> Any:
    return recipe(text, **{"samples": 8, "tokens": 48, "target": "original", "group_size": 16, **changes})


@dataclass(frozen=True)
class Solved:
    problem: LayerProblem
    gap_ECC: Tensor | None
    rule: Any
    choices: Choices
    found: list[tuple[LayerProblem, Any]]


@contextmanager
def noting() -> Iterator[list[Solved]]:
    """Every stack of experts' matrices that is solved, in order."""
    stacks: list[Solved] = []

    def solve(problem: LayerProblem, gap_ECC: Tensor | None, rule: Any, choices: Choices) -> Any:
        found = solve_stack(problem, gap_ECC, rule, choices)
        moved, solutions = found
        layers = [
            replace(moved, weight_RC=weight_RC, hessian_CC=hessian_CC)
            for weight_RC, hessian_CC in zip(moved.weight_RC, moved.hessian_CC, strict=True)
        ]
        stacks.append(Solved(problem, gap_ECC, rule, choices, list(zip(layers, solutions, strict=True))))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "solve_stack", solve)
        yield stacks


@dataclass(frozen=True)
class Made:
    family: str
    source: Path
    out: Path
    result: Any
    stacks: list[Solved]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            dtype = torch.bfloat16 if family == "gpt-oss" else torch.float32
            made[family] = add_tokenizer(make(family, tmp_path_factory.mktemp(family) / "source", dtype=dtype))
        return made[family]

    return folder


@pytest.fixture(scope="module", params=EACH)
def made(request: pytest.FixtureRequest, folders: Any, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Made:
    source, out = folders(request.param), tmp_path_factory.mktemp(request.param) / "out"
    with noting() as stacks, warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        result = api.compress(source, out, calm(text))
    return Made(request.param, source, out, result, stacks)


@pytest.fixture(scope="module")
def loaded(made: Made) -> Any:
    return api.load(made.out, "cpu", torch.float32, kernel="dense")


def fused_slices(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every expert's matrix, R x C, of a file that has them fused, by the last three parts of the name we give it."""
    for name, tensor in tensors.items():
        home, _, parameter = name.removesuffix(".weight").rpartition(".")
        if tensor.dim() != 3 or parameter.endswith("bias"):
            continue
        for expert, matrix in enumerate(tensor):
            if parameter == "input_linear":  # granite: gate rows, then up rows
                yield f"{home}.experts.{expert}.gate_proj", matrix[:32]
                yield f"{home}.experts.{expert}.up_proj", matrix[32:]
            elif parameter == "output_linear":
                yield f"{home}.experts.{expert}.down_proj", matrix
            elif parameter == "down_proj":
                yield f"{home}.{expert}.down_proj", matrix.T
            elif "router" not in name and "feed_forward" in name:  # llama 4: inputs x (gate, then up)
                yield f"{home}.{expert}.gate_proj", matrix[:, :32].T
                yield f"{home}.{expert}.up_proj", matrix[:, 32:].T
            else:  # gpt-oss: inputs x (gate and up in turn)
                yield f"{home}.{expert}.gate_proj", matrix[:, 0::2].T
                yield f"{home}.{expert}.up_proj", matrix[:, 1::2].T


def originals(source: Path) -> dict[str, Tensor]:
    """Every matrix of a source by the name it is compressed under, found by the layout of its file alone."""
    tensors = tensors_of(source)
    plain = {
        name.removesuffix(".weight"): t for name, t in tensors.items() if t.dim() == 2 and name.endswith(".weight")
    }
    return plain | dict(fused_slices(tensors))


def compressed(model: Any) -> dict[str, CompressedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, CompressedLinear)}


# --- the tree


def test_every_matrix_is_in_the_tree(made: Made) -> None:
    tree = build(Checkpoint.open(made.source))
    found = originals(made.source)
    outside, inside = MATRICES[made.family]
    assert len([m for m in tree.matrices if ".experts." not in m.path]) == outside
    assert len([m for m in tree.matrices if ".experts." in m.path]) == inside
    assert len({m.name for m in tree.matrices}) == outside + inside
    apart = load_apart(made.source, CPU, torch.float32)
    for block in tree.blocks:
        for matrix in block.matrices:
            weight_RC = found[matrix.name].float()
            assert (matrix.rows, matrix.columns) == tuple(weight_RC.shape)
            assert torch.equal(apart.get_submodule(f"{block.module}.{matrix.path}").weight, weight_RC)
            assert (matrix.part is not None) == (made.family in FUSED_ON_DISK and ".experts." in matrix.path)
    names = [name for block in tree.blocks for name in block.tensors] + list(tree.rest)
    assert sorted(names) == list(tree.checkpoint.names)


def test_routers_are_left_and_listed(made: Made) -> None:
    tree = build(Checkpoint.open(made.source))
    before, after = tensors_of(made.source), tensors_of(made.out)
    routers = [router for block in tree.blocks for router in block.routers]
    expected = {"qwen2-moe": 4, "deepseek-v3": 1, "nemotron-h": 1}.get(
        made.family, 2
    )  # two of qwen2's are scalar gates
    assert len(routers) == expected
    for router in routers:
        assert before[f"{router}.weight"].shape[0] in (1, EXPERTS[made.family])
        assert same_bytes(after[f"{router}.weight"], before[f"{router}.weight"])
    config = json.loads((made.out / "config.json").read_text())
    assert set(routers) < set(config["quantization_config"]["ignore"])


def test_taken_apart_it_computes_the_same(made: Made) -> None:
    ids_ST = token_ids(2, 24)
    dense, apart = load_dense(made.source, CPU, torch.float32), load_apart(made.source, CPU, torch.float32)
    assert not any(isinstance(module, Experts) for module in dense.modules())
    experts = dict(find_experts(apart))
    assert experts and all(len(found) == EXPERTS[made.family] for found in experts.values())
    torch.testing.assert_close(logits(apart, ids_ST), logits(dense, ids_ST), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_MOE_FAMILIES)
def test_families_nobody_thought_of_come_apart_too(family: str, tmp_path: Path) -> None:
    ids_ST, source = token_ids(2, 16), make(family, tmp_path)
    dense, apart = load_dense(source, CPU, torch.float32), load_apart(source, CPU, torch.float32)
    torch.testing.assert_close(logits(apart, ids_ST), logits(dense, ids_ST), rtol=1e-5, atol=1e-5)
    matrices = [matrix for block in build(Checkpoint.open(source)).blocks for matrix in block.matrices]
    assert sum(".experts." in matrix.path for matrix in matrices) in (4 * 3, 2 * 4 * 3)


def test_experts_called_with_several_scaled_rows() -> None:
    """Llama 4's convention with more than one expert a token, which no released model uses."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(**{**MOE_CONFIGS["llama4"][1], "num_experts_per_tok": 2})
    moe = Llama4TextMoe(config).eval().requires_grad_(False)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    fused = {name: tensor.clone() for name, tensor in moe.experts.named_parameters()}
    x_STD = torch.randn(2, 10, 64)
    before = moe(x_STD)[0].clone()
    holder = nn.ModuleDict({"moe": moe})
    take_apart(holder)
    for index in range(4):
        expert = moe.experts.expert(index)
        parts = (*fused["gate_up_proj"][index].T.chunk(2), fused["down_proj"][index].T)
        for name, part_RC in zip(("gate_proj", "up_proj", "down_proj"), parts, strict=True):
            expert.get_submodule(name).weight = nn.Parameter(part_RC.contiguous(), requires_grad=False)
    torch.testing.assert_close(moe(x_STD)[0], before, rtol=1e-4, atol=1e-5)


# --- compressed and loaded again


def test_every_matrix_is_accounted_for(made: Made) -> None:
    outside, inside = MATRICES[made.family]
    rows = journal(made.out)
    assert made.result.matrices == len(rows) == len({row["name"] for row in rows}) == outside + inside
    on_disk = Checkpoint.open(made.out)
    for row in rows:
        suffixes = ("weight_packed", "weight_scale", "weight_shape")
        assert row["bytes"] == sum(on_disk.nbytes(f"{row['name']}.{suffix}") for suffix in suffixes)
        assert row["loss"] >= 0
        assert ("tokens" in row) == (".experts." in row["name"])
    packed = Counter(name.rpartition(".")[2] for name in on_disk.names)
    assert packed["weight_packed"] == len(rows)
    leftovers = [name for name in on_disk.names if on_disk.shape(name)[2:]]
    assert not leftovers, "no tensor of all experts is left"


def test_names_are_those_on_disk(made: Made) -> None:
    names = {row["name"] for row in journal(made.out)}
    assert {
        "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2",
        "nemotron-h": "backbone.layers.1.mixer.experts.3.up_proj",
        "granite-moe": "model.layers.1.block_sparse_moe.experts.3.gate_proj",
        "llama4": "model.layers.1.feed_forward.experts.3.gate_proj",
    }.get(made.family, "model.layers.1.mlp.experts.3.gate_proj") in names
    if made.family == "gpt-oss":
        before, after = tensors_of(made.source), tensors_of(made.out)
        fused_ER = before["model.layers.1.mlp.experts.gate_up_proj_bias"]
        assert torch.equal(after["model.layers.1.mlp.experts.2.gate_proj.bias"], fused_ER[2, 0::2])
        assert torch.equal(after["model.layers.1.mlp.experts.2.up_proj.bias"], fused_ER[2, 1::2])
        assert not any(name.endswith("proj_bias") for name in after)


def test_weights_stay_packed(made: Made, loaded: Any) -> None:
    assert len(compressed(loaded)) == made.result.matrices
    assert all(parameter.dim() < 3 for parameter in loaded.parameters())


def fused_again(dense: Any, apart: Any) -> Any:
    """The dense transformers model with the values of a compressed one, its experts' put where they were fused."""
    layers = compressed(apart)
    for path, layer in layers.items():
        if ".experts." not in path:
            dense.get_submodule(path).weight.data.copy_(layer.weight)
    for path, experts in find_experts(apart):
        module = dense.get_submodule(path)
        for index in range(len(experts)):
            values = {name: layers[f"{path}.{index}.{name}"].weight for name in ("up_proj", "down_proj")}
            if f"{path}.{index}.gate_proj" in layers:
                both = (layers[f"{path}.{index}.gate_proj"].weight, values.pop("up_proj"))
                interleaved = type(module).__name__ == "GptOssExperts"
                values["gate_up_proj"] = torch.stack(both, 1).flatten(0, 1) if interleaved else torch.cat(both)
            for name, value_RC in values.items():
                stored = getattr(module, name).data[index]
                transposed = type(module).__name__ in ("GptOssExperts", "Llama4TextExperts")
                stored.copy_(value_RC.T if transposed else value_RC)
    return dense


def test_logits_are_those_of_the_family_with_these_weights(made: Made, loaded: Any) -> None:
    ids_ST = token_ids(2, 24)
    dense = load_dense(made.source, CPU, torch.float32)
    before = logits(dense, ids_ST)
    expected = logits(fused_again(dense, loaded), ids_ST)
    torch.testing.assert_close(logits(loaded, ids_ST), expected, rtol=1e-4, atol=1e-4)
    # Near the original, and not it. Random routers sit on the fence: a token that changes experts changes a lot.
    likeness = torch.cosine_similarity(before.flatten(0, 1), expected.flatten(0, 1)).mean()
    assert 0.75 < likeness < 0.9999


def test_transformers_loads_it(made: Made, loaded: Any) -> None:
    from transformers import AutoModelForCausalLM

    if made.family in NO_MAPPING:
        return
    ids_ST = token_ids(2, 24)
    model, info = AutoModelForCausalLM.from_pretrained(made.out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(model, ids_ST), logits(loaded, ids_ST), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EACH)
def test_rounding_is_that_of_every_matrix_by_itself(family: str, folders: Any, tmp_path: Path, text: Path) -> None:
    result = api.compress(folders(family), tmp_path / "out", recipe(text, method="rtn", mirror=False))
    layers = compressed(api.load(tmp_path / "out", "cpu", torch.float32))
    assert len(layers) == result.matrices == sum(MATRICES[family])
    tree = build(Checkpoint.open(folders(family)))
    names = {f"{block.module}.{m.path}": m.name for block in tree.blocks for m in block.matrices}
    found = originals(folders(family))
    for path, layer in layers.items():
        weight_RC = found[names[path]]
        grid = Grid(4, 32, True, "minmax", scale_dtype=weight_RC.dtype, mirror=False)
        problem = LayerProblem(weight_RC.float(), torch.eye(weight_RC.shape[1]), 0, 0.0)
        expected, stored = round_to_nearest(problem, grid), layer.solution()
        for field in ("codes_RC", "scales_RG", "zeros_RG"):
            assert same_bytes(getattr(stored, field), getattr(expected, field)), (path, field)


@pytest.mark.parametrize("family", EACH)
def test_our_own_format_in_transformers(family: str, folders: Any, tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    out, again, ids_ST = tmp_path / "out", tmp_path / "again", token_ids(2, 24)
    api.compress(folders(family), out, recipe(text, method="rtn", sparsity="0.5", bits=16))
    expected = logits(api.load(out, "cpu", torch.float32), ids_ST)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert len(compressed(model)) == sum(MATRICES[family])
    torch.testing.assert_close(logits(model, ids_ST), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(again)
    assert sorted(Checkpoint.open(again).names) == sorted(Checkpoint.open(out).names)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "granite-moe"])
def test_a_plain_format_puts_experts_back(family: str, folders: Any, tmp_path: Path, text: Path) -> None:
    """Same names, same shapes, half of each expert's matrix zero, and biases untouched."""
    out = tmp_path / "out"
    api.compress(folders(family), out, recipe(text, method="rtn", sparsity="0.5", bits=16, format="dense"))
    before, after = tensors_of(folders(family)), tensors_of(out)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    pruned, tree = originals(out), build(Checkpoint.open(folders(family)))
    assert all(float((pruned[matrix.name] == 0).float().mean()) == 0.5 for matrix in tree.matrices)
    names = {matrix.weight for matrix in tree.matrices}
    assert all(same_bytes(after[name], tensor) for name, tensor in before.items() if name not in names)
    assert torch.isfinite(logits(load_dense(out, CPU, torch.float32), token_ids(1, 8))).all()


def test_gptq_format(folders: Any, tmp_path: Path, text: Path) -> None:
    api.compress(folders("qwen3-moe"), tmp_path / "out", recipe(text, method="rtn", format="gptq"))
    assert "model.layers.1.mlp.experts.3.down_proj.qweight" in Checkpoint.open(tmp_path / "out")
    assert len(compressed(api.load(tmp_path / "out"))) == sum(MATRICES["qwen3-moe"])


def test_resume_gives_the_same_bytes(folders: Any, tmp_path: Path, text: Path) -> None:
    chosen = calm(text)

    class Stop(Exception):
        pass

    def stop(done: float, _total: float, _what: str) -> None:
        if done >= 1:
            raise Stop

    api.compress(folders("mixtral"), tmp_path / "whole", chosen)
    with pytest.raises(Stop):
        api.compress(folders("mixtral"), tmp_path / "out", chosen, tell=stop)
    assert not (tmp_path / "out" / "config.json").exists() and journal(tmp_path / "out")
    api.compress(folders("mixtral"), tmp_path / "out", chosen)
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


# --- what experts are solved with


def heard_by_experts(model: Any, path: str, ids_ST: Tensor) -> tuple[Tensor, Tensor]:
    """What the experts module of a dense transformers model is called with: inputs and the experts they go to."""
    seen: list[tuple[Tensor, ...]] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    logits(model, ids_ST)
    hook.remove()
    return seen[0][0], seen[0][1]


def test_every_expert_sees_its_own_tokens(folders: Any, tmp_path: Path, text: Path) -> None:
    source, chosen = folders("qwen3-moe"), calm(text, target="drifted", samples=16)
    with noting() as stacks:
        api.compress(source, tmp_path / "out", chosen)
    ids_ST = pipeline.calibration_ids(source, chosen)
    assert ids_ST is not None
    dense, stored = load_dense(source, CPU, torch.float32), compressed(api.load(tmp_path / "out", "cpu", torch.float32))
    for name, layer in stored.items():  # the experts of block 0 see what its compressed attention makes
        if name.startswith("model.layers.0.self_attn"):
            dense.get_submodule(name).weight.data.copy_(layer.weight)
    inputs_TD, expert_TK = heard_by_experts(dense, "model.layers.0.mlp.experts", ids_ST)
    upward, downward = stacks[0].problem, stacks[1].problem
    assert upward.weight_RC.shape == (4, 64, 64) and downward.weight_RC.shape == (4, 64, 32)
    tokens = [
        row["tokens"] for row in journal(tmp_path / "out") if row["name"].startswith("model.layers.0.mlp.experts")
    ]
    for expert in range(4):
        x_ND = inputs_TD[(expert_TK == expert).any(-1)]
        assert tokens[3 * expert : 3 * expert + 3] == [len(x_ND)] * 3 and len(x_ND) >= 64
        torch.testing.assert_close(upward.hessian_CC[expert], x_ND.T @ x_ND / len(x_ND), rtol=1e-3, atol=1e-3)
        gate, up = (stored[f"model.layers.0.mlp.experts.{expert}.{leaf}"].weight for leaf in ("gate_proj", "up_proj"))
        act_NC = nn.functional.silu(x_ND @ gate.T) * (x_ND @ up.T)
        torch.testing.assert_close(downward.hessian_CC[expert], act_NC.T @ act_NC / len(x_ND), rtol=1e-3, atol=1e-3)


def test_drift_is_measured_for_the_same_tokens(folders: Any, tmp_path: Path, text: Path) -> None:
    """x* - x of the tokens an expert serves now, wherever the original model sent them."""
    source, chosen = folders("mixtral"), calm(text, samples=16, pull=0.5)
    with noting() as stacks:
        api.compress(source, tmp_path / "out", chosen)
    ids_ST = pipeline.calibration_ids(source, chosen)
    assert ids_ST is not None
    dense = load_dense(source, CPU, torch.float32)
    before_TD, _ = heard_by_experts(dense, "model.layers.0.mlp.experts", ids_ST)
    for name, layer in compressed(api.load(tmp_path / "out", "cpu", torch.float32)).items():
        if name.startswith("model.layers.0.self_attn"):
            dense.get_submodule(name).weight.data.copy_(layer.weight)
    now_TD, expert_TK = heard_by_experts(dense, "model.layers.0.mlp.experts", ids_ST)
    gap_ECC = stacks[0].gap_ECC
    assert gap_ECC is not None
    for expert in range(4):
        mine_T = (expert_TK == expert).any(-1)
        x_NC, moved_NC = now_TD[mine_T], before_TD[mine_T] - now_TD[mine_T]
        torch.testing.assert_close(gap_ECC[expert], 0.5 * moved_NC.T @ x_NC / len(x_NC), rtol=1e-2, atol=1e-3)


def test_experts_lose_less_than_by_rounding(made: Made) -> None:
    per_expert = 2 if made.family == "nemotron-h" else 3  # of which gate and up are solved as one
    assert sum(len(stack.found) for stack in made.stacks) == MATRICES[made.family][1] // per_expert * 2
    for stack in made.stacks:
        for problem, solution in stack.found:
            assert solution.certificate < 0.9 * round_to_nearest(problem, stack.rule).certificate


def stack_of(experts: int = 6, rows: int = 24, columns: int = 96, tokens: int = 200) -> LayerProblem:
    generator = torch.Generator().manual_seed(0)
    x_ETC = torch.randn(experts, tokens, columns, generator=generator)
    x_ETC = x_ETC @ torch.randn(experts, columns, columns, generator=generator) / 8
    weight_ERC = torch.randn(experts, rows, columns, generator=generator)
    return LayerProblem(weight_ERC, x_ETC.mT @ x_ETC / tokens, tokens, 0.01, "experts")


@pytest.mark.parametrize(
    "rule", [Grid(4, 32), Grid(3, 32, symmetric=False), Grid(1.58, 32), Pattern(0.5), Pattern(keep=2, of=4)]
)
def test_a_stack_is_solved_as_its_layers_are(rule: Any) -> None:
    problem, choices = stack_of(), Choices()
    gap_ECC = 0.01 * torch.randn(problem.hessian_CC.shape, generator=torch.Generator().manual_seed(1))
    moved, found = solve_stack(problem, gap_ECC, rule, choices)
    for number, solution in enumerate(found):
        alone = replace(problem, weight_RC=problem.weight_RC[number], hessian_CC=problem.hessian_CC[number])
        factor = alone.factor(choices.order)
        alone = replace(alone, weight_RC=alone.weight_RC + factor.solve(alone.weight_RC @ gap_ECC[number]))
        torch.testing.assert_close(moved.weight_RC[number], alone.weight_RC, rtol=1e-4, atol=1e-5)
        expected = solve(alone, rule, choices, factor)
        assert solution.certificate == pytest.approx(expected.certificate, rel=0.01)
        different = (solution.values() - expected.values()).abs() > 1e-3
        assert float(different.float().mean()) < 0.01  # a tie that rounding breaks, and what follows from it


def test_one_bad_layer_of_a_stack_is_the_only_one_damped_more() -> None:
    problem = stack_of()
    hessian_ECC = problem.hessian_CC.clone()
    hessian_ECC[2] -= 3.0 * hessian_ECC[2].diagonal().mean() * torch.eye(96)  # nothing a sum of squares could be
    bad = replace(problem, hessian_CC=hessian_ECC)
    with pytest.warns(FallbackWarning, match="needs more than damping"):
        moved, solutions = solve_stack(bad, None, Grid(4, 32), Choices(refine=0))
    assert torch.equal(moved.weight_RC, problem.weight_RC)
    assert [solution.damping > 0.01 for solution in solutions] == [number == 2 for number in range(6)]
    _, expected = solve_stack(problem, None, Grid(4, 32), Choices(refine=0))
    for number in (0, 1, 3, 4, 5):
        assert torch.equal(solutions[number].codes_RC, expected[number].codes_RC)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_block_of_experts_alone(true_sequential: bool, folders: Any, tmp_path: Path, text: Path) -> None:
    """Nothing else to compress in it, and the original's stream goes on all the same."""
    chosen = calm(text, true_sequential=true_sequential)
    tree = build(Checkpoint.open(folders("nemotron-h")))
    ids_ST = pipeline.calibration_ids(folders("nemotron-h"), chosen)
    assert ids_ST is not None
    runner, block = BlockRunner(tree, CPU, torch.float32), tree.blocks[1]
    states = States(runner, ids_ST, tmp_path, 4, original=True)
    alone = replace(block, matrices=tuple(m for m in block.matrices if ".experts." in m.path))
    module = runner.load(1)
    with torch.no_grad():
        view = states.view(1, module, alone, None)
        expected = runner.run(1, module, view.dense.states_STD[:4]).clone()
        rules = {matrix.path: Grid(4, 16) for matrix in alone.matrices}
        solutions = layerwise(view, rules, chosen, Choices(), lambda share: None)
    assert solutions.keys() == rules.keys() and len(rules) == 4 * 2
    torch.testing.assert_close(view.dense.states_STD[:4], expected)


def test_experts_solved_one_at_a_time_come_out_the_same(
    folders: Any, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with noting() as together:
        api.compress(folders("qwen3-moe"), tmp_path / "together", calm(text))
    monkeypatch.setitem(solver.CHUNK_BYTES, "cpu", 1)
    with noting() as apart:
        api.compress(folders("qwen3-moe"), tmp_path / "apart", calm(text))
    assert [len(stack.found) for stack in together] == [4] * 4 and [len(stack.found) for stack in apart] == [1] * 16
    found = zip(journal(tmp_path / "together"), journal(tmp_path / "apart"), strict=True)
    assert all(one["loss"] == pytest.approx(other["loss"], rel=0.02) for one, other in found)


# --- experts with few tokens, or many


@contextmanager
def router_prefers(source: Path, folder: Path, favourite: int, never: int) -> Iterator[Path]:
    """The source with routers that send every token to one expert, and none to another."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("router.bias")]:
        tensors[name][favourite], tensors[name][never] = 50.0, -50.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    yield folder


@pytest.fixture
def lopsided(folders: Any, tmp_path: Path) -> Iterator[Path]:
    with router_prefers(folders("gpt-oss"), tmp_path / "lopsided", 1, 3) as folder:
        yield folder


def tokens_by_expert(out: Path, block: int = 0) -> dict[int, dict[str, Any]]:
    """The journal's line of every expert's down_proj."""
    rows = [row for row in journal(out) if row["block"] == block and row["name"].endswith("down_proj")]
    return {int(row["name"].split(".experts.")[1].split(".")[0]): row for row in rows if ".experts." in row["name"]}


def test_an_expert_without_tokens_learns_from_the_others(lopsided: Path, tmp_path: Path, text: Path) -> None:
    out, chosen = tmp_path / "out", calm(text, target="drifted")
    with (
        noting() as stacks,
        pytest.warns(FallbackWarning, match=r"layers\.0\.mlp\.experts: .*\b3 \(0\).*others' tokens"),
    ):
        api.compress(lopsided, out, chosen)
    rows = tokens_by_expert(out)
    assert rows[1]["tokens"] == 8 * 48 and rows[3]["tokens"] == 0 and sum(r["tokens"] for r in rows.values()) == 768
    assert rows[3]["starved"] and "starved" not in rows[1] and "starved" not in rows[0]
    upward = stacks[0].problem.hessian_CC  # everybody's tokens are what expert 1 sees, and all that expert 3 has
    torch.testing.assert_close(upward[3], upward[1], rtol=1e-4, atol=1e-4)
    for problem, solution in (stacks[1].found[3],):
        assert solution.certificate < 0.9 * round_to_nearest(problem, stacks[1].rule).certificate


def test_few_tokens_are_helped_out(folders: Any, tmp_path: Path, text: Path) -> None:
    """Own tokens count one each, the layer's as much as half as many as the expert has inputs, all of them together."""
    source, chosen = folders("qwen3-moe"), calm(text, target="drifted", samples=4, tokens=24)
    with noting() as stacks, pytest.warns(FallbackWarning, match="fewer tokens"):
        api.compress(source, tmp_path / "out", chosen)
    ids_ST = pipeline.calibration_ids(source, chosen)
    assert ids_ST is not None
    dense = load_dense(source, CPU, torch.float32)
    for name, layer in compressed(api.load(tmp_path / "out", "cpu", torch.float32)).items():
        if name.startswith("model.layers.0.self_attn"):
            dense.get_submodule(name).weight.data.copy_(layer.weight)
    inputs_TD, expert_TK = heard_by_experts(dense, "model.layers.0.mlp.experts", ids_ST)
    starved = [row for row in tokens_by_expert(tmp_path / "out").values() if "starved" in row]
    assert starved
    for expert in range(4):
        x_ND = inputs_TD[(expert_TK == expert).any(-1)]
        expected = x_ND.T @ x_ND / len(x_ND)
        if len(x_ND) < 64:
            expected = (x_ND.T @ x_ND + 32 * inputs_TD.T @ inputs_TD / len(inputs_TD)) / (len(x_ND) + 32)
        torch.testing.assert_close(stacks[0].problem.hessian_CC[expert], expected, rtol=1e-3, atol=1e-3)


def test_starved_experts_are_rounded_if_asked(lopsided: Path, tmp_path: Path, text: Path) -> None:
    with pytest.warns(FallbackWarning, match="rounded to nearest"):
        api.compress(lopsided, tmp_path / "out", calm(text, starved="round"))
    api.compress(lopsided, tmp_path / "rtn", recipe(text, method="rtn", group_size=16))
    layers, rounded = (compressed(api.load(tmp_path / name)) for name in ("out", "rtn"))
    for path, layer in layers.items():
        if ".experts." in path:
            same = torch.equal(layer.solution().codes_RC, rounded[path].solution().codes_RC)
            assert same == (".experts.3." in path)


def test_starved_experts_are_an_error_if_asked(lopsided: Path, tmp_path: Path) -> None:
    small = ("--samples", 4, "--tokens", 32, "--group-size", 16)
    ran = featherweight("compress", lopsided, tmp_path / "out", *small, "--starved", "error")
    assert "model.layers.0.mlp.experts: " in ran.error and "3 (0)" in ran.error and "--route-all" in ran.error
    ran = featherweight("compress", lopsided, tmp_path / "other", *small, "--starved", "maybe")
    assert "starved must be shared, round or error, not 'maybe'" in ran.error
    ran = featherweight("compress", lopsided, tmp_path / "all", *small, "--route-all")
    assert ran.code == 0 and "fewer tokens" not in ran.err


def test_route_all_shows_every_expert_every_token(lopsided: Path, tmp_path: Path, text: Path) -> None:
    with noting() as stacks, warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        api.compress(lopsided, tmp_path / "out", calm(text, route_all=True))
    upward = stacks[0].problem.hessian_CC
    torch.testing.assert_close(upward, upward[:1].expand_as(upward), rtol=1e-5, atol=1e-5)
    rows = tokens_by_expert(tmp_path / "out")
    assert rows[3]["tokens"] == 0 and "starved" not in rows[3], "the journal says where the model sends tokens"


def test_no_more_than_four_times_the_mean(folders: Any, tmp_path: Path, text: Path) -> None:
    """With one of eight experts a token and a favourite, the favourite's tokens are taken one in two."""
    source = tmp_path / "source"
    add_tokenizer(make("llama4", source, num_local_experts=8))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("router.weight")]:
        tensors[name][1:] = 0.0
        tensors[name][1] = -tensors[name][0]  # expert 0 or 1, by the sign
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with noting() as stacks:
        api.compress(source, tmp_path / "out", calm(text))
    found = {expert: row["tokens"] for expert, row in tokens_by_expert(tmp_path / "out").items()}
    assert max(found.values()) > 4 * 384 // 8
    assert sum(found.values()) == 384
    assert stacks[0].problem.tokens <= 192


@pytest.mark.slow
def test_special_tokens_do_not_count_if_asked(folders: Any, tmp_path: Path, text: Path) -> None:
    """Two of every window of 48 are made beginnings and ends: 16 of 384 tokens, with two experts each."""
    ids = token_ids(8, 48).clamp(min=4)  # 3 stands for what is unknown, and is special too
    ids[:, 0], ids[:, -1] = 1, 2
    for name, drops in (("kept", False), ("dropped", True)):
        pipeline.compress(folders("qwen3-moe"), tmp_path / name, calm(text, drop_special=drops), "cpu", ids_ST=ids)
    counts = [sum(row["tokens"] for row in tokens_by_expert(tmp_path / name).values()) for name in ("kept", "dropped")]
    assert counts == [2 * 384, 2 * 368]
    assert "drop_special" not in calm(text).as_dict() and calm(text, drop_special=True).as_dict()["drop_special"]


# --- experts that are modules of their own, in an encoder-decoder


def test_switch_transformers_by_its_own_batches() -> None:
    """Any module with batches of the user's goes through `compress_module` (by the stream: test_encoder_decoder)."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=2, num_decoder_layers=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    batches = [
        {"input_ids": token_ids(8, 32, seed=seed), "decoder_input_ids": token_ids(8, 16, seed=seed + 9)}
        for seed in range(4)
    ]
    result = api.compress_module(model, batches, Grid(4, 32), skip=[".*router.*"])
    rows = {row.name: row for row in result.report}
    experts = [name for name in rows if ".experts.expert_" in name]
    assert len(experts) == 2 * 4 * 2  # two matrices each, in one layer of the encoder and one of the decoder
    tokens = [rows[f"encoder.block.1.layer.1.mlp.experts.expert_{expert}.wi"].tokens for expert in range(4)]
    assert sum(tokens) == 4 * 8 * 32 and min(tokens) > 0
    assert any("router.classifier" in name for name in result.left)
    before, after = (m(**batches[0]).logits.flatten(0, 1) for m in (model, result.module))
    assert 0.9 < torch.cosine_similarity(before, after).mean() < 0.9999


# --- budgets


@pytest.mark.slow
def test_a_budget_gives_the_experts_of_a_block_one_width(folders: Any, tmp_path: Path, text: Path) -> None:
    result = api.compress(folders("qwen3-moe"), tmp_path / "out", calm(text, average_bits=5.0, group_size=32))
    assert result.bits_per_weight <= 5.0
    bits: dict[int, set[float]] = {}
    for row in journal(tmp_path / "out"):
        if ".experts." in row["name"]:
            bits.setdefault(row["block"], set()).add(row["bits"])
    assert all(len(widths) == 1 for widths in bits.values())
    logits(api.load(tmp_path / "out"), token_ids(1, 8))


@pytest.mark.slow
def test_gradients_weigh_what_is_not_an_expert(folders: Any, tmp_path: Path, text: Path) -> None:
    result = api.compress(folders("qwen3-moe"), tmp_path / "out", calm(text, guide=0.5))
    assert result.matrices == sum(MATRICES["qwen3-moe"])


# --- bad input


def edited(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """A copy with other tensors or another configuration."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, **config}))
    return folder


@pytest.mark.parametrize(("family", "count"), [("mixtral", 8), ("qwen3-moe", 3), ("gpt-oss", 8)])
def test_another_number_of_experts(family: str, count: int, folders: Any, tmp_path: Path, text: Path) -> None:
    both = {"num_experts": count, "num_local_experts": count}  # families know it by one of these names
    source = edited(folders(family), tmp_path / "source", lambda tensors: None, **both)
    with pytest.raises(
        RequestError, match=rf"(has 4 experts on disk and config.json says {count}|\({count} experts\))"
    ):
        api.compress(source, tmp_path / "out", calm(text))
    assert not (tmp_path / "out").exists()


def test_a_missing_expert(folders: Any, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for leaf in ("w1", "w2", "w3"):
            del tensors[f"model.layers.1.block_sparse_moe.experts.2.{leaf}.weight"]

    source = edited(folders("mixtral"), tmp_path / "source", drop)
    with pytest.raises(RequestError, match=r"layers\.1\.mlp\.experts has 3 experts on disk and config.json says 4"):
        build(Checkpoint.open(source))


def test_a_missing_matrix_of_an_expert(folders: Any, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    source = edited(folders("olmoe"), tmp_path / "source", lambda tensors: tensors.pop(name))
    with pytest.raises(RequestError, match=rf"{name} of OlmoeForCausalLM has no tensor among"):
        build(Checkpoint.open(source))


@pytest.mark.parametrize(("family", "router"), [("mixtral", "block_sparse_moe.gate"), ("gpt-oss", "mlp.router")])
def test_a_missing_router(family: str, router: str, folders: Any, tmp_path: Path) -> None:
    source = edited(
        folders(family), tmp_path / "source", lambda tensors: tensors.pop(f"model.layers.0.{router}.weight")
    )
    with pytest.raises(RequestError, match=r"model\.layers\.0\.mlp\.\w+\.weight of \w+ has no tensor among"):
        build(Checkpoint.open(source))


def test_some_experts_fused_and_some_not(folders: Any, tmp_path: Path) -> None:
    def fuse(tensors: dict[str, Tensor]) -> None:
        home = "model.layers.1.mlp.experts"
        tensors[f"{home}.down_proj"] = torch.stack([tensors.pop(f"{home}.{e}.down_proj.weight") for e in range(4)])

    source = edited(folders("qwen3-moe"), tmp_path / "source", fuse)
    with pytest.raises(RequestError, match=r"experts\.down_proj holds all experts and .* is one expert's"):
        build(Checkpoint.open(source))


def test_experts_of_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"layers\.0\.mlp\.\w+\.weight has shape .*3-D tensors of this kind"):
        build(Checkpoint.open(make("jetmoe", tmp_path)))


def test_a_matrix_that_went_missing_is_an_error(folders: Any, tmp_path: Path, text: Path) -> None:
    matrices = build(Checkpoint.open(folders("mixtral"))).matrices
    api.compress(folders("mixtral"), tmp_path, recipe(text, method="rtn"))
    rows, shards = journal(tmp_path), sorted(tmp_path.glob("*.safetensors"))[1:]
    shards_of.require_all(matrices, rows, shards, False)
    with pytest.raises(FeatherweightError, match="31 matrices and the model 32"):
        shards_of.require_all(matrices, rows[:-1], shards, False)
    with pytest.raises(FeatherweightError, match="takes 0 bytes"):
        shards_of.require_all(matrices, rows, shards[:1], False)


def test_layouts_say_where_matrices_lie() -> None:
    plain, turned = Layout(), Layout(interleaved=True)
    assert plain.rows(1, 32, ("gate_proj", "up_proj")) == (32, 64, 1)
    assert turned.rows(1, 32, ("gate_proj", "up_proj")) == (1, None, 2)
    assert Layout(gated=False, bias=True).parameters() == {"up_proj", "down_proj", "up_proj_bias", "down_proj_bias"}


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_blocks_of_experts_are_trained_as_a_whole(family: str, folders: Any, tmp_path: Path, text: Path) -> None:
    source = folders(family)
    trained = calm(text, method="block-ap", epochs=1, bits=2, samples=6)
    result = api.compress(source, tmp_path / "out", trained)
    lines = journal(tmp_path / "out")
    assert result.matrices == sum(MATRICES[family]) == len(lines)
    assert all(line["block_loss"] <= line["block_loss_before"] for line in lines)
    assert all(line["loss"] is not None and line["loss"] >= 0 for line in lines)  # NaN is neither
    assert any(line["epoch"] for line in lines)
