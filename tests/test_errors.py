"""What cannot be done is refused in one sentence with exit code 2, and nothing is left that looks whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from runs import LOCK, Ran, featherweight, model_files, processes, recipe, shards
from tiny import add_tokenizer, make

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("source"), max_shard_size="80KB"))


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A sound checkpoint of several shards, to be broken."""
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def compress(source: object, out: Path, text: Path, *options: object) -> Ran:
    """The command with small numbers; later options win."""
    small = (
        "--group-size",
        32,
        "--samples",
        4,
        "--tokens",
        32,
        "--refine",
        0,
        "--search",
        "minmax",
        "--calibration",
        text,
    )
    return featherweight("compress", source, out, *small, *options)


def assert_untouched(out: Path) -> None:
    """Not begun at all, or nothing but the lock."""
    assert not out.exists() or {path.name for path in out.iterdir()} <= {LOCK}


def assert_not_whole(out: Path) -> None:
    """No transformers, no engine and no `eval` takes it for a checkpoint, and no half-written file lies about."""
    assert not (out / "config.json").exists() and not (out / INDEX).exists()
    assert featherweight("inspect", out).error.startswith(f"{out} is not a checkpoint")
    for shard in out.glob("*.safetensors"):
        assert load_file(shard)
    odd = [path.name for path in out.iterdir() if path.suffix == ".part" or path.name.startswith(".tmp")]
    assert odd == []


def test_a_sound_request_is_met(source: Path, out: Path, text: Path) -> None:
    """What all others here differ from by one fault."""
    ran = compress(source, out, text)
    assert ran.code == 0 and ran.last["matrices"] == 14


# --- the checkpoint


def test_no_checkpoint(tmp_path: Path, out: Path, text: Path) -> None:
    for model in (tmp_path / "absent", tmp_path, text, "no-such-model"):
        for command in (("compress", model, out), ("eval", model), ("inspect", model), ("generate", model, "Hi")):
            assert featherweight(*command).error.startswith(f"{model} is not a checkpoint: no config.json")
    assert_untouched(out)


def test_a_config_without_weights(source: Path, out: Path, text: Path) -> None:
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    assert "has no weights" in compress(source, out, text).error
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pickled PyTorch weights only, which are never opened here" in compress(source, out, text).error
    (source / "config.json").write_text('{"model_type": ')
    assert "config.json is not valid JSON" in compress(source, out, text).error
    assert_untouched(out)


def shard_of(source: Path, name: str) -> Path:
    shard: str = json.loads((source / INDEX).read_text())["weight_map"][name]
    return source / shard


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_truncated_shard(source: Path, out: Path, text: Path) -> None:
    shard = shard_of(source, NAME)
    whole = shard.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 3, 0):
        shard.write_bytes(whole[:kept])
        said = compress(source, out, text).error
        assert f"{shard} is truncated" in said and f"the file has {kept};" in said
        assert featherweight("eval", source, "--windows", 1).error == said
    shard.write_bytes(b"\xff" * len(whole))
    assert str(shard) in compress(source, out, text).error
    assert_untouched(out)


def test_an_index_that_names_what_is_not_there(source: Path, out: Path, text: Path) -> None:
    index = json.loads((source / INDEX).read_text())

    def with_shard(shard: str) -> str:
        changed = {**index["weight_map"], NAME: shard}
        (source / INDEX).write_text(json.dumps({**index, "weight_map": changed}))
        return compress(source, out, text).error

    assert "gone.safetensors is missing" in with_shard("gone.safetensors")
    other = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"][NAME])
    assert f"says tensor {NAME} is in {other}" in with_shard(other)
    stolen = source.parent / "stolen.safetensors"
    shutil.copyfile(shard_of_index(index, source), stolen)
    for shard in ("../stolen.safetensors", str(stolen)):
        assert f"names {shard}, a file outside the folder" in with_shard(shard)
    assert_untouched(out)


