"""The CUDA kernel of sub1 without a GPU: its arithmetic and its shares of work in emulation, what it compiles to, where
it is taken. Tests marked gpu run it.

Shapes: R outputs, C inputs, T tokens, E experts, M matrices of an expert, N pairs of a token and an expert.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda.pathfinder import find_nvidia_binary_utility
from torch import Tensor

from featherweight.codec import decode, encode
from featherweight.codec.rows import side_by_side
from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import Solution
from featherweight.formats import FORMATS
from featherweight.kernels import pick, reasons, sub1_bank
from featherweight.kernels.sub1_bank import Bank, Entry, entry_of, fused
from featherweight.kernels.sub1_launch import MOST_WARPS, STRIDES, lay_out, stride_of
from featherweight.linear import CompressedLinear
from featherweight.native import nvrtc

FORMAT = FORMATS["sub1"]
HALF, BFLOAT = torch.float16, torch.bfloat16
H100_BYTES, RTX_3090_BYTES = 232448, 101376
BASE = 4096  # where x begins in shared memory
ROW = Grid(1.58, None, scale_dtype=BFLOAT)


def draw(rows: int, columns: int, zero_share: float, seed: int = 0) -> Tensor:
    """Symbols 0, 1 and 3: the weights 0, 1 and -1."""
    chance = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (chance > zero_share).to(torch.uint8) + 2 * (chance > (1 + zero_share) / 2).to(torch.uint8)


def values(symbols: Tensor, scales: Tensor) -> Tensor:
    """The weights that symbols stand for, float64."""
    width = symbols.shape[1] // scales.shape[1]
    return ((symbols.int() ^ 2) - 2).double() * scales.double().repeat_interleave(width, 1)


# ---- arithmetic -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [4, 5, 6, 7])
@pytest.mark.parametrize("stride", STRIDES)
def test_symbols_lead_to_their_columns(bits: int, stride: int) -> None:
    """The steps of SYMBOL in csrc/sub1.cu, in 32-bit words, make the sums that the codes stand for."""
    symbols = draw(8, 300, {4: 0.8, 5: 0.885, 6: 0.96, 7: 0.99}[bits])
    encoded = encode(symbols, ("runs",))
    assert (encoded.header.bits, encoded.header.values) == (bits, 2)
    words = side_by_side(encoded.stream_N, encoded.row_offsets.diff(), fill=-1, multiple=bits).numpy().view(np.uint32)
    x = np.arange(1, 301)
    for row, codes in zip(words, decode(encoded, "w").numpy(), strict=True):
        expected = x[codes == encoded.header.levels[1]].sum() - x[codes == encoded.header.levels[2]].sum()
        assert emulated_row(row, bits, stride, x) == expected


def emulated_row(words: np.ndarray, bits: int, stride: int, x: np.ndarray) -> int:
    """One lane: `at` is where the next column of x lies, in bytes."""
    whole = int.from_bytes(words.tobytes(), "little")
    gaps, total = (1 << bits) - 2, 0
    columns, odd = gaps // 2, pow(gaps // 2, -1, 1 << 32)
    at = BASE
    for place in range(len(words) * 32 // bits):
        low = bits if place % 2 and stride >= 2 << bits else 0  # the second of two is left in place
        v = whole >> place * bits - low & 0xFFFFFFFF
        gap, y = ~v & gaps << low, v & 1 << low ^ odd << low
        assert stride // 2 % (1 << low) == 0, "factors are divided by it"
        at = ((gap * -(stride // 2 >> low) if gap else y * -(columns * stride >> low)) + at) & 0xFFFFFFFF
        sign = ((y << 31 - low) + 0xBF800000) & 0xFFFFFFFF
        assert sign in (0x3F800000, 0xBF800000)  # 1 and -1 as floats
        if gap:
            column = (at + (place % 32 * (columns + 1) + columns) * stride - BASE & 0xFFFFFFFF) // stride
            total += int(x[column]) * (1 if sign < 1 << 31 else -1)
        if place % 32 == 31:
            at += 32 * stride << (bits - 1)
    return total


def weight_of(tokens: int) -> int:
    return 4 if tokens <= 1 else 5 if tokens <= 2 else 7 if tokens <= 4 else 11


@pytest.mark.parametrize(("experts", "rows", "matrices"), [(1, 40, 1), (8, 6144, 1), (64, 768, 2), (128, 100, 2)])
@pytest.mark.parametrize("pairs", [1, 8, 9, 130])
def test_every_tile_of_every_pair_is_in_one_share(experts: int, rows: int, matrices: int, pairs: int) -> None:
    """The shares of work that CTAs find for themselves, as csrc/sub1.cu has them: in tiles, or turns of all warps."""
    counts = np.bincount(np.random.default_rng(0).integers(0, experts, pairs), minlength=experts)
    tiles, ctas = -(-rows // 32), 132
    cost = [n // 8 * weight_of(8) + (weight_of(n % 8) if n % 8 else 0) for n in counts]
    before = np.concatenate([[0], np.cumsum(cost)])
    turn = MOST_WARPS if tiles * matrices * before[-1] >= 2 * weight_of(1) * MOST_WARPS * ctas else 1
    turns = -(-tiles // turn)
    each = turns * matrices
    work = each * before[-1]
    unit = weight_of(min(8, -(-pairs // experts)))
    share = -(-work // (unit * ctas)) * unit
    done = np.zeros((pairs, matrices, tiles), dtype=int)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for cta in range(ctas):
        low, high = share * cta, min(work, share * (cta + 1))
        expert = max(e for e in range(experts) if each * before[e] <= low)
        while expert < experts and each * before[expert] < high:
            at = each * before[expert]
            for pair in range(starts[expert], starts[expert + 1], 8):
                tokens = min(8, starts[expert + 1] - pair)
                weight = weight_of(tokens)
                for matrix in range(matrices):
                    first = (0 if low <= at else -(-(low - at) // weight)) * turn
                    last = min(tiles, min(turns, -(-(high - at) // weight)) * turn) if at < high else 0
                    if first < last:
                        done[pair : pair + tokens, matrix, first:last] += 1
                    at += turns * weight
            expert += 1
    assert (done == 1).all()


@pytest.mark.parametrize("limit", [H100_BYTES, RTX_3090_BYTES])
@pytest.mark.parametrize(("columns", "stage_bytes"), [(2048, 5728), (2048, 12672), (6144, 16848), (768, 2700)])
def test_shared_memory_is_laid_out_within_its_limit(columns: int, stage_bytes: int, limit: int) -> None:
    stride = stride_of(64, columns, stage_bytes, limit)
    for pairs in (1, 64, 1024):
        layout = lay_out(pairs, 64, columns, stride, stage_bytes, limit)
        assert layout.bytes <= limit or layout.warps == 0
        assert layout.at_stage >= 8 * pairs + 8 * 65 and layout.bytes >= layout.at_x + columns * stride
        assert layout.at_x >= layout.at_stage + layout.warps * layout.stages * stage_bytes
        assert layout.at_x % 128 == layout.at_stage % 16 == layout.stage_bytes % 4 == 0
    if limit == H100_BYTES and columns == 2048 and stage_bytes == 5728:  # what was measured
        assert (stride, lay_out(64, 64, columns, stride, stage_bytes, limit).warps) == (64, MOST_WARPS)


# ---- what it is made of ---------------------------------------------------------------------------------------------
@cache
def compiled(arch: str, bf16: int, stride: int) -> nvrtc.Cubin:
    """With symbols of five bits alone, and bitmaps."""
    return nvrtc.compile_source(nvrtc.source("kernels/sub1"), (f"BF16={bf16}", f"STRIDE={stride}", "CODES=33"), arch)


@pytest.mark.parametrize(
    ("arch", "bf16", "stride"),
    [
        pytest.param("sm_90a", 1, 64, id="hopper"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("sm_80", 0, 16), ("sm_86", 1, 32)]),
    ],
)
def test_it_compiles_without_spilling(arch: str, bf16: int, stride: int) -> None:
    log = compiled(arch, bf16, stride).log
    assert "warning" not in log
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)) == {("0",) * 3}
    assert max(map(int, re.findall(r"Used (\d+) registers", log))) <= 128, "16 warps have to fit on a multiprocessor"


def test_a_symbol_takes_few_instructions(tmp_path: Path) -> None:
    """The loop over 32 symbols of one token: products beside what the integer units do, and nothing that branches."""
    nvdisasm = find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm is not None, "nvidia-cuda-nvdisasm is one of the development requirements"
    path = tmp_path / "sub1.cubin"
    path.write_bytes(compiled("sm_90a", 1, 64).code)
    text = subprocess.run([nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    body = next(section for section in text.split(".section\t.text.") if section.startswith("sub1_products"))
    line = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.+?)\s*;|(\.L_x_\d+):)", re.M)
    found = [each[1] or each[2] for each in line.finditer(body)]
    loops = []
    for end, each in enumerate(found):
        target = re.match(r"BRA `\((\.L_x_\d+)\)", each)
        if target and target[1] in found[:end]:
            inside = [i.split(" ")[0].split(".")[0] for i in found[found.index(target[1]) : end + 1] if i[0] != "."]
            if inside.count("FFMA") == 32:
                loops.append(inside)
    symbols, flags = sorted((loop for loop in loops if loop.count("BRA") == 1), key=len, reverse=True)[:2]
    assert len(symbols) <= 8.2 * 32 and len(flags) <= 6 * 32
    integer = sum(symbols.count(each) for each in ("LOP3", "SHF", "ISETP", "IADD3", "LEA", "SEL", "VIADD"))
    assert integer <= 3.5 * 32, "half rate: more of these than of anything else"


# ---- where it is taken ----------------------------------------------------------------------------------------------
def test_it_says_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(rule: Rule, columns: int = 256, dtype: torch.dtype = BFLOAT, device: str = "cuda") -> str:
        return str(reasons(FORMAT, rule, 64, columns, dtype, device)["sub1-cuda"])

    assert "NVIDIA GPUs, and the layer is on cpu" in why(ROW, device="cpu")
    assert "float16 or torch.bfloat16, and the activations are torch.float32" in why(ROW, dtype=torch.float32)
    assert "multiple of 16, and they have 250" in why(ROW, columns=250)
    assert "torch sees 0" in why(ROW)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and the GPU has 7.5" in why(ROW)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why(ROW) == "None"
    assert pick(FORMAT, ROW, 64, 256, BFLOAT, "cuda", wanted="sub1-cuda").name == "sub1-cuda"
    assert pick(FORMAT, ROW, 64, 256, BFLOAT, "cuda").name == "sub1-cuda"


def packed(symbols: Tensor, scales: Tensor, kind: str) -> dict[str, Tensor]:
    grid = Grid(1.58, None if scales.shape[1] == 1 else symbols.shape[1] // scales.shape[1], scale_dtype=scales.dtype)
    zeros = torch.full(scales.shape, 2, dtype=torch.uint8)
    codes = ((symbols + 2) & 3).to(torch.uint8)
    tensors = FORMAT.pack(Solution(codes, scales, zeros, grid, torch.zeros(len(codes))))
    found = encode(symbols, (kind,)).tensors()  # type: ignore[arg-type]
    found.setdefault("row_words", torch.empty(0, dtype=torch.uint8))
    return {**tensors, **{f"weight_{part}": tensor for part, tensor in found.items()}}


@pytest.mark.parametrize("kind", ["runs", "bitmap", "plain", "dictionary"])
@pytest.mark.parametrize("share", [0.885, 1.0])
def test_what_it_cannot_read_is_encoded_again(kind: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sub1_bank, "block_bytes", lambda device: H100_BYTES)
    symbols = draw(40, 256, share)
    entry = entry_of(FORMAT, packed(symbols, torch.rand(40, 1).bfloat16(), kind))  # type: ignore[arg-type]
    assert fused(entry) and torch.equal(decode(entry.encoded, "w"), symbols)
    kept = kind == "bitmap" or (kind == "runs" and share < 1)
    assert (entry.encoded.header.kind == kind) == kept


def test_a_table_says_where_everything_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sub1_bank, "block_bytes", lambda device: H100_BYTES)
    scales = torch.rand(40, 1).bfloat16()
    entries = [Entry.of(encode(draw(40, 256, share), ("runs", "bitmap")), scales) for share in (0.5, 0.9)]
    bank = Bank.of([entries])
    assert bank.table.shape == (1, 2, 4) and (bank.rows, bank.columns) == (40, 256)
    kinds = [int(word) & 0xFF for word in bank.table[0, :, 3]]
    assert kinds == [1, 2] and [int(word) >> 32 for word in bank.table[0, :, 3]] == [1, entries[1].encoded.header.bits]
    assert bank.codes == 1 | 1 << entries[1].encoded.header.bits
    for row, entry in zip(bank.table[0].tolist(), entries, strict=True):
        assert row[:3] == [tensor.data_ptr() for tensor in entry.tensors()]
        assert bool(row[3] >> 31 & 1) == (entry.encoded.header.levels[1] == 3) and row[3] >> 30 & 1
    offsets = entries[1].encoded.row_offsets.tolist()
    most = max(-(-b // 4) * 4 - a // 4 * 4 for a, b in pairwise([*offsets[::32], offsets[-1]]))
    assert 4 * most <= entries[1].stage_bytes <= 4 * most + 16


# ---- on a GPU -------------------------------------------------------------------------------------------------------
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device("cuda")


def bank_on_gpu(
    experts: int, matrices: int, rows: int, columns: int, shares: list[float], dtype: torch.dtype
) -> tuple[Bank, Tensor]:
    """A bank and its exact weights, E x M x R x C."""
    device, entries, exact = cuda(), [], []
    for expert in range(experts):
        rows_of: list[Entry] = []
        for matrix in range(matrices):
            symbols = draw(rows, columns, shares[(expert + matrix) % len(shares)], expert * matrices + matrix)
            scales = (torch.rand(rows, 1) + 0.1).to(dtype)
            encoded = sub1_bank.moved(encode(symbols, ("runs", "bitmap")), device)
            rows_of.append(Entry.of(encoded, scales.to(device)))
            exact.append(values(symbols, scales))
        entries.append(rows_of)
    return Bank.of(entries), torch.stack(exact).view(experts, matrices, rows, columns).to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(
    ("experts", "matrices", "rows", "columns", "tokens", "choices"),
    [(3, 2, 70, 256, 2, 2), (4, 1, 70, 250, 1, 2), (8, 2, 96, 1024, 5, 3), (8, 1, 100, 2048, 33, 4),
     (128, 2, 33, 768, 8, 8), (4, 1, 40, 6144, 3, 2), (6, 1, 22600, 64, 1, 6)],
)  # fmt: skip
def test_products_of_every_pair(
    experts: int, matrices: int, rows: int, columns: int, tokens: int, choices: int, dtype: torch.dtype
) -> None:
    bank, exact = bank_on_gpu(experts, matrices, rows, columns, [0.46, 0.8, 0.885, 0.93, 0.99], dtype)
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    expert_N = torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)]).flatten().cuda()
    want = torch.einsum("nmrc,nc->nmr", exact[expert_N], x.double().repeat_interleave(choices, 0))
    got = bank.products(x, expert_N, choices)
    error, rounding = (got.double() - want).norm(), (want.to(dtype).double() - want).norm()
    assert (error**2 - rounding**2).clamp_min(0).sqrt() <= 1e-3 * want.norm()
    assert torch.equal(bank.products(x, expert_N, choices), got)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 32, 33, 300])
@pytest.mark.parametrize("kind", ["runs", "bitmap", "plain", "dictionary"])
def test_layers_on_a_gpu(kind: str, tokens: int) -> None:
    device, symbols, scales = cuda(), draw(200, 512, 0.885), torch.rand(200, 1).bfloat16()
    tensors = {name: tensor.to(device) for name, tensor in packed(symbols, scales, kind).items()}
    layer = CompressedLinear.from_tensors(FORMAT, ROW, tensors, None, BFLOAT, "sub1-cuda")
    x = torch.randn(tokens, 512, device=device).bfloat16()
    want = x.double() @ values(symbols, scales).to(device).T
    torch.testing.assert_close(layer(x).double(), want, rtol=2e-2, atol=2e-2 * float(want.abs().mean()))
