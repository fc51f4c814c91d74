"""Options and fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Before numpy and torch are imported, here and in processes that tests start: the suite runs in two processes, and
# threads of both that wait for each other's cores take many times longer than one.
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # Triton reads it when it is first imported, long before the test that needs it
    os.environ["TRITON_INTERPRET"] = "1"

from tiny import add_tokenizer, make, write_text  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", type=Path, default=None, help="folder of real checkpoints (else their tests skip)")


def pytest_configure() -> None:
    """One torch thread a process: tiny models gain nothing from two, and the suite runs in two processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models_folder(request: pytest.FixtureRequest) -> Path:
    """The folder given by --models."""
    folder = request.config.getoption("--models")
    if folder is None or not folder.is_dir():
        pytest.skip("no folder of real checkpoints: give one with --models DIR")
    return Path(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some calibration text."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a matrix of 256 inputs, which are more than one slab."""
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("llama"), intermediate_size=256))