def shard_of_index(index: dict[str, Any], source: Path) -> Path:
    return source / index["weight_map"][NAME]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [NAME, "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers(name: str, bad: float, source: Path, out: Path, text: Path) -> None:
    shard = shard_of(source, name)
    tensors = load_file(shard)
    tensors[name].view(-1)[7] = bad
    save_file(tensors, shard, metadata={"format": "pt"})
    assert compress(source, out, text).error.startswith(f"{name} in {shard} holds 1 NaN or Inf among")
    assert_not_whole(out)
    assert compress(source, out.parent / "rtn", text, "--method", "rtn").error.startswith(f"{name} in {shard}")
    assert_not_whole(out.parent / "rtn")


def test_a_tensor_is_missing(source: Path, out: Path, text: Path) -> None:
    shard, index = shard_of(source, NAME), json.loads((source / INDEX).read_text())
    tensors = load_file(shard)
    del tensors[NAME], index["weight_map"][NAME]
    save_file(tensors, shard, metadata={"format": "pt"})
    (source / INDEX).write_text(json.dumps(index))
    assert compress(source, out, text).error.startswith(f"{NAME} of LlamaForCausalLM has no tensor")
    assert_untouched(out)


def test_unknown_architecture(source: Path, out: Path, text: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    for change in ({"model_type": "abacus"}, {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}):
        (source / "config.json").write_text(json.dumps({**config, **change}))
        for ran in (compress(source, out, text), featherweight("eval", source, "--windows", 1)):
            assert f"has model type {change['model_type']!r}, of which transformers" in ran.error
    assert_untouched(out)


def test_experts_of_an_unknown_kind(tmp_path: Path, out: Path, text: Path) -> None:
    source = add_tokenizer(make("jetmoe", tmp_path / "source"))
    assert compress(source, out, text).error.startswith("model.layers.0.mlp.")
    assert_untouched(out)


# --- text and windows


def test_too_little_text(source: Path, out: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("ten tokens")
    said = featherweight("compress", source, out, "--group-size", 32, "--tokens", 32, "--calibration", short).error
    assert "the calibration text has 10 tokens and one window needs 32: lower --tokens or give more text" in said
    for content, what in ((b"", "holds no text"), (b" \n\n", "holds no text"), (b"caf\xe9", "is not UTF-8")):
        short.write_bytes(content)
        assert what in featherweight("compress", source, out, "--group-size", 32, "--calibration", short).error
    absent = tmp_path / "absent.txt"
    assert f"text source {absent} does not exist" in compress(source, out, absent).error
    assert_untouched(out)
    said = featherweight("eval", source, "--text", text, "--context", 64, "--windows", 0).error
    assert "hold no prediction" in said or "at least 1" in said


def test_windows_longer_than_the_model(source: Path, out: Path, text: Path) -> None:
    said = compress(source, out, text, "--tokens", 129).error
    assert said.startswith("--tokens 129 is longer than the model's 128 positions: use --tokens 128")
    assert_untouched(out)
    assert "129 tokens and the model takes at most 128" in featherweight("eval", source, "--context", 129).error


def test_no_tokenizer(source: Path, out: Path, text: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer that can be loaded" in compress(source, out, text).error
    assert_untouched(out)


def test_a_tokenizer_of_another_model(tmp_path: Path, out: Path, text: Path) -> None:
    """Ids beyond the embedding: it is the user who has mixed up two models."""
    source = add_tokenizer(make("llama", tmp_path / "source", vocab_size=64))
    assert "the model knows 0 to 63" in compress(source, out, text).error
    assert_not_whole(out)


# --- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bits", 9), "bits must be one of 1.58, 2, 3, 4, 5, 6, 7, 8, not 9"),
        (("--bits", 4.5), "not 4.5"),
        (("--bits", "nan"), "not nan"),
        (("--bits", "inf"), "not inf"),
        (("--bits", 1.58, "--asymmetric"), "drop asymmetric or ask for 2 bits"),
        (("--group-size", 48), "model.layers.0.self_attn.q_proj has 64 inputs, which the group size 48 does not divide:"
                               " use --group-size 64 or 32 or 16 or row"),
        (("--group-size", 128), "has 64 inputs, which the group size 128 does not divide"),
        (("--group-size", 0), "group size must be 1 or more"),
        (("--group-size", -1), "'-1'"),
        (("--group-size", "columns"), "group size must be a number or 'row', not 'columns'"),
        (("--group-size", "²"), "group size must be a number or 'row', not '²'"),
        (("--method", "magic"), "method must be gptq, obq, rtn or block-ap, not 'magic'"),
        (("--format", "gguf9"), "there is no format gguf9: choose compressed-tensors, gptq, gptq_v2"),
        (("--format", "gptq", "--bits", 5), "model.layers.0.self_attn.q_proj wants 5 bits, and gptq has 2, 3, 4 or 8"),
        (("--search", "luck"), "search must be minmax, mse or hessian, not 'luck'"),
        (("--order", "random"), "order must be activation, pivot or natural, not 'random'"),
        (("--scales-from", "above"), "scales_from must be original or updated, not 'above'"),
        (("--scales-from", "updated"), "use --order natural"),
        (("--target", "moon"), "target must be drifted or original, not 'moon'"),
        (("--sink-share", 1), "sink_share must be at least 0 and less than 1, not 1.0"),
        (("--damping", -1), "damping must lie between 0 and 10"),
        (("--damping", "nan"), "not nan"),
        (("--refine", -1), "refine must be 0 rounds or more, not -1"),
        (("--samples", 0), "samples must be 1 or more, not 0"),
        (("--tokens", 1), "tokens must be 2 or more, not 1"),
        (("--seed", 1 << 70), "seed"),
        (("--device", "abacus"), "device 'abacus' is not known: use auto, cpu, cuda or cuda:N"),
        (("--device", "meta"), "device 'meta' is not supported"),
        (("--device", "cuda:77"), "device 'cuda:77' was asked for and this machine has"),
        (("--recipe", "grandma"), "no recipe is called 'grandma': take default, best, fast, rtn"),
        (("--recipe", "no_such_module:recipe"), "cannot be imported"),
        (("--recipe", "json:no_such_function"), "cannot be imported"),
        (("--recipe", "platform:python_version"), "returned str, not a featherweight Recipe"),
        (("--chat-template",), "this tokenizer has none"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_unknown_values(options: tuple[object, ...], said: str, original: Path, out: Path, text: Path) -> None:
    assert said in compress(original, out, text, *options).error
    assert_untouched(out)


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress",),
        ("compress", "a"),
        ("compress", "a", "b", "--bits", "four"),
        ("compress", "a", "b", "--fast"),
        ("fly",),
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_read(arguments: tuple[str, ...]) -> None:
    ran = featherweight(*arguments)
    assert ran.code == 2 and ran.out == "" and "Usage" in ran.err and "Traceback" not in ran.err


def test_eval_and_generate(original: Path, text: Path, tmp_path: Path) -> None:
    for options, said in (
        (("--context", 1), "at least 2"),
        (("--windows", -1), "-1"),
        (("--text", tmp_path / "absent.txt"), "does not exist"),
        (("--against", tmp_path / "absent"), "is not a checkpoint"),
    ):
        assert said in featherweight("eval", original, "--text", text, "--context", 64, *options).error
    other = add_tokenizer(make("llama", tmp_path / "other", vocab_size=160))
    assert (
        "same vocabulary"
        in featherweight("eval", original, "--text", text, "--context", 64, "--windows", 1, "--against", other).error
    )
    for options, said in (
        (("Hi", "--max-new-tokens", 0), "at least 1"),
        (("Hi", "--temperature", -1), "0 or more"),
        (("",), "0 tokens"),
    ):
        assert said in featherweight("generate", original, *options).error


# --- the disk


def finishes(source: Path, out: Path, text: Path, like: Path) -> None:
    """Once there is room, the same command ends with the bytes of an undisturbed run."""
    assert compress(source, out, text).code == 0
    assert compress(source, like, text).code == 0
    assert model_files(out) == model_files(like)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_disk_is_full(code: int, original: Path, out: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = safetensors.torch.save_file, 0

    def save(tensors: Any, path: Path, *rest: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        real(tensors, path, *rest, **named)
        if calls == 3:
            os.truncate(path, 1000)
            raise OSError(code, os.strerror(code), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save)
        said = compress(original, out, text).error
    assert calls == 3
    assert "the disk is full" in said and "bytes needed" in said and "finished blocks are kept" in said
    assert_not_whole(out)
    assert len(shards(out)) == 2
    finishes(original, out, text, out.parent / "like")


def full_after(writes: int, patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Lets so many fsyncs succeed, then fails one; returns whether it came to that."""
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    patch.setattr(os, "fsync", fsync)
    return lambda: calls > writes


def test_the_disk_fills_up_at_any_write(original: Path, text: Path, tmp_path: Path) -> None:
    assert compress(original, tmp_path / "whole", text, "--method", "rtn").code == 0
    for writes in range(100):
        out = tmp_path / str(writes)
        with pytest.MonkeyPatch.context() as patch:
            happened = full_after(writes, patch)
            ran = compress(original, out, text, "--method", "rtn")
        if not happened():
            break
        assert "the disk is full" in ran.error, writes
        assert not (out / "config.json").exists() and not list(out.glob("*.part")), writes
        assert compress(original, out, text, "--method", "rtn").code == 0
        assert model_files(out) == model_files(tmp_path / "whole"), writes
    assert writes >= 9  # manifest, three shards with their journal lines, index, config


def compress_in_little_room(line: Connection, source: Path, out: Path, text: Path, limit: int, on_disk: bool) -> None:
    """In a process of its own, where no file may grow beyond `limit` bytes."""
    from featherweight.stream import hidden

    if on_disk:
        hidden.free_memory_bytes = lambda: 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    ran = compress(source, out, text, "--samples", 16)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    line.send(ran)


@pytest.mark.parametrize(("limit", "on_disk"), [(29_000, False), (600, False), (60_000, True)])
def test_a_real_limit_on_file_sizes(limit: int, on_disk: bool, original: Path, out: Path, text: Path) -> None:
    """Below the first shard of 33 kB; below every file; below the 128 kB of hidden states, which are to be on disk."""
    ours, theirs = processes().Pipe()
    arguments = (theirs, original, out, text, limit, on_disk)
    process = processes().Process(target=compress_in_little_room, args=arguments)
    process.start()
    theirs.close()
    ran = ours.recv()
    process.join()
    assert process.exitcode == 0
    assert "too large" in ran.error.lower() or "disk is full" in ran.error
    assert "finished blocks are kept" in ran.error
    assert_not_whole(out)
    assert not list(out.glob(".*.scratch"))
    assert compress(original, out, text, "--samples", 16).code == 0


def test_recipes_of_the_tests_are_those_of_the_command(original: Path, out: Path, text: Path) -> None:
    """The command prints the recipe it takes; ours in code is the same."""
    ran = compress(original, out, text, "--target", "drifted", "--damping", 0.1)
    assert f"recipe {recipe(text).digest()}: " in ran.err
