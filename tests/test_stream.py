"""compress and load, end to end, for every family, format and option.

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from featherweight import api
from featherweight.core.solution import Solution
from featherweight.errors import RequestError
from featherweight.linear import CompressedLinear
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.load import load_dense
from featherweight.models.tree import build
from featherweight.stream import compress as pipeline
from featherweight.stream import hidden as hidden_states
from featherweight.stream import layerwise as solver
from runs import Seen, featherweight, journal, model_files, recipe, shards, watching
from tiny import FAMILIES, MOE_FAMILIES, add_tokenizer, make, token_ids, write_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a matrix of 256 inputs, which are more than one slab."""
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("llama"), intermediate_size=256))


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("one"), num_hidden_layers=1))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous(), other.contiguous()
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
    )


def logits(model: Any, ids_ST: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids_ST, use_cache=False).logits
    return found


def weight_of(module: nn.Module) -> Tensor:
    """R x C, whichever way the module keeps it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def put_weights(dense: Any, compressed: Any) -> int:
    """Gives the dense model the values of the compressed one's matrices; returns how many."""
    count = 0
    for path, layer in compressed.named_modules():
        if isinstance(layer, CompressedLinear):
            weight_of(dense.get_submodule(path)).data.copy_(layer.weight)
            count += 1
    return count


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
        result = api.compress(
            source, folder / "out", recipe(text, target="original", pull=0.5, search="hessian", refine=1)
        )
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
    expected = matrices_of(dense, tree.blocks_path)
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
    blocks = loaded.get_submodule(build(Checkpoint.open(made.source)).blocks_path)
    originals = dense.get_submodule(build(Checkpoint.open(made.source)).blocks_path)
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


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_are_refused_before_anything_is_written(family: str, tmp_path: Path, text: Path) -> None:
    source = add_tokenizer(make(family, tmp_path / "source"))
    with pytest.raises(RequestError, match=r"layers\.0\.mlp\.experts\.\w+ .*not supported"):
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
    path = build(Checkpoint.open(source)).blocks_path
    drifted = block_inputs(api.load(tmp_path / "out", "cpu", torch.float32, kernel="dense"), path, ids_ST)
    original = block_inputs(load_dense(source, CPU, torch.float32), path, ids_ST)
    assert not torch.allclose(drifted[-1], original[-1], rtol=1e-3, atol=1e-3)
    for block, expected, dense_STD in zip(seen, drifted, original, strict=True):
        torch.testing.assert_close(block.hidden_STD, expected, rtol=1e-4, atol=1e-4)
        assert (block.dense_STD is None) == (target == "drifted")
        if block.dense_STD is not None:
            torch.testing.assert_close(block.dense_STD, dense_STD, rtol=1e-4, atol=1e-4)


def linear_inputs(model: Any, path: str, ids_ST: Tensor) -> Tensor:
    """What goes into one matrix, T x C."""
    heard: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _module, args: heard.append(args[0]))
    logits(model, ids_ST)
    hook.remove()
    return heard[0].flatten(0, 1)


@dataclass(frozen=True)
class Handed:
    """What a group of matrices with one input was solved with."""

    names: tuple[str, ...]
    hessian_CC: Tensor
    cross_CC: Tensor | None


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Handed]:
    """Every group solved in the test, in order."""
    found: list[Handed] = []
    solve = solver.solve_group

    def noting(view: Any, group: Any, hessian: Any, cross: Any, *rest: Any) -> dict[str, Solution]:
        names = tuple(matrix.name for matrix in group)
        found.append(Handed(names, hessian.mean().clone(), None if cross is None else cross.mean().clone()))
        return solve(view, group, hessian, cross, *rest)

    monkeypatch.setattr(solver, "solve_group", noting)
    return found


