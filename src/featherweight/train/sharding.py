"""A model in training of which every process holds a part: PyTorch's fully sharded data parallelism, block by block.

What is trained, what stands still (packed codes among it), gradients and averages lie in equal parts on all processes;
a block is whole only while it runs. Everything here is called by all processes, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featherweight.train.tuned_linear import TunedLinear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(parameter: Any) -> bool:
    """Whether this is one of `shard`'s: a DTensor, whose own module takes a second to import."""
    return hasattr(parameter, "placements")


def mesh_of(device: torch.device) -> DeviceMesh:
    """All processes in a row, each with a device of this type."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves this process a part of every tensor of the module that is not sharded yet: blocks first, then the model.

    What a tuned layer has in buffers, which are never sharded, becomes parameters that are not trained; words become
    floats of the same bits, for PyTorch 2.11 shards no integers.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in module.modules():
        if isinstance(layer, TunedLinear):
            _without_buffers(layer)
            layer.layer.words |= _without_buffers(layer.layer)  # nothing where its block has been here
    fully_shard(module, mesh=mesh)


def _without_buffers(module: nn.Module) -> dict[str, torch.dtype]:
    """Makes parameters of matrices in buffers; the dtypes of those that were words, by name."""
    words = {}
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim() < 2 or buffer.dtype not in (torch.int32, torch.bfloat16, torch.float16, torch.float32):
            continue  # shapes and masks: small, and no word of four bytes
        del module._buffers[name]
        if buffer.dtype == torch.int32:
            words[name], buffer = torch.int32, buffer.view(torch.float32)
        module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    return words


def mine(parameter: Any) -> Tensor:
    """What of a parameter is held here, to be changed in place: all of it where it is not sharded."""
    held: Tensor = parameter.to_local() if is_sharded(parameter) else parameter
    return held.detach()


def my_part(whole: Tensor, parameter: Any) -> Tensor:
    """The part of a tensor of a parameter's shape that belongs to what is held here of the parameter, where that is."""
    whole = whole.to(parameter.device)
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    part: Any = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    own: Tensor = part.to_local().clone()  # or the whole would be kept for it
    return own


def whole(part: Tensor, parameter: Any) -> Tensor:
    """The tensor whose parts (`my_part`) all processes give."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    full: Tensor = sharded.full_tensor()
    return full


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The parameters that were sharded with this module as they are in one piece; nothing where they are."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        yield
        return
    module.reshard()  # or what it still has whole is from before its parts were last changed
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
