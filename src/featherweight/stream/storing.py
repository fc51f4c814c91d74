"""Solutions become shards, and what the shards hold becomes the weights that the next block sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor, nn

from featherweight.core.rules import Rule, grid_of, pattern_of
from featherweight.core.solution import AnySolution, Solution
from featherweight.errors import FeatherweightError
from featherweight.formats import Format
from featherweight.models import tree as trees
from featherweight.models.offload import apart_in, with_weights
from featherweight.models.tree import Block, Matrix, ModelTree
from featherweight.recipe import FLOAT_BITS, Recipe
from featherweight.stream.folder import OutputFolder
from featherweight.stream.groups import Kept, Solved
from featherweight.stream.parallel import ALONE, Parcel, World
from featherweight.stream.phases import Stretch, added
from featherweight.stream.shard import block_tensors, plain_weight, require_all, require_same

OUTSIDE = -1  # in the journal, the block of what lies in none


@dataclass(frozen=True)
class Packed:
    """A block's matrices as its shard will hold them.

    Attributes:
        tensors: of every matrix, by `Matrix.path` and suffix, on the device they were packed on.
        stored: what these tensors say, by path: the solutions once more, from the bytes.
        lines: the journal's, one a matrix.
    """

    block: Block
    tensors: dict[str, dict[str, Tensor]]
    stored: dict[str, AnySolution]
    lines: list[dict[str, Any]]


class Shards:
    """How the matrices of one run lie in its shards."""

    def __init__(self, tree: ModelTree, recipe: Recipe, format: Format, rule_of: Callable[[Matrix], Rule]) -> None:
        self.tree, self.recipe, self.format, self.rule_of = tree, recipe, format, rule_of

    def pack(self, block: Block, solutions: Mapping[str, Solved], seconds: float, world: World = ALONE) -> Packed:
        """The solutions of a block as tensors of the format, but for those that are already: FeatherweightError where
        they do not say the same. Of several processes each packs some, and all have what the others made."""
        known: dict[str, Parcel] = {
            path: ({**solution.line, "block_seconds": round(seconds, 3)}, solution.tensors)
            for path, solution in solutions.items()
            if isinstance(solution, Kept)
        }
        left = {m.path: m for m in block.matrices if m.path not in known}
        mine: dict[str, Parcel] = {}
        stored: dict[str, AnySolution] = {}
        owners = world.deal([float(matrix.rows * matrix.columns) for matrix in left.values()])
        for (path, matrix), owner in zip(left.items(), owners, strict=True):
            solution = solutions[path]
            if owner == world.rank and not isinstance(solution, Kept):
                packed, stored[path] = self._packed(matrix, solution)
                mine[path] = self._line(block.index, matrix, solution, packed, seconds), packed
        only_leader = all(self._says_all(solutions[path]) for path in left)  # nobody else reads what another packed
        found = known | world.merged(mine, for_leader=only_leader)
        for path, matrix in left.items():
            if path not in stored:
                stored[path] = self._as_stored(solutions[path], matrix, found[path][1])
        lines = [found[matrix.path][0] for matrix in block.matrices]
        return Packed(block, {matrix.path: found[matrix.path][1] for matrix in block.matrices}, stored, lines)

    def _as_stored(self, solution: Solved, matrix: Matrix, packed: dict[str, Tensor]) -> AnySolution:
        """What tensors say that another process has packed: it has found there the solution that this one has too,
        but for a plain format, which keeps its values alone."""
        return solution if self._says_all(solution) else self._unpacked(packed, matrix)

    def _says_all(self, solution: Solved) -> TypeGuard[Solution]:
        """Whether a solution is what its tensors will say."""
        return isinstance(solution, Solution) and solution.keep_RC is None and not self.format.plain

    def keep(self, block: Block, matrix: Matrix, solution: AnySolution) -> Kept:
        """One solution as tensors of the format, at once."""
        packed, _ = self._packed(matrix, solution)
        line = self._line(block.index, matrix, solution, packed, 0.0)
        on_cpu = {suffix: tensor.cpu() for suffix, tensor in packed.items()}
        return Kept(on_cpu, line, lambda: self._unpacked(on_cpu, matrix).values())

    def _packed(self, matrix: Matrix, solution: AnySolution) -> tuple[dict[str, Tensor], AnySolution]:
        """The tensors of a solution, and what they say."""
        packed = self._turned(self.format.pack(solution, matrix.name, self.tree.dtype), matrix)
        if any(tensor.device.type == "cpu" for tensor in packed.values()):  # a format that codes there
            packed = {suffix: tensor.cpu() for suffix, tensor in packed.items()}
        found = self._unpacked(packed, matrix)
        require_same(matrix, solution, found)
        return packed, found

    def write(self, folder: OutputFolder, packed: Packed, stretch: Stretch) -> None:
        """Writes a shard and its lines of the journal, having read it back and compared byte by byte."""
        stretch.wait()
        began = time.perf_counter()
        tensors = block_tensors(self.tree.checkpoint, packed.block, packed.tensors, self.format.plain)
        with folder.staged(packed.block.index + 1, tensors) as part:
            with safe_open(part, framework="pt") as file:
                _require_written(packed.block, tensors, file, part.name)
            seconds = added(stretch.seconds(), {"write": time.perf_counter() - began})
            rounded = {name: round(took, 4) for name, took in seconds.items()}
            folder.lines += [*packed.lines, {"block": packed.block.index, "phase_seconds": rounded}]

    def put(
        self, module: nn.Module, block: Block, stored: Mapping[str, AnySolution], settled: Container[str] = ()
    ) -> None:
        """Gives a block the weights that its shard holds; experts that are apart have theirs, and so have the matrices,
        by path, that are `settled`, where shards say what solutions do."""
        for matrix in (matrix for matrix in block.matrices if matrix.path in stored):
            solution = stored[matrix.path]
            if matrix.path in settled and self._says_all(solution):
                continue
            values_RC = solution.values()
            weight = module.get_submodule(matrix.path).weight
            assert isinstance(weight, Tensor)
            weight.copy_(values_RC.T if matrix.transposed else values_RC)

    def read(self, folder: OutputFolder, block: Block, module: nn.Module | None = None) -> dict[str, AnySolution]:
        """What a finished shard says of its matrices, by `Matrix.path`; experts that are apart in the module read
        there what they have become."""
        inside: dict[str, dict[str, Callable[[], Tensor]]] = {}
        apart = {} if module is None else apart_in(module)
        others = []
        for matrix in block.matrices:
            path, _, leaf = matrix.path.rpartition(".")
            if path in apart:
                inside.setdefault(path, {})[leaf] = partial(self._values, folder, block, matrix)
            else:
                others.append(matrix)
        for path, values in inside.items():
            apart[path].compressed = partial(with_weights, apart[path].original, values)
        with safe_open(folder.shard(block.index + 1), framework="pt") as file:
            return {matrix.path: self._read(file, matrix) for matrix in others}

    def finish(self, folder: OutputFolder, rules: Mapping[str, Rule], tokens: tuple[Matrix, ...]) -> None:
        """The small files that make the folder a checkpoint, once every matrix is accounted for: those of the blocks,
        and those that stand for `tokens`, with the rule of each by its name."""
        shards = [folder.shard(index) for index in range(len(self.tree.blocks) + 1)]
        require_all((*tokens, *self.tree.matrices), folder.rows, shards, self.format.plain)
        rounded = {matrix.name for matrix in tokens}
        left = [path for path in trees.matrices_left(self.tree) if path not in rounded]
        targets = ("Linear", "Embedding") if tokens else ("Linear",)
        quantization = self.format.config(dict(rules), left, targets=targets, meta=self.recipe.as_dict())
        config, source = dict(self.tree.checkpoint.config), self.tree.checkpoint
        extra: dict[str, dict[str, Any]] = {}
        if quantization is not None:
            config["quantization_config"] = quantization
            extra = {"quantize_config.json": quantization} if self.format.name.startswith("gptq") else {}
        folder.finish(config, extra, source.path, source.side_files())

    def _values(self, folder: OutputFolder, block: Block, matrix: Matrix) -> Tensor:
        with safe_open(folder.shard(block.index + 1), framework="pt") as file:
            return self._read(file, matrix).values()

    def _read(self, file: Any, matrix: Matrix) -> AnySolution:
        if self.format.plain:
            tensors = {"weight": plain_weight(file, matrix)}
        else:
            suffixes = self.format.suffixes(self.rule_of(matrix))
            tensors = {suffix: file.get_tensor(f"{matrix.name}.{suffix}") for suffix in suffixes}
        return self._unpacked(tensors, matrix)

    def _unpacked(self, tensors: dict[str, Tensor], matrix: Matrix) -> AnySolution:
        return self.format.unpack(self._turned(tensors, matrix), self.rule_of(matrix), matrix.name)

    def _turned(self, tensors: dict[str, Tensor], matrix: Matrix) -> dict[str, Tensor]:
        """A plain `weight` the other way round where the module holds it so; every other tensor as it is."""
        if not (self.format.plain and matrix.transposed):
            return tensors
        return {suffix: tensor.T.contiguous() for suffix, tensor in tensors.items()}

    def _line(
        self, index: int, matrix: Matrix, solution: AnySolution, packed: dict[str, Tensor], seconds: float
    ) -> dict[str, Any]:
        """The journal's line of one matrix."""
        grid, pattern = grid_of(self.rule_of(matrix)), pattern_of(self.rule_of(matrix))
        return {
            "block": index,
            "name": matrix.name,
            "shape": [matrix.rows, matrix.columns],
            "bits": FLOAT_BITS if grid is None else grid.bits,
            "group_size": grid and grid.group_size,
            "symmetric": grid and grid.symmetric,
            "sparsity": pattern and str(pattern),
            "bytes": sum(tensor.nbytes for tensor in packed.values()),
            "loss": None if self.recipe.method == "rtn" or index == OUTSIDE else solution.certificate,
            **solution.metrics,
            **self.format.metrics(solution),
            "damping": solution.damping,
            "block_seconds": round(seconds, 3),
        }


def _require_written(block: Block, tensors: Mapping[str, Tensor], file: Any, shard: str) -> None:
    """Every tensor of the matrices is in the shard as it was handed over, bit for bit."""
    ours = {matrix.name for matrix in block.matrices} | {matrix.weight for matrix in block.matrices}
    for name, tensor in tensors.items():
        if name not in ours and name.rpartition(".")[0] not in ours:
            continue
        found = file.get_tensor(name)
        same = found.dtype == tensor.dtype and found.shape == tensor.shape
        if not (same and torch.equal(_bytes(found), _bytes(tensor))):
            raise FeatherweightError(
                f"{name} read back from {shard} differs from what was written: please report this."
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
