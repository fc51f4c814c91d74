"""What kernels are given wrongly, and machines that lack something: a sentence, or the next kernel."""

from __future__ import annotations

import sys

import pytest
import torch

from featherweight.core.rules import Grid
from featherweight.errors import RequestError
from featherweight.formats import FORMATS
from featherweight.kernels import KERNELS, machine, pick, triton_linear
from featherweight.native import nvrtc
from test_kernels_triton import solution

FORMAT = FORMATS["compressed-tensors"]
HALF, BFLOAT = torch.float16, torch.bfloat16
LAYER = (FORMAT, Grid(4, 64), 48, 256)


@pytest.mark.parametrize(("kernel", "dtype"), [("cpu-int4", BFLOAT), ("triton", HALF), ("dequantize", torch.float32)])
def test_inputs_that_do_not_fit_are_refused(kernel: str, dtype: torch.dtype) -> None:
    run = KERNELS[kernel].prepare(FORMAT, Grid(4, 64), FORMAT.pack(solution(Grid(4, 64), 48, 256)), dtype)
    x = torch.randn(2, 256, dtype=dtype)
    with pytest.raises(
        RequestError, match=rf"input is torch.float64 with 256 columns, and the layer is {dtype} with 256"
    ):
        run(x.double(), None)
    with pytest.raises(RequestError, match=rf"input is {dtype} with 128 columns, and the layer is {dtype} with 256"):
        run(x[:, :128], None)
    with pytest.raises(RequestError, match="input is on meta, and the layer on cpu: move one"):
        run(x.to("meta"), None)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_a_gpu_older_than_ampere_gets_the_kernel_of_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5))
    assert pick(*LAYER, HALF, "cuda").name == "dequantize"


def test_a_machine_without_triton_gets_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(triton_linear, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="triton does not take this layer: it needs triton, which is not installed"):
        pick(*LAYER, HALF, "cuda", wanted="triton")
    assert pick(FORMAT, Grid(8, 64), 48, 256, torch.float32, "cuda").name == "dequantize"


def test_groups_that_no_kernel_takes_go_through_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    assert pick(FORMAT, Grid(8, 24), 48, 240, HALF, "cuda").name == "dequantize"
    assert pick(FORMAT, Grid(2, 3), 48, 240, HALF, "cuda").name == "reference"


def test_a_machine_without_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc._nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    try:
        with pytest.raises(nvrtc.CompileError, match=r"NVRTC is not installed .*pip install cuda-bindings"):
            nvrtc.compile_source("", (), "sm_90a")
    finally:
        nvrtc._nvrtc.cache_clear()


def test_every_kernel_says_why_it_does_not_run_here() -> None:
    found = machine(*LAYER, torch.float32, "cpu")
    assert set(found) == set(KERNELS) and all(why is None or len(why) > 10 for why in found.values())
    assert [name for name, why in found.items() if why is None] == ["dequantize", "reference", "dense"]
