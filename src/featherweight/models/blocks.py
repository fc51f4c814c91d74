"""One block of a model at a time on the device, everything else on meta.

What a block is called with besides the hidden states (position embeddings, masks, alibi) is not known here for any
family: the model's own forward is run over recorders that stand in for the blocks and keep what they were handed.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight.errors import RequestError
from featherweight.models.calls import Call, Recording, clean_call, same
from featherweight.models.experts import find_experts
from featherweight.models.load import fill_buffers, meta_tensors, place, put
from featherweight.models.names import Source
from featherweight.models.offload import Apart, Shelf
from featherweight.models.skeleton import skeleton
from featherweight.models.tree import ModelTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shapes whose arguments are kept: the usual batch, the smaller one at the end, and a short probe. Masks are big.
SHAPES_KEPT = 3


class AllSeen(Exception):
    """Raised in the last recorder: whatever follows the blocks is never run."""


class _WrongAnswer(Exception):
    """A recorder was not handed what the one before it returned."""


def _with_its_blocks(tree: ModelTree) -> PreTrainedModel:
    """A copy of the tree's model around the same blocks: with many experts a second skeleton is as large as a block."""
    blocks = (tree.model.get_submodule(block.module) for block in tree.blocks)
    return copy.deepcopy(tree.model, {id(block): block for block in blocks})


