"""Several processes on one model (Gloo, two on this CPU): what one would have written, whole or resumable.

What is compared with is always the same request in one process.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from featherweight import api, formats
from featherweight.core import problem, shared_factor, triangle
from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.core.problem import LayerProblem
from featherweight.errors import FallbackWarning, FeatherweightError, RequestError
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.tree import Matrix, build
from featherweight.plan import Database
from featherweight.recipe import Recipe
from featherweight.recipes import papers_gptq
from featherweight.stream import compress as pipeline
from featherweight.stream import dealing, messages
from featherweight.stream import hidden as hidden_states
from featherweight.stream.allocation import DATABASE
from featherweight.stream.dealing import Sharers, deal_stage
from featherweight.stream.inputs import Group, GroupSums, add_up
from featherweight.stream.messages import FIRST_BYTES
from featherweight.stream.parallel import ALONE, World, check_divisible
from runs import MANIFEST, journal, processes, shards, stamps, tensors_of
from tiny import add_tokenizer, make

BLOCKS = 2
LLAMA = {"num_hidden_layers": BLOCKS, "intermediate_size": 256}
SMALL = {"group_size": 32, "samples": 5, "tokens": 32}  # windows that two do not share evenly


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("source"), **LLAMA))


@pytest.fixture
def default(text: Path) -> Recipe:
    return Recipe(**SMALL, calibration=(str(text),))


@pytest.fixture(scope="module")
def alone(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default recipe in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    api.compress(source, out, Recipe(**SMALL, calibration=(str(text),)))
    return out


# --- processes that have met

Happening = Callable[[int], None]  # is handed the rank before the work begins


def take_part(
    line: Connection, rank: int, size: int, place: Path, request: tuple[Path, Path, Recipe], happen: Happening | None
) -> None:
    """One of the processes: sends its result, or the error as it would be told."""
    dist.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        if happen is not None:
            happen(rank)
        line.send(api.compress(*request, tell=lambda *told: line.send(told)))
    except FeatherweightError as error:
        line.send(error)
    except BaseException:
        line.send(traceback.format_exc())
    os._exit(0)  # whatever the others wait for is gone at once, as with any process that ends


def together(
    source: Path, out: Path, chosen: Recipe, happen: Happening | None = None, size: int = 2
) -> list[tuple[list[Any], int | None]]:
    """What each process said last, after how many words of progress."""
    place = out.with_name(out.name + ".meeting")
    place.unlink(missing_ok=True)
    lines, workers = [], []
    for rank in range(size):
        ours, theirs = processes().Pipe()
        arguments = (theirs, rank, size, place, (source, out, chosen), happen)
        worker = processes().Process(target=take_part, args=arguments)
        worker.start()
        theirs.close()
        lines.append(ours)
        workers.append(worker)
    said = [heard(line) for line in lines]
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    return [(words, worker.exitcode) for words, worker in zip(said, workers, strict=True)]


def heard(line: Connection) -> list[Any]:
    words = []
    while line.poll(120):
        try:
            words.append(line.recv())
        except EOFError:
            return words
    raise AssertionError(f"a process hangs after {words[-1:]}")


def whole(said: list[tuple[list[Any], int | None]]) -> list[Any]:
    """The results, one a process; only the first told of its progress."""
    assert [type(words[-1]).__name__ for words, _ in said] == ["Result"] * len(said), said
    assert all(len(words) == 1 for words, _ in said[1:]) and len(said[0][0]) > BLOCKS
    return [words[-1] for words, _ in said]


def of_two(work: Callable[[Connection, int, Path], None], meeting: Path) -> list[Any]:
    """What two processes send that do this."""
    ends = [processes().Pipe() for _ in range(2)]
    for rank, (_, theirs) in enumerate(ends):
        processes().Process(target=work, args=(theirs, rank, meeting)).start()
        theirs.close()
    return [heard(ours)[-1] for ours, _ in ends]


ALONG = tuple((long, riding) for long in ((), (0,), (0, 1)) for riding in (1 << 18, 16, 0))  # who has a long text


def talk(line: Connection, rank: int, place: Path) -> None:
    """Sends what it hears of a short text and two long ones, and of tensors that go along with them or do not."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    world, heard = World(rank, 2), []
    for long, riding in ALONG:
        messages.RIDING_BYTES = riding
        said = f"{rank}" * (3 * FIRST_BYTES["cpu"] if rank in long else 5)
        found = world.merged({f"of {rank}": (said, {"n": torch.arange(rank + 2), "none": torch.empty(0)})})
        sent = {name: (told, {key: t.tolist() for key, t in held.items()}) for name, (told, held) in found.items()}
        heard.append((world.each(said), world.first(said), sent, world.add_up_each([1, rank])))
    line.send(heard)
    os._exit(0)


