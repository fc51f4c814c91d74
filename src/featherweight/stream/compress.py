"""compress: a checkpoint in, a compressed checkpoint out, one block at a time.

Shapes: S sequences, T tokens, R outputs, C inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from featherweight.core.rules import Rule, grid_of
from featherweight.core.solution import AnySolution
from featherweight.errors import RequestError
from featherweight.formats import Format
from featherweight.formats import by_name as format_by_name
from featherweight.models import tree as trees
from featherweight.models.blocks import BlockRunner
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.encoder_decoder import runner_of
from featherweight.models.load import load_tokenizer
from featherweight.models.tokens import token_matrices
from featherweight.models.tree import Block, Matrix, ModelTree
from featherweight.native.memory import kept, uncollected
from featherweight.recipe import FLOAT_BITS, Recipe
from featherweight.stream import attention
from featherweight.stream.allocation import allocated_rules, check_reach
from featherweight.stream.calibration import BATCH_TOKENS, LOW_TOKENS, TOKENS, Tell, calibration_ids, window_length
from featherweight.stream.carried import Carried
from featherweight.stream.device import compute_dtype, peak_memory_bytes
from featherweight.stream.folder import OutputFolder
from featherweight.stream.fused import fuse, rotations
from featherweight.stream.guide import Weights, token_weights
from featherweight.stream.inputs import BlockView
from featherweight.stream.layerwise import layerwise
from featherweight.stream.parallel import World, check_divisible, joined
from featherweight.stream.phases import Phases
from featherweight.stream.portions import room_for_experts
from featherweight.stream.rehearsal import Rehearsal, waking
from featherweight.stream.request import check_ids, manifest, refuse_parts
from featherweight.stream.states import States
from featherweight.stream.storing import OUTSIDE, Packed, Shards
from featherweight.stream.tokens import round_tokens
from featherweight.stream.trained import dealt, trained
from featherweight.stream.writer import Ahead, Writer

Memory = Literal["auto", "low"]


@dataclass(frozen=True)
class Result:
    """What `compress` made: the output folder, matrices compressed, their bits per weight from bytes on disk, the bytes
    of all shards, the seconds this run took, the most memory it held (of the GPU, or of the process on a CPU), and the
    seconds of all blocks by phase ("write" goes on beside the others on a GPU)."""

    out: str
    matrices: int
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_memory_bytes: int
    phase_seconds: dict[str, float]


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    device: str = "auto",
    tell: Tell | None = None,
    ids_ST: Tensor | None = None,
    memory: Memory = "auto",
) -> Result:
    """Compresses `model` into the folder `out`; started again on a half-done folder, it goes on where it stopped.

    Raises RequestError for everything the user can mend: a broken checkpoint, an architecture or a shape that does not
    fit, too little text, a folder begun with another recipe, model or data, a full disk.

    Of several processes (`stream.parallel`), all call it with the same arguments; one writes and tells.

    `ids_ST` are token ids to calibrate on in place of the recipe's text. With `memory` "low", hidden states stay off
    the GPU and fewer tokens go through a block at a time: slower, with sums in another order.
    """
    with joined() as world:
        return _compress(model, Path(out), recipe, device, tell, ids_ST, memory, world)


def _compress(
    model: str | Path,
    out: Path,
    recipe: Recipe,
    device: str,
    tell: Tell | None,
    ids_ST: Tensor | None,
    memory: Memory,
    world: World,
) -> Result:
    started = time.perf_counter()
    torch_device = world.device(device)
    if torch_device.type == "cuda":
        waking()
    world = world.over(torch_device)
    checkpoint = Checkpoint.open(resolve(model))
    tree = trees.build(checkpoint)
    refuse_parts(tree, recipe)
    recipe = recipe.but(tokens=window_length(recipe, tree))
    check_divisible(world, recipe)
    tell = tell if tell and world.leads else lambda done, total, what: None
    job = _Job(tree, recipe, torch_device, out, tell, world, memory)
    if recipe.budget is None:
        job.check()
    else:
        check_reach(tree, recipe, job.format)
    folder = OutputFolder(out, len(tree.blocks))
    with folder.locked() if world.leads else nullcontext():
        given = ids_ST
        ids_ST = world.first_tensor(lambda: calibration_ids(checkpoint.path, recipe) if given is None else given)
        check_ids(tree, ids_ST)
        if world.leads:
            folder.begin(manifest(tree, recipe, ids_ST, torch_device, job.dtype, world))
        if not world.first(folder.done):
            keep = kept() if torch_device.type == "cpu" else nullcontext(lambda: None)
            with torch.no_grad(), keep as job.between_blocks:
                job.plan()
                job.run(folder, ids_ST)
            if world.leads:
                job.shards.finish(folder, {**job.rules, **job.token_rules}, tuple(job.tokens.values()))
        world.wait()
        folder.lines = folder.lines if world.leads else folder.finished_lines()
    bits = 8 * sum(row["bytes"] for row in folder.rows) / sum(row["shape"][0] * row["shape"][1] for row in folder.rows)
    seconds = time.perf_counter() - started
    phase_seconds = {name: round(took, 3) for name, took in folder.seconds.items()}
    peak = peak_memory_bytes(torch_device)
    return Result(str(out), len(folder.rows), bits, folder.size_bytes(), seconds, peak, phase_seconds)


class _Job:
    """One run of `compress`: what does not change from block to block."""

    def __init__(
        self,
        tree: ModelTree,
        recipe: Recipe,
        device: torch.device,
        out: Path,
        tell: Tell,
        world: World,
        memory: Memory,
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
        self.shards = Shards(tree, recipe, self.format, self.rule_of)
        self.phases = Phases(device)
        self.beside = device.type == "cuda"  # on a CPU, reading and writing beside the solver takes cores from it
        self.dtype = compute_dtype(tree.dtype, device)
        self.fuses = not recipe.trains  # training compiles blocks and needs gradients
        self.low = memory == "low"
        self.carried = Carried(device, self.low)
        first = tree.model.get_submodule(tree.blocks[0].module)
        self.rehearsal = Rehearsal(device, self.dtype, first, tree.matrices[0].columns)
        self.between_blocks: Callable[[], None] = lambda: None
        # A plain format rounds what the pass has gone through, and training goes through the block again.
        self.endings = not (self.low or recipe.trains or self.format.plain)
        together = min(BATCH_TOKENS[device.type], LOW_TOKENS) if self.low else BATCH_TOKENS[device.type]
        self.expert_bytes = room_for_experts(tree, recipe, device, self.dtype, self.low, world)
        self.batch = max(1, together // (recipe.tokens or TOKENS))

    def plan(self) -> None:
        """With a budget, a rule for each matrix in place of the one for all."""
        if self.recipe.budget is not None:
            device = str(self.device)
            self.rules = allocated_rules(self.tree, self.recipe, self.format, self.out, device, self.tell, self.world)
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

    def run(self, folder: OutputFolder, ids_ST: Tensor | None) -> None:
        """Writes every shard that is not there yet."""
        self.tell(0, len(self.tree.blocks), "reading")
        finished = self.world.first([folder.finished(number) for number in range(len(self.tree.blocks) + 1)])
        with Writer(self.beside) as writer, self.rehearsal, self.world.meeting():
            if not finished[0]:
                self._solve_rest(folder, writer)
            runner = runner_of(self.tree, self.device, self.dtype, self.expert_bytes)
            if not all(finished):
                self.rehearsal.solver(next(iter(self.rules.values())), self.choices)
            turned = rotations(runner.model) if self.fuses else nullcontext()
            attending = attention.in_c() if self.fuses and self.device.type == "cpu" else nullcontext()
            carried, total = self.carried, len(self.tree.blocks)
            first = 0 if ids_ST is not None else next((n for n in range(total) if not finished[n + 1]), total)
            checkpoint = self.tree.checkpoint
            reading = Ahead(lambda index: carried.read(checkpoint, runner.names(index)), total, self.beside, first)
            with reading as ahead, turned, attending, uncollected():
                self._run_blocks(folder, ids_ST, finished[1:], runner, ahead, writer)

    def _run_blocks(
        self,
        folder: OutputFolder,
        ids_ST: Tensor | None,
        finished: list[bool],
        runner: BlockRunner,
        ahead: Ahead[dict[str, Tensor]],
        writer: Writer,
    ) -> None:
        """Solves every block that is not finished, and takes the hidden states through all of them."""
        total = len(self.tree.blocks)
        stored = {} if ids_ST is None else self._stored_tokens(folder, writer)
        ids_ST = ids_ST if ids_ST is None else dealt(ids_ST, self.recipe, self.world)
        original = self.recipe.target == "original"
        special = load_tokenizer(self.tree.checkpoint.path).all_special_ids if self.recipe.drop_special else ()
        states = States(
            runner, ids_ST, self.out, self.batch, original, stored, self.world, self.low, self.endings, special
        )
        stored.clear()
        weights = None if all(finished) else self._weights(ids_ST)
        try:
            for index, block in enumerate(self.tree.blocks):
                if ids_ST is None and finished[index]:
                    continue
                self._run_block(folder, writer, block, states, runner, ahead, weights, finished[index])
                self.between_blocks()
                self.tell(index + 1, total, f"block {index + 1}")
        finally:
            states.close()

    def _run_block(
        self,
        folder: OutputFolder,
        writer: Writer,
        block: Block,
        states: States,
        runner: BlockRunner,
        ahead: Ahead[dict[str, Tensor]],
        weights: Weights | None,
        finished: bool,
    ) -> None:
        """Solves one block if it is not finished, and takes the hidden states through it."""
        index = block.index
        with self.phases("load"):
            module = runner.load(index, ahead.take(index))
        self.rehearsal.wait_for_triton()
        if self.fuses:
            fuse(module)
        settled: set[str] = set()
        if not finished:
            keep = None if self.expert_bytes is None else partial(self.shards.keep, block)
            view = states.view(index, module, block, weights, keep)
            found, settled = self._solve(folder, writer, index, block, view), view.settled
        else:
            if states.dense is not None:
                states.advance(states.dense, index, module)
            found = self.shards.read(folder, block, module) if states.hidden is not None else {}
        if states.hidden is not None and index + 1 < len(self.tree.blocks):
            with self.phases("forward"):
                self.shards.put(module, block, found, settled)
                states.finish(index, module)
                states.turn(index)
        runner.unload(index)

    def _solve_rest(self, folder: OutputFolder, writer: Writer) -> None:
        """Writes what lies outside the blocks, embedding and head rounded if the recipe says so."""
        began, matrices = time.perf_counter(), tuple(self.tokens.values())
        solutions: dict[str, AnySolution] = {}
        for matrix in matrices if self.world.leads else ():
            grid = self.token_rules[matrix.name]
            solutions[matrix.path] = round_tokens(self.tree, matrix, grid, self.format.lowest_zero(grid), self.device)
        if self.world.leads:
            rest = Block(OUTSIDE, "", matrices, self.tree.rest)
            packed = self.shards.pack(rest, solutions, time.perf_counter() - began)
            self._write(folder, writer.put_aside, packed)  # of a large vocabulary, longer than several blocks

    def _write(self, folder: OutputFolder, put: Callable[[Callable[[], None]], None], packed: Packed) -> None:
        """Has the shard of a block written, or of what lies in none."""
        bring, stretch = self.carried.back(packed.tensors), self.phases.stretch()
        rest = replace(packed, tensors={}, stored={})
        put(lambda: self.shards.write(folder, replace(rest, tensors=bring()), stretch))
        if not self.beside:  # it was written here and now, and the shard's own line says how long that took
            self.phases.skip()

    def _stored_tokens(self, folder: OutputFolder, writer: Writer) -> dict[str, Tensor]:
        """What the first shard holds of embedding and head, by their names on the original's disk."""
        if not self.tokens:
            return {}
        writer.wait()
        self.world.wait()
        rest = Block(OUTSIDE, "", tuple(self.tokens.values()), self.tree.rest)
        found = self.shards.read(folder, rest)
        return {m.weight: found[m.path].values() for m in self.tokens.values()}

    def _weights(self, ids_ST: Tensor | None) -> Weights | None:
        """What each token of this process counts for each matrix, where the recipe asks for it."""
        if ids_ST is None or not self.recipe.guide:
            return None

        def tick(_share: float) -> None:
            self.tell(0, len(self.tree.blocks), "gradients")

        return token_weights(self.tree, ids_ST, self.device, self.dtype, self.recipe.seed, tick, self.world)

    def _solve(
        self, folder: OutputFolder, writer: Writer, index: int, block: Block, view: BlockView
    ) -> dict[str, AnySolution]:
        """Solves a block and has its shard written; returns what that will hold."""
        began, total = time.perf_counter(), len(self.tree.blocks)
        rules = {matrix.path: self.rules[matrix.name] for matrix in block.matrices}
        solve_block = trained if self.recipe.trains else layerwise
        solutions = solve_block(
            replace(view, phases=self.phases, ready=self.rehearsal.wait_for_solver),
            rules,
            self.recipe,
            self.choices,
            lambda share: self.tell(index + 0.9 * share, total, f"block {index + 1}"),
        )
        with self.phases("pack"):
            packed = self.shards.pack(block, solutions, time.perf_counter() - began, self.world)
            if self.world.leads:
                self._write(folder, writer.put, packed)
        return packed.stored