class BlockRunner:
    """Runs the blocks of a checkpoint one after the other, each loaded from disk when its turn comes.

    Args:
        tree: the model; it is left as it is (what the runner loads, it loads into copies).
        device: where blocks, hidden states and recorded arguments live.
        dtype: what parameters are turned into and computed in (the family's float32 modules excepted).
        expert_bytes: leave the experts of a block in the files and hold so many bytes of them at most; None holds all.

    The order is `embed` for each batch, then for each block `load`, `run` for each batch, `unload`. Nothing here
    switches gradients off but `embed` and the recording; loaded parameters do not require them. Raises RequestError
    for architectures whose blocks depend on each other or on the tokens by more than the hidden states.
    """

    def __init__(
        self, tree: ModelTree, device: torch.device | str, dtype: torch.dtype, expert_bytes: int | None = None
    ) -> None:
        self.tree, self.expert_bytes = tree, expert_bytes
        self.device = torch.device(device)
        self.dtype = dtype
        self.model = _with_its_blocks(tree) if dtype == tree.dtype else skeleton(tree.checkpoint, dtype)
        self.blocks: list[nn.Module] = [self.model.get_submodule(block.module) for block in tree.blocks]
        inside = {id(module) for path in tree.lists for module in self.model.get_submodule(path).modules()}
        self._outside = {path: module for path, module in self.model.named_modules() if id(module) not in inside}
        for module in self._outside.values():
            fill_buffers(self.model, module, self.device)
        self._loaded: dict[int, nn.Module] = {}
        self._on_meta: list[tuple[nn.Module, str, Tensor]] = []
        self._recordings: OrderedDict[tuple[int, int], tuple[Call, ...]] = OrderedDict()
        self._answer: Callable[[Tensor], Any] | None = None
        self._instead: Mapping[str, Tensor] = {}

    def embed(self, ids_ST: Tensor) -> Tensor:
        """The hidden states in front of block 0 (S x T x D, in the computing dtype) of token ids (int64, S x T).

        Reads the embedding at the first call and keeps it until `release` or the next `load`.
        """
        if self._answer is None:
            self._probe()
        recording = self._record(ids_ST)
        self._remember(ids_ST.shape, recording.calls)
        return recording.hidden_STD

    def names(self, index: int) -> list[str]:
        """The tensors of block `index` by their names on disk."""
        return list(dict.fromkeys(source.name for source in self._wanted(index).values()))

    def load(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Block `index` on the device, in eval mode, with its weights from disk (or what was read before, by
        `names`); lets go of the embedding."""
        self.release()
        tensors = self.tree.checkpoint.read(self.names(index)) if tensors is None else tensors
        self._loaded[index] = block = self.build(index, tensors)
        return block

    def build(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of block `index` on the device, in eval mode, with these weights."""
        block = copy.deepcopy(self.blocks[index])
        block.__dict__.pop("forward", None)  # a recorder's
        for child in block.modules():
            fill_buffers(self.model, child, self.device)
        if self.expert_bytes is not None:
            self._set_apart(index, block, Shelf(self.expert_bytes))
        for name, source in self._wanted(index).items():
            whole = tensors[source.name]
            part = source.of(whole)
            shared = part.is_cuda and part.numel() < whole.numel()  # a part is to be a tensor of its own
            place(block, name, part.clone() if shared else part, self.device)
        return block.eval()

    def _wanted(self, index: int) -> dict[str, Source]:
        """Where each parameter and buffer of a block comes from; buffers that no file holds are not among them."""
        module, block = self.tree.blocks[index].module, self.blocks[index]
        apart = tuple(f"{path}." for path, _ in find_experts(block)) if self.expert_bytes is not None else ()
        made = {
            f"{path}.{name}".removeprefix(".")
            for path, child in block.named_modules()
            for name in child._non_persistent_buffers_set
        }
        names = [name for name, _ in meta_tensors(block) if name not in made and not name.startswith(apart)]
        return {name: self.tree.disk[f"{module}.{name}"] for name in names}

    def _set_apart(self, index: int, block: nn.Module, shelf: Shelf) -> None:
        """Puts an `Apart` in the place of every expert of a block."""
        for path, experts in find_experts(block):
            for number in range(len(experts)):
                at = f"{path}.{number}"
                experts.set_submodule(str(number), Apart(at, shelf, partial(self._expert, index, at)))

    def _expert(self, index: int, at: str) -> nn.Module:
        """One expert as the files have it, on the device."""
        expert = copy.deepcopy(self.blocks[index].get_submodule(at))
        for name, _ in list(meta_tensors(expert)):
            source = self.tree.disk[f"{self.tree.blocks[index].module}.{at}.{name}"]
            if source.part is None:
                tensor = self.tree.checkpoint.read([source.name])[source.name]
            else:
                row = self.tree.checkpoint.read_row(source.name, source.part.expert)
                source, tensor = replace(source, part=replace(source.part, expert=0)), row
            place(expert, name, source.of(tensor), self.device)
        return expert.eval()

    def run(self, index: int, block: nn.Module, hidden_STD: Tensor) -> Tensor:
        """The output of one block for one batch, S x T x D; `block` may have had modules replaced.

        Gradients flow when the caller has them on and something requires them.
        """
        sequences, tokens = hidden_STD.shape[:2]
        output = self._calls(sequences, tokens)[index](block, hidden_STD)
        result = output[0] if isinstance(output, (tuple, list)) else output
        assert isinstance(result, Tensor) and result.shape == hidden_STD.shape
        return result

    def unload(self, index: int) -> None:
        """Move a loaded block back to meta, which frees its memory even where it is still referred to."""
        if block := self._loaded.pop(index, None):
            block.to("meta")

    def release(self) -> None:
        """Back to meta with the embedding and all else read for `embed`."""
        while self._on_meta:
            module, name, tensor = self._on_meta.pop()
            put(module, name, tensor)

    @contextmanager
    def instead(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """`embed` with these values, by name on disk, in place of the checkpoint's."""
        self.release()
        self._instead = values
        try:
            yield
        finally:
            self.release()
            self._instead = {}

    def _calls(self, sequences: int, tokens: int) -> tuple[Call, ...]:
        """The blocks' arguments for one shape. They do not depend on the tokens (see _probe): any will do."""
        key = (sequences, tokens)
        if key in self._recordings:
            self._recordings.move_to_end(key)
        else:
            held = bool(self._on_meta)
            if self._answer is None:
                self._probe()
            self._remember(key, self._record(torch.zeros(key, dtype=torch.int64)).calls)
            if not held:
                self.release()
        return self._recordings[key]

    def _remember(self, shape: tuple[int, ...], calls: tuple[Call, ...]) -> None:
        key = (shape[0], shape[1])
        self._recordings.setdefault(key, calls)
        self._recordings.move_to_end(key)
        while len(self._recordings) > SHAPES_KEPT:
            self._recordings.popitem(last=False)

    def _probe(self) -> None:
        """Find out once whether blocks return a tensor or a tuple, and that their arguments ignore the tokens."""
        ids = torch.zeros((1, 4), dtype=torch.int64)
        failures: list[Exception] = []
        for answer in (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None)):
            self._answer = answer
            try:
                first, second = self._record(ids), self._record(ids + 1)
            except RequestError:
                raise
            except (_WrongAnswer, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                failures.append(error)
                continue
            if not same(first.calls, second.calls):
                raise RequestError(
                    f"{self._family} hands its blocks more that depends on the tokens than the hidden states: this "
                    "architecture is not supported by this version."
                )
            return
        self._answer = None
        raise RequestError(
            f"{self._family} works on the hidden states between its {len(self.blocks)} blocks ({failures[0]}): this "
            "architecture is not supported by this version."
        ) from failures[0]

    @property
    def _family(self) -> str:
        return type(self.model).__name__

    @torch.no_grad()
    def _record(self, ids_ST: Tensor) -> Recording:
        seen: list[Call] = []
        held: list[Tensor] = []
        with self._recorders(seen, held), self._reading():
            try:
                self.model(input_ids=ids_ST.to(self.device), use_cache=False)
            except AllSeen:
                hidden = held[0]
                if hidden.is_meta:
                    raise RequestError(f"{self._family} embeds tokens by weights outside its modules.") from None
                return Recording(hidden, tuple(seen))
        raise RequestError(f"{self._family} called {len(seen)} of its {len(self.blocks)} blocks: not supported.")

    @contextmanager
    def _recorders(self, seen: list[Call], held: list[Tensor]) -> Iterator[None]:
        """Let each block's forward, on this instance only, record its call and return its input."""

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                keyword = not args
                hidden = kwargs.pop("hidden_states") if keyword else args[0]
                if index != len(seen) or (held and hidden is not held[0]):
                    raise _WrongAnswer(f"block {index} was not handed the output of block {index - 1}")
                held.append(hidden)
                seen.append(clean_call(args[1:], kwargs, keyword))
                if len(seen) == len(self.blocks):
                    raise AllSeen
                assert self._answer is not None
                return self._answer(hidden)

            return forward

        for index, block in enumerate(self.blocks):
            block.__dict__["forward"] = recorder(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """While the model runs, read the weights of a module outside the blocks at the moment it is called."""
        hooks = [
            module.register_forward_pre_hook(lambda module, _args, path=path: self._materialize(path, module))
            for path, module in self._outside.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _materialize(self, path: str, module: nn.Module) -> None:
        for name, tensor in list(meta_tensors(module, recurse=False)):
            on_disk = self.tree.disk[f"{path}.{name}" if path else name].name
            self._on_meta.append((module, name, tensor))
            value = self._instead.get(on_disk)
            if value is None:
                value = self.tree.checkpoint.read([on_disk], device=self.device)[on_disk]
            place(module, name, value, self.device)
