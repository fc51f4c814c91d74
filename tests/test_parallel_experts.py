"""Mixtures of experts by several processes (Gloo, two on this CPU): each expert on the tokens of all, solved by one.

Shapes: S sequences, T tokens, D width, K choices, E experts, N tokens of one expert, C inputs.
"""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight import api
from featherweight.core.problem import LayerProblem
from featherweight.errors import FallbackWarning, RequestError
from featherweight.models.experts import Expert, Experts, Layout, Routed
from featherweight.recipe import Recipe
from featherweight.recipes import by_name
from featherweight.stream import compress as pipeline
from featherweight.stream import experts as solver
from featherweight.stream import messages, portions
from featherweight.stream.expert_sums import Mixture, Summing
from featherweight.stream.hidden import HiddenStates
from featherweight.stream.parallel import ALONE, World
from featherweight.stream.routing import Gathered, Served, served_by
from runs import journal, model_files, stamps
from test_parallel import Happening, assert_alike, together, whole
from tiny import MOE_FAMILIES, add_tokenizer, make, write_text

SMALL = {"group_size": 32, "samples": 5, "tokens": 32}  # windows that two do not share evenly
# of block 0, before any tie can tell
FIRST = ("layers.0.self_attn.q", "layers.0.self_attn.k", "layers.0.self_attn.v", "layers.0.mixer.q")
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::featherweight.errors.FallbackWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("mixtral", tmp_path_factory.mktemp("source")))


def nothing() -> Experts:
    return Experts([torch.nn.Identity()] * 4, Layout())


# --- who counts for which expert


@dataclass(frozen=True)
class Told(World):
    """One of several processes; it hears what the others said when they were asked the last time."""

    said: dict[int, Tensor] = field(default_factory=dict)

    def from_each(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        (self.said[self.rank],) = tensors
        return [[self.said.get(rank, tensors[0])] for rank in range(self.size)]


def parted(tokens: Routed, special_T: Tensor | None, chosen: Recipe, columns: int, size: int) -> list[list[Served]]:
    """What each of `size` processes finds that have the tokens in turn, by process."""
    said: dict[int, Tensor] = {}

    def served(rank: int) -> list[Served]:
        world = Told(rank, size, said=said)
        at = world.split(len(tokens.inputs_TD))
        special = None if special_T is None else special_T[at]
        part = Routed(tokens.inputs_TD[at], tokens.expert_TK[at])
        return served_by("experts", nothing(), part, chosen, columns, special, world)

    for rank in range(size):
        served(rank)
    return [served(rank) for rank in range(size)]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("changes", "columns"), [({}, 8), ({}, 64), ({"route_all": True}, 64)])
def test_the_tokens_of_all_are_those_of_one(changes: dict[str, Any], columns: int, special: bool) -> None:
    """The same in the same order, thinned out or not, with help for the same experts, whoever has them."""
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.randint(0, 2, (101, 2), generator=generator) * 2  # 0 and 2 often, 3 seldom, 1 never
    expert_TK[::9, 1] = 3
    expert_TK[::5, 0] = 4  # nowhere
    tokens = Routed(torch.randn(101, 8, generator=generator), expert_TK)
    special_T = torch.rand(101, generator=generator) < 0.2 if special else None
    alone = served_by("experts", nothing(), tokens, Recipe(**changes), columns, special_T)
    assert any(each.starved for each in alone) != bool(changes)
    for size in (2, 3):
        found = parted(tokens, special_T, Recipe(**changes), columns, size)
        for one, *parts in zip(alone, *found, strict=True):
            assert {(part.expert, part.routed, part.starved) for part in parts} == {
                (one.expert, one.routed, one.starved)
            }
            for name in ("own", "help") if one.starved else ("own",):
                require_same(getattr(one, name), [getattr(part, name) for part in parts], len(expert_TK))


def require_same(one: Any, parts: list[Any], tokens: int) -> None:
    """Tokens of each process, counted from its first one, are those of the only one."""
    starts = [World(rank, len(parts)).split(tokens).start for rank in range(len(parts))]
    assert torch.equal(torch.cat([p.token_N + at for p, at in zip(parts, starts, strict=True)]), one.token_N)
    assert torch.equal(torch.cat([part.choice_N for part in parts]), one.choice_N)
    assert {part.total for part in parts} == {one.total} == {len(one.token_N)}


