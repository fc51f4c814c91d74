"""C for CPUs, compiled at first use by the machine's own compiler and kept on disk.

On CPUs with a matrix unit (AMX) torch multiplies bfloat16 at full speed only into bfloat16, and never by packed codes:
`amx.c` and `gram.c` have what is missing, `gram.c` for vectors of bfloat16 (AVX512_BF16) too, which torch takes to be
float32. Linux on x86-64 alone: elsewhere a process cannot ask for the unit in this way. `loops.c` is plain C for any
CPU: loops whose steps are too small for calls of a library; `int4.c` likewise: for products with 4-bit codes. Where
there is no compiler, callers go torch's way, with one FallbackWarning.

CUDA C++ is compiled and launched by `nvrtc.py` and `launch.py`, for every room that has some.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning

PLAIN_FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11")
VECTOR_FLAGS = (*PLAIN_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")
FLAGS = (*VECTOR_FLAGS, "-mamx-tile", "-mamx-bf16")
VECTORS = {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"}
NEEDED = VECTORS | {"amx_tile", "amx_bf16"}
COMPILERS = ("cc", "gcc", "clang")
DIGEST_BYTES = 32
COMPILE_S = 60.0
HUGE_PAGE, USE_HUGE_PAGES = 1 << 21, 14  # Linux' number for asking for them
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # Linux' numbers for asking to use tiles


def cache_folder() -> Path:
    """Where libraries are kept between processes."""
    return Path.home() / ".cache" / "featherweight" / "native"


@cache
def amx() -> Any:
    """The functions of `amx.c`; None where the CPU has no tiles of bfloat16, or, with a warning, nothing compiles."""
    return _of_tiles("amx.c")


@cache
def gram() -> Any:
    """The functions of `gram.c`, by tiles or by vectors; None likewise."""
    return _of_tiles("gram.c") if has_tiles() and _permitted() else gram_by_vectors()


@cache
def gram_by_vectors() -> Any:
    """The functions of `gram.c` for CPUs that have vectors of bfloat16; None likewise."""
    return _of_vectors("gram.c", "sums over tokens take twice as long")


@cache
def attention() -> Any:
    """The functions of `attention.c`, for CPUs with vectors of bfloat16 and no matrix unit, which torch's own uses."""
    return None if has_tiles() else _of_vectors("attention.c", "attention takes four times as long")


@cache
def loops() -> Any:
    """The functions of `loops.c`, for any CPU; None, with a warning, where nothing compiles."""
    return _of_any_cpu("loops.c", (), "the solver's loops", "several times as long")


@cache
def pieces() -> Any:
    """The functions of `pieces.c`, likewise."""
    return _of_any_cpu("pieces.c", ("-fno-math-errno",), "norms, gates and rotations", "half as long again in passes")


@cache
def int4() -> Any:
    """The functions of `int4.c`, likewise."""
    return _of_any_cpu("int4.c", ("-Wno-psabi",), "products with 4-bit codes", "two to five times as long")


def _of_any_cpu(source: str, flags: tuple[str, ...], what: str, without: str) -> Any:
    return _loaded(source, (*_vector_flags(), *flags), f"{what} were not compiled", f"they take {without}; install")


def _of_tiles(source: str) -> Any:
    if not has_tiles() or not _permitted():
        return None
    what = "this CPU multiplies tiles of bfloat16, and nothing was compiled for it"
    return _loaded(source, FLAGS, what, "products take two to five times as long; install")


def _of_vectors(source: str, without: str) -> Any:
    if not _instructions() >= VECTORS:
        return None
    what = "this CPU multiplies vectors of bfloat16, and nothing was compiled for it"
    return _loaded(source, VECTOR_FLAGS, what, f"{without}; install")


