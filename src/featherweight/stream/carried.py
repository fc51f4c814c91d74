"""Tensors that come to a GPU and leave it beside its work, each way in a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from featherweight.models.checkpoint import Checkpoint

ROOM = 8  # times their size must be free for tensors to be brought before their turn


class Carried:
    """Brings tensors to a device and back without its own work waiting; where that is no GPU, they are there already.

    It belongs to the thread that makes it: the device's work is what goes into that thread's stream.
    """

    def __init__(self, device: torch.device, low: bool = False) -> None:
        self.device, self.low = device, low
        if device.type == "cuda":
            self.work = torch.cuda.current_stream(device)
            self.coming, self.going = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def read(self, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of a checkpoint: on a GPU that has much room once they are there, else page-locked for it; safe on
        any thread."""
        if self.device.type != "cuda":
            return checkpoint.read(names)
        size_bytes = sum(checkpoint.nbytes(name) for name in names)
        if self.low or ROOM * size_bytes > torch.cuda.mem_get_info(self.device)[0]:
            return {name: tensor.pin_memory() for name, tensor in checkpoint.read(names).items()}
        with torch.cuda.stream(self.coming):
            found = checkpoint.read(names, device=self.device)
        for tensor in found.values():
            tensor.record_stream(self.work)
        self.coming.synchronize()
        return found

    def back(
        self, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, dict[str, Tensor]], Callable[[], None]]:
        """The tensors in page-locked memory, and what returns when they are there."""
        on_gpu = self.device.type == "cuda"
        beside: AbstractContextManager[object] = torch.cuda.stream(self.going) if on_gpu else nullcontext()
        if on_gpu:
            self.going.wait_stream(self.work)
            for tensor in (tensor for each in tensors.values() for tensor in each.values() if tensor.is_cuda):
                tensor.record_stream(self.going)
        with beside:
            found = {
                path: {suffix: tensor.to("cpu", non_blocking=True) for suffix, tensor in each.items()}
                for path, each in tensors.items()
            }
        if not on_gpu:
            return found, lambda: None
        copied = torch.cuda.Event()
        copied.record(self.going)
        return found, copied.synchronize
