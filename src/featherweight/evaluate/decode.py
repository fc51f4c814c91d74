"""One sequence, token by token, with keys and values in memory of fixed size; on a GPU a token is one CUDA graph.

Of the small launches between the matrices, a graph takes away what it costs to start them, which is several times the
GPU's work for one token. What is left of them is fused where the model is found to be made of known pieces (`fused`),
and else runs as the model's own modules do.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning
from featherweight.evaluate import fused
from featherweight.kernels.decode import likeliest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP = 2
How = Literal["fused", "modules", "compiled"]


def unsuited(model: PreTrainedModel) -> str | None:
    """Why a token of this model cannot be one CUDA graph, in a few words; None when it can."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers says that a {type(model).__name__} is no single graph"
    # A graph takes decisions in Python once and for all, and positions that are no tensors too.
    if any(not isinstance(_position(layer), Tensor) for layer in _cache(model, 1).layers):
        return f"the keys of a {type(model).__name__} are not all kept in place"
    return None


def _cache(model: PreTrainedModel, length: int) -> Any:
    """Memory for keys and values, in place. Layers with a sliding window get all positions: they would move their
    memory by decisions in Python, and the mask hides what lies outside of a window."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[index] = StaticLayer(max_cache_len=length)
            cache.layers[index].window = layer.max_cache_len  # type: ignore[attr-defined]
    return cache


class Decoder:
    """A model in the middle of a text.

    Args:
        model: a causal language model of transformers, for which `unsuited` is None.
        length: the most tokens, the prompt's among them.
        how: what a token is made of: "fused" takes few launches of our own for all that lies between the products (and
            with a FallbackWarning the modules, where they are found to do something else), "modules" the model's own,
            "compiled" those by torch.compile, which takes a minute or so.
    """

    def __init__(self, model: PreTrainedModel, length: int, how: How = "fused") -> None:
        self.model: Any = model
        self.how = how
        self.cache = _cache(model, length)
        self.runs: Any = model  # the model, or what torch.compile made of it
        self.step: fused.Step | None = None
        self.token: Tensor | None = None  # 1 x 1: what a step reads; then, the likeliest after it
        self.logits_V: Tensor | None = None  # what a graph writes
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def begin(self, ids_T: Tensor) -> Tensor:
        """The logits after a prompt (int64), V. The next token's step is made too, and on a GPU its graph."""
        logits_V = self._logits(self.model, ids_T.unsqueeze(0)).clone()
        self.token = ids_T[-1:].clone().unsqueeze(0)
        if self.how == "compiled":
            self.runs = torch.compile(self.model, fullgraph=True, dynamic=False)
        elif self.how == "fused":
            self._fuse(self.token)
        if ids_T.is_cuda:
            self._capture()
        self.token.copy_(logits_V.argmax())
        return logits_V

    @torch.no_grad()
    def next(self, token: Tensor | None = None) -> Tensor:
        """The logits after one more token (int64, one element), V; a graph writes them to the same place each time.

        None takes the likeliest token, which `token` holds, as it does the likeliest one afterwards: so tokens follow
        one another without the host looking at them.
        """
        assert self.token is not None, "begin first"
        if token is not None:
            self.token.copy_(token.view(1, 1))
        if self.graph is None:
            return self._advance()
        self.graph.replay()
        assert self.logits_V is not None
        return self.logits_V

    def _advance(self) -> Tensor:
        """One step, and its likeliest token in the place of the one it was given."""
        assert self.token is not None
        logits_V = self._logits(self.runs, self.token) if self.step is None else self.step(self.token)
        likeliest(logits_V, self.token)
        return logits_V

    def _logits(self, model: Any, ids: Tensor) -> Tensor:
        found: Tensor = model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        return found

    def _fuse(self, token: Tensor) -> None:
        """Take the fused step where it is the model's own; else keep the modules, and say why."""
        try:
            self.step = fused.find(self.model, self.cache, token, partial(self._logits, self.model))
        except Exception as error:  # not the model's step, or Triton: a missing compiler, an old GPU, a kind for each
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            message = f"tokens take the model's own modules, several times the launches, since {reason}."
            warnings.warn(message, FallbackWarning, stacklevel=3)

    def _positions(self) -> list[Tensor]:
        """What a step counts up."""
        if self.step is not None:
            return [self.step.position]
        return [_position(layer) for layer in self.cache.layers]

    def _capture(self) -> None:
        """Run the step until nothing is made for the first time any more, then once more into a graph."""
        positions = self._positions()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._advance()
                for position in positions:
                    position.sub_(1)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.logits_V = self._advance()
        except RuntimeError as error:
            warnings.warn(
                f"tokens are launched kernel by kernel, since no CUDA graph could be made ({str(error)[:200]}).",
                FallbackWarning,
                stacklevel=3,
            )
            return
        self.graph = graph


def _position(layer: Any) -> Any:
    """How many tokens a layer of the cache holds: a tensor that the layer counts up in place."""
    return getattr(layer, "cumulative_length", None)
