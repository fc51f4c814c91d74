"""A checkpoint folder, opened lazily: what is in it by the names on disk, and any tensor when it is asked for.

Only headers are read on opening, so a broken download is found before any work starts. Nothing stays mapped: tensors
are copies.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import RequestError
from featherweight.models.headers import DTYPES, Entry, read_entries
from featherweight.models.reading import fill

EMBEDDED = "feather-tiny"
EMBEDDED_MOE = "feather-tiny-moe"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def resolve(model: str | Path) -> Path:
    """The folder of a model named on the command line: a local folder, an embedded model, or a hub name.

    A hub name ("org/name") is downloaded by huggingface_hub (safetensors, tokenizer and configuration files only).
    Raises RequestError when it is none of the three.
    """
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if str(model) in (EMBEDDED, EMBEDDED_MOE):
        return _embedded(str(model))
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        return _download(str(model))
    raise RequestError(
        f"{model} is not a checkpoint: no config.json; give a folder with config.json and .safetensors, "
        f'a hub name such as "org/name", "{EMBEDDED}" or "{EMBEDDED_MOE}".'
    )


def _embedded(name: str) -> Path:
    folder = Path(str(resources.files("featherweight") / "assets" / name))
    if not (folder / "config.json").is_file():
        raise RequestError(f"{name} is missing from this installation ({folder}): install featherweight again.")
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"{name} is neither a local folder nor could it be had from the hub: {reason}") from error


class Checkpoint:
    """The tensors of a checkpoint by their names on disk; made by `Checkpoint.open`, holds no file open.

    Attributes:
        path: the folder.
        config: config.json as a dict.
        names: every tensor name, sorted.
        shards: the safetensors files, relative to `path`, sorted.
    """

    def __init__(self, path: Path, config: dict[str, Any], entries: dict[str, Entry], shards: tuple[str, ...]) -> None:
        self.path = path
        self.config = config
        self.shards = shards
        self.names = tuple(sorted(entries))
        self._entries = entries

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a folder and check every header; RequestError names the file, both numbers and the fix."""
        folder = Path(path)
        config = _read_json(folder / "config.json")
        shards, index = _find_shards(folder)
        entries: dict[str, Entry] = {}
        for shard in shards:
            found = read_entries(folder, shard)
            absent = sorted(name for name, where in index.items() if where == shard and name not in found)
            if absent:
                raise RequestError(
                    f"{folder / INDEX} says tensor {absent[0]} is in {shard}, which holds {len(found)} tensors but not "
                    f"this one ({len(absent)} are missing): download the checkpoint again."
                )
            entries.update({name: entry for name, entry in found.items() if index.get(name, shard) == shard})
        return cls(folder, config, entries, shards)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise RequestError(f"{self.path} has no tensor {name} ({len(self.names)} others): check the name.")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype of a tensor; RequestError if this torch has none for it (4- and 6-bit floats)."""
        stored = self._entry(name).dtype
        if stored not in DTYPES:
            raise RequestError(f"{name} is stored as {stored}, which is not one of {', '.join(DTYPES)}: convert it.")
        return DTYPES[stored]

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk."""
        return self._entry(name).nbytes

    def read(
        self, names: Iterable[str], check_finite: bool = True, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Copies of tensors on a device, in their stored dtypes; a GPU's come in its current stream.

        Raises RequestError naming the first tensor with NaN or Inf when `check_finite` is set. Memory is that of the
        tensors and some MiB.
        """
        tensors: dict[str, Tensor] = {}
        by_shard: dict[str, list[tuple[int, Tensor]]] = {}
        for name in dict.fromkeys(names):
            entry = self._entry(name)
            tensors[name] = torch.empty(entry.shape, dtype=self.dtype(name), device=device)
            by_shard.setdefault(entry.shard, []).append((entry.start, tensors[name]))
        for shard, wanted in by_shard.items():
            fill(self.path / shard, wanted)
        if check_finite:
            for name, tensor in tensors.items():
                _require_finite(name, tensor, self.path / self._entry(name).shard)
        return tensors

    def read_row(self, name: str, row: int) -> Tensor:
        """One row of a tensor's first axis, with that axis; on the CPU, otherwise as `read`."""
        entry = self._entry(name)
        tensor = torch.empty((1, *entry.shape[1:]), dtype=self.dtype(name))
        fill(self.path / entry.shard, [(entry.start + row * tensor.nbytes, tensor)])
        _require_finite(name, tensor, self.path / entry.shard)
        return tensor

    def fingerprint(self) -> str:
        """A sha256 that tells one checkpoint from another, cheap for huge models.

        It covers config.json, and of every shard the name, header, size and the first and last 64 KiB of data: other
        weights in the middle of a file with the same two ends go unseen.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for shard in self.shards:
            file_path = self.path / shard
            size = file_path.stat().st_size
            with file_path.open("rb") as file:
                head = file.read(8)
                header = file.read(struct.unpack("<Q", head)[0])
                digest.update(f"{shard} {size}".encode() + head + header + file.read(65536))
                file.seek(max(file.tell(), size - 65536))
                digest.update(file.read(65536))
        return digest.hexdigest()

    def side_files(self) -> list[Path]:
        """What goes into an output folder as it is: tokenizer, templates, generation_config, README, licence ...

        No weights, no index, no config.json, nothing hidden; of subfolders only `additional_chat_templates`.
        """
        found = [*self.path.iterdir(), *self.path.glob("additional_chat_templates/*")]
        return sorted(path for path in found if path.is_file() and not _is_weight(path.name))


def _is_weight(name: str) -> bool:
    return (
        name == "config.json"
        or name.startswith(".")
        or name.endswith(".index.json")
        or PurePosixPath(name).suffix in WEIGHT_SUFFIXES
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RequestError(
            f"{path.parent} is not a checkpoint: no {path.name}; give a folder with config.json and .safetensors."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} holds a JSON {type(content).__name__} where an object belongs: download it again.")
    return content


def _find_shards(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The shards of a folder and the index (empty when one file holds all); the order of search is transformers'."""
    if (folder / SINGLE).is_file():
        return (SINGLE,), {}
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise RequestError(f"{folder / INDEX} has no weight_map of tensor names to files: download it again.")
        shards = tuple(sorted(set(index.values())))
        for shard in shards:
            _check_shard(folder, shard, len(shards))
        return shards, index
    if any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()):
        raise RequestError(
            f"{folder} holds pickled PyTorch weights only, which are never opened here: convert them to safetensors "
            "(load with transformers, then save_pretrained)."
        )
    strays = len(list(folder.glob("*.safetensors")))
    raise RequestError(
        f"{folder} has no weights: neither {SINGLE} nor {INDEX} (other .safetensors files: {strays}); "
        "download the checkpoint again."
    )


def _check_shard(folder: Path, shard: str, count: int) -> None:
    pure = PurePosixPath(shard)
    if pure.is_absolute() or ".." in pure.parts or "\\" in shard or ":" in shard:
        raise RequestError(f"{folder / INDEX} names {shard}, a file outside the folder: take it out of the index.")
    if not (folder / shard).is_file():
        raise RequestError(f"{folder / INDEX} names {count} shards, but {shard} is missing: download it again.")


def _require_finite(name: str, tensor: Tensor, path: Path) -> None:
    """aminmax, not isfinite: NaN and Inf both show in it, and it is 25 times faster with no temporary."""
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.bfloat16))
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int((~torch.isfinite(tensor.float())).sum())
        raise RequestError(
            f"{name} in {path} holds {bad} NaN or Inf among {tensor.numel()} values, where none is allowed: "
            "use a sound copy of the checkpoint."
        )