def _loaded(source: str, flags: Sequence[str], what: str, without: str) -> Any:
    try:
        return ctypes.CDLL(str(library(Path(__file__).with_name(source), cache_folder(), flags)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"{what} ({said}): {without} a C compiler.", FallbackWarning, stacklevel=4)
        return None


def _vector_flags() -> tuple[str, ...]:
    """What to compile plain C with: the widest vectors that this CPU has."""
    has = _instructions()
    if has >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}:
        wide = (*PLAIN_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
        return (*wide, "-mavx512vnni") if "avx512_vnni" in has else wide
    return (*PLAIN_FLAGS, "-mavx2", "-mfma") if has >= {"avx2", "fma"} else PLAIN_FLAGS


@cache
def has_tiles() -> bool:
    """Whether this machine is a Linux whose CPU has every instruction of `amx.c`."""
    return _instructions() >= NEEDED


@cache
def has_byte_products() -> bool:
    """Whether vectors of this CPU multiply and add bytes, as `int4.c` does where they can."""
    return _instructions() >= {"avx2", "fma"}


def _instructions() -> set[str]:
    """What Linux says that an x86 CPU has; nothing elsewhere."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return set()


def _permitted() -> bool:
    """Asks Linux, once for the whole process, to let it use tiles."""
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


def library(source: Path, folder: Path, flags: Sequence[str] | None = None) -> Path:
    """A C source as a library in `folder`, compiled if it is not there or not as it was written.

    Its digest follows it in the file. Files appear by renaming, so processes that compile at once cannot disturb each
    other. Raises OSError (no compiler, or the folder cannot be written) or subprocess.SubprocessError.
    """
    text, flags = source.read_bytes(), FLAGS if flags is None else flags
    text += b"".join(header.read_bytes() for header in sorted(source.parent.glob("*.h")))
    key = hashlib.sha256(b"\0".join((text, *(flag.encode() for flag in flags)))).hexdigest()
    path = folder / f"{source.stem}-{key[:32]}.so"
    if path.exists() and _sound(path.read_bytes()):
        return path
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"none of {', '.join(COMPILERS)} is installed")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *flags, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
        code = made.read_bytes()
        made.write_bytes(code + hashlib.sha256(code).digest())
        made.replace(path)
    return path


def _sound(stored: bytes) -> bool:
    return hashlib.sha256(stored[:-DIGEST_BYTES]).digest() == stored[-DIGEST_BYTES:]


class _Call(ctypes.Structure):
    """`Call` of call.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("work", "number", "threads")),
        ("count", ctypes.c_int64),
        ("arguments", ctypes.c_void_p),
    )


def run(name: str, arguments: Sequence[Tensor | int], count: int, most: int, functions: Any = None) -> None:
    """A function of `amx.c`, or of the library given, for 0 .. count - 1, dealt out to as many threads as torch has, at
    most `most`.

    Tensors are passed as their addresses. The threads are torch's own, since others would share the cores with these,
    which go on turning for some milliseconds after their work.
    """
    functions = functions or amx()
    work = getattr(functions, name)
    given = (ctypes.c_int64 * len(arguments))(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))
    threads = min(torch.get_num_threads(), count, most)
    if threads <= 1 or openmp() is None:
        work(given, ctypes.c_int64(0), ctypes.c_int64(count))
        return
    library = openmp()
    pointers = (
        ctypes.cast(f, ctypes.c_void_p) for f in (work, library.omp_get_thread_num, library.omp_get_num_threads)
    )
    call = _Call(*pointers, count, ctypes.cast(given, ctypes.c_void_p))
    library.GOMP_parallel(ctypes.cast(functions.part, ctypes.c_void_p), ctypes.byref(call), threads, 0)


def huge_pages(tensor: Tensor) -> None:
    """Asks Linux to hold a tensor that nothing was written to in pages of 2 MB, whose addresses are found at once.

    A product that waits for memory takes up to twice as long without. What cannot be had is done without.
    """
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE - first
    if size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), USE_HUGE_PAGES)


@cache
def openmp() -> Any:
    """The OpenMP library that torch itself calls; None, with a warning, where that has none of GNU's entry points.

    Asked of torch's own library, whose dependencies are searched: another package may have loaded another OpenMP
    (sentencepiece's wheels do), whose threads would turn beside torch's on the same cores.
    """
    own = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    library = ctypes.CDLL(str(own[0])) if own else None
    if library is not None and hasattr(library, "GOMP_parallel"):
        return library
    warnings.warn(
        "torch has loaded no OpenMP library with GOMP_parallel: what is C runs on one thread; use its wheels.",
        FallbackWarning,
        stacklevel=3,
    )
    return None