def test_many_tokens_are_thinned_out_together() -> None:
    """All go to one of four experts: as many as the mean count, evenly over all processes."""
    expert_TK = torch.full((600, 1), 4)
    expert_TK[:500] = 0
    tokens = Routed(torch.randn(600, 8), expert_TK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featherweight.stream.routing.MOST", 1)
        alone = served_by("experts", nothing(), tokens, Recipe(), 8)[0]
        parts = [served[0].own for served in parted(tokens, None, Recipe(), 8, 2)]
    assert alone.own.total == 500 // 4 and alone.routed == 500
    require_same(alone.own, parts, 600)
    assert [len(part.token_N) for part in parts] == [75, 50]


# --- sums


def test_sums_are_added_up_where_the_expert_is_solved() -> None:
    """H and the drift's part of two halves as of the whole, for an expert with help from others' tokens and for one
    without, in front of the first matrices and of the last."""
    generator = torch.Generator().manual_seed(0)
    experts = tiny_experts(generator)
    tokens, width = 60, 8
    expert_TK = torch.randint(0, 3, (tokens, 2), generator=generator)
    expert_TK[:, 1] = 3
    now_TD, before_TD = torch.randn(2, tokens, width, generator=generator)
    special: Tensor | None = None
    alone = served_by("experts", experts, Routed(now_TD, expert_TK), Recipe(), 30, special)
    parts = parted(Routed(now_TD, expert_TK), special, Recipe(), 30, 2)
    assert alone[0].starved and not alone[3].starved

    def summing(at: slice, world: World) -> Summing:
        states = HiddenStates((1, 1, 1), torch.float32, CPU, Path("unused"))
        mixture = Mixture("experts", "experts", experts, Gathered(Routed(before_TD[at], expert_TK[at]), states))
        return Summing(mixture, Routed(now_TD[at], expert_TK[at]), CPU, world)

    original = {"up_proj.weight": torch.randn(12, width, generator=generator)}
    for number in (0, 3):
        for leaf in ("up_proj", "down_proj"):
            left: list[Tensor] = []
            second = summing(slice(30, 60), Adding(1, 2, left=left)).sums(parts[1][number], original, leaf, 0)
            first = summing(slice(0, 30), Adding(0, 2, left=left)).sums(parts[0][number], original, leaf, 0)
            known = summing(slice(0, 60), ALONE).sums(alone[number], original, leaf, 0)
            assert second is None and first is not None and known is not None and not left
            assert first.tokens == known.tokens
            torch.testing.assert_close(first.hessian_CC, known.hessian_CC)
            assert first.gap_CC is not None and known.gap_CC is not None
            torch.testing.assert_close(first.gap_CC, known.gap_CC)
    x_NC = now_TD.double()  # expert 3 has all tokens
    known = summing(slice(0, 60), ALONE).sums(alone[3], original, "up_proj", 0)
    assert known is not None
    torch.testing.assert_close(known.hessian_CC, (x_NC.T @ x_NC / tokens).float())


@dataclass(frozen=True)
class Adding(World):
    """One of two processes: what the second leaves for the first is added there."""

    left: list[Tensor] = field(default_factory=list)

    def sum_to(self, owner: int, tensor: Tensor) -> None:
        if self.rank != owner:
            self.left.append(tensor.clone())
        else:
            tensor += self.left.pop(0)


def tiny_experts(generator: torch.Generator) -> Experts:
    """Four experts of 8 inputs and 12 inside."""
    layout = Layout(gated=False)
    experts = Experts([Expert(layout, 8, 12, torch.float32, torch.tanh) for _ in range(4)], layout)
    experts.to_empty(device=CPU)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return experts


# --- what is written


def note_solved(folder: Path, then: Happening | None, rank: int) -> None:
    """Keeps how many rows of experts' matrices a process solves, in a file of its own."""
    inner, path = solver.solve_stack, folder / f"rows.{rank}"
    path.write_text("0")

    def solve(problem: LayerProblem, *rest: Any) -> Any:
        rows = problem.weight_RC.shape[0] * problem.weight_RC.shape[1]
        path.write_text(str(int(path.read_text()) + rows))
        return inner(problem, *rest)

    solver.solve_stack = solve
    if then is not None:
        then(rank)


def in_portions(_rank: int) -> None:
    """Experts stay in the files, few are solved at a time, and most tensors are sent by themselves."""
    messages.SMALL_BYTES, messages.RIDING_BYTES = {"cpu": 256}, 64
    pipeline.room_for_experts = lambda *_: 4096
    for module in (solver, portions):
        module.CHUNK_BYTES = {"cpu": 4096}


KINDS = [
    pytest.param("mixtral", {}, None, id="mixtral"),
    pytest.param("gpt-oss", {"target": "drifted", "starved": "round"}, in_portions, id="gpt-oss in portions"),
    *(pytest.param(family, {}, None, id=f"{family}, all", marks=pytest.mark.slow) for family in MOE_FAMILIES),
    pytest.param("llama4", {"route_all": True}, None, id="route all", marks=pytest.mark.slow),
    *(
        pytest.param("qwen3-moe", changes, in_portions, id=f"{name} in portions", marks=pytest.mark.slow)
        for name, changes in {"default": {}, "rtn": {"method": "rtn"}, "2:4": {"sparsity": "2:4", "bits": 16},
                              "sub1": {"bits": 1.58, "format": "sub1", "damping": 1.0}}.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "happen"), KINDS)
def test_two_write_what_one_would(
    family: str, changes: dict[str, Any], happen: Happening | None, text: Path, tmp_path: Path
) -> None:
    """Every expert is solved once, by one of the processes, and each has its part of them."""
    source = add_tokenizer(make(family, tmp_path / "source", dtype=torch.float32))
    chosen = Recipe(**{**SMALL, "group_size": 16, **changes}, calibration=(str(text),))
    whole(together(source, tmp_path / "out", chosen, partial(note_solved, tmp_path, happen)))
    api.compress(source, tmp_path / "alone", chosen)
    assert_alike(tmp_path / "out", tmp_path / "alone", FIRST)
    for one, other in zip(journal(tmp_path / "out"), journal(tmp_path / "alone"), strict=True):
        assert abs(one.get("tokens", 0) - other.get("tokens", 0)) <= 0.1 * other.get("tokens", 0) + 8
    solved = [int((tmp_path / f"rows.{rank}").read_text()) for rank in range(2)]
    rows = sum(row["shape"][0] for row in journal(tmp_path / "out") if "tokens" in row)
    assert solved == [rows / 2, rows / 2]
    assert (rows > 0) == (chosen.method != "rtn")


# --- stopped, and gone on with by others


def second_dies(rank: int) -> None:
    """In the middle of the second block's experts."""
    inner, solved = solver.solve_stack, []

    def solve(*arguments: Any) -> Any:
        solved.append(1)
        if rank == 1 and len(solved) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments)

    solver.solve_stack = solve


