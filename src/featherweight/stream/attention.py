"""Causal attention of a pass in C (`native/attention.c`), where torch's own is slow: on CPUs with vectors of bfloat16
but no matrix unit it takes four times as long, and multiplies what no query sees.

Shapes: S sequences, H heads of queries, K of keys and values, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.native import attention as native_attention
from featherweight.native import run

WIDTHS = 32  # of a head; other than multiples of it are left to torch
NAME = "sdpa"  # what transformers calls torch's own
OTHERS = ("position_bias", "cache", "softcap", "output_attentions")  # what is not done here


@contextmanager
def in_c() -> Iterator[None]:
    """While this lasts, transformers' models attend in C where that may do it, if they attend by torch's operator."""
    if not native_attention():
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known

    own = known[NAME]
    known[NAME] = partial(_attended, own)
    try:
        yield
    finally:
        del known[NAME]
        if known[NAME] is not own:  # it was somebody's own before
            known[NAME] = own


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether C may do it: bfloat16 on a CPU, as many queries as keys, no gradients."""
    tensors = (query, key, value)
    alike = all(t.dim() == 4 and t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors)
    if not alike or torch.is_grad_enabled() or not query.numel():
        return False
    sequences, heads, tokens, width = query.shape
    shape = (sequences, key.shape[1], tokens, width)
    fits = key.shape == value.shape == shape and not heads % key.shape[1] and not width % WIDTHS
    return fits and all(t.stride(-1) == 1 for t in tensors) and bool(native_attention())


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of queries, S x H x T x D, each with the keys, S x K x T x D, up to its own token. Returns
    S x T x H x D.
    """
    sequences, heads, tokens, width = query.shape
    found = query.new_empty(sequences, tokens, heads, width)
    given: list[Tensor | int] = []
    for x in (query, key, value):
        given += [x, *x.stride()[:3]]
    sizes = (heads, key.shape[1], tokens, width, torch.tensor(scale, dtype=torch.float32))
    count = sequences * key.shape[1]
    run("attend", (*given, found, *sizes), count, count, native_attention())
    return found


def _attended(
    own: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Any:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    others = (kwargs.get(name) for name in OTHERS)
    plain = attention_mask is None and not dropout and all(other is None or other is False for other in others)
    if plain and causal and usable(query, key, value):
        return attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    return own(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
