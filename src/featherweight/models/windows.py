"""What a window of text is to a model: ids to a decoder, a beginning and its continuation to an encoder and decoder.

Shapes: S sequences, T tokens of a window, N predictions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featherweight.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_inputs(model: PreTrainedModel, ids_ST: Tensor) -> dict[str, Tensor]:
    """What to call the model with for windows of ids (int64).

    An encoder reads the first half of a window, and the decoder writes the second (of an odd number of tokens, the last
    is left out). That is any text's next words, whatever a family was trained on: sentinels of masked spans, as T5's,
    are not made up.
    """
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids_ST}
    start = model.config.decoder_start_token_id
    if start is None:
        raise RequestError(
            f"config.json of the {type(model).__name__} names no decoder_start_token_id, with which its decoder "
            "begins: add it."
        )
    first_SN, second_SN = halves(ids_ST)
    begin_S1 = torch.full_like(second_SN[:, :1], start)
    return {"input_ids": first_SN, "decoder_input_ids": torch.cat([begin_S1, second_SN[:, :-1]], 1)}


def halves(ids_ST: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of every window and the second."""
    half = ids_ST.shape[1] // 2
    return ids_ST[:, :half], ids_ST[:, half : 2 * half]


def predicted(model: PreTrainedModel, logits_STV: Tensor, ids_ST: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that predict a token of the windows, S x N x V, and the tokens, S x N."""
    if model.config.is_encoder_decoder:
        return logits_STV, halves(ids_ST)[1]
    return logits_STV[:, :-1], ids_ST[:, 1:]