def inputs_of(model: Any, paths: list[str], ids_ST: Tensor) -> dict[str, Tensor]:
    """What goes into each of these matrices, T x C."""
    heard: dict[str, Tensor] = {}
    for path in paths:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(
            lambda _m, args, path=path: heard.__setitem__(path, args[0].reshape(-1, args[0].shape[-1]))
        )
    logits(model, ids_ST)
    return heard


# olmo2 and opt-projected have no norm in front of q, k and v: these see the hidden states themselves.
@pytest.mark.parametrize("changes", [{}, {"true_sequential": True}, {"target": "original"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "opt-projected", "falcon-new"])
def test_sums_are_those_of_the_inputs(
    family: str, changes: dict[str, Any], tmp_path: Path, text: Path, handed: list[Handed]
) -> None:
    """H of the last block's matrices: the blocks before it are compressed, its own matrices original (or, sequentially,
    compressed as far as they run before). The cross sum: how the inputs differ from the original model's."""
    source = add_tokenizer(make(family, tmp_path / "source"))
    chosen = recipe(text, **changes)
    api.compress(source, tmp_path / "out", chosen)
    ids_ST = pipeline.calibration_ids(source, chosen)
    assert ids_ST is not None
    tree = build(Checkpoint.open(source))
    last = tree.blocks[-1]
    drifted = load_dense(source, CPU, torch.float32)
    for name, layer in api.load(tmp_path / "out", "cpu", torch.float32, kernel="dense").named_modules():
        if isinstance(layer, CompressedLinear) and (chosen.true_sequential or not name.startswith(last.module)):
            weight_of(drifted.get_submodule(name)).data.copy_(layer.weight)
    paths = {matrix.name: f"{last.module}.{matrix.path}" for matrix in last.matrices}
    now = inputs_of(drifted, list(paths.values()), ids_ST)
    before = inputs_of(load_dense(source, CPU, torch.float32), list(paths.values()), ids_ST)
    sums = {name: group for group in handed for name in group.names if name in paths}
    assert sums.keys() == paths.keys()
    for name, path in paths.items():
        x_TC, tokens = now[path], ids_ST.numel()
        close(sums[name].hessian_CC, x_TC.T @ x_TC / tokens)
        cross_CC = sums[name].cross_CC
        assert (cross_CC is None) == (chosen.target == "drifted")
        if cross_CC is not None:
            close(cross_CC, (before[path] - x_TC).T @ x_TC / tokens)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_matrices_with_one_input_are_solved_together(
    llama: Path, tmp_path: Path, text: Path, handed: list[Handed]
) -> None:
    api.compress(llama, tmp_path / "out", recipe(text))
    inner = [{name.rpartition(".")[2] for name in group.names} for group in handed]
    assert inner == 2 * [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]


# --- formats


BOUNDS = {2: 0.65, 3: 0.35, 4: 0.17, 8: 0.011}  # |W - V| / |W| of a random matrix


def assert_loads(out: Path, seen: list[Seen], stored_bits: int, symmetric: bool, group_size: int | None) -> Any:
    """What is loaded is what was solved, code for code; returns the model."""
    model = api.load(out, "cpu", torch.float32, kernel="dense")
    for block, layers in zip(seen, model.model.layers, strict=True):
        for path, solution in block.solutions.items():
            layer = layers.get_submodule(path)
            assert isinstance(layer, CompressedLinear)
            grid = layer.grid
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
    """Nothing has drifted yet in front of q, k and v of block 0; sequentially the rest of it differs; so does block 1."""
    first = changed(by_option["default"], by_option[option], 0)
    assert not first & QKV
    assert ("mlp.down_proj" in first) == (option == "true-sequential")
    assert changed(by_option["default"], by_option[option], 1) & QKV


def test_no_pull_is_no_target(llama: Path, text: Path, tmp_path: Path, by_option: dict[str, Path]) -> None:
    api.compress(llama, tmp_path / "out", recipe(text, target="original", pull=0.0))
    assert shards(tmp_path / "out") == shards(by_option["default"])


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
