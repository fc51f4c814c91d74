"""What there is to choose from, what may be spent on it, and what was chosen.

Shapes: L layers (after those that share a choice are joined).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import RequestError

Unit = Literal["bytes", "bits", "sparsity", "seconds"]
RESOLUTION = 1e-9  # of seconds, which have no smallest unit of their own
DENSE_BITS = 16
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Offer:
    """What one option does to one layer.

    Attributes:
        label: the option's.
        damage: predicted harm, any unit that adds up over layers, 0 or more.
        bytes: stored.
        kept: weights that may differ from zero; None for all.
        seconds: measured time, where there is a table of it.
    """

    label: str
    damage: float
    bytes: int
    kept: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Layer:
    """A matrix and its offers. Layers with the same `group` (but "") get the same label."""

    name: str
    weights: int
    offers: tuple[Offer, ...]
    group: str = ""


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer.

    Attributes:
        choices: label by layer name.
        damage: predicted, summed.
        bound: no choice within the budget has less.
        bytes: of the layers and the fixed bytes.
        cost: in the budget's unit and never above it ("sparsity": never below it); "bits" are bits a weight.
        exact: whether no cost was rounded.
    """

    choices: dict[str, str]
    damage: float
    bound: float
    bytes: int
    cost: float
    exact: bool


@dataclass(frozen=True)
class Table:
    """The undominated offers of a layer (or of layers that share a choice), the cheapest first."""

    layers: tuple[Layer, ...]
    labels: tuple[str, ...]
    damage: Floats
    cost: Ints


@dataclass(frozen=True)
class Task:
    """A budget in whole units of cost, and how to speak of it."""

    tables: list[Table]
    unit: Unit
    weights: int
    fixed_bytes: int
    limit: int

    @classmethod
    def of(cls, layers: Sequence[Layer], budget: float, unit: Unit, fixed_bytes: int) -> Task:
        if not layers:
            raise RequestError("there are no layers to allocate: give at least one.")
        tables = [_table(members, unit) for members in _joined(layers)]
        task = cls(tables, unit, sum(layer.weights for layer in layers), fixed_bytes, 0)
        task.check(budget)
        return replace(task, limit=task.units(budget))

    @property
    def floor(self) -> int:
        return sum(int(table.cost[0]) for table in self.tables)

    @property
    def ceiling(self) -> int:
        return sum(int(table.cost[-1]) for table in self.tables)

    @property
    def room(self) -> int:
        """What may be spent above the floor."""
        return min(self.limit, self.ceiling) - self.floor

    def units(self, budget: float) -> int:
        """A budget as the most units of cost."""
        if self.unit == "bytes":
            return math.floor(budget) - self.fixed_bytes
        if self.unit == "bits":
            return math.floor(budget * self.weights / 8 + 1e-6)
        if self.unit == "sparsity":
            return math.floor((1 - budget) * self.weights + 1e-6)
        return math.floor(budget / RESOLUTION + 1e-6)

    def amount(self, cost: int) -> float:
        """Units of cost in the budget's unit."""
        if self.unit == "bytes":
            return float(cost + self.fixed_bytes)
        if self.unit == "bits":
            return 8 * cost / self.weights
        return 1 - cost / self.weights if self.unit == "sparsity" else cost * RESOLUTION

    def say(self, amount: float, up: bool = False) -> str:
        """An amount as the user writes it, rounded so that asking for it works: `up`, not below it."""
        if self.unit == "bytes":
            return f"{math.ceil(amount) if up else math.floor(amount):,} bytes"
        digits = 6 if self.unit == "seconds" else 4
        rounded = (math.ceil if up else math.floor)(amount * 10**digits - (1e-6 if up else -1e-6)) / 10**digits
        return {
            "bits": f"{rounded:.4f} bits a weight",
            "sparsity": f"a sparsity of {rounded:.4f}",
            "seconds": f"{rounded:.6f} s",
        }[self.unit]

    def check(self, budget: float) -> None:
        """Raises RequestError for what cannot be met."""
        if not math.isfinite(budget) or budget < 0 or (self.unit == "sparsity" and budget >= 1):
            raise RequestError(f"a budget of {budget:g} {self.unit} means nothing: give a finite number above 0.")
        least, most = self.amount(self.floor), self.amount(self.ceiling)
        if self.unit == "sparsity":
            least, most = most, least
        span = f"these options reach from {self.say(least, up=True)} to {self.say(most)}"
        dense = {"bytes": self.fixed_bytes + self.weights * DENSE_BITS / 8, "bits": float(DENSE_BITS)}.get(self.unit)
        units = self.units(budget)
        if dense is not None and budget > dense:
            raise RequestError(
                f"{self.say(budget)} are more than the {self.say(dense)} of the model in 16 bits: {span}; ask for "
                f"{self.say(most)} or less."
            )
        if units < self.floor or (units > self.ceiling and self.unit != "seconds"):
            low = (units < self.floor) != (self.unit == "sparsity")
            nearest = self.say(least, up=True) if low else self.say(most)
            raise RequestError(f"{self.say(budget)} cannot be met: {span}; the nearest that can is {nearest}.")

    def allocation(self, picks_L: Sequence[int], bound: float, exact: bool) -> Allocation:
        """What the picks (an offer's number in each table) amount to."""
        choices: dict[str, str] = {}
        damage, cost, stored = 0.0, 0, self.fixed_bytes
        for table, pick in zip(self.tables, picks_L, strict=True):
            damage, cost = damage + float(table.damage[pick]), cost + int(table.cost[pick])
            for layer in table.layers:
                choices[layer.name] = table.labels[pick]
                stored += next(offer.bytes for offer in layer.offers if offer.label == table.labels[pick])
        assert cost <= self.limit, "the solver spent more than it had"
        return Allocation(choices, damage, bound, stored, self.amount(cost), exact)


def _joined(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers, those of one group together."""
    found: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        found.setdefault((layer.group, "" if layer.group else layer.name), []).append(layer)
    if sum(len({layer.name for layer in members}) for members in found.values()) != len(layers):
        raise RequestError("two layers have one name: names must differ.")
    return list(found.values())


def _table(members: list[Layer], unit: Unit) -> Table:
    """The offers that all members have, summed, without those that another one beats."""
    offers = [{offer.label: offer for offer in layer.offers} for layer in members]
    shared = [label for label in offers[0] if all(label in each for each in offers)]
    if not shared:
        names = ", ".join(layer.name for layer in members)
        raise RequestError(f"{names} must share a choice and have no option in common: allow one that fits them all.")
    rows = []
    for label in shared:
        damage = sum(each[label].damage for each in offers)
        if not math.isfinite(damage):
            raise RequestError(f"{members[0].name} has a damage of {damage} under {label}: measure it again.")
        cost = sum(_cost(each[label], layer, unit) for each, layer in zip(offers, members, strict=True))
        rows.append((cost, damage, label))
    kept: list[tuple[int, float, str]] = []
    for row in sorted(rows, key=lambda row: row[:2]):
        if not kept or row[1] < kept[-1][1]:
            kept.append(row)
    costs, damages, labels = zip(*kept, strict=True)
    return Table(tuple(members), labels, np.array(damages, np.float64), np.array(costs, np.int64))


def _cost(offer: Offer, layer: Layer, unit: Unit) -> int:
    if unit in ("bytes", "bits"):
        return offer.bytes
    if unit == "sparsity":
        return layer.weights if offer.kept is None else offer.kept
    if offer.seconds is None:
        raise RequestError(f"{layer.name} has no measured time under {offer.label}: measure it, or budget its bytes.")
    return round(offer.seconds / RESOLUTION)
