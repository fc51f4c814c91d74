"""Options and fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is first imported, long before the test that needs it
    os.environ["TRITON_INTERPRET"] = "1"

from tiny import add_tokenizer, make, write_text


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
