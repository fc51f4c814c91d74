"""CUDA C++ to machine code: compiled by NVRTC at first use, kept on disk, loaded once per device.

The sources are in the `csrc/` of the rooms that launch them. They include no header of a toolkit, so NVRTC alone is
enough: no nvcc, no toolkit, no GPU. NVRTC and its binding `cuda.bindings` come with torch's CUDA wheels.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import FallbackWarning, FeatherweightError

DIGEST_BYTES = 32
FLAGS = ("--std=c++17", "--ptxas-options=-v")


class CompileError(FeatherweightError):
    """NVRTC is missing, or refused a source; the message holds its log."""


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture, and what the compiler said about it (registers, spills)."""

    code: bytes
    log: str


def source(name: str) -> str:
    """The text of a room's source ("kernels/sub1" is kernels/csrc/sub1.cu), with what it includes in its place."""
    room, stem = name.split("/")
    folder = Path(__file__).parent.parent / room / "csrc"
    text = (folder / f"{stem}.cu").read_text(encoding="utf-8")
    return re.sub(r'#include "(\w+\.cuh)"', lambda found: (folder / found[1]).read_text(encoding="utf-8"), text)


def device_refusal(device: torch.device, oldest: tuple[int, int]) -> str | None:
    """Why this machine's GPU runs no kernel made for `oldest` and later."""
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU, and torch sees 0"
    found = torch.cuda.get_device_capability(device)
    if found < oldest:
        return f"it needs compute capability {oldest[0]}.{oldest[1]}, and the GPU has {found[0]}.{found[1]}"
    return None


def arch(major: int, minor: int) -> str:
    """NVRTC's name of a compute capability. Hopper's own instructions need the suffix."""
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def cache_folder() -> Path:
    """Where machine code is kept between processes."""
    return Path.home() / ".cache" / "featherweight" / "cubin"


def compile_source(text: str, macros: Sequence[str], arch: str) -> Cubin:
    """Compile CUDA C++ for `arch` ("sm_90a"); macros as "NAME=VALUE". Raises CompileError."""
    nvrtc = _nvrtc()
    flags = [flag.encode() for flag in (*FLAGS, f"--gpu-architecture={arch}", *(f"-D{macro}" for macro in macros))]
    program = driver_value(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = b" " * driver_value(nvrtc.nvrtcGetProgramLogSize(program))
        driver_value(nvrtc.nvrtcGetProgramLog(program, log))
        words = log.rstrip(b" \0").decode(errors="replace")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC refused a kernel for {arch} ({result.name}): {words}")
        code = b" " * driver_value(nvrtc.nvrtcGetCUBINSize(program))
        driver_value(nvrtc.nvrtcGetCUBIN(program, code))
        return Cubin(code, words)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cubin(name: str, macros: Sequence[str], arch: str, folder: Path | None = None) -> bytes:
    """The machine code of a room's source, from `folder` (default: `cache_folder()`) or compiled and put there.

    A file that is missing, cut short or altered is made again: each starts with the digest of the rest. Files appear by
    renaming, so processes that compile at once cannot disturb each other. Raises CompileError.
    """
    text = source(name)
    key = hashlib.sha256("\0".join((text, *FLAGS, *macros, arch, *map(str, nvrtc_version()))).encode()).hexdigest()
    path = (folder or cache_folder()) / f"{Path(name).name}-{arch}-{key[:32]}.cubin"
    kept = _read(path)
    if kept is not None:
        return kept
    code = compile_source(text, macros, arch).code
    _write(path, code)
    return code


def nvrtc_version() -> tuple[int, int]:
    """Of the NVRTC that is installed. Raises CompileError where there is none."""
    nvrtc = _nvrtc()
    result, major, minor = nvrtc.nvrtcVersion()
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC does not answer ({result.name}): reinstall nvidia-cuda-nvrtc.")
    return major, minor


def _read(path: Path) -> bytes | None:
    """What `_write` put there, or None."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, code = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        Path(file.name).replace(path)
    except OSError as error:
        warnings.warn(
            f"compiled kernels cannot be kept in {path.parent} ({error}): each process will compile them again.",
            FallbackWarning,
            stacklevel=3,
        )


@cache
def _nvrtc() -> Any:
    """The binding, with the library it needs. Raises CompileError."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise CompileError(
            f"NVRTC is not installed ({error}): pip install cuda-bindings nvidia-cuda-nvrtc, which torch's CUDA wheels "
            "also bring."
        ) from error
    return nvrtc


def driver_value(answer: tuple[Any, ...]) -> Any:
    """The value that a call of NVRTC or the driver returned beside its status. Raises CompileError."""
    if answer[0] != 0:
        raise CompileError(f"CUDA answered {answer[0].name}: update the driver, or reinstall nvidia-cuda-nvrtc.")
    return answer[1] if len(answer) == 2 else answer[1:]
