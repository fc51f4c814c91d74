"""Windows of token ids: seeded random ones to calibrate on, whole ones side by side to evaluate on.

Shapes: T tokens (of the whole text, or of one window), S sequences.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from featherweight.errors import RequestError


def calibration_windows(tokens_T: Tensor, samples: int, length: int, seed: int, bos: int | None = None) -> Tensor:
    """`samples` windows of `length` ids from seeded random places of the text; the same arguments give the same ids.

    Args:
        tokens_T: int64 ids of the text, on the CPU.
        samples: how many windows, at least 1.
        length: ids in a window, at least 2, the BOS included.
        seed: of the places.
        bos: the id in front of every window (it takes the place of the window's last token), or None.

    Returns:
        ids_ST: int64, samples x length.

    Raises:
        RequestError: a number below its least, or a text shorter than one window.
    """
    if samples < 1:
        raise RequestError(f"{samples} calibration samples were asked for and at least 1 is needed: raise --samples")
    take = _text_tokens(tokens_T, length, bos, "calibration", "--tokens")
    generator = torch.Generator().manual_seed(seed)
    starts_S = torch.randint(tokens_T.numel() - take + 1, (samples,), generator=generator)
    return _with_bos(tokens_T[starts_S[:, None] + torch.arange(take)], bos)


def evaluation_windows(tokens_T: Tensor, context: int, bos: int | None = None) -> Tensor:
    """The text cut into whole windows without overlap; what is left at the end is dropped.

    Without BOS a window is `context` tokens of text, of which all but the first are predicted. With BOS it is the BOS
    and `context` - 1 tokens of text, all predicted. Either way `context` - 1 predictions a window.

    Args:
        tokens_T: int64 ids of the text.
        context: ids in a window, at least 2, the BOS included.
        bos: the id in front of every window, or None.

    Returns:
        ids_ST: int64, S x context.

    Raises:
        RequestError: a context below 2, or a text shorter than one window.
    """
    take = _text_tokens(tokens_T, context, bos, "evaluation", "--context")
    windows = tokens_T.numel() // take
    return _with_bos(tokens_T[: windows * take].reshape(windows, take), bos)


def digest(ids: Tensor) -> str:
    """SHA-256 of the shape and the ids (as little-endian int64), in hex: the same text, cut the same way."""
    shape = ",".join(map(str, ids.shape))
    raw = ids.detach().cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"int64 {shape}\n".encode() + raw).hexdigest()


def _text_tokens(tokens_T: Tensor, length: int, bos: int | None, purpose: str, option: str) -> int:
    """How many tokens of text go into one window; raises unless the text has that many."""
    if length < 2:
        raise RequestError(
            f"{purpose} windows of {length} tokens were asked for and at least 2 are needed: raise {option}"
        )
    take = length - (bos is not None)
    if tokens_T.numel() < take:
        raise RequestError(
            f"the {purpose} text has {tokens_T.numel()} tokens and one window needs {take}: "
            f"lower {option} or give more text"
        )
    return take


def _with_bos(text_ST: Tensor, bos: int | None) -> Tensor:
    if bos is None:
        return text_ST
    return torch.cat([text_ST.new_full((text_ST.shape[0], 1), bos), text_ST], dim=1)