def test_texts_of_any_length_arrive(tmp_path: Path) -> None:
    """In one message or two, whoever has the long one."""
    for turns in of_two(talk, tmp_path / "meeting"):
        for (long, _), (each, first, sent, sums) in zip(ALONG, turns, strict=True):
            said = [f"{rank}" * (3 * FIRST_BYTES["cpu"] if rank in long else 5) for rank in range(2)]
            assert each == said and first == said[0] and sums == [2, 1]
            assert sent == {f"of {n}": (said[n], {"n": list(range(n + 2)), "none": []}) for n in range(2)}


# --- what they write


def codes_of(folder: Path) -> dict[str, Tensor]:
    """Codes (or, with floats, which weights are kept) of every matrix, by name."""
    config = Checkpoint.open(folder).config["quantization_config"]
    format, rules = formats.from_config(config)
    tensors, found = tensors_of(folder), {}
    for name in (row["name"] for row in journal(folder)):
        rule = rules.of(name)
        held = {suffix: tensors[f"{name}.{suffix}"] for suffix in format.suffixes(rule)}
        solution = format.unpack(held, rule, name)
        codes_RC = getattr(solution, "codes_RC", None)
        found[name] = solution.keep_RC if codes_RC is None else codes_RC
    return found


FIRST = ("embed", "layers.0.self_attn.", "layers.0.mlp.gate", "layers.0.mlp.up")  # solved before anything is put back


def assert_alike(out: Path, other: Path, first: tuple[str, ...] = FIRST) -> None:
    """Both folders whole, with the same files, the same codes (but for ties) of what is solved first, and like losses.

    One tie that falls the other way moves all that comes after it: one process that takes its windows one by one
    differs from itself as much in later matrices (docs/log.md), so of those only losses are compared.
    """
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}
    assert (out / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert next(iter(shards(out).values())) == next(iter(shards(other).values()))  # what lies outside the blocks
    ours, theirs = codes_of(out), codes_of(other)
    assert list(ours) == list(theirs) and len(theirs) == len(journal(out))
    compared = [name for name in theirs if any(part in name for part in first)]
    same = sum(int((ours[name] == theirs[name]).sum()) for name in compared)
    assert same / sum(theirs[name].numel() for name in compared) > 0.999
    for one, another in zip(journal(out), journal(other), strict=True):
        near = 1e-2 if another["name"] in compared else 0.1
        assert (one["loss"] or 0.0) == pytest.approx(another["loss"] or 0.0, rel=near), one["name"]


def test_two_write_what_one_would(source: Path, default: Recipe, alone: Path, tmp_path: Path) -> None:
    results = whole(together(source, tmp_path / "out", default))
    assert_alike(tmp_path / "out", alone)
    for result in results:
        assert (result.matrices, result.bytes) == (7 * BLOCKS, sum(map(len, shards(alone).values())))
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["made_with"]["processes"] == 2
    assert "processes" not in json.loads((alone / MANIFEST).read_text())["made_with"]


RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "papers.gptq": (dataclasses.asdict(papers_gptq()), FIRST),
    "2:4": ({"sparsity": "2:4", "bits": 16}, FIRST),
    "joint, head": ({"sparsity": "0.5", "embedding_bits": 8, "format": "compressed-tensors"}, FIRST),
    "guided": ({"guide": 0.5}, FIRST),
    "sequential": ({"true_sequential": True, "symmetric": False}, ("0.self_attn.q", "0.self_attn.k", "0.self_attn.v")),
}


