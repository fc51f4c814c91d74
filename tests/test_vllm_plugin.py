"""The plug-in for vLLM, against a stand-in of the interface it is written for: vLLM itself is not installed here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight import vllm_plugin
from featherweight.core.rules import Grid
from featherweight.formats import FORMATS
from featherweight.kernels import KERNELS, dequantize
from test_kernels_triton import solution

HALF = torch.float16


class PlatformEnum(Enum):
    CUDA = 1
    ROCM = 2


@dataclass(frozen=True)
class ScalarType:
    """vLLM's: unsigned codes, with what is subtracted from them."""

    size_bits: int
    bias: int

    def has_bias(self) -> bool:
        return self.bias != 0


@dataclass
class MPLinearLayerConfig:
    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: ScalarType
    act_type: torch.dtype
    group_size: int
    zero_points: bool
    has_g_idx: bool
    out_type: torch.dtype | None = None


class MPLinearKernel:
    """What vLLM's base class does for its kernels."""

    def __init__(self, c: MPLinearLayerConfig, w_q: str, w_s: str, w_zp: str | None = None, w_g: str | None = None):
        self.config, self.w_q_name, self.w_s_name, self.w_zp_name, self.w_gidx_name = c, w_q, w_s, w_zp, w_g

    def _transform_param(self, layer: nn.Module, name: str | None, change: Any) -> None:
        if name is not None and getattr(layer, name, None) is not None:
            setattr(layer, name, nn.Parameter(change(getattr(layer, name)), requires_grad=False))

    def _get_weight_params(self, layer: nn.Module) -> tuple[Any, ...]:
        return tuple(getattr(layer, name or "", None) for name in (self.w_q_name, self.w_s_name, self.w_zp_name, ""))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[PlatformEnum, list[type]]]:
    """vLLM's registry of kernels, with one of its own in it."""
    kernels: dict[PlatformEnum, list[type]] = {PlatformEnum.CUDA: [int], PlatformEnum.ROCM: []}
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.platforms", "vllm.model_executor")}
    linear = ModuleType("vllm.model_executor.kernels.linear")
    linear.MPLinearKernel = MPLinearKernel  # type: ignore[attr-defined]
    linear.register_linear_kernel = lambda kernel, platform, kind: kernels[platform].append(kernel)  # type: ignore[attr-defined]
    modules["vllm.platforms"].PlatformEnum = PlatformEnum  # type: ignore[attr-defined]
    modules |= {"vllm.model_executor.kernels": ModuleType("kernels"), linear.__name__: linear}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield kernels
    vllm_plugin.register.cache_clear()
    vllm_plugin.kernel_class.cache_clear()


def config(**changes: Any) -> MPLinearLayerConfig:
    usual = {"full_weight_shape": (256, 64), "partition_weight_shape": (256, 64), "weight_type": ScalarType(4, 8)}
    return MPLinearLayerConfig(
        **{**usual, "act_type": HALF, "group_size": 64, "zero_points": False, "has_g_idx": False, **changes}
    )


def test_it_is_an_entry_point_and_goes_to_the_end_once(registry: dict[PlatformEnum, list[type]]) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    (ours,) = registry[PlatformEnum.ROCM]
    assert registry[PlatformEnum.CUDA] == [int, ours] and ours.__name__ == "FeatherweightLinearKernel"
    assert ours.get_min_capability() == 80  # type: ignore[attr-defined]
    found = [each.value for each in entry_points(group="vllm.general_plugins") if each.name == "featherweight"]
    assert found in ([], ["featherweight.vllm_plugin:register"]), "none where the package is not installed"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"group_size": -1}, None),
        ({"weight_type": ScalarType(8, 128)}, None),
        ({"weight_type": ScalarType(4, 0), "zero_points": True}, None),
        ({"full_weight_shape": (512, 64), "group_size": 512}, None),  # a row, shared by two partitions
        ({"weight_type": ScalarType(3, 4)}, "these have 3"),
        ({"has_g_idx": True}, "permuted"),
        ({"weight_type": ScalarType(4, 0)}, "both or neither"),
        ({"weight_type": ScalarType(4, 7)}, "a bias of 8, and it is 7"),
        ({"group_size": 96}, "whole groups of 96 inputs, and this partition has 256"),
        ({"act_type": torch.float32}, "no fast kernel"),
    ],
)
def test_what_it_takes(registry: dict[PlatformEnum, list[type]], changes: dict[str, Any], why: str | None) -> None:
    takes, said = vllm_plugin.kernel_class().can_implement(config(**changes))  # type: ignore[attr-defined]
    assert takes == (why is None) and (why is None or why in said)


def loaded(tensors: dict[str, Tensor], first: int) -> nn.Module:
    """A layer as vLLM leaves it: parameters that say where their outputs are."""
    layer = nn.Module()
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor, requires_grad=False)
        parameter.output_dim = first  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)
    return layer


# vLLM itself refuses GPTQ with zero points.
@pytest.mark.parametrize(
    ("name", "symmetric"), [("compressed-tensors", True), ("compressed-tensors", False), ("gptq", True)]
)
def test_layers_are_repacked_and_multiplied(
    registry: dict[PlatformEnum, list[type]], name: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(4, 64, symmetric)
    weights = solution(grid, 64, 256)
    tensors = FORMATS[name].pack(weights)
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    names = names if name == "compressed-tensors" else ("qweight", "scales", "qzeros")
    layer = loaded({key: tensors[key] for key in names if key in tensors}, 0 if name == "compressed-tensors" else 1)
    monkeypatch.setattr(vllm_plugin, "chosen", lambda config: KERNELS["dequantize"])  # there is no GPU here
    kind = ScalarType(4, 8) if symmetric else ScalarType(4, 0)
    kernel = vllm_plugin.kernel_class()(config(weight_type=kind, zero_points=not symmetric), *names)
    kernel.process_weights_after_loading(layer)
    x, bias = torch.randn(3, 256).half(), torch.randn(64).half()
    want = nn.functional.linear(x, dequantize(weights, HALF), bias)
    torch.testing.assert_close(kernel.apply_weights(layer, x, bias), want, rtol=2e-3, atol=2e-3)
    assert all(parameter.numel() == 0 for parameter in layer.parameters()), "packed once, not twice"
