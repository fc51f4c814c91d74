"""The output folder, which is also the checkpoint of the work: finished shards, a journal, and their origin.

One shard holds what lies outside the blocks, then one shard a block. A shard appears under its name whole or not at
all, its journal lines are on disk before it appears, and config.json comes last: a folder with config.json is done.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from featherweight.errors import FallbackWarning, RequestError
from featherweight.stream.phases import added

MANIFEST, JOURNAL, LOCK = "featherweight.json", "journal.jsonl", ".featherweight.lock"
INDEX = "model.safetensors.index.json"
LEFT_OUT = {"processes": 1}  # what a manifest says where it says nothing
LEFTOVERS = ("*.part", "*.scratch", ".tmp*")  # of a run that was killed


class OutputFolder:
    """Everything written to OUT goes through here."""

    def __init__(self, path: Path, blocks: int) -> None:
        self.path, self.blocks = path, blocks
        self.lines: list[dict[str, Any]] = []
        self._settling = Lock()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The journal's lines of matrices."""
        return [line for line in self.lines if "name" in line]

    @property
    def seconds(self) -> dict[str, float]:
        """What the finished blocks took in all, by phase."""
        found: dict[str, float] = {}
        for line in self.lines:
            found = added(found, line.get("phase_seconds", {}))
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process alone; RequestError if another one has it."""
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{self.path} cannot be made ({error.strerror}): choose another OUT.") from error
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RequestError(
                f"{self.path} is being written by another process: wait for it or choose another OUT."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, manifest: dict[str, Any]) -> None:
        """Starts the folder, or checks that what is there was begun with the same request and picks up its journal."""
        path = self.path / MANIFEST
        for pattern in LEFTOVERS:
            for left in self.path.glob(pattern):
                left.unlink()
        if path.exists():
            _compare(path, json.loads(path.read_text()), manifest)
            self.lines = self.finished_lines()
            self.write_text(JOURNAL, "".join(json.dumps(line) + "\n" for line in self.lines))
            return
        strange = sorted(p.name for p in self.path.iterdir() if p.name != LOCK)
        if strange:
            raise RequestError(
                f"{self.path} is not empty (it holds {strange[0]}) and not begun by featherweight: choose a new OUT."
            )
        self.write_text(MANIFEST, json.dumps(manifest, indent=1) + "\n")

    @property
    def done(self) -> bool:
        return (self.path / "config.json").exists()

    def shard(self, index: int) -> Path:
        """The file of shard 0 (outside the blocks) or of block index - 1."""
        return self.path / f"model-{index + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    def finished(self, index: int) -> bool:
        return self.shard(index).exists()

    @contextmanager
    def staged(self, index: int, tensors: dict[str, Tensor]) -> Iterator[Path]:
        """Writes a shard beside its place, lets the caller look at it, then moves it there with its journal lines.

        Several threads may, each another shard; they look and move one after the other.
        """
        from safetensors.torch import save_file

        part = self.shard(index).with_suffix(".part")
        need = sum(tensor.nbytes for tensor in tensors.values())
        with self._saving(part, need):
            save_file(tensors, part, metadata={"format": "pt"})
            shutil.copymode(self.path / MANIFEST, part)  # it comes for the owner alone
            _sync(part)
        with self._settling:
            lines_before = len(self.lines)
            try:
                yield part
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            new = "".join(json.dumps(line) + "\n" for line in self.lines[lines_before:])
            with self._saving(part, len(new)):
                with open(self.path / JOURNAL, "a", encoding="utf-8") as journal:
                    journal.write(new)
                    journal.flush()
                    os.fsync(journal.fileno())
                part.rename(self.shard(index))

    def write_text(self, name: str, text: str) -> None:
        """A small file, whole or not at all."""
        part = self.path / (name + ".part")
        with self._saving(part, len(text)):
            part.write_text(text, encoding="utf-8")
            _sync(part)
        part.rename(self.path / name)

    def finish(
        self, config: dict[str, Any], extra: dict[str, dict[str, Any]], source: Path, side_files: list[Path]
    ) -> None:
        """Index, side files of the folder `source` (tokenizer, templates), `extra` JSON files, and config.json last."""
        from safetensors import safe_open

        weight_map: dict[str, str] = {}
        total_bytes = 0
        for index in range(self.blocks + 1):
            with safe_open(self.shard(index), framework="pt") as shard:
                weight_map |= dict.fromkeys(shard.keys(), self.shard(index).name)
            total_bytes += self.shard(index).stat().st_size
        index_text = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_text(INDEX, json.dumps(index_text, indent=1) + "\n")
        for side_file in side_files:
            target = self.path / side_file.relative_to(source)
            with self._saving(target, side_file.stat().st_size):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(side_file, target)
        for name, value in {**extra, "config.json": config}.items():
            self.write_text(name, json.dumps(value, indent=2) + "\n")

    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.shard(index).stat().st_size for index in range(self.blocks + 1))

    def finished_lines(self) -> list[dict[str, Any]]:
        """The journal's lines of finished blocks: a killed run may leave lines, or half a line, of the one after."""
        path = self.path / JOURNAL
        kept = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if self.finished(row["block"] + 1):
                kept[row["block"], row.get("name")] = row
        return list(kept.values())

    @contextmanager
    def _saving(self, path: Path, need_bytes: int) -> Iterator[None]:
        """Turns a full disk into one sentence and takes the half-written file away."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(
                error
            )
            free = shutil.disk_usage(self.path).free
            why = f"the disk is full ({need_bytes:,} bytes needed, {free:,} free)" if full else str(error)
            raise RequestError(
                f"{path.name} could not be written to {self.path}: {why}; make room and repeat the command, "
                "finished blocks are kept."
            ) from error


def journal_losses(folder: Path) -> dict[str, float | None]:
    """Loss by matrix name from a folder's journal; empty where there is none."""
    path = folder / JOURNAL
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {row["name"]: row["loss"] for row in rows if "name" in row}


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _compare(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """RequestError naming the first field in which a resumed request differs from the one that began the folder."""
    for part in ("recipe", "model", "data"):
        before, now = old.get(part, {}), new[part]
        for field in sorted(before.keys() | now.keys()):
            if before.get(field) != now.get(field):
                raise RequestError(
                    f"{path.parent} was begun with {part} {field} = {before.get(field)!r}, and now {now.get(field)!r} "
                    "is asked for: repeat the first command or choose a new OUT."
                )
    before, now = ({**LEFT_OUT, **manifest["made_with"]} for manifest in (old, new))
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
    if changed:
        warnings.warn(
            f"resuming with {', '.join(changed)}: bytes may differ from an uninterrupted run.",
            FallbackWarning,
            stacklevel=3,
        )
