"""Which device to work on, in which dtype, and how much memory it took."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from featherweight.errors import RequestError


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU; RequestError for a device this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device {name!r} is not known: use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {name!r} was asked for and this machine has {torch.cuda.device_count()} GPUs: use cpu."
        )
    return device


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of forward passes: the checkpoint's, but float32 on a CPU that is no faster (or slower) in it."""
    if device.type == "cuda" or stored == torch.float32:
        return stored
    return stored if stored == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: by torch on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if found := re.search(r"^VmHWM:\s*(\d+) kB", _status(), re.MULTILINE):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows has no such figure in the standard library
        return 0
    # On Linux this counts what the parent held when it started us, hence VmHWM first.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status() -> str:
    """What Linux says of this process; empty elsewhere."""
    try:
        return Path("/proc/self/status").read_text()
    except OSError:
        return ""
