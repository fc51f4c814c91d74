"""The files of the original QMoE (IST-DASLab/qmoe, 2023): their tensors into our codes.

Of a ternary matrix they hold, under its name, `w_comp` (int16: codewords of 16 bits, row after row), `row_off` (int32,
(R + 1,): where rows start) and `ter_minmax` (bfloat16, (2 R,): the values of levels 1 and 2 of row after row). The
number of columns is that of the model's config, and nothing protects the codewords.

Shapes: R rows, C columns, N codewords of all rows, S codewords of the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from featherweight.codec.dictionary import ORIGINAL_BITS, ORIGINAL_ZERO_SHARE, decode_codewords, dictionary
from featherweight.codec.rows import side_by_side
from featherweight.errors import RequestError

PARTS = {"w_comp": torch.int16, "row_off": torch.int32, "ter_minmax": torch.bfloat16}


def read_qmoe(tensors: Mapping[str, Tensor], columns: int, name: str) -> tuple[Tensor, Tensor]:
    """A matrix of R x `columns` from QMoE's tensors of it.

    Returns codes_RC (uint8: 0 is the weight 0, 1 its row's least, 2 its row's greatest) and values of shape (R, 2),
    bfloat16: the least and the greatest. Raises RequestError naming `name`, and the row where one does not fit.
    """
    offsets = checked_offsets(tensors, name)
    counts_R = offsets.diff()
    table = dictionary(ORIGINAL_BITS, ORIGINAL_ZERO_SHARE, offsets.device)
    codewords = tensors["w_comp"].to(torch.int32) & 0xFFFF
    # Behind a row the codeword of one pair of zeros: with it a row of S codewords has S - its own pairs too many.
    codewords_RS = side_by_side(codewords, counts_R, fill=0)
    lengths_RS = table.lengths_K[codewords_RS]
    pairs_R = lengths_RS.sum(1) - (lengths_RS.shape[1] - counts_R)
    wrong = (pairs_R != -(-columns // 2)).nonzero().flatten().tolist()
    if wrong:
        raise RequestError(
            f"{name}'s row {wrong[0]} holds {2 * int(pairs_R[wrong[0]])} weights, and the model says {columns}: "
            "the file is damaged, or of another model."
        )
    levels_RC = decode_codewords(codewords_RS, table, columns + columns % 2)
    if levels_RC[:, columns:].any():
        raise RequestError(f"{name} has weights behind its last column, {columns - 1}: the file is damaged.")
    values_R2 = tensors["ter_minmax"].view(-1, 2)
    # Where a row has no weight below (or above) zero its least (greatest) is 0, and its zeros are written as that.
    zero_R2 = values_R2 == 0
    codes_RC = levels_RC[:, :columns]
    return codes_RC * ~((codes_RC == 1) & zero_R2[:, :1] | (codes_RC == 2) & zero_R2[:, 1:]), values_R2


def checked_offsets(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """`row_off` as int64, once everything agrees about rows and codewords."""
    for part, dtype in PARTS.items():
        if part not in tensors or tensors[part].dtype != dtype or tensors[part].ndim != 1:
            is_there = f"{tensors[part].dtype} {list(tensors[part].shape)}" if part in tensors else "missing"
            raise RequestError(f"{name}.{part} is {is_there}, not a row of {dtype}: it is no QMoE matrix.")
    offsets = tensors["row_off"].to(torch.int64)
    rows, codewords = len(offsets) - 1, len(tensors["w_comp"])
    if rows < 1 or len(tensors["ter_minmax"]) != 2 * rows:
        raise RequestError(f"{name} has {rows} rows by row_off and {len(tensors['ter_minmax']) / 2:g} by ter_minmax.")
    if int(offsets[0]) or int(offsets[-1]) != codewords or bool((offsets.diff() < 1).any()):
        raise RequestError(
            f"{name}.row_off goes from {int(offsets[0])} to {int(offsets[-1])} and should rise from 0 to "
            f"{codewords}, the codewords there are: the file is damaged."
        )
    return offsets
