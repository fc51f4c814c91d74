"""Tensors that come to a GPU and leave it beside its work, each way in a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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

    def back(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], dict[str, dict[str, Tensor]]]:
        """What brings the tensors, as they are once the device has done its work so far, to page-locked memory and
        returns when they are there; may be called on any thread, and lets go of those on the device."""
        left = {path: dict(each) for path, each in tensors.items()}
        if self.device.type != "cuda":
            return lambda: left
        made = self.work.record_event()

        def bring() -> dict[str, dict[str, Tensor]]:
            with torch.cuda.stream(self.going):
                self.going.wait_event(made)
                found = {
                    path: {suffix: tensor.to("cpu", non_blocking=True) for suffix, tensor in each.items()}
                    for path, each in left.items()
                }
            self.going.synchronize()
            left.clear()
            return found

        return bring