SLOW_RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rtn": ({"method": "rtn"}, FIRST),
    "obq": ({"method": "obq"}, FIRST),
    "ExactOBS": ({"sparsity": "2:4", "bits": 16, "mask": "obs"}, FIRST),
}
ALL_RECIPES = [
    *(pytest.param(*recipe, id=name) for name, recipe in RECIPES.items()),
    *(pytest.param(*recipe, id=name, marks=pytest.mark.slow) for name, recipe in SLOW_RECIPES.items()),
]


@pytest.mark.parametrize(("changes", "first"), ALL_RECIPES)
def test_any_recipe(changes: dict[str, Any], first: tuple[str, ...], source: Path, text: Path, tmp_path: Path) -> None:
    chosen = Recipe(**{**changes, **SMALL, "calibration": (str(text),)})
    whole(together(source, tmp_path / "out", chosen, hidden_on_disk))
    api.compress(source, tmp_path / "alone", chosen)
    assert_alike(tmp_path / "out", tmp_path / "alone", first)


def hidden_on_disk(_rank: int) -> None:
    hidden_states.free_memory_bytes = lambda: 0


def unevenly_shared(_rank: int) -> None:
    """The dearest group of every stage is shared, whatever that costs, and so is its factor."""
    dealing.WORTH = 100.0
    shared_factors()
    one_shared = dealing._one_shared

    def noted(groups: Sequence[Group], divisible: Sequence[bool], world: World) -> dealing.Deal | None:
        found = one_shared(groups, divisible, world)
        assert found is not None and (len(groups) == 1) == (found.sharers.shares == (0.5, 0.5))
        return found

    dealing._one_shared, dealing._all_shared = noted, lambda *_: None


def test_a_group_that_is_shared_unevenly(source: Path, text: Path, alone: Path, tmp_path: Path) -> None:
    chosen = Recipe(**SMALL, calibration=(str(text),))
    whole(together(source, tmp_path / "out", chosen, unevenly_shared))
    assert_alike(tmp_path / "out", alone, FIRST)


def shared_factors() -> None:
    problem.in_place_pays = lambda matrix_CC: True
    shared_factor.LEAST_COLUMNS, triangle.BLOCK, triangle.WHOLE = 0, 24, 8


