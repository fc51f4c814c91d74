"""C for CPUs with a matrix unit (AMX), compiled at first use by the machine's own compiler and kept on disk.

torch multiplies bfloat16 there at full speed only into bfloat16, and never by packed codes. `amx.c` has what is
missing; where the CPU has no such unit nothing is lost, and where there is no compiler its callers go torch's way, with
one FallbackWarning. Linux on x86-64 alone: elsewhere a process cannot ask for the unit in this way.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning

FLAGS = (
    *("-O3", "-shared", "-fPIC", "-std=gnu11"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
)
NEEDED = {"amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512dq", "avx512vl"}
COMPILERS = ("cc", "gcc", "clang")
DIGEST_BYTES = 32
COMPILE_S = 60.0
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # Linux' numbers for asking to use tiles


def cache_folder() -> Path:
    """Where libraries are kept between processes."""
    return Path.home() / ".cache" / "featherweight" / "native"


@cache
def amx() -> Any:
    """The functions of `amx.c`; None where the CPU has no tiles of bfloat16, or, with a warning, nothing compiles."""
    if not has_tiles() or not _permitted():
        return None
    try:
        return ctypes.CDLL(str(library(Path(__file__).with_name("amx.c"), cache_folder())))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"this CPU multiplies tiles of bfloat16, and nothing was compiled for it ({said}): products take two to "
            "five times as long; install a C compiler (gcc 11 or clang 12, or newer).",
            FallbackWarning,
            stacklevel=2,
        )
        return None


@cache
def has_tiles() -> bool:
    """Whether this machine is a Linux whose CPU has every instruction of `amx.c`."""
    try:
        words = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return set(words) >= NEEDED


def _permitted() -> bool:
    """Asks Linux, once for the whole process, to let it use tiles."""
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


def library(source: Path, folder: Path) -> Path:
    """A C source as a library in `folder`, compiled if it is not there or not as it was written.

    Its digest follows it in the file. Files appear by renaming, so processes that compile at once cannot disturb each
    other. Raises OSError (no compiler, or the folder cannot be written) or subprocess.SubprocessError.
    """
    text = source.read_bytes()
    key = hashlib.sha256(b"\0".join((text, *(flag.encode() for flag in FLAGS)))).hexdigest()
    path = folder / f"{source.stem}-{key[:32]}.so"
    if path.exists() and _sound(path.read_bytes()):
        return path
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"none of {', '.join(COMPILERS)} is installed")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
        code = made.read_bytes()
        made.write_bytes(code + hashlib.sha256(code).digest())
        made.replace(path)
    return path


def _sound(stored: bytes) -> bool:
    return hashlib.sha256(stored[:-DIGEST_BYTES]).digest() == stored[-DIGEST_BYTES:]


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor lies, for a C function; the caller keeps it alive."""
    return ctypes.c_void_p(tensor.data_ptr())


def number(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def shared(work: Callable[[int, int], object], count: int, most: int) -> None:
    """`work` of begin .. end - 1 on as many threads as torch has (at most `most`), 0 .. count - 1 dealt out to them."""
    threads = min(torch.get_num_threads(), count, most)
    if threads <= 1:
        work(0, count)
        return
    edges = [count * n // threads for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))
