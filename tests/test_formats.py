"""What every format owes (pack then unpack gives the solution back), and each layout against an independent reading."""

from __future__ import annotations

import importlib.metadata
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.errors import RequestError
from featherweight.formats import FORMATS, Format, by_name, from_config

ROWS, COLUMNS = 96, 128
GRIDS = [
    Grid(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product((2, 3, 4, 5, 6, 7, 8), (32, None), (True, False))
] + [Grid(bits=1.58, group_size=32)]


def random_solution(grid: Grid, rows: int = ROWS, columns: int = COLUMNS, lowest_zero: int = 0) -> Solution:
    """Random codes, scales of both signs and, off the symmetric grid, random zeros."""
    draw = torch.Generator().manual_seed(rows + columns)
    groups = columns // grid.width(columns)
    codes = torch.randint(grid.bottom, grid.top + 1, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = ((torch.rand(rows, groups, generator=draw) + 0.5) * 0.02).to(grid.scale_dtype)
    scales[::3] *= -1
    zeros = torch.randint(lowest_zero, grid.top + 1, (rows, groups), dtype=torch.uint8, generator=draw)
    zeros = torch.full_like(zeros, grid.middle) if grid.symmetric else zeros
    return Solution(codes, scales, zeros, grid, torch.rand(rows, generator=draw))


def holds(format: Format, grid: Grid) -> bool:
    widths = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "sub1": (2,)}
    return grid.stored_bits in widths.get(format.name, range(2, 9))


CODES = ("compressed-tensors", "gptq", "gptq_v2", "sparse", "sub1")  # formats that give back the codes of a grid
CASES = [pytest.param(FORMATS[f], g, id=f"{f}-{g}") for f in CODES for g in GRIDS if holds(FORMATS[f], g)]


@pytest.mark.parametrize(("format", "grid"), CASES)
def test_unpack_gives_back_what_was_packed(format: Format, grid: Grid) -> None:
    grid = replace(grid, scale_dtype=format.scale_dtype(torch.bfloat16))
    solution = random_solution(grid, lowest_zero=format.lowest_zero(grid))
    tensors = format.pack(solution)
    assert tuple(tensors) == format.suffixes(grid)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert format.shape(tensors, grid) == (ROWS, COLUMNS)
    back = format.unpack(tensors, format.read(format.config({"q_proj": grid})).of("q_proj"))
    assert torch.equal(back.codes_RC, solution.codes_RC) and back.codes_RC.dtype == torch.uint8
    assert torch.equal(back.scales_RG, solution.scales_RG) and back.scales_RG.dtype == grid.scale_dtype
    assert torch.equal(back.zeros_RG, solution.zeros_RG) and back.zeros_RG.dtype == torch.uint8
    assert back.grid == replace(grid, bits=grid.stored_bits)
    assert torch.equal(back.values(), solution.values()) and back.certificate == 0.0


@pytest.mark.parametrize(("format", "grid"), CASES)
def test_config_names_the_format_and_the_grid(format: Format, grid: Grid) -> None:
    config = format.config({"q_proj": grid, "k_proj": grid}, ["lm_head", "model.layers.0.mlp.gate"])
    found, rules = from_config(config)
    read = rules.of("k_proj")
    assert found is format
    assert (read.bits, read.group_size, read.symmetric) == (grid.stored_bits, grid.group_size, grid.symmetric)


@pytest.mark.parametrize("format", [FORMATS[name] for name in CODES], ids=CODES)
def test_refusals_common_to_all(format: Format) -> None:
    grid = Grid(2 if format.name == "sub1" else 4, group_size=32, scale_dtype=format.scale_dtype(torch.float16))
    solution = random_solution(grid)
    with pytest.raises(RequestError, match=r"q_proj has 80 inputs, which the group size 32 does not divide"):
        format.check("q_proj", 32, 80, grid)
    with pytest.raises(RequestError, match=r"experts has shape \(1, 96, 128\)"):
        format.pack(replace(solution, codes_RC=solution.codes_RC[None]), "experts")
    with pytest.raises(RequestError, match="q_proj has a scale beyond the 65504"):
        format.pack(replace(solution, scales_RG=solution.scales_RG * 1e7), "q_proj")
    with pytest.raises(RequestError, match=rf"q_proj has zeros {grid.middle - 1} \.\. "):
        format.pack(replace(solution, zeros_RG=solution.zeros_RG - 1), "q_proj")
    tensors = format.pack(solution)
    last = format.suffixes(grid)[-1]
    with pytest.raises(RequestError, match=f"q_proj has no {last}"):
        format.unpack({k: v for k, v in tensors.items() if k != last}, grid, "q_proj")
    with pytest.raises(RequestError, match="q_proj"):
        format.unpack(tensors, replace(grid, group_size=64), "q_proj")


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "message"),
    [
        (5, 32, 32, "wants 5 bits"),
        (3, 48, 64, "48 outputs.*multiple of 32"),
        (3, 64, 48, "48 inputs.*multiple of 32"),
        (4, 12, 16, "12 outputs.*multiple of 8"),
        (2, 16, 24, "24 inputs.*multiple of 16"),
        (8, 6, 16, "6 outputs.*multiple of 4"),
    ],
)
def test_gptq_refuses_what_its_words_cannot_hold(bits: int, rows: int, columns: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        FORMATS["gptq"].check("q_proj", rows, columns, Grid(bits=bits, group_size=None))


def test_gptq_refuses_other_scales_and_other_orders() -> None:
    gptq, grid = FORMATS["gptq"], Grid(bits=4, group_size=32)
    with pytest.raises(RequestError, match=r"torch.bfloat16 scales, and gptq stores torch.float16"):
        gptq.check("q_proj", 64, 64, replace(grid, scale_dtype=torch.bfloat16))
    tensors = gptq.pack(random_solution(grid))
    with pytest.raises(RequestError, match=r"q_proj.g_idx orders the inputs by activation"):
        gptq.unpack(tensors | {"g_idx": tensors["g_idx"].flip(0)}, grid, "q_proj")


def test_gptq_v1_has_no_zero_of_zero() -> None:
    v1, v2, grid = FORMATS["gptq"], FORMATS["gptq_v2"], Grid(bits=4, group_size=32, symmetric=False)
    solution = random_solution(grid)
    assert int(solution.zeros_RG.min()) == 0 and (v1.lowest_zero(grid), v2.lowest_zero(grid)) == (1, 0)
    with pytest.raises(RequestError, match="a zero of 0, and gptq stores 1 or more"):
        v1.pack(solution)
    with pytest.raises(RequestError, match=r"q_proj.qzeros stores 15"):
        v1.unpack(v2.pack(solution), grid, "q_proj")


def field(words: list[int], i: int, bits: int) -> int:
    """The i-th code of a column of words, read bit by bit."""
    at = range(i * bits, (i + 1) * bits)
    return sum(((words[bit // 32] >> (bit % 32)) & 1) << n for n, bit in enumerate(at))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_layout_read_bit_by_bit(version: str, bits: int) -> None:
    grid = Grid(bits=bits, group_size=32, symmetric=False)
    solution = random_solution(grid, 32, 64, lowest_zero=1)
    tensors = by_name(version).pack(solution)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (2 * bits, 32)),
        "qzeros": (torch.int32, (2, bits)),
        "scales": (torch.float16, (2, 32)),
        "g_idx": (torch.int32, (64,)),
    }
    qweight, qzeros = tensors["qweight"].T.tolist(), tensors["qzeros"].tolist()
    values = torch.zeros(32, 64)
    for out, into in itertools.product(range(32), range(64)):
        group = int(tensors["g_idx"][into])
        zero = field(qzeros[group], out, bits) + (1 if version == "gptq" else 0)
        values[out, into] = (field(qweight[out], into, bits) - zero) * float(tensors["scales"][group, out])
    assert torch.equal(values, solution.values())


def test_gptq_published_constants() -> None:
    solution = random_solution(Grid(bits=4, group_size=32))
    assert (FORMATS["gptq"].pack(solution)["qzeros"] == 0x77777777).all()
    assert (FORMATS["gptq_v2"].pack(solution)["qzeros"] == 0x88888888 - (1 << 32)).all()


def installed_compressed_tensors() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("compressed-tensors").split(".")[:2])


@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_is_what_the_package_makes(bits: int, symmetric: bool, size: int | None) -> None:
    pytest.importorskip("compressed_tensors")
    if 32 % bits and installed_compressed_tensors() < (0, 18):
        pytest.skip("compressed-tensors before 0.18 leaves gaps between codes of 3, 5, 6 and 7 bits")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    format = FORMATS["compressed-tensors"]
    grid = Grid(bits=bits, group_size=size, symmetric=symmetric, scale_dtype=torch.float32)
    solution = random_solution(grid, 50, 96)
    scheme = QuantizationConfig.model_validate(format.config({"q_proj": grid})).config_groups["group_0"]
    middle = grid.middle
    dense = {"weight": solution.values(), "weight_scale": solution.scales_RG}
    if not symmetric:
        dense["weight_zero_point"] = (solution.zeros_RG.int() - middle).to(torch.int8)
    theirs, ours = PackedQuantizationCompressor.compress(dense, scheme), format.pack(solution)
    assert set(ours) == set(theirs)
    for suffix, tensor in theirs.items():
        assert torch.equal(ours[suffix], tensor) and ours[suffix].dtype == tensor.dtype, suffix
    assert torch.equal(PackedQuantizationCompressor.decompress(ours, scheme)["weight"], solution.values())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compressed_tensors_config_passes_its_own_model(grid: Grid) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = FORMATS["compressed-tensors"].config({"q_proj": grid}, ["lm_head"])
    parsed = quantization.QuantizationConfig.model_validate(config)
    assert set(config) <= set(parsed.model_dump()) and parsed.ignore == ["lm_head"]
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size) == (grid.stored_bits, grid.group_size)


def test_gaps_between_codes_are_named_as_such() -> None:
    format, grid = FORMATS["compressed-tensors"], Grid(bits=3, group_size=32)
    tensors = format.pack(random_solution(grid, 8, 1024))
    with pytest.raises(RequestError, match="q_proj has 103 words a row, and 1024 inputs fill 96"):
        format.unpack(tensors | {"weight_packed": torch.zeros(8, 103, dtype=torch.int32)}, grid, "q_proj")


def changed(config: dict[str, Any], where: str, value: object) -> dict[str, Any]:
    """`config` with one setting, at a dotted path, changed."""
    key, _, rest = where.partition(".")
    return config | {key: changed(config.get(key) or {}, rest, value) if rest else value}


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("config_groups", {}, "no config_groups"),
        ("config_groups.group_0.input_activations", {"num_bits": 8}, "input_activations"),
        ("config_groups.group_0.weights.actorder", "group", "actorder group"),
        ("config_groups.group_0.weights.type", "float", "type float"),
        ("config_groups.group_0.weights.strategy", "tensor", "strategy tensor"),
        ("config_groups.group_0.weights.strategy", "channel", "strategy channel with group_size 128"),
        ("config_groups.group_0.weights.num_bits", 16, "bits must be one of"),
        ("config_groups.group_0.format", "int-quantized", "format is int-quantized"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        ("quant_method", "awq", "quant_method is awq"),
    ],
)
def test_compressed_tensors_configs_that_are_not_read(where: str, value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        from_config(changed(FORMATS["compressed-tensors"].config({"q_proj": Grid()}), where, value))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("bits", 5, "bits is 5"),
        ("checkpoint_format", "gptq_p", "no format gptq_p"),
        ("dynamic", {"+:.*mlp.*": {"bits": 5}}, "bits is 5"),
        ("dynamic", {".*mlp.*": {"adapter": {}}}, "dynamic changes adapter for .*mlp.*"),
        ("dynamic", {"+:(": {"bits": 8}}, "no regular expression"),
        ("pack_dtype", "int64", "pack_dtype is int64"),
    ],
)
def test_gptq_configs_that_are_not_read(where: str, value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        from_config(changed(FORMATS["gptq"].config({"q_proj": Grid()}), where, value))


def test_gptq_skips_what_is_ignored() -> None:
    config = FORMATS["gptq"].config(
        {"q_proj": Grid()}, ["lm_head", "model.layers.0.mlp.gate", "re:.*router"], meta={"damping": 0.01}
    )
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.gate$": {}, "-:.*router": {}}
    assert config["meta"]["damping"] == 0.01


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(
        RequestError, match=r"no format awq: choose compressed-tensors, gptq, gptq_v2, sparse, sub1, dense\."
    ):
        by_name("awq")
