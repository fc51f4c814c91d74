"""compress: a checkpoint in, a compressed checkpoint out, one block at a time.

Shapes: S sequences, T tokens, R outputs, C inputs.
"""

from __future__ import annotations

import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from featherweight import data
from featherweight.core.rules import Rule, grid_of, pattern_of
from featherweight.core.solution import AnySolution
from featherweight.errors import RequestError
from featherweight.formats import Format
from featherweight.formats import by_name as format_by_name
from featherweight.models import tree as trees
from featherweight.models.blocks import BlockRunner
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.tokens import token_matrices
from featherweight.models.tree import Block, Matrix, ModelTree
from featherweight.recipe import FLOAT_BITS, Recipe
from featherweight.stream.allocation import allocated_rules, check_reach
from featherweight.stream.calibration import BATCH_TOKENS, TOKENS, Tell, calibration_ids, window_length
from featherweight.stream.device import compute_dtype, peak_memory_bytes
from featherweight.stream.folder import OutputFolder
from featherweight.stream.guide import Weights, token_weights
from featherweight.stream.inputs import BlockView
from featherweight.stream.layerwise import layerwise
from featherweight.stream.parallel import World, check_divisible, joined
from featherweight.stream.shard import block_tensors, plain_weight, require_all, require_same
from featherweight.stream.states import States
from featherweight.stream.tokens import round_tokens
from featherweight.stream.trained import trained

OUTSIDE = -1  # in the journal, the block of what lies in none


@dataclass(frozen=True)
class Result:
    """What `compress` made: the output folder, matrices compressed, their bits per weight from bytes on disk, the bytes
    of all shards, the seconds this run took, and the most memory it held (of the GPU, or of the process on a CPU)."""

    out: str
    matrices: int
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_memory_bytes: int


def compress(
    model: str | Path, out: str | Path, recipe: Recipe, device: str = "auto", tell: Tell | None = None
) -> Result:
    """Compresses `model` into the folder `out`; started again on a half-done folder, it goes on where it stopped.

    Raises RequestError for everything the user can mend: a broken checkpoint, an architecture or a shape that does not
    fit, too little text, a folder begun with another recipe, model or data, a full disk.

    Of several processes (`stream.parallel`), all call it with the same arguments; one writes and tells.
    """
    with joined() as world:
        return _compress(model, Path(out), recipe, device, tell, world)


def _compress(model: str | Path, out: Path, recipe: Recipe, device: str, tell: Tell | None, world: World) -> Result:
    started = time.perf_counter()
    torch_device = world.device(device)
    checkpoint = Checkpoint.open(resolve(model))
    tree = trees.build(checkpoint)
    recipe = recipe.but(tokens=window_length(recipe, tree))
    check_divisible(world, tree, recipe)
    job = _Job(tree, recipe, torch_device, out, tell if tell and world.leads else lambda done, total, what: None, world)
    if recipe.budget is None:
        job.check()
    else:
        check_reach(tree, recipe, job.format)
    folder = OutputFolder(out, len(tree.blocks))
    with folder.locked() if world.leads else nullcontext():
        ids_ST = world.first_tensor(lambda: calibration_ids(checkpoint.path, recipe))
        job.check_ids(ids_ST)
        if world.leads:
            folder.begin(job.manifest(ids_ST))
        if not world.first(folder.done):
            with torch.no_grad():
                job.plan()
                job.run(folder, ids_ST)
            if world.leads:
                job.finish(folder)
        world.wait()
        folder.rows = folder.rows if world.leads else folder.finished_rows()
    bits = 8 * sum(row["bytes"] for row in folder.rows) / sum(row["shape"][0] * row["shape"][1] for row in folder.rows)
    seconds = time.perf_counter() - started
    return Result(str(out), len(folder.rows), bits, folder.size_bytes(), seconds, peak_memory_bytes(torch_device))


