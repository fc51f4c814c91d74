"""Compiling and the folder of machine code, without a GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from featherweight.errors import FallbackWarning
from featherweight.native import nvrtc


def test_a_source_that_does_not_compile_says_so() -> None:
    with pytest.raises(nvrtc.CompileError, match=r"(?s)refused a kernel for sm_90a.*expected"):
        nvrtc.compile_source("__global__ void broken( {", (), "sm_90a")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A source that compiles at once; what it returns fills with one entry a compilation."""
    compilations: list[str] = []
    whole = nvrtc.compile_source

    def counted(text: str, macros: tuple[str, ...], arch: str) -> nvrtc.Cubin:
        compilations.append(arch)
        return whole(text, macros, arch)

    monkeypatch.setattr(nvrtc, "source", lambda name: f'extern "C" __global__ void {name}(int* p) {{ *p = VALUE; }}')
    monkeypatch.setattr(nvrtc, "compile_source", counted)
    return compilations


def test_machine_code_is_kept_per_source_macros_and_architecture(small: list[str], tmp_path: Path) -> None:
    first = nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path)
    assert nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path) == first and len(small) == 1
    assert nvrtc.cubin("one", ("VALUE=2",), "sm_80", tmp_path) != first
    nvrtc.cubin("two", ("VALUE=1",), "sm_80", tmp_path)
    nvrtc.cubin("one", ("VALUE=1",), "sm_90a", tmp_path)
    assert len(small) == 4 and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("break_it", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"?" + b[41:], None])
def test_broken_machine_code_is_made_again(
    small: list[str], tmp_path: Path, break_it: Callable[[bytes], bytes] | None
) -> None:
    first = nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.unlink() if break_it is None else path.write_bytes(break_it(whole))
    assert nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path) == first and len(small) == 2
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_said_and_survived(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(FallbackWarning, match="cannot be kept"):
        assert nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path / "file" / "cubin")[:4] == b"\x7fELF"


def _compile_in_a_process(folder: str) -> str:
    text = "\n".join(f'extern "C" __global__ void f{i}(int* p) {{ *p = {i}; }}' for i in range(100))
    nvrtc.source = lambda name: text  # in a process of its own
    return hashlib.sha256(nvrtc.cubin("many", (), "sm_80", Path(folder))).hexdigest()


def test_processes_that_compile_at_once_agree(tmp_path: Path) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        digests = set(pool.map(_compile_in_a_process, [str(tmp_path)] * 2))
    assert len(digests) == 1 and len(list(tmp_path.iterdir())) == 1