def factors(line: Connection, rank: int, place: Path) -> None:
    """Sends R of some H, and whether there was one of what has none."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    shared_factors()
    shared: list[int] = []
    make_ = shared_factor.shared_root_
    problem.shared_root_ = lambda *given: (shared.append(len(given[0])), make_(*given))[1]
    made = [LayerProblem(torch.zeros(1, len(h_CC)), h_CC).factor(helpers=World(rank, 2)) for h_CC in hessians()]
    assert shared == [len(h_CC) for h_CC in hessians()]
    none = [make_(-h_CC, World(rank, 2)) for h_CC in hessians()]
    line.send(([(factor.root_CC.numpy(), factor.order_C.numpy()) for factor in made], none))
    os._exit(0)


def hessians() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(400, columns, generator=draw, dtype=torch.float64) for columns in (24, 25, 100, 192)]
    return [x_TC.T @ x_TC / 400 for x_TC in inputs]


def test_a_factor_made_together(tmp_path: Path) -> None:
    """One block, two, several, blocks that divide the columns; the same numbers for all."""
    (one, none), (other, neither) = of_two(factors, tmp_path / "meeting")
    assert none == neither == [None] * 4
    for (root, order), (again, _), h_CC in zip(one, other, hessians(), strict=True):
        alone = LayerProblem(torch.zeros(1, len(h_CC)), h_CC).factor()
        assert (root == again).all() and torch.equal(torch.from_numpy(order), alone.order_C)
        torch.testing.assert_close(torch.from_numpy(root), alone.root_CC)


# --- stopped, and gone on with by others


class Stop(FeatherweightError):
    """What the tests interrupt with."""


def begin(source: Path, out: Path, chosen: Recipe) -> Path:
    """The first block, by one process."""

    def tell(done: float, _total: float, _what: str) -> None:
        if done >= 1:
            raise Stop

    with pytest.raises(Stop):
        api.compress(source, out, chosen, tell=tell)
    return out


def test_two_go_on_where_one_stopped(source: Path, default: Recipe, alone: Path, tmp_path: Path) -> None:
    out = begin(source, tmp_path / "out", default)
    before = stamps(out)
    assert len(before) == 2
    whole(together(source, out, default))
    assert stamps(out).items() >= before.items()
    assert_alike(out, alone)
    finished = stamps(out)
    whole_again = together(source, out, default)  # nothing is left to do
    assert [type(words[-1]).__name__ for words, _ in whole_again] == ["Result"] * 2 and stamps(out) == finished


def in_second_block(rank: int, act: Callable[[], None]) -> None:
    """Lets the second process act when it is about to solve its second block."""
    inner, solved = pipeline.layerwise, []

    def solve(*arguments: Any) -> Any:
        solved.append(1)
        if rank == 1 and len(solved) == 2:
            act()
        return inner(*arguments)

    pipeline.layerwise = solve


def second_dies(rank: int) -> None:
    in_second_block(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def second_fails(rank: int) -> None:
    def fail() -> None:
        raise FeatherweightError("H of a matrix could not be factored")

    in_second_block(rank, fail)


@pytest.mark.parametrize("happen", [second_dies, second_fails])
def test_one_goes_on_where_two_failed(
    happen: Happening, source: Path, default: Recipe, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (words, _), (others, code) = together(source, out, default, happen)
    assert re.search(r"process 0 of 2 lost the others.*finished blocks are kept, repeat the command", str(words[-1]))
    assert (others, code) == ([], -9) if happen is second_dies else "could not be factored" in str(others[-1])
    before = stamps(out)
    assert len(before) == 2 and not (out / "config.json").exists()
    with pytest.warns(FallbackWarning, match="resuming with processes 2 -> 1: bytes may differ"):
        api.compress(source, out, default)
    assert stamps(out).items() >= before.items()
    assert_alike(out, alone)


# --- a budget


def plan_of(folder: Path) -> dict[str, tuple[float, int]]:
    return {row["name"]: (row["bits"], row["group_size"]) for row in journal(folder)}


@pytest.mark.parametrize("begun", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_find_the_plan_of_one(begun: bool, source: Path, default: Recipe, tmp_path: Path) -> None:
    """One database, each line of it written once, by the first; what one process had measured is not measured again."""
    chosen, out = default.but(average_bits=4.0, search="minmax", refine=0), tmp_path / "out"
    begin(source, out, chosen) if begun else None
    before = set((out / DATABASE).read_text().splitlines()) if begun else set()
    assert not begun or len(before) == 1 + 7
    whole(together(source, out, chosen))
    api.compress(source, tmp_path / "alone", chosen)
    assert plan_of(out) == plan_of(tmp_path / "alone") and len(set(plan_of(out).values())) > 1
    lines = (out / DATABASE).read_text().splitlines()
    ours, theirs = Database.open(out / DATABASE), Database.open(tmp_path / "alone" / DATABASE)
    assert before <= set(lines) and len(lines) == len(theirs.lines()) == len(ours.lines())
    assert ours.header == theirs.header and ours.calibration == theirs.calibration
    for name, row in theirs.rows.items():
        for label, measured in row.options.items():
            assert ours.rows[name].options[label].loss == pytest.approx(measured.loss, rel=0.02)
    for name, points in theirs.points.items():
        for label, point in points.items():
            assert ours.points[name][label] == pytest.approx(point, rel=0.05)
    assert_alike(out, tmp_path / "alone")


# --- refused


def test_more_processes_than_sequences(source: Path, default: Recipe, tmp_path: Path) -> None:
    """Each process says why, and none hangs."""
    check_divisible(ALONE, default.but(samples=1))
    for words, _ in together(source, tmp_path / "out", default.but(samples=1)):
        assert isinstance(words[-1], RequestError)
        assert "2 processes were to share 1 calibration sequences, and each needs 1: raise --samples to 2" in str(
            words[-1]
        )
    assert not (tmp_path / "out").exists()


def test_another_folder_is_refused_by_the_one_that_writes(source: Path, default: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (words, _), (others, _) = together(source, tmp_path / "out", default)
    assert isinstance(words[-1], RequestError) and "holds thesis.txt" in str(words[-1])
    assert "process 1 of 2 lost the others" in str(others[-1])


def test_each_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert World(5, 8, 1).device("auto") == World(1, 2, 1).device("cuda") == torch.device("cuda", 1)
    assert chosen == [1, 1]
    assert World(1, 2, 1).device("cpu") == torch.device("cpu")
    assert ALONE.device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RequestError, match="each of 2 processes has a GPU of its own: use --device cuda"):
        World(0, 2).device("cuda:1")
    with pytest.raises(RequestError, match=r"process 3 of this machine .* it has 2: use --nproc-per-node 2"):
        World(2, 4, 2).device("auto")


# --- who does what


def test_sequences_are_split_in_order() -> None:
    for size, count in ((1, 5), (2, 5), (3, 8), (8, 8)):
        parts = [list(range(count))[World(rank, size).split(count)] for rank in range(size)]
        assert list(itertools.chain(*parts)) == list(range(count))
        assert min(map(len, parts)) >= count // size


def test_every_sum_is_added_up(source: Path) -> None:
    """H, the drift's part and the sinks', with their tokens: of two halves as of the whole."""
    matrix = build(Checkpoint.open(source)).blocks[0].matrices[0]
    generator = torch.Generator().manual_seed(0)
    inputs_STC, gap_STC = torch.randn(2, 6, 8, matrix.columns, generator=generator)

    def sums_of(at: slice) -> GroupSums:
        sums = GroupSums(Group((matrix,), first=True), drift=True, sinks=True, device=torch.device("cpu"))
        sums.add(inputs_STC[at], gap_STC[at])
        return sums

    def tensor_of(part: HessianSum | CrossSum) -> Tensor:
        return part.sum_CC if isinstance(part, HessianSum) else part.sum_RC

    others = sums_of(slice(2, 6)).parts()
    coming = iter(others)

    class Two(World):
        def sum_(self, tensor: Tensor) -> None:
            tensor += tensor_of(next(coming))

        def add_up_each(self, numbers: Sequence[int]) -> list[int]:
            return [number + other.tokens for number, other in zip(numbers, others, strict=True)]

    mine = sums_of(slice(0, 2))
    add_up(mine.parts(), Two(0, 2))
    whole = sums_of(slice(0, 6))
    assert len(others) == 4
    for one, another in zip(mine.parts(), whole.parts(), strict=True):
        torch.testing.assert_close(tensor_of(one), tensor_of(another))
        assert one.tokens == another.tokens
    for sums in (mine, whole):
        sums.weigh_sinks(0.2)
    torch.testing.assert_close(mine.hessian.mean(), whole.hessian.mean())


def test_tasks_are_dealt_out_by_cost() -> None:
    assert ALONE.deal([3.0, 1.0]) == [0, 0]
    assert World(0, 2).deal([1.0, 5.0, 2.0, 2.0]) == World(1, 2).deal([1.0, 5.0, 2.0, 2.0]) == [1, 0, 1, 1]
    assert sorted(World(0, 4).deal([7.0, 7.0, 7.0])) == [0, 1, 2]


def group(columns: int, *rows: int) -> Group:
    return Group(
        tuple(Matrix(f"{n}", f"{n}", f"{n}.weight", None, count, columns, False) for n, count in enumerate(rows))
    )


@pytest.mark.parametrize(
    ("stage", "owners", "shares"),
    [
        ([group(4096, 4096, 4096, 4096), group(4096, 4096), group(4096, 11008, 11008)], [1, 1, 0], (1.0,)),  # 7B
        ([group(11008, 4096)], [None], (0.5, 0.5)),
        ([group(8192, 8192, 1024, 1024), group(8192, 8192), group(8192, 28672, 28672)], [0, 1, None], (0.482, 0.518)),
        ([group(64, 64), group(64, 64), group(64, 64), group(64, 64)], [0, 1, 0, 1], (1.0,)),
        ([group(64, 640), group(64, 608), group(64, 640)], [None, 1, 0], (0.475, 0.525)),
    ],
)
def test_a_stage_is_dealt_so_that_all_end_together(
    stage: list[Group], owners: list[int | None], shares: tuple[float, ...]
) -> None:
    deals = [deal_stage(stage, [True] * len(stage), World(rank, 2)) for rank in range(2)]
    assert deals[0].owners == deals[1].owners == owners
    assert deals[0].sharers.shares == deals[1].sharers.shares == pytest.approx(shares, abs=2e-3)
    loads = [0.0, 0.0]
    for each, owner in zip(stage, owners, strict=True):
        for rank, count in enumerate(map(sum, deals[0].sharers.counts(each)) if owner is None else ()):
            loads[rank] += each.cost() - each.rows_cost + count * each.matrices[0].columns ** 2
        if owner is not None:
            loads[owner] += each.cost()
    assert max(loads) == pytest.approx(deals[0].cost, rel=0.02)
    assert deal_stage(stage, [True] * len(stage), ALONE).owners == [0] * len(stage)
    assert None not in deal_stage(stage, [False] * len(stage), World(0, 2)).owners


def test_parts_of_rows_are_all_rows_once() -> None:
    for rows in (1, 3, 64, 1000, 4096, 28672):
        for shares in ((0.5, 0.5), (0.732, 0.268), (0.2, 0.5, 0.3)):
            parts = [Sharers(World(rank, len(shares)), shares).part(rows) for rank in range(len(shares))]
            assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
            assert rows < 1000 or all(part.start % 64 == 0 for part in parts)


# --- torchrun


def torchrun(source: Path, text: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m"]
    command += ["featherweight", "compress", source, out, "--group-size", 32, "--samples", SMALL["samples"]]
    return [str(part) for part in [*command, "--tokens", SMALL["tokens"], "--calibration", text]]


@pytest.mark.slow
def test_torchrun(source: Path, text: Path, alone: Path, tmp_path: Path) -> None:
    """The whole command: one line on stdout, one report of progress."""
    done = subprocess.run(torchrun(source, text, tmp_path / "out"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["matrices"] == 7 * BLOCKS
    assert done.stderr.count("recipe ") == 1
    assert_alike(tmp_path / "out", alone)


@pytest.mark.slow
def test_torchrun_ends_when_one_is_killed(text: Path, default: Recipe, tmp_path: Path) -> None:
    """SIGKILL to the second process between two blocks: torchrun fails at once, and one process goes on."""
    source = add_tokenizer(make("llama", tmp_path / "source", num_hidden_layers=12, intermediate_size=256))
    out = tmp_path / "out"
    with subprocess.Popen(torchrun(source, text, out), stderr=subprocess.PIPE, text=True) as run:
        while len(shards(out)) < 3:
            assert run.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert run.wait(60) != 0
        assert run.stderr is not None
        assert re.search(r"Root Cause.*\n.*\n.*\n.*\n *rank +: 1 .*\n *exitcode +: -9", run.stderr.read())
    before = stamps(out)
    assert 3 <= len(before) < 13 and not (out / "config.json").exists()
    with pytest.warns(FallbackWarning, match="resuming with processes 2 -> 1"):
        api.compress(source, out, default)
    assert stamps(out).items() >= before.items() and len(journal(out)) == 7 * 12
