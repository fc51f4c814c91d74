"""The least predicted damage under a budget: one option for every layer (a multiple-choice knapsack).

Options that another one of the same layer beats in both damage and cost are dropped first; that loses nothing. (The
lower convex hull would be smaller still, but the best choice under a hard budget can lie off it; it only serves for the
bound.) What is left is solved by dynamic programming over the cost in equal cells, as SPDY and OBC do.

How far off it can be. Where the costs have a common divisor that gives few enough cells (matrices of a few shapes,
grids only), the cells are that divisor and the answer is exact. Otherwise costs above a layer's cheapest are rounded to
the nearest cell of (ceiling - floor) / CELLS; of the budgets within half a cell a layer of the one asked for, the best
whose true cost fits is taken. So the answer never exceeds the budget, and is at least as good as the best under a
budget smaller by a cell a layer: 0.25 % of that range for 300 layers, in truth a tenth of that. What is left over is
spent greedily. `Allocation.bound` is what no choice can beat (the hull's linear relaxation), so each answer says itself
how good it is.

Shapes: L layers (after those that share a choice are joined), B cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from featherweight.errors import RequestError
from featherweight.plan.budget import Allocation, Layer, Offer, Table, Task, Unit

__all__ = ["Allocation", "Layer", "Offer", "Unit", "allocate", "allocate_milp", "check_budget"]


CELLS = 1 << 17  # where costs are rounded
EXACT_CELLS = 1 << 18  # where they need not be
WORK = 1e9  # cells x options that are worth it for an exact answer


def allocate(layers: Sequence[Layer], budget: float, unit: Unit = "bytes", fixed_bytes: int = 0) -> Allocation:
    """The least damage under a budget, by dynamic programming.

    Args:
        layers: what there is to choose from.
        budget: the most bytes; or ("bits") stored bits a weight; or ("seconds") time; or ("sparsity") the least share
            of zeros. Bits, sparsity and seconds are of the layers alone.
        fixed_bytes: what the file holds besides the layers (embeddings, norms, headers), part of a budget of bytes.

    Raises RequestError for a budget below the floor (all options at their smallest), above the ceiling (all at their
    least damage; time is not held to this) or above dense, naming both; and for layers that cannot share a choice.
    """
    task = Task.of(layers, budget, unit, fixed_bytes)
    cell, exact = _cell(task)
    picks_L = _programme(task, cell, 0 if exact else len(task.tables) // 2 + 1)
    if not exact:
        _spend(task, picks_L)
    return task.allocation(picks_L, _bound(task), exact)


def check_budget(layers: Sequence[Layer], budget: float, unit: Unit = "bytes", fixed_bytes: int = 0) -> None:
    """Raises RequestError for a budget out of the offers' reach, whatever harm they do: known before it is measured."""
    unmeasured = [
        replace(layer, offers=tuple(replace(offer, damage=1 / _size(offer, unit)) for offer in layer.offers))
        for layer in layers
    ]
    Task.of(unmeasured, budget, unit, fixed_bytes)


def _size(offer: Offer, unit: Unit) -> float:
    """Something that grows with what an offer costs, so that no offer is beaten by a smaller one."""
    return 1.0 + (offer.bytes if unit != "sparsity" or offer.kept is None else offer.kept)


