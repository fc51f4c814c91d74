"""What is done beside the solver: threads that write and read, the time by phase, the end of a block's pass."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight import api
from featherweight.benchmarks import compress as bench
from featherweight.benchmarks.shapes import Shapes
from featherweight.core import solve as core_solve
from featherweight.core.rules import Grid
from featherweight.core.solve import Choices
from featherweight.errors import FeatherweightError, RequestError
from featherweight.models import reading
from featherweight.models.checkpoint import Checkpoint
from featherweight.native.memory import uncollected
from featherweight.recipe import Recipe
from featherweight.stream import compress as pipeline
from featherweight.stream import folder as folder_room
from featherweight.stream import layerwise, rehearsal
from featherweight.stream.carried import Carried
from featherweight.stream.ending import Ending
from featherweight.stream.folder import JOURNAL, OutputFolder
from featherweight.stream.phases import Phases, added
from featherweight.stream.writer import Ahead, Writer
from runs import featherweight, journal, recipe, shards
from tiny import add_tokenizer, make

BLOCKS = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("source"), num_hidden_layers=BLOCKS))


@pytest.fixture(scope="module")
def chosen(text: Path) -> Recipe:
    return recipe(text, target="original")


@pytest.fixture(scope="module")
def alone(source: Path, chosen: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Everything one after the other, as on a CPU."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, api.compress(source, out, chosen)


# --- threads


def test_jobs_are_done_in_order_on_another_thread() -> None:
    done: list[tuple[int, bool]] = []
    with Writer(beside=True) as writer:
        for number in range(5):
            writer.put(lambda n=number: done.append((n, threading.current_thread() is threading.main_thread())))  # type: ignore[misc]
        writer.wait()
        assert done == [(number, False) for number in range(5)]


def test_an_error_comes_out_and_no_job_after_it_is_begun() -> None:
    done: list[int] = []

    def fail() -> None:
        raise RequestError("the disk is full")

    def write_three() -> None:
        with Writer(beside=True) as writer:
            for job in (lambda: done.append(0), fail, lambda: done.append(2), lambda: done.append(3)):
                writer.put(job)

    with pytest.raises(RequestError, match="the disk is full"):
        write_three()
    assert done == [0]


def test_work_that_was_put_is_done_whatever_the_caller_runs_into() -> None:
    done: list[int] = []

    def slowly() -> None:
        time.sleep(0.05)
        done.append(1)

    def stop() -> None:
        with Writer(beside=True) as writer:
            writer.put(slowly)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert done == [1]


def test_what_is_put_aside_holds_up_nobody_and_its_error_comes_out() -> None:
    done: list[int] = []
    others = threading.Event()

    def long() -> None:
        assert others.wait(5)
        done.append(9)
        raise RequestError("the disk is full")

    def write() -> None:
        with Writer(beside=True) as writer:
            writer.put_aside(long)
            for number in range(6):
                writer.put(lambda n=number: done.append(n))  # type: ignore[misc]
            writer.put(others.set)
            writer.wait()

    with pytest.raises(RequestError, match="the disk is full"):
        write()
    assert done == [0, 1, 2, 3, 4, 5, 9]


def test_shards_of_two_threads_have_their_own_lines_each_once(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, 9)
    folder.begin({"recipe": {}})

    def write(block: int) -> None:
        with folder.staged(block + 1, {"weight": torch.ones(4)}):
            folder.lines += [{"block": block, "name": f"{block}.{n}"} for n in range(3)]
            time.sleep(0.01)

    with Writer(beside=True) as writer:
        for block in range(8):
            (writer.put_aside if block % 2 else writer.put)(lambda b=block: write(b))  # type: ignore[misc]
    lines = folder.finished_lines()
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == len(lines) == 24
    assert sorted(line["name"] for line in lines) == [f"{block}.{n}" for block in range(8) for n in range(3)]


def test_the_next_is_made_before_it_is_asked_for() -> None:
    made: list[int] = []
    second = threading.Event()

    def make_it(number: int) -> int:
        made.append(number)
        if number == 2:
            second.set()
        if number == 4:
            raise RequestError("block 4 is broken")
        return 10 * number

    with Ahead(make_it, 5, beside=True, first=1) as ahead:
        assert ahead.take(1) == 10
        assert second.wait(5)
        assert [ahead.take(2), ahead.take(3)] == [20, 30]
        with pytest.raises(RequestError, match="block 4"):
            ahead.take(4)
        assert ahead.take(0) == 0  # out of turn
    assert made[:4] == [1, 2, 3, 4]


def beside(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline, "Writer", lambda _: Writer(beside=True))
    patch.setattr(pipeline, "Ahead", lambda make_it, count, _, first: Ahead(make_it, count, beside=True, first=first))


def test_beside_the_solver_the_same_bytes_are_written(
    source: Path, chosen: Recipe, alone: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside(monkeypatch)
    api.compress(source, tmp_path / "out", chosen)
    assert shards(tmp_path / "out") == shards(alone[0])


def test_a_full_disk_on_the_other_thread_stops_a_run_that_then_goes_on(
    source: Path, chosen: Recipe, alone: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = OutputFolder.staged

    def full(folder: OutputFolder, index: int, tensors: Any) -> Any:
        if index == 1:
            raise RequestError("the disk is full")
        return staged(folder, index, tensors)

    with monkeypatch.context() as patch:
        beside(patch)
        patch.setattr(OutputFolder, "staged", full)
        with pytest.raises(RequestError, match="the disk is full"):
            api.compress(source, tmp_path / "out", chosen)
    assert len(shards(tmp_path / "out")) == 1 and not (tmp_path / "out" / "config.json").exists()
    api.compress(source, tmp_path / "out", chosen)
    assert shards(tmp_path / "out") == shards(alone[0])


# --- time by phase


def test_inner_phases_count_alone() -> None:
    phases = Phases(torch.device("cpu"))
    with phases("outer"):
        time.sleep(0.02)
        with phases("inner"):
            time.sleep(0.03)
    first = phases.stretch().seconds()
    assert 0.02 <= first["outer"] < 0.03 <= first["inner"] and first["other"] < 0.01
    time.sleep(0.01)
    assert phases.stretch().seconds().keys() == {"other"}
    assert added({"a": 1.0, "b": 2.0}, {"b": 3.0}) == {"a": 1.0, "b": 5.0}


def test_the_journal_has_a_line_a_block_with_its_phases(alone: tuple[Path, Any]) -> None:
    out, result = alone
    lines = [line for line in (out / JOURNAL).read_text().splitlines() if "phase_seconds" in line]
    assert len(lines) == BLOCKS + 1 and len(journal(out)) == result.matrices == 7 * BLOCKS
    assert {"load", "forward", "hessian", "factor", "solve", "pack", "write"} <= result.phase_seconds.keys()
    assert 0 < sum(result.phase_seconds.values()) <= result.seconds


def test_what_a_slow_disk_takes_is_counted_once(
    source: Path, chosen: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = folder_room._sync
    monkeypatch.setattr(folder_room, "_sync", lambda path: (time.sleep(0.2), sync(path)))
    result = api.compress(source, tmp_path / "out", chosen)
    assert result.phase_seconds["write"] >= 0.2 * (BLOCKS + 1)
    assert result.phase_seconds["pack"] < 0.2


# --- the end of a pass


def test_a_pass_that_is_ended_later_gives_the_bytes_of_another_pass(
    source: Path, chosen: Recipe, alone: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[bool] = []
    finish = Ending.finish

    def counted(ending: Ending, *rest: Any) -> bool:
        finished.append(finish(ending, *rest))
        return finished[-1]

    monkeypatch.setattr(Ending, "finish", counted)
    api.compress(source, tmp_path / "kept", chosen)
    assert finished == [True] * (BLOCKS - 1)
    api.compress(source, tmp_path / "low", chosen, memory="low")
    assert finished == [True] * (BLOCKS - 1)
    monkeypatch.setattr(Ending, "takes", lambda *_: False)  # no room
    api.compress(source, tmp_path / "full", chosen)
    assert finished == [True] * (BLOCKS - 1) + [False] * (BLOCKS - 1)
    assert shards(tmp_path / "kept") == shards(tmp_path / "low") == shards(tmp_path / "full") == shards(alone[0])


# --- what must stop a run, with the name of what it stopped at


def test_hidden_states_that_are_not_finite_stop_at_the_block(text: Path, tmp_path: Path) -> None:
    """Finite weights whose products overflow in the second block."""
    source = add_tokenizer(make("llama", tmp_path / "source", num_hidden_layers=BLOCKS))
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e20
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"layers\.[01]\..* saw inputs with NaN or Inf"):
        api.compress(source, tmp_path / "out", recipe(text))


def test_a_loss_that_is_not_what_the_solver_claims_stops_at_the_matrix(
    source: Path, chosen: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Any:
        solution = core_solve.solve(*args)
        return replace(solution, loss_R=1.01 * solution.loss_R)

    monkeypatch.setattr(layerwise, "solve", wrong)
    with pytest.raises(FeatherweightError, match=r"layers\.0\.self_attn\.q_proj.*claims a loss of .* report this"):
        api.compress(source, tmp_path / "out", chosen)
    assert len(shards(tmp_path / "out")) == 1  # what lies outside the blocks


def test_what_is_compiled_on_does_not_depend_on_the_default_dtype() -> None:
    """Of torch, which transformers sets for all threads while it makes a model: seen with two GPUs."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        for piece in rehearsal._pieces(Grid(4, 32), Choices(), torch.device("cpu")):
            piece()
        rehearsal._norm(torch.bfloat16, 32, torch.device("cpu"))
        rehearsal._pass(torch.bfloat16, 32, 8, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_solver_is_compiled_after_triton_knows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def slowly(*_: Any) -> None:
        time.sleep(0.05)
        heard.append("Triton")

    def fail(*_: Any) -> None:
        raise RuntimeError("what fails here is left to the block that needs it")

    monkeypatch.setattr(rehearsal, "_norm", slowly)
    monkeypatch.setattr(rehearsal, "_pass", fail)
    monkeypatch.setattr(rehearsal, "compile_solver", lambda *_: heard.append("solver"))
    monkeypatch.setattr(rehearsal.Rehearsal, "_run", lambda self, work, *arguments: work(*arguments, self._device))
    with rehearsal.Rehearsal(torch.device("cuda"), torch.bfloat16, torch.nn.Identity(), 32) as threads:
        threads.solver(Grid(4, 32), Choices())
        threads.wait_for_triton()
        assert heard[0] == "Triton"
        threads.wait_for_solver()
        assert heard == ["Triton", "solver"]


def test_the_solver_is_waited_for_when_the_first_sums_are_there(
    source: Path, chosen: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    collect, solve_group = layerwise.collect, layerwise.solve_group
    monkeypatch.setattr(layerwise, "collect", lambda *a: (heard.append("collect"), collect(*a))[1])
    monkeypatch.setattr(layerwise, "solve_group", lambda *a: (heard.append("solve"), solve_group(*a))[1])
    monkeypatch.setattr(rehearsal.Rehearsal, "wait_for_solver", lambda self: heard.append("compiled"))
    api.compress(source, tmp_path / "out", chosen)
    assert heard[:3] == ["collect", "compiled", "solve"]


def test_what_is_there_is_not_collected_meanwhile() -> None:
    before = gc.get_freeze_count()
    with uncollected():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0


# --- the benchmark


@pytest.mark.parametrize("experts", [0, 4])
def test_bench_compress(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shapes(64, 32, 4, 4, 2, 16, 128, experts, min(experts, 2), qk_norm=experts > 0)
    monkeypatch.setattr(bench, "peak_tflops", lambda device, dtype: 0.01)
    report = bench.measure(shapes, Recipe(group_size=32, samples=4, tokens=64, route_all=True), 2, "cpu", peer=False)
    assert report is not None and report.processes == 1
    assert (report.blocks, report.layers, report.peer_s, report.peak_gpu_bytes) == (2, 4, None, None)
    assert report.block_s == pytest.approx(sum(report.phase_s.values()), abs=0.01)
    assert report.whole_s == pytest.approx(report.seconds + 2 * report.block_s, abs=0.1)
    assert report.first_block_s > 0 and report.outside_s > 0
    assert report.seconds == pytest.approx(report.first_block_s + report.block_s + report.outside_s, abs=0.02)
    assert 0 < report.share_of_floor < 1 and report.floor_s > 0 and report.peak_host_bytes > 1 << 26
    assert dict(bench.rows(report))["all 4 blocks"] == asdict(report)["whole_s"]


def test_bench_knows_its_shapes() -> None:
    ran = featherweight("bench", "compress", "--shapes", "llama-9")
    assert ran.code == 2 and "there are no shapes llama-9: choose llama-2-7b" in ran.error


@pytest.mark.gpu
@pytest.mark.parametrize("low", [False, True])
def test_what_is_carried_to_a_gpu_and_back_is_the_same(
    low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 1 << 16)  # many pieces on their way at once
    checkpoint = Checkpoint.open(make("llama", tmp_path / "model"))
    carried, given = Carried(torch.device("cuda", 0), low), checkpoint.read(checkpoint.names)
    for _ in range(20):
        here = carried.read(checkpoint, checkpoint.names)
        assert all(tensor.is_pinned() if low else tensor.is_cuda for tensor in here.values())
        assert all(torch.equal(here[name].cpu(), given[name]) for name in given)
    twice = {"matrix": {name: tensor.cuda() * 2 for name, tensor in here.items()}}
    bring = carried.back(twice)
    del here, twice
    back = bring()
    assert all(torch.equal(back["matrix"][name], given[name] * 2) for name in given)


def test_a_cpu_has_carried_tensors_already(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make("llama", tmp_path / "model"))
    carried, given = Carried(torch.device("cpu")), checkpoint.read(checkpoint.names)
    here = carried.read(checkpoint, checkpoint.names)
    assert all(torch.equal(here[name], given[name]) for name in given)
    back = carried.back({"matrix": given})()
    assert all(back["matrix"][name] is given[name] for name in given)
