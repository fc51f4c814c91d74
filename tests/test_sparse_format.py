"""The sparse layout and dense folders: identity, sizes to the byte, and damage that must never become a weight."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.codec import pack_flags, unpack_flags
from featherweight.core.rules import Grid, Joint, Pattern, Rule
from featherweight.core.solution import AnySolution, Solution, SparseSolution
from featherweight.core.support import best_mask
from featherweight.errors import RequestError
from featherweight.formats import FORMATS, from_config
from featherweight.formats.sparse import index_bits, indexed

SPARSE, DENSE = FORMATS["sparse"], FORMATS["dense"]
PATTERNS = [
    Pattern(0.0), Pattern(0.5), Pattern(0.97), Pattern(0.5, block=4),
    *(Pattern(keep=n, of=m) for n, m in ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 3), (4, 16), (5, 32))),
]  # fmt: skip
GRIDS = [
    Grid(bits=bits, group_size=size, symmetric=symmetric, scale_dtype=torch.bfloat16)
    for bits, size, symmetric in itertools.product((2, 3, 4, 8), (96, None), (True, False))
] + [Grid(bits=1.58, group_size=96, scale_dtype=torch.float16)]
SHAPES = [(1, 96), (7, 96), (33, 288)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def draws(rows: int, columns: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * rows + columns)


def pruned(pattern: Pattern, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> SparseSolution:
    """Random weights; a kept one may be zero, and unstructured, the first row is pruned entirely where that fits."""
    weight_RC = torch.randn(rows, columns, generator=draws(rows, columns)).to(dtype)
    weight_RC[-1, ::5] = 0
    worth_RC = torch.rand(rows, columns, generator=draws(rows, columns))
    if not pattern.of and rows > 1 and pattern.sparsity > 1 / rows:
        worth_RC[0] = -1
    keep_RC = best_mask(worth_RC, pattern)
    return SparseSolution(weight_RC * keep_RC, keep_RC, pattern, torch.zeros(rows))


def joint(rule: Joint, rows: int, columns: int) -> Solution:
    """Random codes, and zeros' own codes where pruned."""
    grid, draw = rule.grid, draws(rows, columns)
    groups = columns // grid.width(columns)
    codes = torch.randint(grid.bottom, grid.top + 1, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = (torch.randn(rows, groups, generator=draw) * 0.02 + 0.1).to(grid.scale_dtype)
    zeros = torch.randint(0, grid.top + 1, (rows, groups), dtype=torch.uint8, generator=draw)
    zeros = torch.full_like(zeros, grid.middle) if grid.symmetric else zeros
    keep = pruned(rule.pattern, rows, columns).keep_RC
    codes = torch.where(keep, codes, zeros.repeat_interleave(columns // groups, -1))
    return Solution(codes, scales, zeros, grid, torch.zeros(rows), keep_RC=keep, pattern=rule.pattern)


def nbytes(tensors: dict[str, Tensor], but: tuple[str, ...] = ()) -> int:
    return sum(tensor.nbytes for suffix, tensor in tensors.items() if suffix not in but)


def round_trip(solution: AnySolution, **options: Any) -> AnySolution:
    tensors = SPARSE.pack(solution, "q_proj", **options)
    assert tuple(tensors) == SPARSE.suffixes(solution.rule)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    rule = SPARSE.read(SPARSE.config({"q_proj": solution.rule}) or {}).of("q_proj")
    assert SPARSE.shape({k: t if k == "weight_shape" else t.to("meta") for k, t in tensors.items()}, rule)
    return SPARSE.unpack(tensors, rule, "q_proj")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruned_floats_come_back(pattern: Pattern) -> None:
    for (rows, columns), dtype in itertools.product(SHAPES, DTYPES):
        solution = pruned(pattern, rows, columns, dtype)
        back = round_trip(solution)
        assert isinstance(back, SparseSolution) and back.values_RC.dtype == dtype
        assert torch.equal(back.values_RC, solution.values_RC) and torch.equal(back.keep_RC, solution.keep_RC)
        assert (back.pattern, back.certificate) == (pattern, 0.0)
        in_half = round_trip(solution, dtype=torch.float16)
        assert torch.equal(in_half.values(), solution.values_RC.half().float())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pruned_codes_come_back(grid: Grid, pattern: Pattern) -> None:
    for rows, columns in SHAPES:
        solution = joint(Joint(grid, pattern), rows, columns)
        back = round_trip(solution)
        assert isinstance(back, Solution) and back.keep_RC is not None and solution.keep_RC is not None
        for field in ("codes_RC", "scales_RG", "zeros_RG", "keep_RC"):
            assert torch.equal(getattr(back, field), getattr(solution, field)), field
        assert back.rule == Joint(replace(grid, bits=grid.stored_bits), pattern)
        assert torch.equal(back.values(), solution.values())


def test_a_layer_pruned_to_nothing_comes_back() -> None:
    keep = torch.zeros(3, 96, dtype=torch.bool)
    empty = replace(pruned(Pattern(0.97), 3, 96), values_RC=torch.zeros(3, 96), keep_RC=keep)
    assert torch.equal(round_trip(empty).values(), torch.zeros(3, 96))
    solution = joint(Joint(GRIDS[0], Pattern(0.97)), 3, 96)
    codes = solution.zeros_RG.repeat_interleave(96, -1)
    assert torch.equal(round_trip(replace(solution, codes_RC=codes, keep_RC=keep)).values(), torch.zeros(3, 96))


@pytest.mark.gpu
def test_tensors_stay_on_their_device() -> None:
    solution = joint(Joint(GRIDS[0], Pattern(0.5)), 7, 96)
    moved = replace(
        solution,
        **{f: getattr(solution, f).cuda() for f in ("codes_RC", "scales_RG", "zeros_RG", "keep_RC", "loss_R")},
    )
    back = round_trip(moved)
    assert back.codes_RC.is_cuda and torch.equal(back.codes_RC.cpu(), solution.codes_RC)


def test_flags_are_read_bit_by_bit() -> None:
    flags = torch.rand(5, 19, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_flags(flags)
    assert packed.shape == (5, 3) and torch.equal(unpack_flags(packed)[:, :19], flags)
    assert all(((int(packed[r, c // 8]) >> (c % 8)) & 1) == flags[r, c] for r in range(5) for c in range(19))
    assert not unpack_flags(packed)[:, 19:].any()


@pytest.mark.parametrize(
    ("pattern", "bits"), [((1, 4), 2), ((2, 4), 2), ((1, 2), 1), ((2, 8), 3), ((4, 8), None), ((3, 4), None)]
)
def test_places_are_stored_where_they_are_no_longer_than_a_mask(pattern: tuple[int, int], bits: int | None) -> None:
    rule = Pattern(keep=pattern[0], of=pattern[1])
    assert indexed(rule) == (bits is not None) and (bits is None or index_bits(rule) == bits)


def test_layout_of_two_of_four_read_bit_by_bit() -> None:
    rows, columns = 3, 96
    solution = pruned(Pattern(keep=2, of=4), rows, columns)
    tensors = SPARSE.pack(solution)
    values = torch.zeros(rows, columns)
    for row, k in itertools.product(range(rows), range(columns // 2)):
        word = int(tensors["weight_index"][row, 2 * k // 32]) & 0xFFFFFFFF
        values[row, 4 * (k // 2) + ((word >> (2 * k % 32)) & 3)] = tensors["weight_values"][row, k]
    assert torch.equal(values, solution.values_RC)


ROWS, COLUMNS = 256, 1024
DENSE_BYTES = 2 * ROWS * COLUMNS


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        (Pattern(0.5), 9 / 16 * 16),
        (Pattern(keep=2, of=4), 8 + 1),
        (Pattern(keep=1, of=4), 4 + 0.5),
        (Joint(Grid(bits=4, group_size=128), Pattern(keep=2, of=4)), 3.125),
        (Joint(Grid(bits=4, group_size=128), Pattern(0.5)), 1 + 2 + 0.125),
        (Joint(Grid(bits=4, group_size=128), Pattern(keep=4, of=8)), 1 + 2 + 0.125),
        (Joint(Grid(bits=3, group_size=64, symmetric=False), Pattern(0.75)), 1 + 0.75 + 19 / 64),
        (Grid(bits=4, group_size=128), 4.125),
    ],
    ids=str,
)
def test_sizes_are_what_the_arithmetic_says(rule: Rule, bits: float) -> None:
    if isinstance(rule, Pattern):
        tensors = SPARSE.pack(pruned(rule, ROWS, COLUMNS), dtype=torch.bfloat16)
    elif isinstance(rule, Joint):
        tensors = SPARSE.pack(joint(rule, ROWS, COLUMNS))
    else:
        solution = joint(Joint(rule, Pattern(0.0)), ROWS, COLUMNS)
        tensors = SPARSE.pack(replace(solution, pattern=None))
    assert nbytes(tensors, but=("weight_shape", "weight_kept")) * 8 == bits * ROWS * COLUMNS
    assert nbytes(tensors) - math.ceil(bits * ROWS * COLUMNS / 8) in (16, 24)


def damaged(tensors: dict[str, Tensor], suffix: str, change: Any) -> dict[str, Tensor]:
    return tensors | {suffix: change(tensors[suffix].clone())}


def flip(tensor: Tensor) -> Tensor:
    """The lowest bit of the first element the other way round."""
    tensor.view(-1)[0] ^= 1
    return tensor


UNSTRUCTURED, TWO_FOUR, FOUR_EIGHT = Pattern(0.5), Pattern(keep=2, of=4), Pattern(keep=4, of=8)
INT4 = Grid(bits=4, group_size=32)


@pytest.mark.parametrize(
    ("rule", "suffix", "change", "message"),
    [
        (UNSTRUCTURED, "weight_mask", flip, r"q_proj.weight_mask keeps \d+ weights, and q_proj.weight_values holds 48"),
        (
            UNSTRUCTURED,
            "weight_values",
            lambda t: t[:-1],
            "q_proj.weight_mask keeps 48 weights.*weight_values holds 47",
        ),
        (UNSTRUCTURED, "weight_values", lambda t: t[None], "q_proj.weight_values is torch.float32 with 2 axes"),
        (UNSTRUCTURED, "weight_values", lambda t: t.double(), "q_proj.weight_values is torch.float64"),
        (UNSTRUCTURED, "weight_mask", lambda t: t[:, :-1], r"q_proj.weight_mask has shape \(1, 11\)"),
        (UNSTRUCTURED, "weight_shape", lambda t: t + 1, r"q_proj.weight_mask has shape \(1, 12\)"),
        (UNSTRUCTURED, "weight_shape", lambda t: t * 0, "q_proj.weight_shape says 0 x 0"),
        (FOUR_EIGHT, "weight_mask", flip, "q_proj.weight_mask keeps [35] of 8 weights, and 4:8 is 4"),
        (FOUR_EIGHT, "weight_values", lambda t: t[:, :-1], r"q_proj.weight_values has shape \(1, 47\)"),
        (TWO_FOUR, "weight_index", lambda t: t * 0, "q_proj.weight_index has places that do not rise from 0 to 3"),
        (TWO_FOUR, "weight_index", lambda t: t[:, :-1], r"q_proj.weight_index has shape \(1, 2\)"),
        (Pattern(keep=1, of=3), "weight_index", lambda t: t * 0 - 1, "do not rise from 0 to 2"),
        (Joint(INT4, UNSTRUCTURED), "weight_mask", flip, r"q_proj.weight_mask keeps \d+ weights.*weight_kept says 48"),
        (Joint(INT4, UNSTRUCTURED), "weight_kept", flip, "q_proj.weight_mask keeps 48 weights.*weight_kept says 49"),
        (Joint(INT4, UNSTRUCTURED), "weight_packed", lambda t: t[:-1], r"q_proj.weight_packed has shape \(5,\)"),
        (Joint(INT4, TWO_FOUR), "weight_packed", lambda t: t[:, :-1], r"q_proj.weight_packed has shape \(1, 5\)"),
        (Joint(INT4, TWO_FOUR), "weight_scale", lambda t: t[:, :-1], r"q_proj.weight_scale has shape \(1, 2\)"),
    ],
)
def test_damage_is_named(rule: Rule, suffix: str, change: Any, message: str) -> None:
    solution = joint(rule, 1, 96) if isinstance(rule, Joint) else pruned(rule, 1, 96)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=message):
        SPARSE.unpack(damaged(SPARSE.pack(solution), suffix, change), rule, "q_proj")


def test_bits_behind_the_last_column_are_damage() -> None:
    tensors = SPARSE.pack(pruned(UNSTRUCTURED, 2, 30))
    tensors["weight_mask"][1, 3] |= 1 << 7
    with pytest.raises(RequestError, match=r"q_proj.weight_mask has bits behind its 30 columns"):
        SPARSE.unpack(tensors, UNSTRUCTURED, "q_proj")


def test_what_cannot_be_packed() -> None:
    solution = pruned(UNSTRUCTURED, 8, 96)
    with pytest.raises(RequestError, match="q_proj keeps 0 to 4 weights of each 4, and 2:4 is 2"):
        SPARSE.pack(replace(solution, pattern=TWO_FOUR), "q_proj")
    with pytest.raises(RequestError, match=r"q_proj is torch.float64, and sparse stores"):
        SPARSE.pack(replace(solution, values_RC=solution.values_RC.double()), "q_proj")
    with pytest.raises(RequestError, match="q_proj has a weight beyond the 65504"):
        SPARSE.pack(replace(solution, values_RC=solution.values_RC * 1e7), "q_proj", torch.float16)
    with pytest.raises(RequestError, match=r"q_proj has shape \(1, 8, 96\)"):
        SPARSE.pack(replace(solution, values_RC=solution.values_RC[None]), "q_proj")
    with pytest.raises(RequestError, match="q_proj has 30 inputs, which 2:4 sparsity does not divide"):
        SPARSE.check("q_proj", 8, 30, TWO_FOUR)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq_v2"])
def test_formats_of_codes_hold_joint_rules_and_refuse_patterns(name: str) -> None:
    format = FORMATS[name]
    rule = Joint(Grid(bits=4, group_size=32, scale_dtype=torch.float16), TWO_FOUR)
    solution = joint(rule, 32, 96)
    tensors = format.pack(solution)
    assert tuple(tensors) == format.suffixes(rule)
    read = (from_config(format.config({"a": rule}) or {})[1]).of("a")
    assert read == Grid(bits=4, group_size=32)
    for asked in (rule, read):
        back = format.unpack(tensors, asked)
        assert isinstance(back, Solution) and back.keep_RC is None and back.pattern is None
        assert torch.equal(back.codes_RC, solution.codes_RC) and torch.equal(back.values(), solution.values())
    message = rf"q_proj is pruned \(2:4\) and not rounded, and {name} stores codes only: use --format sparse or dense"
    for refused in (
        lambda: format.check("q_proj", 32, 96, TWO_FOUR),
        lambda: format.pack(pruned(TWO_FOUR, 32, 96), "q_proj"),
        lambda: format.unpack(tensors, TWO_FOUR, "q_proj"),
    ):
        with pytest.raises(RequestError, match=message):
            refused()


def test_dense_keeps_zeros_in_place() -> None:
    solution = pruned(UNSTRUCTURED, 7, 96)
    tensors = DENSE.pack(solution, dtype=torch.bfloat16)
    assert list(tensors) == ["weight"] == list(DENSE.suffixes(UNSTRUCTURED))
    assert torch.equal(tensors["weight"], solution.values_RC.bfloat16()) and tensors["weight"].is_contiguous()
    back = DENSE.unpack(tensors, UNSTRUCTURED)
    assert isinstance(back, SparseSolution) and torch.equal(back.keep_RC, tensors["weight"] != 0)
    assert DENSE.config({"q_proj": UNSTRUCTURED}) is None and DENSE.shape(tensors, UNSTRUCTURED) == (7, 96)
    fake = joint(Joint(INT4, TWO_FOUR), 7, 96)
    assert torch.equal(DENSE.pack(fake, dtype=torch.float32)["weight"], fake.values())
    assert DENSE.pack(fake)["weight"].dtype == torch.float16
    with pytest.raises(RequestError, match="q_proj has a weight beyond the 65504"):
        DENSE.pack(replace(solution, values_RC=solution.values_RC * 1e7), "q_proj", torch.float16)
    with pytest.raises(RequestError, match="has no quantization_config"):
        DENSE.read({})


# --- a rule for each matrix

MIXED: dict[str, Rule] = {
    "model.layers.0.q_proj": Grid(bits=4, group_size=32),
    "model.layers.0.k_proj": Grid(bits=4, group_size=32),
    "model.layers.0.down_proj": Grid(bits=8, group_size=None, symmetric=False),
    "model.layers.10.q_proj": Grid(bits=2, group_size=64),
}


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq_v2", "sparse"])
def test_mixed_rules_are_read_back_exactly(name: str) -> None:
    config = FORMATS[name].config(MIXED, ["lm_head"])
    format, rules = from_config(config or {})
    assert format is FORMATS[name]
    assert {matrix: rules.of(matrix) for matrix in MIXED} == MIXED
    assert set(rules.distinct) == set(MIXED.values())
    if not name.startswith("gptq"):  # there, others obey the config's own
        with pytest.raises(RequestError, match=r"has 3 rules, and none is for model\.layers\.1\.q_proj"):
            rules.of("model.layers.1.q_proj")


def test_mixed_rules_in_the_words_of_each_format() -> None:
    groups = (FORMATS["compressed-tensors"].config(MIXED) or {})["config_groups"]
    assert [group["targets"] for group in groups.values()] == [
        ["model.layers.0.q_proj", "model.layers.0.k_proj"], ["model.layers.0.down_proj"], ["model.layers.10.q_proj"],
    ]  # fmt: skip
    config = FORMATS["gptq"].config(MIXED, ["lm_head", "model.gate"]) or {}
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert config["dynamic"] == {
        r"-:^model\.gate$": {},
        r"+:^(?:model\.layers\.0\.down_proj)$": {"bits": 8, "group_size": -1, "desc_act": False, "sym": False},
        r"+:^(?:model\.layers\.10\.q_proj)$": {"bits": 2, "group_size": 64, "desc_act": False, "sym": True},
    }


def test_mixed_rules_of_patterns_and_grids() -> None:
    mixed: dict[str, Rule] = {"a": UNSTRUCTURED, "b": TWO_FOUR, "c": Joint(INT4, Pattern(0.5, block=8)), "d": INT4}
    config = SPARSE.config(mixed, ["lm_head"]) or {}
    assert config == {
        "quant_method": "featherweight", "format": "sparse", "version": 1, "ignore": ["lm_head"],
        "rules": [
            {"pattern": {"sparsity": 0.5, "block": 1}, "grid": None, "matrices": ["a"]},
            {"pattern": {"keep": 2, "of": 4}, "grid": None, "matrices": ["b"]},
            {"pattern": {"sparsity": 0.5, "block": 8}, "grid": {"bits": 4, "group_size": 32, "symmetric": True},
             "matrices": ["c"]},
            {"pattern": None, "grid": {"bits": 4, "group_size": 32, "symmetric": True}, "matrices": ["d"]},
        ],
    }  # fmt: skip
    rules = SPARSE.read(config)
    assert {name: rules.of(name) for name in mixed} == mixed
    assert (SPARSE.config({"a": INT4, "b": INT4}) or {})["rules"][0]["matrices"] == "*"


def test_two_rules_for_one_matrix_are_refused() -> None:
    config = FORMATS["compressed-tensors"].config(MIXED) or {}
    config["config_groups"]["group_2"]["targets"] = ["re:.*q_proj"]
    rules = from_config(config)[1]
    assert rules.of("model.layers.5.q_proj") == Grid(bits=2, group_size=64)
    with pytest.raises(RequestError, match=r"has 2 rules for model\.layers\.0\.q_proj, and a matrix obeys 1"):
        rules.of("model.layers.0.q_proj")
    config["config_groups"]["group_2"]["targets"] = ["Linear"]
    with pytest.raises(RequestError, match=r"has 2 rules for model\.layers\.0\.q_proj"):
        from_config(config)[1].of("model.layers.0.q_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2, and version 1 of the sparse format is read"),
        ({"version": None}, "version is None, and version 1"),
        ({"format": "sparse-next"}, "format is sparse-next, and sparse or sub1 is read"),
        ({"codebook": 1}, "quantization_config has codebook, and format, ignore"),
        ({"rules": []}, "rules holds no rule"),
        ({"rules": [{"pattern": None, "grid": None, "matrices": "*"}]}, "neither pattern nor grid"),
        ({"rules": [{"pattern": {"keep": 2, "of": 4}, "grid": None}]}, r"rules\[0\] has no matrices"),
        ({"rules": ["2:4"]}, r"rules\[0\] is '2:4', and an object is read"),
        ({"rules": [{"pattern": {"keep": 2, "of": 4}, "grid": None, "matrices": "all"}]}, "matrices is 'all'"),
        ({"rules": [{"pattern": {"keep": 2, "of": "4"}, "grid": None, "matrices": "*"}]}, r"pattern\.of is '4'"),
        ({"rules": [{"pattern": {"keep": 2, "of": 4, "of2": 1}, "grid": None, "matrices": "*"}]}, "has of2"),
        (
            {"rules": [{"pattern": {"sparsity": 1.5, "block": 1}, "grid": None, "matrices": "*"}]},
            "less than 1, not 1.5",
        ),
        ({"rules": [{"pattern": None, "grid": {"bits": 4}, "matrices": "*"}]}, "grid has no group_size"),
    ],
)
def test_sparse_configs_that_are_not_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        from_config((SPARSE.config({"q_proj": TWO_FOUR}) or {}) | change)