def allocate_milp(layers: Sequence[Layer], budget: float, unit: Unit = "bytes", fixed_bytes: int = 0) -> Allocation:
    """The same by scipy's mixed-integer solver (HiGHS): a check on `allocate`, with its arguments and errors.

    Raises RequestError also where scipy is not installed or finds no answer.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise RequestError("allocation by MILP needs scipy: pip install scipy, or use the default solver.") from error
    task = Task.of(layers, budget, unit, fixed_bytes)
    sizes = [len(table.damage) for table in task.tables]
    column = np.arange(sum(sizes))
    row = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_matrix((np.ones(len(column)), (row, column)))
    cost = np.concatenate([table.cost - table.cost.min() for table in task.tables]).astype(float)
    damage = np.concatenate([table.damage for table in task.tables])
    room = float(task.room)
    found: Any = milp(
        damage / max(float(damage.max()), 1e-300) * 1e3,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_matrix(cost / max(room, 1.0)), -np.inf, 1.0 if room else 0.0),
        ],
        integrality=np.ones(len(column)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RequestError(f"scipy's MILP found no allocation ({found.message}): use the default solver.")
    picks_L = [int(np.argmax(part)) for part in np.split(found.x, np.cumsum(sizes)[:-1])]
    return task.allocation(picks_L, _bound(task), exact=True)


def _cell(task: Task) -> tuple[int, bool]:
    """Units of cost in one cell, and whether every cost is a whole number of them."""
    divisor = 0
    for table in task.tables:
        divisor = math.gcd(divisor, *(int(extra) for extra in table.cost - table.cost[0]))
    options = sum(len(table.cost) for table in task.tables)
    cells = task.room // max(divisor, 1)
    if not divisor or (cells <= EXACT_CELLS and cells * options <= WORK):
        return max(divisor, 1), True
    # Of the whole range, not of this budget's share: the answers to two budgets then lie in one set of cells.
    return max(1, -(-(task.ceiling - task.floor) // CELLS)), False


def _programme(task: Task, cell: int, margin: int) -> list[int]:
    """The best picks whose true cost fits, where the rounded cost may be off by `margin` cells."""
    cells = task.room // cell + margin
    rounded = [(2 * (table.cost - table.cost[0]) + cell) // (2 * cell) for table in task.tables]
    best_B = np.zeros(cells + 1)  # the least damage of the layers so far with at most so many cells spent
    small = max(len(spent_O) for spent_O in rounded) <= 256  # the largest array here by far
    picks_LB = np.zeros((len(task.tables), cells + 1), np.uint8 if small else np.uint16)
    for table, spent_O, picks_B in zip(task.tables, rounded, picks_LB, strict=True):
        before_B, best_B = best_B, best_B + table.damage[0]
        for option, spent in enumerate(spent_O.tolist()):
            if not option or spent > cells:
                continue
            with_B = before_B[: cells + 1 - spent] + table.damage[option]
            better_B = with_B < best_B[spent:]
            np.copyto(best_B[spent:], with_B, where=better_B)
            picks_B[spent:][better_B] = option
    for start in range(cells, -1, -1):  # damage rises from here on, so the first that fits is the best
        left, picks_L = start, []
        for spent_O, picks_B in zip(reversed(rounded), reversed(picks_LB), strict=True):
            picks_L.append(int(picks_B[left]))
            left -= int(spent_O[picks_L[-1]])
        picks_L.reverse()
        if sum(int(table.cost[pick]) for table, pick in zip(task.tables, picks_L, strict=True)) <= task.limit:
            return picks_L
    return [0] * len(task.tables)  # less than half a cell a layer to spend: all of it is left for `_spend`


def _spend(task: Task, picks_L: list[int]) -> None:
    """Spends what rounding left over: again and again the exchange in one layer that lowers damage most."""
    left = task.limit - sum(int(table.cost[pick]) for table, pick in zip(task.tables, picks_L, strict=True))
    while True:
        best, at, to = 0.0, -1, -1
        for index, (table, pick) in enumerate(zip(task.tables, picks_L, strict=True)):
            option = int(np.searchsorted(table.cost, table.cost[pick] + left, side="right")) - 1
            gain = float(table.damage[pick] - table.damage[option])
            if option > pick and gain > best:
                best, at, to = gain, index, option
        if at < 0:
            return
        left -= int(task.tables[at].cost[to] - task.tables[at].cost[picks_L[at]])
        picks_L[at] = to


def _bound(task: Task) -> float:
    """The damage of the linear relaxation: the steps of all layers' lower hulls, the steepest first."""
    damage = sum(float(table.damage[0]) for table in task.tables)
    steps = [step for table in task.tables for step in _hull_steps(table)]
    left = task.room
    for gain, cost in sorted(steps, key=lambda step: -step[0] / step[1]):
        share = min(1.0, left / cost)
        damage -= share * gain
        left -= cost
        if left <= 0:
            break
    return max(damage, 0.0)


def _hull_steps(table: Table) -> list[tuple[float, int]]:
    """(damage saved, cost) from one corner of a table's lower convex hull to the next."""
    corners: list[int] = []
    for option in range(len(table.cost)):
        while len(corners) > 1 and _slope(table, corners[-2], option) <= _slope(table, corners[-2], corners[-1]):
            corners.pop()
        corners.append(option)
    pairs = itertools.pairwise(corners)
    return [(float(table.damage[a] - table.damage[b]), int(table.cost[b] - table.cost[a])) for a, b in pairs]


def _slope(table: Table, start: int, stop: int) -> float:
    return float((table.damage[stop] - table.damage[start]) / (table.cost[stop] - table.cost[start]))
