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
Message = tuple[Any, list[Tensor]]  # the same without names
Kinds = list[tuple[str, Sequence[int], str]]  # the dtypes, shapes and devices of tensors
PATIENCE = timedelta(minutes=30)  # with a process that neither answers nor ends; one that ends is noticed at once
SMALL_BYTES = {"cpu": 1 << 16, "cuda": 1 << 26}  # what is copied to be sent with others: a message takes longer
LENGTH_BYTES, TEXT_BYTES = 8, 1 << 14  # of a text's first message: its length, and what of it goes along
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
        return [said] if self.size == 1 else self._texts(said)

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

    def _from(self, owner: int, message: Message) -> Message:
        """A JSON value and tensors from the process that has them; the message of the others is not looked at."""
        said, tensors = message
        with self._talking():
            first, more = _framed([said, _kinds(tensors)] if owner == self.rank else None)
            dist.broadcast(first, owner)
            if rest := _length(first) - TEXT_BYTES:
                more = more if owner == self.rank else torch.empty(rest, dtype=torch.uint8)
                dist.broadcast(more, owner)
            said, kinds = _read(first, more)
            return said, self._sent(owner, kinds, tensors)

    def _from_all(self, message: Message, for_leader: bool = False) -> list[Message]:
        """The JSON values and tensors of all processes, in their order; `for_leader`, process 0 keeps its tensors."""
        said, tensors = message
        told = self._texts([said, _kinds(tensors)])
        first = list(tensors) if self.leads else []  # of the leader's, when nobody else needs them
        with self._talking():
            return [
                (each, first if for_leader and owner == 0 else self._sent(owner, kinds, tensors))
                for owner, (each, kinds) in enumerate(told)
            ]

    def _texts(self, said: Any) -> list[Any]:
        """The JSON values of all processes: one message, or two where one of them is long."""
        first, more = _framed(said)
        firsts, mores = [torch.empty_like(first) for _ in range(self.size)], [more] * self.size
        with self._talking():
            dist.all_gather(firsts, first)
            if rest := max(map(_length, firsts)) - TEXT_BYTES:
                more = torch.cat([more, more.new_zeros(rest - len(more))])
                mores = [torch.empty_like(more) for _ in firsts]
                dist.all_gather(mores, more)
        return [_read(*each) for each in zip(firsts, mores, strict=True)]

    def _sent(self, owner: int, kinds: Kinds, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The owner's tensors, which are of these dtypes, shapes and devices."""
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
        return tensors

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


def _kinds(tensors: Sequence[Tensor]) -> Kinds:
    return [(str(t.dtype).removeprefix("torch."), t.shape, t.device.type) for t in tensors]


def _framed(said: Any) -> tuple[Tensor, Tensor]:
    """A JSON value as a message of one size for all, which begins with the text's length, and what does not fit in."""
    text = json.dumps(said).encode().ljust(TEXT_BYTES)
    framed = torch.frombuffer(bytearray(len(text).to_bytes(LENGTH_BYTES, "little") + text), dtype=torch.uint8)
    return framed[: LENGTH_BYTES + TEXT_BYTES], framed[LENGTH_BYTES + TEXT_BYTES :]


def _length(first: Tensor) -> int:
    return int.from_bytes(first[:LENGTH_BYTES].numpy().tobytes(), "little")


def _read(first: Tensor, more: Tensor) -> Any:
    """What `_framed` was given; behind `more` there may be bytes that are nobody's."""
    text = torch.cat([first[LENGTH_BYTES:], more]).numpy().tobytes()
    return json.loads(text[: _length(first)])


def _bundles(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors that are sent together: the small ones of a device, of which a block of experts has a thousand."""
    small: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes <= SMALL_BYTES[tensor.device.type]:
            small.setdefault(tensor.device.type, []).append(tensor)
    large = ([tensor] for tensor in tensors if tensor.nbytes > SMALL_BYTES[tensor.device.type])
    return [*small.values(), *large]


def _taken_apart(solution: AnySolution) -> Parcel:
    fields = {name: getattr(solution, name) for name in FIELDS[type(solution)]}
    held = {name: tensor for name, tensor in fields.items() if tensor is not None}
    return {"damping": solution.damping, "metrics": solution.metrics}, held


def _put_together(said: Any, held: Mapping[str, Tensor], rule: Rule) -> AnySolution:
    grid, fields = grid_of(rule), {**held, **said, "pattern": pattern_of(rule)}
    return SparseSolution(**fields) if grid is None else Solution(grid=grid, **fields)
