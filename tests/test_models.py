"""The tree and the block runner against the dense transformers model, for every family."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from featherweight.errors import RequestError
from featherweight.models.blocks import BlockRunner
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.load import load_dense, load_tokenizer, load_with
from featherweight.models.tree import ModelTree, build
from tiny import FAMILIES, make, token_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tree(folder: Path) -> ModelTree:
    return build(Checkpoint.open(folder))


@pytest.fixture(scope="module")
def dense(folder: Path) -> Any:
    return load_dense(folder, CPU, torch.float32)


def test_tree_has_every_matrix(tree: ModelTree, dense: Any) -> None:
    blocks = dense.get_submodule(tree.lists[0])
    expected = {
        f"{index}.{path}": module
        for index, block in enumerate(blocks)
        for path, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    found = {f"{block.index}.{matrix.path}": matrix for block in tree.blocks for matrix in block.matrices}
    assert found.keys() == expected.keys() and found
    for name, matrix in found.items():
        module = expected[name]
        stored = tree.checkpoint.read([matrix.weight])[matrix.weight]
        assert torch.equal(stored, module.weight)
        assert (matrix.rows, matrix.columns) == tuple(stored.T.shape if matrix.transposed else stored.shape)
        assert matrix.transposed == isinstance(module, Conv1D)
        assert (matrix.bias is None) == (module.bias is None)
        assert matrix.weight == f"{matrix.name}.weight"


def test_blocks_and_rest_share_out_the_disk(tree: ModelTree) -> None:
    names = [name for block in tree.blocks for name in block.tensors] + list(tree.rest)
    assert sorted(names) == list(tree.checkpoint.names)
    assert tree.dtype == torch.float32
    assert all(parameter.is_meta for parameter in tree.model.parameters())


def block_outputs(model: Any, path: str, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Output of every block of the dense model, and its logits."""
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in model.get_submodule(path)
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return outputs, logits


def stream(runner: BlockRunner, batches: list[Tensor]) -> Iterator[list[Tensor]]:
    """The hidden states of all batches after each block."""
    hidden = [runner.embed(ids) for ids in batches]
    for index in range(len(runner.tree.blocks)):
        block = runner.load(index)
        hidden = [runner.run(index, block, states) for states in hidden]
        runner.unload(index)
        assert all(tensor.is_meta for tensor in block.parameters())
        yield hidden


def assert_streams_like_dense(tree: ModelTree, dense: Any, batches: list[Tensor], dtype: torch.dtype) -> BlockRunner:
    runner = BlockRunner(tree, CPU, dtype)
    expected = [block_outputs(dense, tree.lists[0], ids)[0] for ids in batches]
    for index, hidden in enumerate(stream(runner, batches)):
        for states, outputs in zip(hidden, expected, strict=True):
            torch.testing.assert_close(states, outputs[index], rtol=1e-5, atol=1e-5)
    return runner


def test_streamed_blocks_equal_the_dense_model(tree: ModelTree, dense: Any) -> None:
    # the usual batch, one of its shape, a smaller one, and one longer than the sliding window by far
    batches = [token_ids(2, 24, seed=1), token_ids(2, 24, seed=2), token_ids(1, 24, seed=3), token_ids(1, 40, seed=4)]
    runner = assert_streams_like_dense(tree, dense, batches, torch.float32)
    assert all(tensor.is_meta for tensor in runner.model.parameters())


def test_last_hidden_states_give_the_logits(tree: ModelTree, dense: Any) -> None:
    ids = token_ids(2, 16)
    logits = block_outputs(dense, tree.lists[0], ids)[1]
    *_, (hidden,) = stream(BlockRunner(tree, CPU, torch.float32), [ids])
    last = dense.get_submodule(tree.lists[0])[-1]
    hook = last.register_forward_hook(lambda _m, _a, out: (hidden, *out[1:]) if isinstance(out, tuple) else hidden)
    with torch.no_grad():
        ours = dense(input_ids=ids, use_cache=False).logits
    hook.remove()
    assert logits.std() > 0.05
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_streams_like_bfloat16(tree: ModelTree, folder: Path) -> None:
    dense = load_dense(folder, CPU, torch.bfloat16)
    ids = token_ids(2, 24)
    *_, (hidden,) = stream(BlockRunner(tree, CPU, torch.bfloat16), [ids])
    expected = block_outputs(dense, tree.lists[0], ids)[0][-1]
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)


