"""Running any module on a user's batches, with hooks that are always taken off again."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import RequestError

Batches = Iterable[Tensor | Sequence[Any] | Mapping[str, Any]]
Heard = Callable[[Tensor], None]


class Enough(BaseException):
    """Raised inside a forward pass when nothing of interest follows; no module's `except Exception` swallows it."""


def check_batches(batches: object) -> None:
    """Raises RequestError for what is no collection of batches, or one that can be read only once."""
    kind = type(batches).__name__
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        if not hasattr(batches, "__getitem__") or isinstance(batches, Tensor | Mapping | str):
            raise RequestError(f"batches is a {kind}, not a collection of batches: give a list of them, even of one.")
    elif iter(batches) is batches:
        raise RequestError(
            f"batches is a {kind}, which can be read only once, and they are read at least twice: give a list or a "
            "DataLoader."
        )


class Feed:
    """A module with its batches, ready to be run as often as needed."""

    def __init__(self, module: nn.Module, batches: Batches) -> None:
        self.module, self.batches, self.readings = module, batches, 0
        first = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device

    def run(self, begins: Callable[[], None] | None = None) -> int:
        """One reading of all batches, `begins` called before each; returns how many there were."""
        self.readings += 1
        number = -1
        for number, batch in enumerate(self.batches):
            if begins is not None:
                begins()
            with suppress(Enough):
                self._call(batch, number)
        if number < 0:
            raise RequestError("batches is empty and at least one is needed: give the inputs that the module takes.")
        return number + 1

    def _call(self, batch: Any, number: int) -> None:
        args, kwargs = arguments(batch, number)
        args, kwargs = _moved(args, self.device), _moved(kwargs, self.device)
        try:
            self.module(*args, **kwargs)
        except Exception as error:
            given = f"{len(args)} positional and {len(kwargs)} named arguments ({', '.join(kwargs)})"
            error.add_note(f"The module was called on batch {number} with {given.replace(' ()', '')}.")
            raise


def arguments(batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a module is called on a batch: a tensor alone, a tuple (or list) of args, or a mapping of kwargs."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise RequestError(
        f"batch {number} is a {type(batch).__name__}: give a tensor, a tuple of arguments or a dict of named ones."
    )


def _moved(value: Any, device: torch.device) -> Any:
    """The same nested value with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    return {key: _moved(item, device) for key, item in value.items()} if type(value) is dict else value


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every submodule's own mode afterwards, whatever happens."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def hooked(before: Mapping[nn.Module, Heard], after: Mapping[nn.Module, Heard] | None = None) -> Iterator[None]:
    """Calls back with what each module is given (`before`) or gives (`after`)."""

    def given(heard: Heard) -> Callable[..., None]:
        return lambda module, args, kwargs: heard(args[0] if args else next(iter(kwargs.values())))

    def gave(heard: Heard) -> Callable[..., None]:
        return lambda module, args, output: heard(output)

    with ExitStack() as stack:
        for module, heard in before.items():
            handle = module.register_forward_pre_hook(given(heard), with_kwargs=True)
            stack.callback(handle.remove)
        for module, heard in (after or {}).items():
            stack.callback(module.register_forward_hook(gave(heard)).remove)
        yield


@dataclass(frozen=True)
class Sightings:
    """In what order modules are called, how often in each batch, and which are given the very same tensor.

    Attributes:
        order: keys in order of their first call.
        group: key -> a number; keys of one number are given one tensor at their first call, in every batch.
        single: keys that every batch calls exactly once.
    """

    order: list[str]
    group: dict[str, int]
    single: set[str]


class _Watch:
    """What is noted of one batch."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.tensors: list[tuple[weakref.ref[Tensor], int]] = []  # given so far, with their versions
        self.first: dict[str, int] = {}  # key -> which tensor its first call was given

    def hear(self, key: str, given: Tensor) -> None:
        self.calls[key] += 1
        if key in self.first:
            return
        same = (n for n, (known, version) in enumerate(self.tensors) if known() is given and version == given._version)
        self.first[key] = next(same, len(self.tensors))
        if self.first[key] == len(self.tensors):
            self.tensors.append((weakref.ref(given), given._version))


def watch(feed: Feed, modules: Mapping[nn.Module, str]) -> Sightings:
    """Runs all batches and notes who is called; several modules may go under one key."""
    notes: list[_Watch] = []
    heard = {module: (lambda given, key=key: notes[-1].hear(key, given)) for module, key in modules.items()}
    with hooked(heard):
        feed.run(lambda: notes.append(_Watch()))
    order = list(dict.fromkeys(key for note in notes for key in note.first))
    numbers: dict[tuple[int | None, ...], int] = {}
    group = {key: numbers.setdefault(tuple(note.first.get(key) for note in notes), len(numbers)) for key in order}
    return Sightings(order, group, {key for key in order if all(note.calls[key] == 1 for note in notes)})


def working_copy(module: nn.Module) -> nn.Module:
    """A deep copy; RequestError where the module cannot be copied."""
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise RequestError(f"the module cannot be copied ({error}): use inplace=True.") from error


@contextmanager
def undone_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts the tensors' present values back if anything is raised inside."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        raise
