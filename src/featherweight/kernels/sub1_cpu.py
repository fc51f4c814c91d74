"""The weights of encoded rows that are not zero, column and value, on a CPU: no zero is ever written or multiplied.

With few tokens a product is then a sum of columns of x^T, picked and weighed: torch's `embedding_bag`, whose bags are
rows. Three to five times faster than decoding codes and multiplying by them (docs/formats.md).

Shapes: R rows, C columns, T tokens, W words of the longest row, S symbols of a row, N nonzero weights of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.codec import Encoded, words_for
from featherweight.codec.encoded import Kind
from featherweight.codec.rows import side_by_side
from featherweight.codec.runs import Alphabet, split

KINDS: tuple[Kind, ...] = ("runs", "bitmap")


@dataclass(frozen=True)
class Nonzeros:
    """What rows hold beside zeros.

    Attributes:
        columns_N: int32, row after row; C for entries that are no weight, whose value is 0.
        values_N: float32, of one unit: scales are not in it.
        offsets_R: int32, where each row starts.
    """

    columns_N: Tensor
    values_N: Tensor
    offsets_R: Tensor

    @property
    def rows_N(self) -> Tensor:
        """The row of each entry."""
        counts_R = self.offsets_R.diff(append=self.offsets_R.new_tensor([len(self.columns_N)]))
        return torch.arange(len(counts_R)).repeat_interleave(counts_R, output_size=len(self.columns_N))

    def times(self, x_CT: Tensor) -> Tensor:
        """V x: float32 of shape (R, T), for float32 x_CT with a row of zeros behind its last."""
        return functional.embedding_bag(
            self.columns_N, x_CT, self.offsets_R, mode="sum", per_sample_weights=self.values_N
        )

    def dense(self, columns: int) -> Tensor:
        """All weights, float32 of shape (R, C)."""
        width = columns + 1  # what is no weight goes into the last
        flat = torch.zeros(len(self.offsets_R) * width)
        flat.scatter_(0, self.rows_N * width + self.columns_N, self.values_N)
        return flat.view(-1, width)[:, :columns]


def nonzeros(encoded: Encoded, start: int, stop: int, values: dict[int, float]) -> Nonzeros:
    """Rows start .. stop-1 of a matrix of one of KINDS, whose checksums hold and whose commonest code is the weight 0.

    `values` says what the other codes are worth.
    """
    header = encoded.header
    offsets = encoded.row_offsets[start : stop + 1]
    stream_N, lengths_R = encoded.stream_N[offsets[0] : offsets[-1]], offsets.diff()
    worth = np.array([values[code] for code in header.levels[1:]], dtype=np.float32)
    if header.kind == "bitmap":
        return of_bitmap(side_by_side(stream_N, lengths_R, fill=0), header.columns, worth)
    return of_runs(side_by_side(stream_N, lengths_R, fill=-1), header.bits, header.columns, worth)


def of_runs(words_RW: Tensor, bits: int, columns: int, worth: npt.NDArray[np.float32]) -> Nonzeros:
    """Every symbol as an entry: where the zeros it stands for lead, with the value it ends with, or none."""
    alphabet = Alphabet(bits, max(1, len(worth)))
    symbols_RS = split(words_RW, bits)
    padded = np.resize(worth, alphabet.values) if len(worth) else np.zeros(1, dtype=np.float32)
    value = np.concatenate((np.zeros(1, dtype=np.float32), padded)).take(alphabet.levels())
    places_RS = torch.from_numpy(alphabet.advances().take(symbols_RS)).cumsum(1, dtype=torch.int32)
    columns_N = (places_RS - 1).clamp_(max=columns).view(-1)
    offsets_R = torch.arange(len(words_RW), dtype=torch.int32) * symbols_RS.shape[1]
    return Nonzeros(columns_N, torch.from_numpy(value.take(symbols_RS)).view(-1), offsets_R)


def of_bitmap(words_RW: Tensor, columns: int, worth: npt.NDArray[np.float32]) -> Nonzeros:
    """The flags that are set, and the bit that each of them has behind the flags."""
    flag_words = words_for(columns, 1)
    raw = words_RW.numpy().view(np.uint8)
    flags = np.unpackbits(raw[:, : 4 * flag_words], axis=1, bitorder="little")
    places = np.flatnonzero(flags.view(np.bool_))
    starts = np.arange(len(flags) + 1) * flags.shape[1]
    offsets = np.searchsorted(places, starts)
    counts = np.diff(offsets)
    signs = np.unpackbits(raw[:, 4 * flag_words :], axis=1, bitorder="little")
    levels = signs[np.arange(signs.shape[1]) < counts[:, None]]
    columns_N = (places - np.repeat(starts[:-1], counts)).astype(np.int32)
    values_N = np.resize(worth, 2).take(levels)
    return Nonzeros(*map(torch.from_numpy, (columns_N, values_N, offsets[:-1].astype(np.int32))))
