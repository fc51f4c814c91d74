"""Windows of token ids: seeded random ones to calibrate on, whole ones side by side to evaluate on.

Shapes: T tokens (of the whole text, or of one window), S sequences.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.errors import RequestError

Encode = Callable[[str], list[int]]
PROBE = 4096  # characters that tell how many there are to a token
LONGEST_WORD = 128  # characters
SLACK = 1.25  # and how much longer than that a passage is made, so that it seldom has too few tokens


def calibration_windows(
    encode: Encode, text: str, samples: int, length: int, seed: int, bos: int | None = None
) -> Tensor:
    """`samples` windows of `length` ids from seeded random places of the text; the same arguments give the same ids.

    Only the passages that are drawn are tokenised (from one white space to another): a large text costs no more than
    a small one.

    Args:
        encode: token ids of a text, without special tokens.
        text: what to draw from.
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
    take = _text_tokens(length, bos, "calibration", "--tokens")
    head = text[:PROBE]
    span = math.ceil(SLACK * take * max(1.0, len(head) / max(1, len(encode(head)))))
    draws_S2 = torch.rand((samples, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = [_passage(encode, text, take, span, place, offset) for place, offset in draws_S2.tolist()]
    return _with_bos(torch.tensor(rows, dtype=torch.int64), bos)


def _passage(encode: Encode, text: str, take: int, span: int, place: float, offset: float) -> list[int]:
    """`take` ids, `offset` (0 .. 1) of the way into a passage that begins `place` (0 .. 1) of the way into the text."""
    while True:
        start = int(place * (max(0, len(text) - span) + 1))
        ids = encode(text[_space(text, start, -1) : _space(text, start + span, 1)])
        if len(ids) >= take:
            first = int(offset * (len(ids) - take + 1))
            return ids[first : first + take]
        if span >= len(text):
            _require(len(ids), take, "calibration", "--tokens")
        span *= 2


def _space(text: str, at: int, step: int) -> int:
    """The nearest white space from `at` on in that direction; `at` itself in scripts that have none."""
    for place in range(at, at + step * LONGEST_WORD, step):
        if not 0 < place < len(text):
            return min(max(place, 0), len(text))
        if text[place].isspace():
            return place
    return at


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
    take = _text_tokens(context, bos, "evaluation", "--context")
    _require(tokens_T.numel(), take, "evaluation", "--context")
    windows = tokens_T.numel() // take
    return _with_bos(tokens_T[: windows * take].reshape(windows, take), bos)


def digest(ids: Tensor) -> str:
    """SHA-256 of the shape and the ids (as little-endian int64), in hex: the same text, cut the same way."""
    shape = ",".join(map(str, ids.shape))
    raw = ids.detach().cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"int64 {shape}\n".encode() + raw).hexdigest()


def _text_tokens(length: int, bos: int | None, purpose: str, option: str) -> int:
    """How many tokens of text go into one window."""
    if length < 2:
        raise RequestError(
            f"{purpose} windows of {length} tokens were asked for and at least 2 are needed: raise {option}"
        )
    return length - (bos is not None)


def _require(tokens: int, take: int, purpose: str, option: str) -> None:
    """Raises unless a text has enough tokens for one window."""
    if tokens < take:
        raise RequestError(
            f"the {purpose} text has {tokens} tokens and one window needs {take}: lower {option} or give more text"
        )


def _with_bos(text_ST: Tensor, bos: int | None) -> Tensor:
    if bos is None:
        return text_ST
    return torch.cat([text_ST.new_full((text_ST.shape[0], 1), bos), text_ST], dim=1)