@pytest.mark.slow
def test_one_goes_on_where_two_failed(source: Path, text: Path, tmp_path: Path) -> None:
    chosen, out = Recipe(**SMALL, calibration=(str(text),)), tmp_path / "out"
    (words, _), (others, code) = together(source, out, chosen, second_dies)
    assert re.search(r"process 0 of 2 lost the others.*finished blocks are kept, repeat the command", str(words[-1]))
    assert (others, code) == ([], -9)
    before = stamps(out)
    assert len(before) == 2 and not (out / "config.json").exists()
    with pytest.warns(FallbackWarning, match="resuming with processes 2 -> 1: bytes may differ"):
        api.compress(source, out, chosen)
    assert stamps(out).items() >= before.items()
    api.compress(source, tmp_path / "alone", chosen)
    assert_alike(out, tmp_path / "alone", FIRST)


@pytest.mark.slow
def test_a_starved_expert_is_an_error_for_all_if_asked(source: Path, text: Path, tmp_path: Path) -> None:
    """Both count the tokens of both, so both say the same."""
    said = together(source, tmp_path / "out", Recipe(**SMALL, starved="error", calibration=(str(text),)))
    first, second = (words[-1] for words, _ in said)
    assert isinstance(first, RequestError) and str(first) == str(second)
    assert "experts were sent fewer tokens (of 160) than they have inputs (64)" in str(first)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sub1", "best_2bit", "papers.efficientqat_w2g64", "from obq"])
def test_blocks_with_experts_are_trained_by_two(name: str, source: Path, tmp_path: Path) -> None:
    """The recipes that train, whose steps are shared: as much is learnt, in other batches, from the same start."""
    long = write_text(tmp_path / "long.txt", words=6000)
    small = {"samples": 16, "tokens": 64, "epochs": 2, "held_out": 0.25, "calibration": (str(long),)}
    chosen = by_name("best_2bit").but(start="obq") if name == "from obq" else by_name(name)
    chosen = chosen.but(**small, group_size=None if name == "sub1" else 32)
    whole(together(source, tmp_path / "out", chosen))
    api.compress(source, tmp_path / "alone", chosen)
    assert model_files(tmp_path / "out").keys() == model_files(tmp_path / "alone").keys()
    for one, other in zip(journal(tmp_path / "out"), journal(tmp_path / "alone"), strict=True):
        near = 1e-2 if one["block"] == 0 else 0.2
        assert one["block_loss_before"] == pytest.approx(other["block_loss_before"], rel=near)
        assert one["block_loss"] == pytest.approx(other["block_loss"], rel=0.2)
        assert one["block_loss"] <= one["block_loss_before"]
    assert any(one["block_loss"] < one["block_loss_before"] for one in journal(tmp_path / "out"))


@pytest.mark.slow
def test_experts_without_tokens_are_trained_too(text: Path, tmp_path: Path) -> None:
    """One sequence of eight tokens a step in each process, each token to one of four experts."""
    source = add_tokenizer(make("llama4", tmp_path / "source"))
    small = {"samples": 6, "tokens": 8, "batch": 2, "epochs": 1, "bits": 2, "group_size": 16}
    chosen = Recipe(method="block-ap", tune="rounding", **small, calibration=(str(text),))
    whole(together(source, tmp_path / "out", chosen))
    rows = [row for row in journal(tmp_path / "out") if ".experts." in row["name"]]
    assert rows and all(math.isfinite(row["block_loss"]) for row in rows)
