"""Several processes on one model: what each has to do, and what they tell each other (torch.distributed).

Calibration sequences are split, sums over them added up, groups of matrices dealt out to be solved; process 0 writes.
Started by `torchrun --nproc-per-node N -m featherweight compress ...`, or by a program whose every process has called
`torch.distributed.init_process_group` and then calls `compress`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from featherweight.core.rules import Rule, grid_of, pattern_of
from featherweight.core.solution import AnySolution, Solution, SparseSolution
from featherweight.errors import FeatherweightError, RequestError
from featherweight.recipe import Recipe
from featherweight.stream.device import pick_device
from featherweight.stream.messages import (
    FIRST_BYTES,
    Kinds,
    bundles,
    bytes_of,
    copy_apart,
    framed,
    kinds_of,
    length_of,
    rides,
    unframed,
)

Parcel = tuple[Any, dict[str, Tensor]]  # a JSON value, and tensors by name
Message = tuple[Any, list[Tensor]]  # the same without names
PATIENCE = timedelta(minutes=30)  # with a process that neither answers nor ends; one that ends is noticed at once
CPU = torch.device("cpu")
FIELDS = {Solution: ("codes_RC", "scales_RG", "zeros_RG", "loss_R", "keep_RC"),
          SparseSolution: ("values_RC", "keep_RC", "loss_R")}  # fmt: skip


@dataclass(frozen=True)
class World:
    """The processes that work on one model; alone, every method does nothing or what one process would do.

    All processes call the same methods in the same order. FeatherweightError where another one has ended.

    Attributes:
        rank: this process's number; size: how many there are; local: its number on its machine.
        by: the device that what all tell each other goes through: a GPU's way is shorter than the network's.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    by: torch.device = CPU
    _meeting: list[Future[None]] = field(default_factory=list, compare=False, repr=False)

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

    def over(self, device: torch.device) -> World:
        """The same, with what all tell each other going through this device of each."""
        return replace(self, by=device)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Meanwhile GPUs find the way to each other, half a second's work, beside what needs no other process's."""
        if self.size == 1 or self.by.type != "cuda":
            yield
            return
        met: Future[None] = Future()

        def meet() -> None:
            try:
                dist.all_reduce(torch.zeros(1, device=self.by))
                met.set_result(None)
            except Exception as error:
                met.set_exception(error)

        Thread(target=meet, name="meeting", daemon=True).start()  # after an error nobody may come, and none waits here
        self._meeting.append(met)
        yield
        wait(self._meeting)
        self._meeting.clear()

    def split(self, count: int) -> slice:
        """This process's part of `count` things in a row."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

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
        return self.add_up_each([number])[0]

    def add_up_each(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all processes of each of some numbers, of which all have as many: one message."""
        if self.size == 1:
            return list(numbers)
        told = torch.tensor(numbers)
        with self._talking():
            dist.all_reduce(told)
        return told.tolist()

    def sum_(self, tensor: Tensor) -> None:
        """Puts in a tensor's place its sum over all processes."""
        if self.size > 1:
            with self._talking(tensor):
                dist.all_reduce(tensor)

    def sum_to(self, owner: int, tensor: Tensor) -> None:
        """Puts in the owner's tensor its sum over all processes; what the others' hold afterwards is nothing."""
        if self.size > 1:
            with self._talking(tensor):
                dist.reduce(tensor, owner)

    def spread(self, owner: int, tensor: Tensor) -> None:
        """Puts what the owner has in a contiguous tensor in everyone's."""
        if self.size > 1:
            with self._talking(tensor):
                dist.broadcast(tensor, owner)

    def first(self, said: Any) -> Any:
        """What process 0 says: any JSON value."""
        return self._from(0, (said, []))[0] if self.size > 1 else said

    def each(self, said: Any) -> list[Any]:
        """What every process says, in their order: any JSON value."""
        return [said] if self.size == 1 else [each for each, _ in self._texts(said)]

    def first_tensor(self, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What process 0 makes, which is made nowhere else."""
        if self.size == 1:
            return make()
        made = make() if self.leads else None
        tensors = self._from(0, (None, [] if made is None else [made]))[1]
        return tensors[0] if tensors else None

    def everyones(self, mine: dict[str, AnySolution], rules: Mapping[str, Rule]) -> dict[str, AnySolution]:
        """The solutions of all processes, by path."""
        if self.size == 1:
            return mine
        found = self.merged({path: _taken_apart(solution) for path, solution in mine.items()})
        return {path: mine[path] if path in mine else _put_together(*found[path], rules[path]) for path in found}

    def merged(self, mine: dict[str, Parcel], for_leader: bool = False) -> dict[str, Parcel]:
        """What all processes have, by name, each something else; `for_leader`, tensors that only process 0 needs: what
        the others have not made themselves they may be without."""
        if self.size == 1:
            return mine
        found: dict[str, Parcel] = {}
        contents = [[name, said, list(held)] for name, (said, held) in mine.items()]
        tensors = [tensor for _, held in mine.values() for tensor in held.values()]
        for listed, sent in self._from_all((contents, tensors), for_leader):
            coming = iter(sent)
            for name, said, names in listed:
                found[name] = said, dict(zip(names, coming, strict=False))
        return found

    def from_each(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors that the processes have here, in their order."""
        if self.size == 1:
            return [list(tensors)]
        return [sent for _, sent in self._from_all((None, list(tensors)))]

    def rows_of_each(self, tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
        """`from_each` of tensors that are alike everywhere but for their rows, of which every process is known to have
        so many: nothing needs to be told, and on a GPU nobody waits."""
        found = []
        for owner, rows in enumerate(counts):
            ours = owner == self.rank
            held = [tensor if ours else tensor.new_empty((rows, *tensor.shape[1:])) for tensor in tensors]
            sent = bytes_of(held)
            self.spread(owner, sent)
            if not ours:
                copy_apart(sent, held)
            found.append(held)
        return found

    def _from(self, owner: int, message: Message) -> Message:
        """A JSON value and tensors from the process that has them; the message of the others is not looked at."""
        said, tensors = message
        with self._talking():
            first, more = framed([said, kinds_of(tensors)] if owner == self.rank else None, [], FIRST_BYTES["cpu"])
            dist.broadcast(first, owner)
            if rest := length_of(first) - len(first):
                more = more if owner == self.rank else torch.empty(rest, dtype=torch.uint8)
                dist.broadcast(more, owner)
        (said, kinds), _ = unframed(first, more)
        return said, self._sent(owner, kinds, tensors)

    def _from_all(self, message: Message, for_leader: bool = False) -> list[Message]:
        """The JSON values and tensors of all processes, in their order; `for_leader`, process 0 keeps its tensors."""
        said, tensors = message
        kinds = kinds_of(tensors)
        told = self._texts([said, kinds], [t for t, kind in zip(tensors, kinds, strict=True) if rides(kind)])
        first = list(tensors) if self.leads else []  # of the leader's, when nobody else needs them
        return [
            (each, first if for_leader and owner == 0 else self._sent(owner, kinds, tensors, riding))
            for owner, ((each, kinds), riding) in enumerate(told)
        ]

    def _texts(self, said: Any, riding: Sequence[Tensor] = ()) -> list[tuple[Any, Tensor]]:
        """The JSON values of all processes and the bytes that go along with each: one message, or two where one of them
        is long."""
        first, more = framed(said, riding, FIRST_BYTES[self.by.type])
        firsts, mores = self._gathered(first), [more] * self.size
        if rest := max(map(length_of, firsts)) - len(first):
            mores = self._gathered(torch.cat([more, more.new_zeros(rest - len(more))]))
        return [unframed(*each) for each in zip(firsts, mores, strict=True)]

    def _gathered(self, bytes_N: Tensor) -> list[Tensor]:
        """What all processes have, as many bytes each; on the CPU."""
        sent = bytes_N.to(self.by)
        found = sent.new_empty((self.size, len(sent)))
        with self._talking(sent):
            dist.all_gather(list(found), sent)
        return list(found.cpu())

    def _sent(self, owner: int, kinds: Kinds, tensors: Sequence[Tensor], riding: Tensor | None = None) -> list[Tensor]:
        """The owner's tensors, which are of these dtypes, shapes and devices; of `riding` bytes if those are told."""
        if owner != self.rank:
            tensors = [torch.empty(shape, dtype=getattr(torch, dtype), device=on) for dtype, shape, on in kinds]
        tensors = [tensor.contiguous() for tensor in tensors]
        rode: list[Tensor] = []
        others: list[Tensor] = []
        for tensor, kind in zip(tensors, kinds, strict=True):
            (rode if riding is not None and rides(kind) else others).append(tensor)
        if riding is not None and owner != self.rank:
            copy_apart(riding, rode)
        for bundle in bundles(others):
            sent = bytes_of(bundle)
            if sent.numel():
                self.spread(owner, sent)
            if len(bundle) > 1 and owner != self.rank:
                copy_apart(sent, bundle)
        return tensors

    @contextmanager
    def _talking(self, *tensors: Tensor) -> Iterator[None]:
        """Turns a broken connection into a sentence; what is said of tensors on a GPU, once these have met."""
        try:
            for meeting in self._meeting if any(tensor.is_cuda for tensor in tensors) else ():
                meeting.result()
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


def _taken_apart(solution: AnySolution) -> Parcel:
    fields = {name: getattr(solution, name) for name in FIELDS[type(solution)]}
    held = {name: tensor for name, tensor in fields.items() if tensor is not None}
    return {"damping": solution.damping, "metrics": solution.metrics}, held


def _put_together(said: Any, held: Mapping[str, Tensor], rule: Rule) -> AnySolution:
    grid, fields = grid_of(rule), {**held, **said, "pattern": pattern_of(rule)}
    return SparseSolution(**fields) if grid is None else Solution(grid=grid, **fields)
