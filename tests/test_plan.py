"""Options, their bytes, and the allocation of options to layers under a budget."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.sweep import round_to_nearest
from featherweight.errors import RequestError
from featherweight.formats import by_name
from featherweight.plan import Layer, Offer, Option, allocate, allocate_milp, fitting, menu, stored_bytes
from featherweight.plan.database import Database, Measured, Row, damage_of, predict
from featherweight.plan.options import kept_weights, label_of, table_layout


def random_layers(seed: int, count: int = 4, options: int = 4, step: int = 1, group: int = 0) -> list[Layer]:
    """Layers whose options cost multiples of `step` bytes and mostly do less damage the more they cost."""
    draw = random.Random(seed)
    layers = []
    for index in range(count):
        offers = [
            Offer(f"o{n}", draw.random() ** 3 * 10 / (n + 1), step * draw.randint(4 * n, 4 * n + 6))
            for n in range(options)
        ]
        name = f"g{index // group}" if group else ""
        layers.append(Layer(f"layer{index}", 8 * step * 4 * options, tuple(offers), name))
    return layers


def brute_force(layers: Sequence[Layer], budget: float) -> float:
    """The least damage of all choices under a budget of bytes (and one label in each group)."""
    best = float("inf")
    for picks in itertools.product(*(layer.offers for layer in layers)):
        labels: dict[str, set[str]] = {}
        for layer, offer in zip(layers, picks, strict=True):
            labels.setdefault(layer.group or layer.name, set()).add(offer.label)
        if sum(o.bytes for o in picks) <= budget and all(len(each) == 1 for each in labels.values()):
            best = min(best, sum(o.damage for o in picks))
    return best


def reach(layers: Sequence[Layer]) -> tuple[int, int]:
    """The least and the most bytes."""
    return (
        sum(min(o.bytes for o in layer.offers) for layer in layers),
        sum(max(layer.offers, key=lambda o: (-o.damage, -o.bytes)).bytes for layer in layers),
    )


# --- bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (64, False), (None, True)])
def test_bytes_of_grids_are_those_of_the_format(bits: int, group: int | None, symmetric: bool) -> None:
    grid = Grid(bits, group, symmetric)
    problem = LayerProblem(torch.randn(10, 192, generator=torch.Generator().manual_seed(0)), torch.eye(192))
    tensors = by_name("compressed-tensors").pack(round_to_nearest(problem, grid))
    assert stored_bytes(grid, 10, 192) == sum(tensor.nbytes for tensor in tensors.values())


def test_bytes_of_patterns_are_what_the_arithmetic_says() -> None:
    weights = 1024 * 1024
    assert stored_bytes(None, 1024, 1024) == 2 * weights
    assert stored_bytes(Pattern(0.5), 1024, 1024) == 9 * weights // 8 + 16  # 9/16 of dense
    assert stored_bytes(Pattern(keep=2, of=4), 1024, 1024) == 9 * weights // 8 + 16
    assert stored_bytes(Pattern(keep=1, of=8), 1024, 1024) == weights // 8 * (3 + 16) // 8 + 16  # the index is cheaper
    joint = Joint(Grid(4, 128), Pattern(keep=2, of=4))
    assert stored_bytes(joint, 1024, 1024) == int(3.125 * weights / 8) + 16
    assert kept_weights(Pattern(0.3), 7, 9) == 63 - round(0.3 * 63)
    assert stored_bytes(Pattern(0.5, block=4), 4, 8) == 1 + 32 + 16


def test_menu_and_what_fits() -> None:
    options = menu()
    labels = [option.label for option in options]
    assert len(set(labels)) == len(labels)
    assert {"2b-g32", "8b-g128", "25%", "90%", "2:4", "4:8", "2:4+4b-g128", "50%+4b-g128"} <= set(labels)
    assert {option.label for option in fitting(menu(patterns=False, joint=False), 96)} == {
        f"{bits}b-g32" for bits in (2, 3, 4, 5, 6, 8)
    }
    with pytest.raises(RequestError, match="54 inputs, which none of"):
        fitting(menu(patterns=False), 54)
    assert label_of(Grid(3, None, symmetric=False)) == "3b-row-asym"
    measured = Option.of(Grid(4, 64), table_layout({("4b-g64", 8, 64): 300}))
    assert measured.bytes(8, 64) == 300
    with pytest.raises(RequestError, match="no entry for 4b-g64 of 9 x 64"):
        measured.bytes(9, 64)


# --- allocation


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_and_milp(seed: int) -> None:
    layers = random_layers(seed, count=5, group=2 if seed % 3 == 0 else 0)
    floor, ceiling = reach(layers) if seed % 3 else group_reach(layers)
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = floor + share * (ceiling - floor)
        found = allocate(layers, budget)
        assert found.exact and found.bytes <= budget and found.cost == found.bytes
        assert found.damage == pytest.approx(brute_force(layers, budget))
        assert found.bound <= found.damage + 1e-9
        assert allocate_milp(layers, budget).damage == pytest.approx(found.damage)


def group_reach(layers: Sequence[Layer]) -> tuple[int, int]:
    found = [allocate(layers, share, "bits") for share in feasible_bits(layers)]
    return found[0].bytes, found[1].bytes


def feasible_bits(layers: Sequence[Layer]) -> tuple[float, float]:
    """Floor and ceiling, in bits a weight, as the message names them."""
    with pytest.raises(RequestError) as refused:
        allocate(layers, 0.0, "bits")
    words = str(refused.value).split("reach from ")[1].split()
    return float(words[0]), float(words[5])


def realistic(blocks: int = 43, seed: int = 0, whole_menu: bool = True) -> list[Layer]:
    """Seven matrices a block, as many options as the menu has, damage that falls with the bytes."""
    draw = random.Random(seed)
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    options = menu(patterns=whole_menu, joint=whole_menu)
    layers = []
    for block, (number, (rows, columns)) in itertools.product(range(blocks), enumerate(shapes)):
        weight = draw.lognormvariate(0, 1.5)
        offers = []
        for option in fitting(options, columns):
            stored = option.bytes(rows, columns)
            damage = weight * 4.0 ** -(8 * stored / (rows * columns)) * draw.uniform(0.8, 1.25)
            offers.append(Offer(option.label, damage, stored, kept_weights(option.rule, rows, columns)))
        layers.append(Layer(f"{block}.{number}", rows * columns, tuple(offers)))
    return layers


@pytest.mark.parametrize("whole_menu", [False, True])
def test_three_hundred_layers_fill_a_size_to_half_a_percent_in_seconds(whole_menu: bool) -> None:
    layers = realistic(whole_menu=whole_menu)
    assert len(layers) > 300
    weights = sum(layer.weights for layer in layers)
    last = float("inf")
    for bits in (2.6, 3.25, 4.5):
        budget = bits * weights / 8
        began = time.perf_counter()
        found = allocate(layers, budget)
        assert time.perf_counter() - began < 10  # about one, on an idle core
        assert 0.995 * budget <= found.bytes <= budget
        assert found.damage < last
        assert found.bound <= found.damage <= 1.002 * found.bound
        last = found.damage


def test_rounded_costs_stay_within_the_stated_bound() -> None:
    layers = realistic(blocks=6)
    budget = 3.3 * sum(layer.weights for layer in layers) / 8
    found = allocate(layers, budget)
    assert not found.exact
    checked = allocate_milp(layers, budget)
    assert found.bound <= checked.damage * (1 + 1e-6)
    assert checked.damage * (1 - 1e-6) <= found.damage <= 1.0005 * checked.damage


def test_a_few_bytes_above_the_floor_are_spent_too() -> None:
    layers = realistic(blocks=6)
    floor, _ = reach(layers)
    for extra in (0, 1, 500, 5000):
        found = allocate(layers, floor + extra)
        assert found.exact and found.bytes <= floor + extra
        assert found.damage == pytest.approx(allocate_milp(layers, floor + extra).damage, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_more_budget_is_never_more_damage(seed: int) -> None:
    layers = random_layers(seed, count=8, options=6, step=64)
    floor, ceiling = reach(layers)
    damages = [allocate(layers, floor + n * (ceiling - floor) / 40).damage for n in range(41)]
    assert damages == sorted(damages, reverse=True)


def test_layers_of_a_group_share_their_choice() -> None:
    offers = (Offer("a", 5.0, 10), Offer("b", 1.0, 20), Offer("c", 0.0, 30))
    layers = [Layer("q", 80, offers, "qkv"), Layer("k", 80, offers[1:], "qkv"), Layer("o", 80, offers)]
    for budget in (50, 60, 70, 80, 90):
        found = allocate(layers, budget)
        assert found.choices["q"] == found.choices["k"] != "a"
        assert found.damage == pytest.approx(brute_force(layers, budget))
    with pytest.raises(RequestError, match="q, v must share a choice and have no option in common"):
        allocate([layers[0], Layer("v", 80, (Offer("d", 0.0, 1),), "qkv")], 60)


def test_other_budgets() -> None:
    offers = (Offer("a", 4.0, 10, 20, 3e-3), Offer("b", 1.0, 20, 40, 1e-3), Offer("c", 0.0, 40, 80, 5e-3))
    layers = [Layer("one", 80, offers), Layer("two", 80, offers)]
    by_bits = allocate(layers, 2.0, "bits")
    assert by_bits.cost == 2.0 and by_bits.bytes == 40 and by_bits.damage == 2.0
    assert allocate(layers, 140, fixed_bytes=100).choices == by_bits.choices
    assert allocate(layers, 140, fixed_bytes=100).bytes == 140
    by_sparsity = allocate(layers, 0.5, "sparsity")
    assert by_sparsity.choices == by_bits.choices and by_sparsity.cost == 0.5
    by_time = allocate(layers, 6e-3, "seconds")
    assert sorted(by_time.choices.values()) == ["b", "c"] and by_time.cost == pytest.approx(6e-3)
    assert allocate(layers, 1.0, "seconds").damage == 0.0  # time is not to be filled
    with pytest.raises(RequestError, match="one has no measured time under a"):
        allocate([Layer("one", 80, (Offer("a", 1.0, 10),))], 1.0, "seconds")


@pytest.mark.parametrize(
    ("budget", "unit", "words"),
    [
        (19, "bytes", ["19 bytes cannot be met", "from 20 bytes to 80 bytes", "nearest that can is 20 bytes"]),
        (81, "bytes", ["81 bytes cannot be met", "nearest that can is 80 bytes"]),
        (500, "bytes", ["500 bytes are more than the 320 bytes of the model in 16 bits", "ask for 80 bytes or less"]),
        (0.9, "bits", ["0.9000 bits a weight cannot", "from 1.0000 bits a weight to 4.0000", "is 1.0000 bits"]),
        (17, "bits", ["17.0000 bits a weight are more than the 16.0000"]),
        (
            0.1,
            "sparsity",
            ["a sparsity of 0.1000 cannot", "from a sparsity of 0.2500", "0.7500; ", "is a sparsity of 0.2500"],
        ),
        (0.8, "sparsity", ["nearest that can is a sparsity of 0.7500"]),
        (1.0, "sparsity", ["a budget of 1 sparsity means nothing"]),
        (1e-3, "seconds", ["from 0.004000 s to 0.010000 s", "nearest that can is 0.004000 s"]),
        (float("nan"), "bytes", ["means nothing"]),
        (-1, "bytes", ["means nothing"]),
    ],
)
def test_what_cannot_be_met_says_what_can(budget: float, unit: str, words: list[str]) -> None:
    offers = (Offer("a", 4.0, 10, 20, 2e-3), Offer("b", 1.0, 20, 40, 3e-3), Offer("c", 0.0, 40, 60, 5e-3))
    layers = [Layer("one", 80, offers), Layer("two", 80, offers)]
    for solver in (allocate, allocate_milp):
        with pytest.raises(RequestError) as refused:
            solver(layers, budget, unit)  # type: ignore[arg-type]
        for word in words:
            assert word in str(refused.value)


def test_the_nearest_that_can_be_met_can_be_met() -> None:
    layers = realistic(blocks=1)
    low, high = feasible_bits(layers)
    assert allocate(layers, low, "bits").cost <= low and allocate(layers, high, "bits").cost <= high


def test_bad_layers() -> None:
    with pytest.raises(RequestError, match="no layers"):
        allocate([], 10)
    one = Layer("one", 8, (Offer("a", 1.0, 1),))
    with pytest.raises(RequestError, match="two layers have one name"):
        allocate([one, one], 10)
    with pytest.raises(RequestError, match="one has a damage of nan under a"):
        allocate([Layer("one", 8, (Offer("a", float("nan"), 1),))], 1)


# --- the database


def test_damage_goes_through_the_measured_points() -> None:
    points = [(0.01, 0.001), (0.1, 0.02)]
    for error, kl in points:
        assert damage_of(error, points) == pytest.approx(kl)
    assert damage_of(0.001, points) == pytest.approx(0.0001)  # proportional below the first
    power = torch.log10(torch.tensor(20.0)).item()
    assert damage_of(1.0, points) == pytest.approx(0.02 * 10**power, rel=1e-4)
    assert damage_of(0.02, points) == pytest.approx(0.001 * 2**power, rel=1e-4)
    assert damage_of(0.3, []) == 0.3 and damage_of(0.0, points) == 0.0
    errors = [10 ** (n / 10) for n in range(-50, 5)]
    noisy = [damage_of(error, [(0.01, 0.004), (0.05, 0.001), (0.1, 0.02)]) for error in errors]
    assert noisy == sorted(noisy)


def test_database_is_written_line_by_line_and_refuses_another(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    header = {"model": "abc", "options": ["4b-g32", "2b-g32"]}
    database = Database.begin(path, header)
    row = Row(0, "a", "self_attn.q", "self_attn.q", 4, 32, 2.0, {"4b-g32": Measured(0.1, 0.05, 0.04, 88, 128)})
    database.add(row)
    with path.open("a") as file:
        file.write('{"block": 0, "na')  # killed here
    again = Database.begin(path, header)
    assert again.rows == {"a": row} and path.read_text().endswith("}\n")
    assert predict(again, {"a": "4b-g32"}) == 0.04  # not calibrated
    again.begin_calibration({"ids": "x"})
    again.add_point("a", "4b-g32", 0.04, 0.5)
    assert predict(Database.open(path), {"a": "4b-g32"}) == 0.5
    again.begin_calibration({"ids": "x"})
    assert again.points
    again.begin_calibration({"ids": "y"})
    assert not Database.open(path).points
    for other, words in ((["4b-g32"], "options"), (["4b-g32", "3b-g32"], '"3b-g32"')):
        with pytest.raises(RequestError, match=words):
            Database.begin(path, {**header, "options": other})
    with pytest.raises(RequestError, match="no matrix b"):
        predict(again, {"b": "4b-g32"})
    with pytest.raises(RequestError, match="no option 9b of a, only 4b-g32"):
        predict(again, {"a": "9b"})
    with pytest.raises(RequestError, match="cannot be read"):
        Database.open(tmp_path / "none")
    (tmp_path / "other").write_text("{}\n")
    with pytest.raises(RequestError, match="no sensitivity database"):
        Database.open(tmp_path / "other")


def test_a_table_of_measured_times_is_a_budget(tmp_path: Path) -> None:
    """Times by (matrix, option) make offers in seconds; a matrix without one is named."""
    database = Database.begin(tmp_path / "data.jsonl", {"options": ["4b-g32", "2b-g32"]})
    options = {"4b-g32": Measured(0.1, 0.05, 0.04, 88, 128), "2b-g32": Measured(0.9, 0.5, 0.4, 56, 128)}
    for name in ("a", "b"):
        database.add(Row(0, name, f"{name}.in", name, 4, 32, 2.0, options))
    seconds = {("a", "4b-g32"): 3e-6, ("a", "2b-g32"): 1e-6, ("b", "4b-g32"): 8e-6, ("b", "2b-g32"): 2e-6}
    found = allocate(database.layers(seconds=seconds), 6e-6, "seconds")
    assert found.choices == {"a": "4b-g32", "b": "2b-g32"} and found.cost == pytest.approx(5e-6)
    assert allocate_milp(database.layers(seconds=seconds), 6e-6, "seconds").choices == found.choices
    del seconds["b", "2b-g32"]
    with pytest.raises(RequestError, match="b has no"):
        allocate(database.layers(seconds=seconds), 6e-6, "seconds")