def test_run_needs_no_embed(tree: ModelTree, dense: Any) -> None:
    ids = token_ids(1, 12)
    runner = BlockRunner(tree, CPU, torch.float32)
    hidden = runner.embed(ids)
    resumed = BlockRunner(tree, CPU, torch.float32)
    block = resumed.load(0)
    output = resumed.run(0, block, hidden)
    torch.testing.assert_close(output, block_outputs(dense, tree.lists[0], ids)[0][0], rtol=1e-5, atol=1e-5)
    resumed.unload(0)
    assert all(tensor.is_meta for tensor in resumed.model.parameters())


def fake_compressed(folder: Path, tree: ModelTree, out: Path) -> Path:
    """The checkpoint with each block matrix stored as '<name>.weight_packed', in two halves of its bytes."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for block in tree.blocks:
        for matrix in block.matrices:
            tensors[f"{matrix.name}.weight_packed"] = tensors.pop(matrix.weight).view(torch.int32)
            tensors[f"{matrix.name}.weight_scale"] = torch.full((1,), 1.0)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fake"}}))
    (out / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    return out


class Unpacked(nn.Module):
    """What the fake's matrices become."""

    def __init__(self, inner: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.transposed = isinstance(inner, Conv1D)
        self.register_buffer("weight_packed", tensors["weight_packed"])
        self.register_buffer("bias", tensors.get("bias"))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_packed.view(torch.float32)
        return nn.functional.linear(x, weight.T if self.transposed else weight, self.bias)


def test_load_with_replaces_what_is_compressed(folder: Path, tree: ModelTree, dense: Any, tmp_path: Path) -> None:
    fake = fake_compressed(folder, tree, tmp_path / "fake")
    seen: list[str] = []

    def replace(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        seen.append(name)
        return Unpacked(module, tensors)

    model = load_with(fake, replace, CPU)
    assert sorted(seen) == sorted(matrix.name for block in tree.blocks for matrix in block.matrices)
    assert model.generation_config.max_new_tokens == 7
    ids = token_ids(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


def test_load_with_loads_a_dense_checkpoint(folder: Path, dense: Any) -> None:
    model = load_with(folder, lambda *_: pytest.fail("nothing is compressed"), CPU)
    ids = token_ids(1, 24)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight)


def test_a_compressed_checkpoint_is_not_compressed_again(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    fake = fake_compressed(source, build(Checkpoint.open(source)), tmp_path / "fake")
    with pytest.raises(RequestError, match="quantized already"):
        build(Checkpoint.open(fake))


def test_load_with_names_a_missing_tensor(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_with(source, lambda *_: pytest.fail("nothing is compressed"), CPU)
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build(Checkpoint.open(source))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_names_without_the_prefix(family: str, tmp_path: Path) -> None:
    """Old files were saved from the body alone, and hold buffers no one reads today."""
    source = make(family, tmp_path / "dense")
    prefix = "model." if family == "opt" else "transformer."
    tensors = {name.removeprefix(prefix): value for name, value in load_file(source / "model.safetensors").items()}
    if family == "gpt2":
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    tree = build(Checkpoint.open(source))
    assert all(not name.startswith(prefix) for block in tree.blocks for name in block.tensors)
    assert ("h.0.attn.bias" in tree.blocks[0].tensors) == (family == "gpt2")
    dense = load_dense(source, CPU, torch.float32)
    assert_streams_like_dense(tree, dense, [token_ids(2, 12)], torch.float32)


def test_names_that_transformers_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers has another name for a tensor than the file, ours is the file's."""
    source = make("llama", tmp_path / "dense")
    tensors = {
        name.replace("self_attn.q_proj", "attn.wq"): t for name, t in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    renaming = WeightRenaming(r"\.attn\.wq", ".self_attn.q_proj")
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _model: [renaming])
    tree = build(Checkpoint.open(source))
    assert tree.blocks[1].matrices[0].weight == "model.layers.1.attn.wq.weight" in tree.blocks[1].tensors
    assert tree.blocks[1].matrices[0].path == "self_attn.q_proj"
    runner = BlockRunner(tree, CPU, torch.float32)
    assert torch.equal(runner.load(0).self_attn.q_proj.weight, tensors["model.layers.0.attn.wq.weight"])


def edit_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_unknown_architecture(tmp_path: Path) -> None:
    folder = edit_config(make("llama", tmp_path), model_type="no_such_model")
    for act in (lambda: build(Checkpoint.open(folder)), lambda: load_dense(folder)):
        with pytest.raises(RequestError, match=r"'no_such_model'.*transformers \d"):
            act()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'t5'"):
        build(Checkpoint.open(edit_config(make("llama", tmp_path), model_type="t5", architectures=None)))


def test_config_and_weights_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"shape \[128, 64\] on disk, config.json asks for \[96, 64\]"):
        build(Checkpoint.open(edit_config(make("mistral", tmp_path), intermediate_size=96)))


def test_tokens_may_reach_blocks_by_the_hidden_states_only(tmp_path: Path) -> None:
    tree = build(Checkpoint.open(make("llama", tmp_path)))
    runner = BlockRunner(tree, CPU, torch.float32)
    rotary = runner.model.model.rotary_emb
    inner = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(part + x.sum() for part in inner(x, position_ids))
    with pytest.raises(RequestError, match="depends on the tokens"):
        runner.embed(token_ids(1, 8))


def test_blocks_with_work_between_them_are_refused(tmp_path: Path) -> None:
    tree = build(Checkpoint.open(make("llama", tmp_path)))
    runner = BlockRunner(tree, CPU, torch.float32)
    runner.blocks[1].register_forward_pre_hook(lambda _module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(RequestError, match="between its 2 blocks"):
        runner.embed(token_ids(1, 8))


def test_tied_blocks_and_the_caller_share_arguments(tmp_path: Path) -> None:
    """Masks are big: blocks of one kind hold one tensor between them, and three shapes are kept at most."""
    tree = build(Checkpoint.open(make("gemma3", tmp_path)))
    runner = BlockRunner(tree, CPU, torch.float32)
    for tokens in (8, 16, 24, 32):
        runner.embed(token_ids(2, tokens))
    assert list(runner._recordings) == [(2, 16), (2, 24), (2, 32)]
    first, _, third = runner._recordings[2, 32]
    assert first.kwargs["attention_mask"] is third.kwargs["attention_mask"]
    assert first.kwargs.get("past_key_values") is None


def test_loads_a_replaced_module_and_frees_it(tmp_path: Path) -> None:
    tree = build(Checkpoint.open(make("llama", tmp_path)))
    runner = BlockRunner(tree, CPU, torch.float32)
    hidden = runner.embed(token_ids(1, 8))
    block = runner.load(0)
    before = runner.run(0, block, hidden)
    zero = nn.Linear(128, 64, bias=False)
    nn.init.zeros_(zero.weight)
    block.set_submodule("mlp.down_proj", zero)
    assert not torch.equal(before, runner.run(0, block, hidden))
    runner.unload(0)
    assert zero.weight.is_meta
    torch.testing.assert_close(runner.run(0, runner.load(0), hidden), before)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        load_tokenizer(make("llama", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma3-270m", "qwen2.5-coder-0.5b-instruct"])
def test_real_checkpoints(name: str, models_folder: Path) -> None:
    folder = models_folder / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in {models_folder}")
    tree = build(Checkpoint.open(folder))
    dense = load_dense(folder, CPU)
    vocabulary = dense.config.get_text_config().vocab_size
    ids = token_ids(2, 64, vocabulary=vocabulary)
    *_, (hidden,) = stream(BlockRunner(tree, CPU, tree.dtype), [ids])
    torch.testing.assert_close(hidden, block_outputs(dense, tree.lists[0], ids)[0][-1], rtol=0, atol=0)
    assert sum(len(block.matrices) for block in tree.blocks) == 7 * len(tree.blocks)
    assert len(load_tokenizer(folder)("a few words")["input_ids"]) >= 3
