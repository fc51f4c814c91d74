"""Opening checkpoints: what is read, and one clear sentence for every way a folder can be broken."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from featherweight.errors import RequestError
from featherweight.models import reading
from featherweight.models.checkpoint import INDEX, Checkpoint, resolve
from tiny import make


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("single") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("sharded") / "model", dtype=torch.bfloat16, max_shard_size="100KB")


@pytest.fixture
def folder(single: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "copy"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def refused(folder: Path, *patterns: str) -> None:
    """Opening fails with one sentence that matches every pattern and names the folder."""
    with pytest.raises(RequestError) as caught:
        Checkpoint.open(folder)
    for pattern in patterns:
        caught.match(pattern)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_open_and_read(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    expected = {name: value for path in sharded.glob("*.safetensors") for name, value in load_file(path).items()}
    assert checkpoint.names == tuple(sorted(expected)) and len(checkpoint.shards) > 1
    assert checkpoint.config["model_type"] == "llama"
    tensors = checkpoint.read(expected)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value)
        assert checkpoint.shape(name) == tuple(value.shape)
        assert checkpoint.dtype(name) == value.dtype == torch.bfloat16
        assert checkpoint.nbytes(name) == value.nbytes
    assert "lm_head.weight" not in checkpoint and "model.norm.weight" in checkpoint


def test_read_in_pieces(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(single)
    whole = checkpoint.read(checkpoint.names)
    for piece in (1, 1000, 20000):
        monkeypatch.setattr(reading, "PIECE_BYTES", piece)
        tensors = checkpoint.read(checkpoint.names)
        assert all(torch.equal(tensors[name], whole[name]) for name in checkpoint.names)


def test_reads_every_kind_of_tensor(folder: Path) -> None:
    kinds = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "codes": torch.arange(12, dtype=torch.int32).view(3, 4),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "float8": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
    }
    save_file(kinds, folder / "model.safetensors")
    tensors = Checkpoint.open(folder).read(kinds)
    for name, value in kinds.items():
        assert tensors[name].dtype == value.dtype and tensors[name].shape == value.shape
        assert torch.equal(tensors[name].float(), value.float())


def test_tensors_outlive_the_file(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    tensor = checkpoint.read(["model.norm.weight"])["model.norm.weight"]
    before = tensor.clone()
    (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(folder: Path, bad: float, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    tensors[name][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*1 NaN or Inf among 8192"):
        checkpoint.read([name])
    assert not torch.isfinite(checkpoint.read([name], check_finite=False)[name]).all()


def test_unknown_tensor(single: Path) -> None:
    with pytest.raises(RequestError, match=r"no tensor nothing\.weight"):
        Checkpoint.open(single).read(["nothing.weight"])


def test_fingerprint_sees_weights_config_and_names(folder: Path) -> None:
    prints = {Checkpoint.open(folder).fingerprint(), Checkpoint.open(folder).fingerprint()}
    assert len(prints) == 1
    path = folder / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    prints.add(Checkpoint.open(folder).fingerprint())
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    prints.add(Checkpoint.open(folder).fingerprint())
    tensors = load_file(path)
    tensors["another"] = tensors.pop("model.norm.weight")
    save_file(tensors, path)
    prints.add(Checkpoint.open(folder).fingerprint())
    assert len(prints) == 4


def test_side_files(shards: Path) -> None:
    keep = ["tokenizer.json", "chat_template.jinja", "README.md", "LICENSE", "additional_chat_templates/tool.jinja"]
    for name in [*keep, "pytorch_model.bin", "model.gguf", ".gitattributes", "original/params.json"]:
        (shards / name).parent.mkdir(exist_ok=True)
        (shards / name).write_text("x")
    found = [path.relative_to(shards).as_posix() for path in Checkpoint.open(shards).side_files()]
    assert sorted(found) == sorted([*keep, "generation_config.json"])


def test_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, r"model\.safetensors", rf"says {whole} bytes", rf"has {whole - 100}", "download it again")


@pytest.mark.parametrize("kept", [0, 5, 8, 40])
def test_truncated_header(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, r"model\.safetensors", rf"has {kept}", "download it again")


def test_bytes_too_many(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"more")
    refused(folder, rf"corrupt.*says {whole} bytes.*has {whole + 4}")


def breaks(header: dict[str, dict[str, object]]) -> bytes:
    return json.dumps(header).encode()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda header: b"{" * 100,
        lambda header: b"\xff" * 64,
        lambda header: b"[1, 2, 3]",
        lambda header: breaks({**header, "odd": {"dtype": "F32", "shape": [2, 2]}}),
        lambda header: breaks({**header, "odd": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}),
        lambda header: breaks({**header, "odd": {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]}}),
        lambda header: breaks({**header, "odd": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}),
        lambda header: breaks({**header, "odd": 3}),
    ],
    ids=["syntax", "not-utf8", "list", "no-offsets", "wrong-size", "negative", "overlap", "not-an-object"],
)
def test_corrupt_header(folder: Path, spoil: Callable[[dict[str, dict[str, object]]], bytes]) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = spoil(json.loads(raw[8 : 8 + length]))
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    refused(folder, r"model\.safetensors", "corrupt header", "download it again")


def test_a_file_cut_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"model\.safetensors could not be read"):
        checkpoint.read(["model.norm.weight"])


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_missing_shard(shards: Path) -> None:
    victim = sorted(shards.glob("*.safetensors"))[1]
    count = len(list(shards.glob("*.safetensors")))
    victim.unlink()
    refused(shards, rf"names {count} shards, but {victim.name} is missing")


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/model.safetensors", "a/../../m.safetensors"])
def test_shard_outside_the_folder(shards: Path, outside: str) -> None:
    edit_index(shards, lambda weights: weights.update({"model.norm.weight": outside}))
    refused(shards, r"model\.safetensors\.index\.json", "outside the folder")


def test_tensor_absent_from_its_shard(shards: Path) -> None:
    first = sorted(shards.glob("*.safetensors"))[0].name
    edit_index(shards, lambda weights: weights.update({"model.phantom.weight": first}))
    refused(shards, rf"model\.phantom\.weight is in {first}, which holds \d+ tensors but not this one")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_broken_index(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    refused(shards, r"model\.safetensors\.index\.json")


def test_pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "never opened", "convert them to safetensors")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    refused(folder, r"no weights.*other \.safetensors files: 1")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, r"config\.json", "download it again")


def test_resolve(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(single) == resolve(str(single)) == single
    for wrong in (tmp_path, tmp_path / "nowhere", "no-such-model", "./a/b", "a/b/c"):
        with pytest.raises(RequestError, match=r"is not a checkpoint: no config\.json; give a folder"):
            resolve(wrong)
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(single)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/some-model_1.5") == single
    assert asked == [("org/some-model_1.5", ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])]


def test_resolve_says_why_the_hub_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(RequestError, match=r"org/model is neither a local folder .* the hub: no route$"):
        resolve("org/model")


@pytest.mark.parametrize("name", ["feather-tiny", "feather-tiny-moe"])
def test_the_embedded_models(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, single: Path) -> None:
    monkeypatch.setattr("featherweight.models.checkpoint.resources.files", lambda _package: tmp_path)
    with pytest.raises(RequestError, match=f"{name} is missing"):
        resolve(name)
    shutil.copytree(single, tmp_path / "assets" / name)
    assert resolve(name) == tmp_path / "assets" / name
