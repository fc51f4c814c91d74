"""Our kernels for vLLM: offered for GPTQ and compressed-tensors checkpoints, by vLLM's own registry of linear kernels.

vLLM calls `register` in each of its processes (entry point "vllm.general_plugins"). The kernel goes to the end of the
registry, so by itself it serves what no other kernel there takes; it is preferred where those before it are disabled,
VLLM_DISABLED_KERNELS=MacheteLinearKernel,MarlinLinearKernel,... in vLLM's environment.

Written against the interface in vLLM's repository of November 2026 (model_executor/kernels/linear: MPLinearKernel,
MPLinearLayerConfig, register_linear_kernel) and tested against a stand-in of it: it was never run in vLLM itself.

Shapes: R outputs, C inputs, G groups, W words; a parameter says by `output_dim` which way round it lies.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from featherweight.core.rules import Grid
from featherweight.errors import RequestError
from featherweight.formats import by_name
from featherweight.kernels import Kernel, pick, reasons

FORMAT = "compressed-tensors"
BITS = (2, 4, 8)  # whose words have no gaps in any checkpoint
SLOW = ("dequantize", "reference", "dense")  # vLLM has better
OLDEST = 80


@cache
def register() -> None:
    """Offer the kernel to vLLM; does nothing when it is called again."""
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.platforms import PlatformEnum

    for platform in (PlatformEnum.CUDA, PlatformEnum.ROCM):
        register_linear_kernel(kernel_class(), platform, "mp")


@cache
def kernel_class() -> type:
    """The class that vLLM chooses from its registry: its base is vLLM's."""
    from vllm.model_executor.kernels.linear import MPLinearKernel

    class FeatherweightLinearKernel(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return OLDEST

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            why = refusal(c)
            return why is None, why

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            """Repack what vLLM has loaded, and let go of it."""
            grid, tensors = tensors_of(self, layer)
            kernel = chosen(self.config)
            self.run = kernel.prepare(by_name(FORMAT), grid, tensors, self.config.act_type)
            for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
                self._transform_param(layer, name, lambda parameter: parameter.new_empty(0))

        def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            y: Tensor = self.run(x, bias)
            return y

    return FeatherweightLinearKernel


def refusal(config: Any) -> str | None:
    """Why none of our kernels takes a layer of vLLM's, in a sentence; None when one does."""
    bits = config.weight_type.size_bits
    if bits not in BITS:
        return f"featherweight takes codes of {BITS} bits here, and these have {bits}"
    if config.has_g_idx:
        return "featherweight takes groups in the order of the inputs, and these are permuted (g_idx)"
    if config.zero_points == config.weight_type.has_bias():
        return f"featherweight takes zero points or a bias, and {config.weight_type} has both or neither"
    if config.weight_type.has_bias() and config.weight_type.bias != 1 << (bits - 1):
        return f"featherweight takes a bias of {1 << (bits - 1)}, and it is {config.weight_type.bias}"
    inputs = config.partition_weight_shape[0]
    grid = grid_of(config)
    if grid.group_size is not None and inputs % grid.group_size:
        return f"featherweight takes whole groups of {grid.group_size} inputs, and this partition has {inputs}"
    try:
        chosen(config)
    except RequestError as error:
        return str(error)
    return None


def grid_of(config: Any) -> Grid:
    """Our rule for vLLM's description of a layer; a group of all inputs is a row, however many a partition has."""
    whole = config.group_size in (-1, config.full_weight_shape[0])
    return Grid(config.weight_type.size_bits, None if whole else config.group_size, not config.zero_points)


def chosen(config: Any) -> Kernel:
    """The kernel for a layer; RequestError where only slow ones take it."""
    columns, rows = config.partition_weight_shape
    case = (by_name(FORMAT), grid_of(config), rows, columns, config.act_type, torch.device("cuda"))
    found = pick(*case)
    if found.name in SLOW:
        why = "; ".join(f"{name}: {each}" for name, each in reasons(*case).items() if each is not None)
        raise RequestError(f"no fast kernel of featherweight takes this layer ({why}).")
    return found


def tensors_of(kernel: Any, layer: torch.nn.Module) -> tuple[Grid, dict[str, Tensor]]:
    """What vLLM has loaded, as the tensors of our format: GPTQ's are the same bits, transposed."""
    columns, rows = kernel.config.partition_weight_shape
    words, scales, zeros, _ = kernel._get_weight_params(layer)
    tensors = {
        "weight_packed": _rows_first(words),
        "weight_scale": _rows_first(scales),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if kernel.config.zero_points:
        tensors["weight_zero_point"] = _rows_first(zeros)
    return grid_of(kernel.config), tensors


def _rows_first(parameter: Any) -> Tensor:
    """The data of a parameter with outputs on its first axis."""
    data: Tensor = parameter.data
    return (data if parameter.output_dim == 0 else data.T).contiguous()
