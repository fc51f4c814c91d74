"""The sub1 format: what is stored, damage that must never become a weight, and products that decode as they go."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import featherweight as package
from featherweight.api import inspect
from featherweight.codec import Encoded, decode, encode, entropy_bits, runs
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.solution import Solution
from featherweight.errors import RequestError
from featherweight.formats import FORMATS, Sub1, from_config
from featherweight.kernels import KERNELS, pick, reasons, sub1_cpu
from featherweight.linear import CompressedLinear
from featherweight.recipe import Recipe
from runs import featherweight, journal

SUB1 = Sub1()
TERNARY = Grid(bits=1.58, group_size=None, scale_dtype=torch.bfloat16)
RULES = [
    replace(TERNARY, bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product((1.58, 2), (32, None), (True, False))
    if bits == 2 or symmetric
]


def solution(grid: Grid, rows: int, columns: int, zero_share: float) -> Solution:
    """Codes of which so many stand for zero, whatever their groups' zeros are, and scales of both signs."""
    draw = torch.Generator().manual_seed(rows + columns)
    groups = columns // grid.width(columns)
    zeros = torch.randint(0, 4, (rows, groups), dtype=torch.uint8, generator=draw)
    zeros = torch.full_like(zeros, grid.middle) if grid.symmetric else zeros
    others = torch.randint(grid.bottom, 4, (rows, columns), dtype=torch.uint8, generator=draw)
    some = torch.rand(rows, columns, generator=draw) >= zero_share
    codes = torch.where(some, others, zeros.repeat_interleave(columns // groups, -1))
    scales = ((torch.rand(rows, groups, generator=draw) + 0.5) * 0.02).to(grid.scale_dtype)
    scales[::3] *= -1
    return Solution(codes, scales, zeros, grid, torch.zeros(rows))


def nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("zero_share", [0.0, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("grid", RULES, ids=str)
def test_what_was_packed_comes_back(grid: Grid, zero_share: float) -> None:
    for rows, columns in ((1, 32), (33, 96), (40, 320)):
        packed = solution(grid, rows, columns, zero_share)
        tensors = SUB1.pack(packed, "q_proj")
        assert tuple(tensors) == SUB1.suffixes(grid) and all(tensor.is_contiguous() for tensor in tensors.values())
        on_meta = {suffix: t if suffix == SUB1.shape_in else t.to("meta") for suffix, t in tensors.items()}
        assert SUB1.shape(on_meta, grid) == (rows, columns)
        back = SUB1.unpack(tensors, SUB1.read(SUB1.config({"q_proj": grid})).of("q_proj"), "q_proj")
        for field in ("codes_RC", "scales_RG", "zeros_RG"):
            assert torch.equal(getattr(back, field), getattr(packed, field)), field
        assert torch.equal(back.values(), packed.values())


@pytest.mark.parametrize("grid", RULES, ids=str)
def test_symbols_are_codes_less_their_zeros_modulo_four(grid: Grid) -> None:
    packed = solution(grid, 5, 64, 0.6)
    tensors = SUB1.pack(packed)
    names = ("header", "row_words", "stream", "checksums")
    parts = {name: tensors[f"weight_{name}"] for name in names if tensors[f"weight_{name}"].numel()}
    symbols = decode(Encoded.from_tensors(parts, "it"), "it").tolist()
    width = 64 // packed.zeros_RG.shape[1]
    for row, column in itertools.product(range(5), range(64)):
        code, zero = int(packed.codes_RC[row, column]), int(packed.zeros_RG[row, column // width])
        assert symbols[row][column] == (code - zero) % 4
        assert (packed.values()[row, column] == 0) == (symbols[row][column] == 0)


def test_zeros_are_one_symbol_whatever_the_groups_zeros_are() -> None:
    """Encoded as they are, codes of asymmetric groups would spread the weight 0 over all four."""
    packed = solution(replace(TERNARY, bits=2, group_size=32, symmetric=False), 64, 2048, 0.9)
    tensors = SUB1.pack(packed)
    assert nbytes({k: t for k, t in tensors.items() if "scale" not in k and "zero" not in k}) < 0.6 * sum(
        t.nbytes for t in encode(packed.codes_RC).tensors().values()
    )
    found = SUB1.metrics(packed)
    assert found["zero_share"] == pytest.approx(float((packed.values() == 0).double().mean()))
    assert found["entropy_bits"] < 0.8 < 1.8 < entropy_bits(packed.codes_RC)


def test_a_pattern_is_stored_as_zeros() -> None:
    rule = Joint(replace(TERNARY, scale_dtype=torch.float16), Pattern(0.75))
    packed = replace(solution(rule.grid, 64, 768, 0.75), pattern=rule.pattern)
    packed = replace(packed, keep_RC=packed.codes_RC != 2)
    tensors = SUB1.pack(packed)
    back = SUB1.unpack(tensors, rule)
    assert torch.equal(back.codes_RC, packed.codes_RC) and back.keep_RC is None
    assert SUB1.read(SUB1.config({"q_proj": rule})).of("q_proj") == Grid(bits=2, group_size=None)
    assert 8 * nbytes(tensors) < 1.3 * packed.codes_RC.numel()


def test_requests_that_cannot_be_stored() -> None:
    with pytest.raises(RequestError, match=r"q_proj is to have 4 bits, and sub1 stores 1\.58 \(ternary\) or 2"):
        SUB1.check("q_proj", 64, 128, Grid(bits=4))
    with pytest.raises(RequestError, match=r"q_proj is pruned .* and sub1 stores codes only"):
        SUB1.check("q_proj", 64, 128, Pattern(0.5))
    with pytest.raises(RequestError, match=r"q_proj has torch\.float32 scales, and sub1 stores torch\.bfloat16 or"):
        SUB1.check("q_proj", 64, 128, replace(TERNARY, scale_dtype=torch.float32))
    with pytest.raises(RequestError, match="q_proj has 131200 inputs, and sub1 stores 131072 at most"):
        SUB1.check("q_proj", 64, 131200, TERNARY)
    for budget in ({"size_bytes": 10**9}, {"average_bits": 1.5}):
        with pytest.raises(RequestError, match=r"2 to 8 bits.*sub1 stores"):
            Recipe(bits=1.58, format="sub1", **budget)
    assert (SUB1.scale_dtype(torch.float32), SUB1.scale_dtype(torch.bfloat16)) == (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2, and version 1 of the sub1 format is read"),
        ({"codec": 3}, "quantization_config has codec"),
        ({"rules": [{"pattern": {"sparsity": 0.5, "block": 1}, "grid": None, "matrices": "*"}]}, "grids alone"),
    ],
)
def test_configs_that_are_not_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        from_config(SUB1.config({"q_proj": TERNARY}) | change)


def changed(tensors: dict[str, Tensor], suffix: str, place: int, by: int) -> dict[str, Tensor]:
    other = tensors[suffix].clone()
    other.view(torch.uint8)[place] ^= by
    return tensors | {suffix: other}


@pytest.mark.parametrize("zero_share", [0.3, 0.6, 0.9])
def test_damage_is_named_and_never_a_weight(zero_share: float) -> None:
    grid = replace(TERNARY, bits=2)
    tensors = SUB1.pack(solution(grid, 96, 256, zero_share))
    middle = tensors["weight_stream"].nbytes // 2
    damaged = [
        (changed(tensors, "weight_stream", middle, 16), "q_proj is damaged in tile 1"),
        (changed(tensors, "weight_checksums", 0, 1), "q_proj is damaged in tile 0"),
        (changed(tensors, "weight_header", 0, 2), "q_proj is encoded by version 3 of the codec"),
        (changed(tensors, "weight_header", 8, 1), "q_proj"),
        (tensors | {"weight_stream": tensors["weight_stream"][:-1]}, "q_proj is damaged in tile 2"),
        (tensors | {"weight_stream": torch.cat((tensors["weight_stream"], torch.zeros(1, dtype=torch.int32)))},
         "q_proj has .* words, and its rows take"),
        (tensors | {"weight_row_words": torch.ones(5, dtype=torch.uint8)}, "q_proj"),
        (tensors | {"weight_scale": tensors["weight_scale"].float()}, r"weight_scale is torch\.float32"),
        (tensors | {"weight_scale": tensors["weight_scale"][:-1]}, "weight_scale has shape"),
        ({k: t for k, t in tensors.items() if k != "weight_row_words"}, "q_proj has no weight_row_words"),
    ]  # fmt: skip
    for broken, message in damaged:
        with pytest.raises(RequestError, match=message):
            SUB1.unpack(broken, grid, "q_proj")
    with pytest.raises(RequestError, match="damaged in tile 1"):
        CompressedLinear.from_tensors(SUB1, grid, damaged[0][0]).prepare()


# --- products


def layer(packed: Solution, kernel: str = "auto", dtype: torch.dtype = torch.float32) -> CompressedLinear:
    return CompressedLinear.from_tensors(SUB1, packed.grid, SUB1.pack(packed), None, dtype, kernel)


@pytest.mark.parametrize("zero_share", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("grid", RULES, ids=str)
def test_products_are_those_of_the_values(grid: Grid, zero_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code, both ways to multiply, several tiles."""
    monkeypatch.setitem(KERNELS["sub1-tiles"].prepare.__globals__["TILE_WEIGHTS"], "cpu", 1)
    packed = solution(grid, 70, 288, zero_share)
    built = layer(packed)
    assert built.kernel.name == "sub1-tiles"
    for shape in ((288,), (0, 288), (5, 288), (2, 3, 288), (129, 288)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(built(x.float()).double(), x @ packed.values(torch.float64).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 200])
def test_products_in_the_dtype_of_the_model(dtype: torch.dtype, tokens: int) -> None:
    packed, x = solution(TERNARY, 64, 768, 0.885), torch.randn(tokens, 768).to(dtype)
    bias = torch.randn(64).to(dtype)
    built = CompressedLinear.from_tensors(SUB1, TERNARY, SUB1.pack(packed), bias, dtype)
    exact = x.double() @ packed.values(torch.float64).T + bias.double()
    assert built(x).dtype == dtype and (built(x).double() - exact).norm() < 2**-7 * exact.norm()


@pytest.mark.parametrize(("bits", "zero_share"), [(2, 0.2), (3, 0.6), (4, 0.8), (5, 0.9), (6, 0.95), (8, 0.99)])
def test_entries_of_every_width_make_the_rows_again(bits: int, zero_share: float) -> None:
    symbols_RC = solution(TERNARY, 40, 301, zero_share).codes_RC.sub(2) & 3
    levels_RC = torch.tensor([0, 1, 0, 2], dtype=torch.uint8)[symbols_RC.int()]
    words_RW, _ = runs.encode(runs.find_runs(levels_RC, 2), bits)
    found = sub1_cpu.of_runs(words_RW, bits, 301, np.array([1, -1], dtype=np.float32))
    assert torch.equal(found.dense(301), torch.tensor([0.0, 1.0, 0.0, -1.0])[symbols_RC.int()])


@pytest.mark.parametrize("tokens", [3, 200])
def test_gradients_reach_the_input(tokens: int) -> None:
    packed = solution(TERNARY, 40, 96, 0.8)
    x = torch.randn(tokens, 96, requires_grad=True)
    layer(packed)(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.values().sum(0).expand(tokens, 96))


def test_pick_takes_the_kernel_that_stays_small() -> None:
    assert pick(SUB1, TERNARY, 48, 256, torch.bfloat16, "cpu").name == "sub1-tiles"
    assert pick(SUB1, TERNARY, 48, 256, torch.bfloat16, "cpu", "cpu-int4").name == "cpu-int4"
    why = reasons(FORMATS["gptq"], Grid(), 48, 256, torch.bfloat16, "cpu")
    assert why["sub1-tiles"] == "it decodes sub1, and the weights are gptq"


@pytest.mark.parametrize("kernel", ["reference", "dense", "cpu-int4"])
def test_other_kernels_serve_it_too(kernel: str) -> None:
    packed, x = solution(TERNARY, 64, 256, 0.8), torch.randn(3, 256).bfloat16()
    got = layer(packed, kernel, torch.bfloat16)(x)
    exact = x.double() @ packed.values(torch.float64).T
    assert (got.double() - exact).norm() < 2**-6 * exact.norm()


PROGRAM = """
import sys, torch
from safetensors.torch import load_file
from featherweight.core.rules import Grid
from featherweight.formats import Sub1
from featherweight.linear import CompressedLinear

def most():
    status = open("/proc/self/status").read()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))

torch.set_num_threads(1)
tensors = load_file(sys.argv[1])
few, many = torch.ones(1, 4096).bfloat16(), torch.ones(129, 4096).bfloat16()
torch.nn.functional.linear(many, torch.ones(64, 4096).bfloat16())  # what a first product sets up
for kernel in ("sub1-tiles", "reference"):
    layer = CompressedLinear.from_tensors(Sub1(), Grid(2, None), tensors, kernel=kernel).prepare()
    before = most()
    layer(few), layer(many)
    print(most() - before)
"""


def test_nothing_is_ever_as_large_as_the_dense_matrix(tmp_path: Path) -> None:
    packed = solution(replace(TERNARY, bits=2), 4096, 4096, 0.885)
    save_file(SUB1.pack(packed), tmp_path / "one.safetensors")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "one.safetensors")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    tiles, reference = map(int, ran.stdout.split())
    dense_bytes = 4096 * 4096 * 2
    assert tiles < 0.75 * dense_bytes < 2 * dense_bytes < reference, "the last: the measurement can fail"


# --- whole models


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(48).view(2, 24)).logits


@pytest.fixture(scope="module")
def folder(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model, made by the command line."""
    out = tmp_path_factory.mktemp("sub1") / "out"
    small = ("--samples", 4, "--tokens", 32, "--calibration", text)
    ran = featherweight("compress", llama, out, "--recipe", "sub1", *small)
    assert ran.code == 0, ran.err
    return out


def test_compress_writes_it_and_the_journal_tells_zeros_and_entropy(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("featherweight", "sub1")
    rows = {row["name"]: row for row in inspect(folder)["matrices"]}
    for line in journal(folder):
        assert 0.2 < line["zero_share"] < 0.7 and 1.2 < line["entropy_bits"] < 1.59 and line["bits"] == 1.58
        assert line["bytes"] == rows[line["name"]]["bytes"]
        rows_, columns = line["shape"]
        assert line["bytes"] * 8 > line["entropy_bits"] * rows_ * columns + 16 * rows_


def test_load_and_from_pretrained_run_it_packed(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = logits(package.load(folder, "cpu", torch.float32, "dense"))
    ours, theirs = package.load(folder, "cpu", torch.float32), AutoModelForCausalLM.from_pretrained(folder)
    for model in (ours, theirs):
        layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
        assert len(layers) == 14 and {module.kernel.name for module in layers} == {"sub1-tiles"}
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_damage_in_a_folder_is_named_on_loading(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    tensors, name = load_file(shard), "model.layers.0.mlp.down_proj"
    save_file(changed(tensors, f"{name}.weight_stream", 40, 1), shard, metadata={"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, package.load):
        with pytest.raises(RequestError, match=f"{name} is damaged in tile 0"):
            load(tmp_path / "out")


def test_save_pretrained_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    one, other = model.state_dict(), again.state_dict()
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
