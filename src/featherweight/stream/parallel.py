"""Several processes on one model: what each has to do, and what they tell each other (torch.distributed).

Calibration sequences are split, sums over them added up, groups of matrices dealt out to be solved; process 0 writes.
Started by `torchrun --nproc-per-node N -m featherweight compress ...`, or by a program whose every process has called
`torch.distributed.init_process_group` and then calls `compress`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from featherweight.core.rules import Rule, grid_of, pattern_of
from featherweight.core.solution import AnySolution, Solution, SparseSolution
from featherweight.errors import FeatherweightError, RequestError
from featherweight.recipe import Recipe
from featherweight.stream.device import pick_device

Parcel = tuple[Any, dict[str, Tensor]]  # a JSON value, and tensors by name
PATIENCE = timedelta(minutes=30)  # with a process that neither answers nor ends; one that ends is noticed at once
SMALL_BYTES = 1 << 16  # of a tensor that is copied to be sent with others: a message takes longer than that
FIELDS = {Solution: ("codes_RC", "scales_RG", "zeros_RG", "loss_R", "keep_RC"),
          SparseSolution: ("values_RC", "keep_RC", "loss_R")}  # fmt: skip


@dataclass(frozen=True)
class World:
    """The processes that work on one model; alone, every method does nothing or what one process would do.

    All processes call the same methods in the same order. FeatherweightError where another one has ended.

    Attributes:
        rank: this process's number; size: how many there are; local: its number on its machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes files and tells of the progress."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """`pick_device`, but each of several processes has the GPU of its own number; RequestError without one."""
        device = pick_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise RequestError(
                f"device {name!r} was asked for and each of {self.size} processes has a GPU of its own: use --device "
                "cuda."
            )
        if self.local >= torch.cuda.device_count():
            raise RequestError(
                f"process {self.local + 1} of this machine was to have a GPU of its own and it has "
                f"{torch.cuda.device_count()}: use --nproc-per-node {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def split(self, count: int) -> slice:
        """This process's part of `count` things in a row."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all(self) -> list[World]:
        """Every process as it sees itself, in their order."""
        return [replace(self, rank=rank) for rank in range(self.size)]

    def deal(self, costs: Sequence[float]) -> list[int]:
        """Which process gets which of some tasks: the dearest first, each to the one with least to do."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
            owners[number] = loads.index(min(loads))
            loads[owners[number]] += costs[number]
        return owners

    def wait(self) -> None:
        """Returns once all processes have come here."""
        self.add_up(0)

    def add_up(self, number: int) -> int:
        """The sum of a number over all processes."""
        if self.size == 1:
            return number
        told = torch.tensor([number])
        with self._talking():
            dist.all_reduce(told)
        return int(told)

    def sum_(self, tensor: Tensor) -> None:
        """Puts in a tensor's place its sum over all processes."""
        if self.size > 1:
            with self._talking():
                dist.all_reduce(tensor)

    def sum_to(self, owner: int, tensor: Tensor) -> None:
        """Puts in the owner's tensor its sum over all processes; what the others' hold afterwards is nothing."""
        if self.size > 1:
            with self._talking():
                dist.reduce(tensor, owner)

    def first(self, said: Any) -> Any:
        """What process 0 says: any JSON value."""
        return self._from(0, (said, []))[0] if self.size > 1 else said

    def each(self, said: Any) -> list[Any]:
        """What every process says, in their order: any JSON value."""
        return [said] if self.size == 1 else [self._from(owner, (said, []))[0] for owner in range(self.size)]

    def first_tensor(self, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What process 0 makes, which is made nowhere else."""
        if self.size == 1:
            return make()
        made = make() if self.leads else None
        tensors = self._from(0, (None, [] if made is None else [made]))[1]
        return tensors[0] if tensors else None

    def solved(
        self, costs: Sequence[float], solve: Callable[[int], dict[str, AnySolution]], rules: Mapping[str, Rule]
    ) -> dict[str, AnySolution]:
        """The solutions of every task `solve(number)`, by path, each solved by one process and then known to all."""
        mine: dict[str, AnySolution] = {}
        for number, owner in enumerate(self.deal(costs)):
            mine |= solve(number) if owner == self.rank else {}
        return self.everyones(mine, rules)

    def everyones(self, mine: dict[str, AnySolution], rules: Mapping[str, Rule]) -> dict[str, AnySolution]:
        """The solutions of all processes, by path."""
        if self.size == 1:
            return mine
        found = self.merged({path: _taken_apart(solution) for path, solution in mine.items()})
        return {path: mine[path] if path in mine else _put_together(*found[path], rules[path]) for path in found}

    def merged(self, mine: dict[str, Parcel]) -> dict[str, Parcel]:
        """What all processes have, by name, each something else."""
        if self.size == 1:
            return mine
        found: dict[str, Parcel] = {}
        contents = [[name, said, list(held)] for name, (said, held) in mine.items()]
        tensors = [tensor for _, held in mine.values() for tensor in held.values()]
        for owner in range(self.size):
            listed, sent = self._from(owner, (contents, tensors))
            coming = iter(sent)
            for name, said, names in listed:
                found[name] = said, {each: next(coming) for each in names}
        return found

    def from_each(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors that the processes have here, in their order: one message a process."""
        if self.size == 1:
            return [list(tensors)]
        return [self._from(owner, (None, list(tensors)))[1] for owner in range(self.size)]

    def _from(self, owner: int, message: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
        """A JSON value and tensors from the process that has them; the message of the others is not looked at."""
        said, tensors = message
        header = [said, [(str(t.dtype).removeprefix("torch."), t.shape, t.device.type) for t in tensors]]
        text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        with self._talking():
            dist.broadcast(length, owner)
            text = text if owner == self.rank else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, owner)
            said, kinds = json.loads(text.numpy().tobytes())
            if owner != self.rank:
                tensors = [torch.empty(shape, dtype=getattr(torch, dtype), device=on) for dtype, shape, on in kinds]
            tensors = [tensor.contiguous() for tensor in tensors]
            for bundle in _bundles(tensors):
                parts = [tensor.view(-1).view(torch.uint8) for tensor in bundle]  # not every backend has bools
                sent = parts[0] if len(parts) == 1 else torch.cat(parts)
                if sent.numel():
                    dist.broadcast(sent, owner)
                if len(parts) > 1 and owner != self.rank:
                    for part, own in zip(parts, sent.split([len(part) for part in parts]), strict=True):
                        part.copy_(own)
        return said, tensors

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turns a broken connection into a sentence."""
        try:
            yield
        except RuntimeError as error:
            why = str(error).split("\n", 1)[0]
            raise FeatherweightError(
                f"process {self.rank} of {self.size} lost the others, so one has ended (its own message says why): "
                f"finished blocks are kept, repeat the command with any number of processes ({why})."
            ) from error


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started with this one, or that have joined already; without any, this one alone."""
    if not (dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())):
        yield ALONE
        return
    ours = not dist.is_initialized()
    if ours:
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    yield World(dist.get_rank(), dist.get_world_size(), dist.get_node_local_rank(dist.get_rank()))
    if ours:  # after an error the others may be in the middle of a sum: they learn of it when this process ends
        dist.destroy_process_group()


def check_divisible(world: World, recipe: Recipe) -> None:
    """RequestError where a process would have nothing to do."""
    if world.size == 1:
        return
    if world.size > recipe.samples:
        raise RequestError(
            f"{world.size} processes were to share {recipe.samples} calibration sequences, and each needs 1: raise "
            f"--samples to {world.size} or use --nproc-per-node {recipe.samples}."
        )


def _bundles(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors that are sent together: the small ones of a device, of which a block of experts has a thousand."""
    small: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes <= SMALL_BYTES:
            small.setdefault(tensor.device.type, []).append(tensor)
    return [*small.values(), *([tensor] for tensor in tensors if tensor.nbytes > SMALL_BYTES)]


def _taken_apart(solution: AnySolution) -> Parcel:
    fields = {name: getattr(solution, name) for name in FIELDS[type(solution)]}
    held = {name: tensor for name, tensor in fields.items() if tensor is not None}
    return {"damping": solution.damping, "metrics": solution.metrics}, held


def _put_together(said: Any, held: Mapping[str, Tensor], rule: Rule) -> AnySolution:
    grid, fields = grid_of(rule), {**held, **said, "pattern": pattern_of(rule)}
    return SparseSolution(**fields) if grid is None else Solution(grid=grid, **fields)
