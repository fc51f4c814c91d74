"""The hidden states in front of a block: those of the compressed model and, if asked for, the original's.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from featherweight.core.solution import AnySolution
from featherweight.models.blocks import BlockRunner
from featherweight.models.encoder_decoder import EncoderDecoderRunner
from featherweight.models.tree import Block, Matrix
from featherweight.models.windows import model_inputs
from featherweight.stream.ending import Ending
from featherweight.stream.groups import PROBE_TOKENS, Group, Kept
from featherweight.stream.guide import Weights
from featherweight.stream.hidden import HiddenStates
from featherweight.stream.inputs import BlockView
from featherweight.stream.parallel import ALONE, World


class States:
    """One or two streams that go through the model together, block by block.

    Attributes:
        hidden: what the compressed blocks make of the windows so far; None where the method needs none.
        dense: what the original ones make of them; None where nothing asks for it.
    """

    def __init__(
        self,
        runner: BlockRunner,
        ids_ST: Tensor | None,
        out: Path,
        batch: int,
        original: bool,
        stored: Mapping[str, Tensor] | None = None,
        world: World = ALONE,
        low: bool = False,
        endings: bool = False,
        special: Sequence[int] = (),
    ) -> None:
        """Embeds the windows.

        `out` is the folder for scratch files, `batch` the sequences of one forward pass; `stored` has values by name on
        disk that the compressed model has in place of the original's. Of several processes, each keeps its own windows.
        `low` on memory, nothing is kept on a GPU. `endings` may be kept, where the blocks' weights are solved last.
        `special` are ids of tokens that do not count for experts.
        """
        self.runner, self.batch, self.world = runner, batch, world
        self.hidden: HiddenStates | None = None
        self.dense: HiddenStates | None = None
        self.ending: Ending | None = None
        self.ids_ST: Tensor | None = None
        self.alike: dict[Hashable, list[Group]] = {}
        self.special = torch.tensor(special, dtype=torch.int64)
        if ids_ST is None:
            return
        self.ids_ST = ids = ids_ST[world.split(len(ids_ST))]
        end = f"{world.rank}.scratch" if world.size > 1 else "scratch"
        shape = (len(ids), *runner.embed(ids[:1]).shape[1:])
        self.hidden = HiddenStates(shape, runner.dtype, runner.device, out / f"hidden.{end}", world.size, low)
        self.hidden.fill(batch, lambda at: runner.embed(ids[at]))
        if original:
            self.dense = HiddenStates(shape, runner.dtype, runner.device, out / f"dense.{end}", world.size, low)
            self.dense.states_STD.copy_(self.hidden.states_STD)
        if not isinstance(runner, EncoderDecoderRunner):
            self.ending = Ending(self.hidden) if endings else None
            runner.embed(ids[:1, :PROBE_TOKENS])  # notes a probe's arguments, which would have the embedding read again
        runner.release()
        if stored:
            with runner.instead(stored):
                self.hidden.fill(batch, lambda at: runner.embed(ids[at]))

    def view(
        self,
        index: int,
        module: nn.Module,
        block: Block,
        weights: Weights | None,
        keep: Callable[[Matrix, AnySolution], Kept] | None = None,
    ) -> BlockView:
        """The block as the solver sees it (with round-to-nearest, without any hidden states)."""
        decoding = isinstance(self.runner, EncoderDecoderRunner) and index >= self.runner.turn
        return BlockView(
            module,
            block.matrices,
            lambda hidden: self.runner.run(index, module, hidden),
            self.hidden,
            self.dense,
            self.batch,
            weights=weights and {m.path: weights[m.name] for m in block.matrices if m.name in weights},
            world=self.world,
            ending=self.ending,
            keep=keep,
            special_ST=self._special(decoding),
            carries=decoding,
            alike=self.alike,
        )

    def _special(self, decoding: bool) -> Tensor | None:
        """Which tokens of the encoder, or else of the decoder, are special."""
        if self.ids_ST is None or not len(self.special):
            return None
        inputs = model_inputs(self.runner.model, self.ids_ST)
        return torch.isin(inputs["decoder_input_ids" if decoding else "input_ids"], self.special)

    def finish(self, index: int, module: nn.Module) -> None:
        """Replaces the hidden states by the block's outputs, by what is kept of its last pass if anything is."""
        assert self.hidden is not None
        if self.ending is None or not self.ending.finish(module, self.batch):
            self.advance(self.hidden, index, module)

    def turn(self, index: int) -> None:
        """Behind an encoder's last block: the decoder's states, with what the encoder returns behind them."""
        runner, ids = self.runner, self.ids_ST
        if not isinstance(runner, EncoderDecoderRunner) or index + 1 != runner.turn or ids is None:
            return
        assert self.hidden is not None
        self.hidden = self._decoding(runner, ids, self.hidden, "decoder")
        if self.dense is not None:
            self.dense = self._decoding(runner, ids, self.dense, "decoder.dense")
        runner.release()

    def _decoding(self, runner: EncoderDecoderRunner, ids: Tensor, encoded: HiddenStates, name: str) -> HiddenStates:
        _, tokens, width = encoded.states_STD.shape
        states = encoded.another(name, width, 2 * tokens)
        for at, encoder_STD in encoded.batches(self.batch):
            states.states_STD[at] = runner.embed(ids[at], encoder_STD)
        encoded.close()
        return states

    def advance(self, states: HiddenStates, index: int, module: nn.Module) -> None:
        """Replaces the states by the block's outputs, batch by batch."""
        states.advance(self.batch, lambda hidden_STD: self.runner.run(index, module, hidden_STD))

    def close(self) -> None:
        for states in (self.hidden, self.dense, self.ending):
            if states is not None:
                states.close()