class _Job:
    """One run of `compress`: what does not change from block to block."""

    def __init__(
        self, tree: ModelTree, recipe: Recipe, device: torch.device, out: Path, tell: Tell, world: World
    ) -> None:
        self.tree, self.recipe, self.device, self.out, self.tell, self.world = tree, recipe, device, out, tell, world
        self.format: Format = format_by_name(recipe.format_name)
        stored_dtype = self.format.scale_dtype(tree.dtype)
        self.rules: dict[str, Rule] = {matrix.name: recipe.rule(stored_dtype) for matrix in tree.matrices}
        grid = grid_of(recipe.rule(stored_dtype))
        self.choices = recipe.choices(0 if grid is None else self.format.lowest_zero(grid), stored_dtype)
        tokens_grid = recipe.embedding_rule(stored_dtype)
        self.tokens: dict[str, Matrix] = {} if tokens_grid is None else {m.name: m for m in token_matrices(tree)}
        self.token_rules = {} if tokens_grid is None else dict.fromkeys(self.tokens, tokens_grid)
        self.dtype = compute_dtype(tree.dtype, device)
        self.batch = max(1, BATCH_TOKENS[device.type] // (recipe.tokens or TOKENS))

    def plan(self) -> None:
        """With a budget, a rule for each matrix in place of the one for all."""
        if self.recipe.budget is not None:
            self.rules = allocated_rules(self.tree, self.recipe, self.format, self.out, str(self.device), self.tell)
            self.check()

    def check(self) -> None:
        """Everything that can be refused before any work is done; with a budget, the rules come later."""
        if self.tokens and not self.format.embeddings:
            raise RequestError(
                f"{next(iter(self.tokens))} was to be rounded to {self.recipe.embedding_bits} bits, and "
                f"{self.format.name} leaves embeddings in {FLOAT_BITS}: use --format compressed-tensors."
            )
        for matrix in (*self.tree.matrices, *self.tokens.values()):
            self.format.check(matrix.name, matrix.rows, matrix.columns, self.rule_of(matrix))

    def rule_of(self, matrix: Matrix) -> Rule:
        """What a matrix of the blocks, or one that stands for tokens, is to obey."""
        return self.token_rules[matrix.name] if matrix.name in self.tokens else self.rules[matrix.name]

    def check_ids(self, ids_ST: Tensor | None) -> None:
        """Token ids the embedding does not have mean that the tokenizer is another model's."""
        known = self.tree.model.get_input_embeddings().weight.shape[0]
        if ids_ST is not None and int(ids_ST.max()) >= known:
            raise RequestError(
                f"the tokenizer gives token {int(ids_ST.max())} and the model knows 0 to {known - 1}: "
                "use the model's own tokenizer."
            )

    def manifest(self, ids_ST: Tensor | None) -> dict[str, Any]:
        """What the output's bytes follow from; `OutputFolder.begin` compares it on resuming."""
        import transformers

        return {
            "recipe": self.recipe.as_dict(),
            "recipe_digest": self.recipe.digest(),
            "model": {"fingerprint": self.tree.checkpoint.fingerprint(), "blocks": len(self.tree.blocks)},
            "data": {"ids_sha256": None if ids_ST is None else data.digest(ids_ST)},
            "made_with": {
                "featherweight": version("featherweight"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
                **({"processes": self.world.size} if self.world.size > 1 else {}),
            },
        }

    def run(self, folder: OutputFolder, ids_ST: Tensor | None) -> None:
        """Writes every shard that is not there yet."""
        self.tell(0, len(self.tree.blocks), "reading")
        finished = self.world.first([folder.finished(number) for number in range(len(self.tree.blocks) + 1)])
        if not finished[0]:
            self._write_rest(folder)
        runner = BlockRunner(self.tree, self.device, self.dtype)
        stored = {} if ids_ST is None else self._stored_tokens(folder)
        states = States(runner, ids_ST, self.out, self.batch, self.recipe.target == "original", stored, self.world)
        stored.clear()
        weights = self._weights(folder, ids_ST)
        try:
            for index, block in enumerate(self.tree.blocks):
                if ids_ST is None and finished[index + 1]:
                    continue
                module = runner.load(index)
                if not finished[index + 1]:
                    self._solve(folder, index, block, states.view(index, module, block, weights))
                elif states.dense is not None:
                    states.advance(states.dense, index, module)
                if states.hidden is not None and index + 1 < len(self.tree.blocks):
                    self._put_stored(folder, index, block, module)
                    states.advance(states.hidden, index, module)
                runner.unload(index)
                self.tell(index + 1, len(self.tree.blocks), f"block {index + 1}")
        finally:
            states.close()

    def _write_rest(self, folder: OutputFolder) -> None:
        """Writes what lies outside the blocks, embedding and head rounded if the recipe says so."""
        began, matrices = time.perf_counter(), tuple(self.tokens.values())
        solutions: dict[str, AnySolution] = {}
        for matrix in matrices if self.world.leads else ():
            grid = self.token_rules[matrix.name]
            solutions[matrix.path] = round_tokens(self.tree, matrix, grid, self.format.lowest_zero(grid), self.device)
        rest = Block(OUTSIDE, "", matrices, self.tree.rest)
        self._write(folder, rest, solutions, time.perf_counter() - began)

    def _write(self, folder: OutputFolder, block: Block, solutions: dict[str, AnySolution], seconds: float) -> None:
        """Writes the shard of a block (or of what lies in none); the other processes wait for it."""
        if self.world.leads:
            self._write_shard(folder, block, solutions, seconds)
        self.world.wait()

    def _write_shard(
        self, folder: OutputFolder, block: Block, solutions: dict[str, AnySolution], seconds: float
    ) -> None:
        """Writes a shard, having read it back and compared."""
        packed = {m.path: self._packed(solutions[m.path], m) for m in block.matrices}
        tensors = block_tensors(self.tree.checkpoint, block, packed, self.format.plain)
        with folder.staged(block.index + 1, tensors) as part, safe_open(part, framework="pt") as file:
            for matrix in block.matrices:
                require_same(matrix, solutions[matrix.path], self._read_back(file, matrix))
                folder.rows.append(self._row(block.index, matrix, solutions[matrix.path], packed[matrix.path], seconds))

    def _stored_tokens(self, folder: OutputFolder) -> dict[str, Tensor]:
        """What the first shard holds of embedding and head, by their names on the original's disk."""
        if not self.tokens:
            return {}
        with safe_open(folder.shard(0), framework="pt") as file:
            return {m.weight: self._read_back(file, m).values() for m in self.tokens.values()}

    def _weights(self, folder: OutputFolder, ids_ST: Tensor | None) -> Weights | None:
        """What each token counts for each matrix, where the recipe asks for it and anything is left to solve."""
        left = any(not folder.finished(index + 1) for index in range(len(self.tree.blocks)))
        if ids_ST is None or not self.recipe.guide or not left:
            return None
        total = len(self.tree.blocks)
        return token_weights(
            self.tree, ids_ST, self.device, self.dtype, self.recipe.seed, lambda share: self.tell(0, total, "gradients")
        )

    def _solve(self, folder: OutputFolder, index: int, block: Block, view: BlockView) -> None:
        """Solves a block and writes its shard."""
        began, total = time.perf_counter(), len(self.tree.blocks)
        rules = {matrix.path: self.rules[matrix.name] for matrix in block.matrices}
        solve_block = trained if self.recipe.trains else layerwise
        solutions = solve_block(
            view,
            rules,
            self.recipe,
            self.choices,
            lambda share: self.tell(index + 0.9 * share, total, f"block {index + 1}"),
        )
        self._write(folder, block, solutions, time.perf_counter() - began)

    def _row(
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

    def _packed(self, solution: AnySolution, matrix: Matrix) -> dict[str, Tensor]:
        """The tensors of a matrix as they lie in the file."""
        return self._turned(self.format.pack(solution, matrix.name, self.tree.dtype), matrix)

    def _turned(self, tensors: dict[str, Tensor], matrix: Matrix) -> dict[str, Tensor]:
        """A plain `weight` the other way round where the module holds it so; every other tensor as it is."""
        if not (self.format.plain and matrix.transposed):
            return tensors
        return {suffix: tensor.T.contiguous() for suffix, tensor in tensors.items()}

    def _read_back(self, file: Any, matrix: Matrix) -> AnySolution:
        """A matrix's solution from the bytes of its open shard."""
        rule = self.rule_of(matrix)
        if self.format.plain:
            tensors = {"weight": plain_weight(file, matrix)}
        else:
            tensors = {suffix: file.get_tensor(f"{matrix.name}.{suffix}") for suffix in self.format.suffixes(rule)}
        return self.format.unpack(self._turned(tensors, matrix), rule, matrix.name)

    def _put_stored(self, folder: OutputFolder, index: int, block: Block, module: nn.Module) -> None:
        """Gives the block the weights its shard holds."""
        with safe_open(folder.shard(index + 1), framework="pt") as file:
            for matrix in block.matrices:
                values_RC = self._read_back(file, matrix).values()
                weight = module.get_submodule(matrix.path).weight
                assert isinstance(weight, Tensor)
                weight.copy_(values_RC.T if matrix.transposed else values_RC)

    def finish(self, folder: OutputFolder) -> None:
        """The small files that make the folder a checkpoint, once every matrix is accounted for."""
        shards = [folder.shard(index) for index in range(len(self.tree.blocks) + 1)]
        matrices = (*self.tokens.values(), *self.tree.matrices)
        require_all(matrices, folder.rows, shards, self.format.plain)
        rules = {**self.rules, **self.token_rules}
        left = [path for path in trees.matrices_left(self.tree) if path not in self.tokens]
        targets = ("Linear", "Embedding") if self.tokens else ("Linear",)
        quantization = self.format.config(rules, left, targets=targets, meta=self.recipe.as_dict())
        config = dict(self.tree.checkpoint.config)
        extra: dict[str, dict[str, Any]] = {}
        if quantization is not None:
            config["quantization_config"] = quantization
            extra = {"quantize_config.json": quantization} if self.format.name.startswith("gptq") else {}
        folder.finish(config, extra, self.tree.checkpoint.path, self.tree.checkpoint.side_files())
