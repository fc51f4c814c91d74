"""Killed, interrupted, refused: an output folder ends with the same bytes or with a sentence.

What is compared with is always an uninterrupted run of the same request.
"""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from featherweight import api
from featherweight.errors import FallbackWarning, RequestError
from featherweight.recipe import Recipe
from featherweight.stream import compress as pipeline
from featherweight.stream import hidden as hidden_states
from featherweight.stream.folder import OutputFolder
from runs import JOURNAL, LOCK, MANIFEST, journal, model_files, processes, recipe, shards, stamps, watching
from tiny import add_tokenizer, make, write_text

BLOCKS = 3
KILLS = 10


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("source"), num_hidden_layers=BLOCKS))


@pytest.fixture(scope="module")
def whole(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    api.compress(source, out, quick(text))
    return out


def quick(text: Path) -> Recipe:
    """Two streams of hidden states, and no more arithmetic than needed."""
    return recipe(text, target="original")


@pytest.fixture
def chosen(text: Path) -> Recipe:
    return quick(text)


class Stop(Exception):
    """What the tests interrupt with."""


def stopping_after(blocks: int) -> Callable[[float, float, str], None]:
    """A `tell` that raises as soon as so many blocks are done."""

    def tell(done: float, _total: float, _what: str) -> None:
        if done >= blocks:
            raise Stop

    return tell


def begin(source: Path, out: Path, chosen: Recipe, blocks: int = 1) -> Path:
    """Compresses only the first blocks."""
    with pytest.raises(Stop):
        api.compress(source, out, chosen, tell=stopping_after(blocks))
    assert len(shards(out)) == blocks + 1 and not (out / "config.json").exists()
    return out


def settled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Journal lines without the time it took."""
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def assert_whole(out: Path, whole: Path) -> None:
    """The same files with the same bytes, nothing left over, and every matrix once in the journal."""
    assert model_files(out) == model_files(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert settled(journal(out)) == settled(journal(whole))


# --- killed


def compress_when_told(line: Connection, source: Path, out: Path, chosen: Recipe) -> None:
    """In a process of its own: says so, compresses, and says how long it took."""
    line.send("begun")
    started = time.perf_counter()
    api.compress(source, out, chosen)
    line.send(time.perf_counter() - started)


def attempt(source: Path, out: Path, chosen: Recipe, seconds: float | None) -> float | None:
    """One run in a process of its own, killed after so many seconds; how long it took if it came to its end."""
    ours, theirs = processes().Pipe()
    process = processes().Process(target=compress_when_told, args=(theirs, source, out, chosen))
    process.start()
    theirs.close()
    assert ours.recv() == "begun"
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    took = ours.recv() if process.exitcode == 0 else None
    ours.close()
    return took


def test_killed_at_ten_random_moments(source: Path, chosen: Recipe, whole: Path, tmp_path: Path) -> None:
    """SIGKILL, again and again, on the same folder until it is whole, then on a new one."""
    draw = random.Random(0)
    attempt(source, tmp_path / "warm", chosen, None)  # the first reads more from disk
    full_time = attempt(source, tmp_path / "calm", chosen, None)
    assert full_time is not None
    assert_whole(tmp_path / "calm", whole)
    shares = [(number + draw.random()) / KILLS for number in range(KILLS)]
    draw.shuffle(shares)
    found_half_done = set()
    out, folders = tmp_path / "0", 1
    for _ in range(6 * KILLS):
        if not shares:
            break
        before = stamps(out)
        took = attempt(source, out, chosen, shares[-1] * full_time)
        assert stamps(out).items() >= before.items()
        if took is None:
            shares.pop()
            found_half_done.add(len(stamps(out)))
            if stamps(out) == before:  # the machine has other work than it had: later, next time
                full_time *= 1.1
            continue
        assert_whole(out, whole)
        if not before:  # a whole run was faster than the one measured: the machine had other work then
            full_time = min(full_time, took)
        out, folders = tmp_path / str(folders), folders + 1
    assert not shares, f"{len(shares)} of {KILLS} kills never hit a run of {full_time:.2f} s"
    assert len(found_half_done) > 1
    before = stamps(out)
    api.compress(source, out, chosen)
    assert stamps(out).items() >= before.items()
    assert_whole(out, whole)


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


def killed_before(event: int, patch: pytest.MonkeyPatch) -> None:
    """From the given write to disk (opening, fsync, rename, copy) on, none takes place, nor does any tidying up."""
    done = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > event:
                raise Killed
            return real(*args, **kwargs)

        return call

    def tidying(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: None if done > event else real(*args, **kwargs)

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "copyfile")):
        patch.setattr(module, name, counting(getattr(module, name)))
    to_read, to_write = builtins.open, counting(builtins.open)

    def choose(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        return (to_read if mode in ("r", "rb") else to_write)(file, mode, *rest, **named)

    patch.setattr(builtins, "open", choose)
    for name in ("unlink", "remove"):
        patch.setattr(os, name, tidying(getattr(os, name)))


def test_killed_before_every_single_write(text: Path, tmp_path: Path) -> None:
    source = add_tokenizer(make("llama", tmp_path / "source", num_hidden_layers=1))
    rounding = recipe(text, method="rtn")
    api.compress(source, tmp_path / "whole", rounding)
    killed = 0
    for event in range(200):
        out = tmp_path / str(event)
        try:
            with pytest.MonkeyPatch.context() as patch:
                killed_before(event, patch)
                api.compress(source, out, rounding)
        except Killed:
            killed += 1
        else:
            break
        assert not (out / "config.json").exists()
        before = stamps(out)
        api.compress(source, out, rounding)
        assert stamps(out).items() >= before.items(), event
        assert_whole(out, tmp_path / "whole")
    # manifest, index and config: 2 each; a shard with its journal lines: 4; tokenizer (two) and generation: 1 each
    assert killed >= 6 + 4 * 2 + 3


# --- interrupted


OTHERS: dict[str, dict[str, Any]] = {
    "drifted": {"target": "drifted"},
    "sequential": {"true_sequential": True, "target": "drifted"},
    "gptq-file": {"format": "gptq", "symmetric": False},
    "rtn": {"method": "rtn"},
    "refined": {"refine": 2, "search": "hessian"},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_interrupted_after_every_block(
    changes: dict[str, Any], source: Path, text: Path, chosen: Recipe, tmp_path: Path
) -> None:
    different = dataclasses.replace(chosen, **changes)
    api.compress(source, tmp_path / "whole", different)
    solved = 0
    with watching() as seen:
        for blocks in range(1, BLOCKS + 1):
            before = stamps(tmp_path / "out")
            begin(source, tmp_path / "out", different, blocks)
            assert stamps(tmp_path / "out").items() >= before.items()
            assert len(seen) == blocks  # none is solved twice
        solved = len(seen)
        result = api.compress(source, tmp_path / "out", different)
        assert len(seen) == solved
    assert_whole(tmp_path / "out", tmp_path / "whole")
    assert result.matrices == 7 * BLOCKS


def test_interrupted_inside_a_block(source: Path, chosen: Recipe, whole: Path, tmp_path: Path) -> None:
    def tell(done: float, _total: float, _what: str) -> None:
        if 1.3 < done < 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.compress(source, tmp_path / "out", chosen, tell=tell)
    assert len(shards(tmp_path / "out")) == 2
    api.compress(source, tmp_path / "out", chosen)
    assert_whole(tmp_path / "out", whole)


def test_interrupted_with_hidden_states_on_disk(
    source: Path, chosen: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden_states, "free_memory_bytes", lambda: 0)
        begin(source, tmp_path / "out", chosen, 2)
        assert not list(tmp_path.glob("out/*.scratch")) and not list(tmp_path.glob("out/.*.scratch"))
    api.compress(source, tmp_path / "out", chosen)
    assert_whole(tmp_path / "out", whole)


def test_what_a_killed_run_leaves_is_cleared_away(source: Path, chosen: Recipe, whole: Path, tmp_path: Path) -> None:
    """Half a shard, half a scratch file, and the temporary file safetensors writes before it renames."""
    out = begin(source, tmp_path / "out", chosen)
    third = next(iter(sorted(whole.glob("model-00003-*"))))
    (out / third.with_suffix(".part").name).write_bytes(third.read_bytes()[:1000])
    (out / "config.json.part").write_text("{")
    (out / ".hidden.scratch").write_bytes(bytes(64))
    (out / ".tmpA1b2C3").write_bytes(third.read_bytes()[:2000])
    api.compress(source, out, chosen)
    assert_whole(out, whole)


def test_a_journal_cut_anywhere(source: Path, chosen: Recipe, whole: Path, tmp_path: Path) -> None:
    """Lines of a block whose shard never got its name, the last one half written."""
    lines = (whole / JOURNAL).read_text().splitlines(keepends=True)
    for number, extra in enumerate([lines[7][:40], "".join(lines[7:14]), "".join(lines[7:10]) + lines[10][:-2]]):
        out = begin(source, tmp_path / str(number), chosen)
        with open(out / JOURNAL, "a") as file:
            file.write(extra)
        api.compress(source, out, chosen)
        assert_whole(out, whole)


def test_a_finished_folder_is_left_alone(
    source: Path, chosen: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    before = stamps(tmp_path / "out")
    monkeypatch.setattr(pipeline, "BlockRunner", lambda *_: pytest.fail("no block is needed"))
    result = api.compress(source, tmp_path / "out", chosen)
    assert stamps(tmp_path / "out") == before
    assert_whole(tmp_path / "out", whole)
    assert (result.matrices, result.bytes) == (7 * BLOCKS, sum(map(len, shards(whole).values())))
    assert result.bits_per_weight == pytest.approx(8 * sum(r["bytes"] for r in journal(whole)) / (BLOCKS * 36864))


# --- refused


def test_another_recipe_is_refused(source: Path, chosen: Recipe, text: Path, tmp_path: Path) -> None:
    out = begin(source, tmp_path / "out", chosen)
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    for field, value in (
        ("bits", 3), ("group_size", 16), ("group_size", None), ("symmetric", False), ("seed", 1), ("samples", 3),
        ("tokens", 16), ("format", "gptq"), ("method", "rtn"), ("refine", 2), ("damping", 0.02), ("order", "natural"),
        ("target", "drifted"), ("search", "mse"), ("calibration", (str(text), "builtin")),
    ):  # fmt: skip
        with pytest.raises(RequestError) as refused:
            api.compress(source, out, chosen.but(**{field: value}) if value is not None else _by_row(chosen))
        before = getattr(chosen, field)
        before, now = (list(v) if isinstance(v, tuple) else v for v in (before, value))
        assert f"recipe {field} = {before!r}, and now {now!r}" in str(refused.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept


def _by_row(chosen: Recipe) -> Recipe:
    return dataclasses.replace(chosen, group_size=None)


@pytest.mark.parametrize("finished", [False, True])
def test_another_model_or_text_is_refused(
    finished: bool, source: Path, whole: Path, chosen: Recipe, text: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "out") if finished else begin(source, tmp_path / "out", chosen)
    before = stamps(out)
    other = add_tokenizer(make("llama", tmp_path / "other", num_hidden_layers=BLOCKS, seed=1))
    with pytest.raises(RequestError, match=r"begun with model fingerprint = .* choose a new OUT"):
        api.compress(other, out, chosen)
    deeper = add_tokenizer(make("llama", tmp_path / "deeper", num_hidden_layers=BLOCKS + 1))
    with pytest.raises(RequestError, match=rf"begun with model blocks = {BLOCKS}, and now {BLOCKS + 1}"):
        api.compress(deeper, out, chosen)
    kept = text.read_bytes()
    try:
        write_text(text, seed=1)
        with pytest.raises(RequestError, match="begun with data ids_sha256"):
            api.compress(source, out, chosen)
    finally:
        text.write_bytes(kept)
    assert stamps(out) == before
    api.compress(source, out, chosen)
    assert_whole(out, whole)


def test_a_copy_of_the_model_elsewhere_goes_on(source: Path, chosen: Recipe, whole: Path, tmp_path: Path) -> None:
    """What counts is what is in the files, not where they are."""
    out = begin(source, tmp_path / "out", chosen)
    api.compress(shutil.copytree(source, tmp_path / "copy"), out, chosen)
    assert_whole(out, whole)


def test_another_machine_is_only_warned_of(source: Path, chosen: Recipe, whole: Path, tmp_path: Path) -> None:
    out = begin(source, tmp_path / "out", chosen)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["made_with"]["torch"] = "2.0.0"
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.warns(FallbackWarning, match=r"torch 2\.0\.0 -> .*bytes may differ"):
        api.compress(source, out, chosen)
    assert model_files(out) == model_files(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        api.compress(source, whole, chosen)


def test_a_folder_of_someone_else_is_refused(source: Path, chosen: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match=r"not empty \(it holds thesis\.txt\) and not begun by featherweight"):
        api.compress(source, tmp_path / "out", chosen)
    assert {path.name for path in (tmp_path / "out").iterdir()} - {LOCK} == {"thesis.txt"}
    with pytest.raises(RequestError, match="not empty"):
        api.compress(source, source, chosen)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RequestError, match="cannot be made"):
            api.compress(source, out, chosen)
    (tmp_path / "empty").mkdir()
    begin(source, tmp_path / "empty", chosen)


def hold(line: Connection, source: Path, out: Path, chosen: Recipe) -> None:
    """In a process of its own: compresses, and waits inside for a word before it goes on."""

    def tell(done: float, _total: float, _what: str) -> None:
        if done == 1:
            line.send("half done")
            line.recv()

    api.compress(source, out, chosen, tell=tell)


def test_two_processes_on_one_folder(source: Path, chosen: Recipe, whole: Path, tmp_path: Path) -> None:
    ours, theirs = processes().Pipe()
    process = processes().Process(target=hold, args=(theirs, source, tmp_path / "out", chosen))
    process.start()
    try:
        assert ours.recv() == "half done"
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        with pytest.raises(RequestError, match="being written by another process: wait for it or choose another OUT"):
            api.compress(source, tmp_path / "out", chosen)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        ours.send("go on")
        process.join(60)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == 0
    assert_whole(tmp_path / "out", whole)


def test_the_lock_is_let_go(source: Path, chosen: Recipe, tmp_path: Path) -> None:
    begin(source, tmp_path / "out", chosen)
    with FileLock(tmp_path / "out" / LOCK, timeout=0), pytest.raises(RequestError, match="another process"):
        api.compress(source, tmp_path / "out", chosen)
    folder = OutputFolder(tmp_path / "out", BLOCKS)
    with folder.locked():
        pass
    api.compress(source, tmp_path / "out", chosen)
