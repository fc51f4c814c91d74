"""Which process solves which groups of a stage, and which rows of a group that all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from featherweight.stream.groups import Group
from featherweight.stream.parallel import ALONE, World

WORTH = 0.95  # of the longest time of whole groups, below which one or all are shared: a share is another problem
ALIGNED = 64  # rows: what kernels of the solvers like to begin and end at


@dataclass(frozen=True)
class Sharers:
    """Processes that each solve a part of every matrix's rows, and this one among them.

    Attributes:
        shares: of the rows, by process; their sum is 1.
    """

    world: World = ALONE
    shares: tuple[float, ...] = (1.0,)

    def parts(self, rows: int) -> list[slice]:
        """Every process's part of a matrix's rows, in their order."""
        unit = ALIGNED if rows >= 4 * ALIGNED * len(self.shares) else 1
        ends = [unit * round(rows * share / unit) for share in accumulate(self.shares)]
        return [slice(start, stop) for start, stop in pairwise([0, *ends[:-1], rows])]

    def part(self, rows: int) -> slice:
        """This process's."""
        return self.parts(rows)[self.world.rank]

    def all_have_some(self, group: Group) -> bool:
        """Whether every process has a row of every matrix of a group."""
        return min(map(min, self.counts(group))) > 0

    def counts(self, group: Group) -> list[list[int]]:
        """How many rows of each matrix of a group each process has, by process."""
        by_matrix = [[part.stop - part.start for part in self.parts(matrix.rows)] for matrix in group.matrices]
        return [list(each) for each in zip(*by_matrix, strict=True)]


@dataclass(frozen=True)
class Deal:
    """Who solves what of a stage.

    Attributes:
        owners: of each group, the process that solves it; None where all share it.
        sharers: who has what of such a group.
        cost: what the process with most to do takes, in `Group.cost`'s unit.
    """

    owners: list[int | None]
    sharers: Sharers
    cost: float


def deal_stage(groups: Sequence[Group], divisible: Sequence[bool], world: World) -> Deal:
    """Whole groups, each to the process with least to do; or the dearest group shared so that all end together, the
    others whole; or all groups shared evenly: whatever is done first. Only `divisible` groups can be shared."""
    whole = [group.cost() for group in groups]
    owners = world.deal(whole)
    best = Deal(list(owners), Sharers(world), max(_loads(whole, owners, world.size)))
    for deal in (_one_shared(groups, divisible, world), _all_shared(groups, divisible, world)):
        if deal is not None and deal.cost < (best.cost if None in best.owners else WORTH * best.cost):
            best = deal
    return best


def _loads(costs: Sequence[float], owners: Sequence[int | None], size: int) -> list[float]:
    return [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]


def _one_shared(groups: Sequence[Group], divisible: Sequence[bool], world: World) -> Deal | None:
    """The dearest group shared so that all end together, the others whole."""
    able = [n for n, may in enumerate(divisible) if may]
    if world.size == 1 or not able:
        return None
    shared = max(able, key=lambda n: groups[n].cost())
    others = [0.0 if n == shared else group.cost() for n, group in enumerate(groups)]
    owners = [None if n == shared else owner for n, owner in enumerate(world.deal(others))]
    rows_cost = groups[shared].rows_cost
    factor, loads = groups[shared].cost() - rows_cost, _loads(others, owners, world.size)
    end = (sum(loads) + rows_cost) / world.size + factor
    sharers = Sharers(world, tuple((end - factor - load) / rows_cost for load in loads))
    usable = min(sharers.shares) > 0 and sharers.all_have_some(groups[shared])
    return Deal(owners, sharers, end) if usable else None


def _all_shared(groups: Sequence[Group], divisible: Sequence[bool], world: World) -> Deal | None:
    """All groups, evenly."""
    sharers = Sharers(world, (1 / world.size,) * world.size)
    if world.size == 1 or not (all(divisible) and all(map(sharers.all_have_some, groups))):
        return None
    cost = sum(group.cost() - group.rows_cost * (1 - 1 / world.size) for group in groups)
    return Deal([None] * len(groups), sharers, cost)
