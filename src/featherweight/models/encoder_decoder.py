"""The blocks of an encoder and then those of its decoder, one at a time.

Shapes: S sequences, T tokens that the encoder reads, and as many that the decoder writes; D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import RequestError
from featherweight.models.blocks import SHAPES_KEPT, AllSeen, BlockRunner
from featherweight.models.calls import MEMORY, Call, clean_call, same
from featherweight.models.tree import ModelTree
from featherweight.models.windows import model_inputs


@dataclass(frozen=True)
class Shape:
    """Of a batch: whose blocks it goes through, how many sequences of how many tokens."""

    decoding: bool
    sequences: int
    tokens: int


class EncoderDecoderRunner(BlockRunner):
    """Runs the blocks of an encoder and then those of its decoder; block `turn` is the decoder's first.

    What goes from block to block of the decoder is S x 2T x D: its hidden states, and behind them the encoder's output,
    which its blocks read and leave as it is. What the first block of either returns beside the hidden states (T5's
    position bias) is handed to all others, as the model does; it must not depend on the tokens.
    """

    def __init__(
        self, tree: ModelTree, device: torch.device | str, dtype: torch.dtype, expert_bytes: int | None = None
    ) -> None:
        super().__init__(tree, device, dtype, expert_bytes)
        self.turn = len(self.model.get_submodule(tree.lists[0]))  # type: ignore[arg-type]
        self._beside: OrderedDict[Shape, tuple[Any, ...] | None] = OrderedDict()  # what first blocks return besides
        self._seen: OrderedDict[Shape, tuple[Call, ...]] = OrderedDict()
        self._probed = False

    def embed(self, ids_ST: Tensor, encoder_STD: Tensor | None = None) -> Tensor:
        """The states in front of the encoder's first block, S x T x D of windows of 2T; with those behind its last one,
        the states in front of the decoder's first, S x 2T x D."""
        self._require_independence()
        hidden_STD, memory_STD, _ = self._recorded(ids_ST, encoder_STD is not None, encoder_STD)
        return hidden_STD if encoder_STD is None else torch.cat([hidden_STD, memory_STD.to(hidden_STD)], 1)

    def run(self, index: int, block: nn.Module, hidden_STD: Tensor) -> Tensor:
        decoding = index >= self.turn
        tokens = hidden_STD.shape[1] // 2 if decoding else hidden_STD.shape[1]
        call = self._calls_of(Shape(decoding, len(hidden_STD), tokens))[index - self.turn if decoding else index]
        own_STD, memory_STD = hidden_STD[:, :tokens], hidden_STD[:, tokens:]
        output = call(block, own_STD, memory_STD)
        result: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        assert result.shape == own_STD.shape
        return torch.cat([result, memory_STD], 1) if decoding else result

    def _calls_of(self, shape: Shape) -> tuple[Call, ...]:
        if shape not in self._seen:
            held = bool(self._on_meta)
            self._require_independence()
            ids = torch.zeros((shape.sequences, 2 * shape.tokens), dtype=torch.int64)
            self._recorded(ids, shape.decoding, None)
            if not held:
                self.release()
        self._seen.move_to_end(shape)
        return self._seen[shape]

    def _require_independence(self) -> None:
        """Once: that nothing but the hidden states and the encoder's output depends on the tokens."""
        if self._probed:
            return
        self._probed = True
        ids = torch.zeros((1, 8), dtype=torch.int64)
        for decoding in (False, True):
            calls = [self._recorded(each, decoding, None)[2] for each in (ids, ids + 1)]
            if not same(calls[0], calls[1]):
                raise RequestError(
                    f"{self._family} hands its blocks more that depends on the tokens than the hidden states: this "
                    "architecture is not supported by this version."
                )
            memories = [any(each is MEMORY for each in (*call.args, *call.kwargs.values())) for call in calls[0]]
            if decoding and not all(memories):
                raise RequestError(
                    f"{sum(memories)} of the {len(memories)} decoder blocks of {self._family} are handed what the "
                    "encoder returns, where all have to be: not supported."
                )

    @torch.no_grad()
    def _recorded(
        self, ids_ST: Tensor, decoding: bool, encoder_STD: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Call, ...]]:
        """States in front of a part's first block, what the encoder returned (decoding), and the calls of its blocks;
        the encoder's blocks are skipped as if `encoder_STD` were what the last of them returned."""
        shape = Shape(decoding, len(ids_ST), ids_ST.shape[1] // 2)
        notes = _Notes(decoding, encoder_STD, shape)
        with self._part(notes), self._reading():
            try:
                self.model(**model_inputs(self.model, ids_ST.to(self.device)), use_cache=False)
            except AllSeen:
                self._seen[shape] = calls = tuple(notes.calls)
                self._seen.move_to_end(shape)
                for kept in (self._seen, self._beside):
                    while len(kept) > 2 * SHAPES_KEPT:
                        kept.popitem(last=False)
                hidden_STD = notes.hidden[decoding]
                return hidden_STD, notes.memory.get("STD", hidden_STD), calls
        raise RequestError(f"{self._family} called {len(notes.calls)} of its {len(self.blocks)} blocks: not supported.")

    @contextmanager
    def _part(self, notes: _Notes) -> Iterator[None]:
        """While the model runs, its blocks note what they are called with and return their input."""

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            notes.memory["STD"] = output[0]

        handle = self.model.get_encoder().register_forward_hook(keep)
        for index, block in enumerate(self.blocks):
            block.__dict__["forward"] = self._recorder(index, notes)
        try:
            yield
        finally:
            handle.remove()
            for block in self.blocks:
                del block.__dict__["forward"]

    def _recorder(self, index: int, notes: _Notes) -> Callable[..., Any]:
        decoding = index >= self.turn
        last = len(self.blocks) - 1 if decoding else self.turn - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            keyword = not args
            hidden_STD = kwargs.pop("hidden_states") if keyword else args[0]
            if notes.hidden.setdefault(decoding, hidden_STD) is not hidden_STD:
                raise RequestError(f"{self._family} works on the hidden states between its blocks: not supported.")
            call = clean_call(args[1:], kwargs, keyword)
            if decoding == notes.decoding:
                notes.calls.append(notes.without_memory(call))
                if index == last:
                    raise AllSeen
            if index == last and notes.encoder_STD is not None:
                return self._answer_of(index, notes, call, hidden_STD, notes.encoder_STD)
            return self._answer_of(index, notes, call, hidden_STD, hidden_STD)

        return forward

    def _answer_of(self, index: int, notes: _Notes, call: Call, hidden_STD: Tensor, answer_STD: Tensor) -> Any:
        """What a block returns, with `answer_STD` for its hidden states: the first one of a part is run to see."""
        shape = replace(notes.shape, decoding=index >= self.turn)
        if shape not in self._beside:
            assert index in (0, self.turn)
            output = call(self.build(index, self.tree.checkpoint.read(self.names(index))), hidden_STD)
            self._beside[shape] = tuple(output[1:]) if isinstance(output, (tuple, list)) else None
        beside = self._beside[shape]
        return answer_STD if beside is None else (answer_STD, *beside)


def runner_of(
    tree: ModelTree, device: torch.device | str, dtype: torch.dtype, expert_bytes: int | None = None
) -> BlockRunner:
    """What runs the blocks of a model."""
    return (BlockRunner if len(tree.lists) == 1 else EncoderDecoderRunner)(tree, device, dtype, expert_bytes)


class _Notes:
    """What is heard while the model runs once."""

    def __init__(self, decoding: bool, encoder_STD: Tensor | None, shape: Shape) -> None:
        self.decoding, self.encoder_STD, self.shape = decoding, encoder_STD, shape
        self.hidden: dict[bool, Tensor] = {}
        self.memory: dict[str, Tensor] = {}
        self.calls: list[Call] = []

    def without_memory(self, call: Call) -> Call:
        """The call with a place for what the encoder returned."""
        memory = self.memory.get("STD")
        if memory is None:
            return call

        def empty(value: Any) -> Any:
            return MEMORY if value is memory else value

        return Call(
            tuple(map(empty, call.args)), {name: empty(value) for name, value in call.kwargs.items()}, call.keyword
        )
