"""Small runs of the whole pipeline for the end-to-end tests: recipes, the command line in this process, and processes
that may be killed.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from featherweight.core.solution import Solution
from featherweight.linear import CompressedLinear
from featherweight.recipe import Recipe
from featherweight.stream import compress as pipeline
from featherweight.stream.layerwise import BlockView

LOCK, MANIFEST, JOURNAL = ".featherweight.lock", "featherweight.json", "journal.jsonl"
PRELOADED = [
    "pytest", "featherweight.api", "featherweight.cli", "transformers.models.llama.modeling_llama", "tokenizers",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_fast", "filelock",
]  # fmt: skip


def recipe(text: Path, **changes: Any) -> Recipe:
    """Four windows of 32 tokens, groups of 32, and the arithmetic that takes least time."""
    small = {"group_size": 32, "samples": 4, "tokens": 32, "damping": 0.1}
    plain = {"search": "minmax", "refine": 0, "target": "drifted"}
    return Recipe(**{**small, **plain, "calibration": (str(text),), **changes})


def model_files(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder by relative path, but for the records of the run itself (times, versions)."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if name not in (LOCK, MANIFEST, JOURNAL)}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """When, and as which file, every finished shard was written."""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("*.safetensors")}


def journal(folder: Path) -> list[dict[str, Any]]:
    """The journal's lines of matrices."""
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    return [line for line in lines if "name" in line]


@dataclass(frozen=True)
class Seen:
    """What the solver of one block was handed, and what it answered."""

    place: str
    hidden_STD: Tensor | None
    dense_STD: Tensor | None
    weights: dict[str, Tensor]
    solutions: Mapping[str, Solution]


@contextmanager
def watching() -> Iterator[list[Seen]]:
    """Records every block that is solved, in order."""
    seen: list[Seen] = []
    inner = pipeline.layerwise

    def states(hidden: Any) -> Tensor | None:
        return None if hidden is None else hidden.states_STD.clone()

    def solve(view: BlockView, *rest: Any) -> dict[str, Solution]:
        place = "nowhere" if view.inputs is None else view.inputs.place
        weights = {matrix.path: view.weight(matrix).clone() for matrix in view.matrices}
        hidden_STD, dense_STD = states(view.inputs), states(view.dense)
        solutions = inner(view, *rest)
        seen.append(Seen(place, hidden_STD, dense_STD, weights, solutions))
        return solutions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "layerwise", solve)
        yield seen


# --- models and their tensors


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous(), other.contiguous()
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
    )


def logits(model: Any, ids_ST: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids_ST, use_cache=False).logits
    return found


def weight_of(module: nn.Module) -> Tensor:
    """R x C, whichever way the module keeps it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def put_weights(dense: Any, compressed: Any) -> int:
    """Gives the dense model the values of the compressed one's matrices; returns how many."""
    count = 0
    for path, layer in compressed.named_modules():
        if isinstance(layer, CompressedLinear):
            weight_of(dense.get_submodule(path)).data.copy_(layer.weight)
            count += 1
    return count


# --- the command line


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def last(self) -> dict[str, Any]:
        """The JSON object of the last line of stdout."""
        values = json.loads(self.out.splitlines()[-1])
        assert isinstance(values, dict)
        return values

    @property
    def error(self) -> str:
        """The one sentence of a refusal: the last line of stderr, the only one that starts so; stdout is empty."""
        lines = self.err.strip().splitlines()
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        assert [line for line in lines if line.startswith(("error: ", "failed: "))] == lines[-1:]
        return lines[-1].removeprefix("error: ")


def featherweight(*arguments: object) -> Ran:
    """Runs the command in this process."""
    from featherweight.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["featherweight", *map(str, arguments)])
        patch.setenv("COLUMNS", "400")
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return Ran(code, out.getvalue(), err.getvalue())


# --- processes that may be killed


@functools.cache
def processes() -> ForkServerContext:
    """Processes forked, in milliseconds, from one that has everything imported and has never started a thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        first = context.Process(target=torch.get_num_threads)
        first.start()
        first.join()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return context
