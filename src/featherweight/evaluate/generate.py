"""A look at what a model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from featherweight.errors import RequestError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The model's continuation of `prompt`, without the prompt and without special tokens.

    Only these arguments count: what the checkpoint's generation_config says of temperature, top-k or repetition penalty
    is set aside, its end-of-text ids are kept.

    Args:
        model: a causal language model of transformers, left as it was.
        tokenizer: its tokenizer; puts a BOS in front where it does so by default.
        prompt: any text that is at least one token.
        max_new_tokens: the most tokens to write, at least 1.
        temperature: 0 takes the likeliest token each time; above, samples from the whole distribution at it.
        seed: of the sampling; the caller's random state is not touched.

    Raises:
        RequestError: max_new_tokens < 1, a negative temperature, or a prompt of no tokens.
    """
    if max_new_tokens < 1:
        raise RequestError(f"{max_new_tokens} new tokens were asked for and at least 1 is needed: raise the number")
    if not 0.0 <= temperature < float("inf"):
        raise RequestError(f"temperature {temperature} was asked for and 0 or more is allowed: use 0 for greedy")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.get_input_embeddings().weight.device)
    if ids.shape[1] == 0:
        raise RequestError("the prompt has 0 tokens and this model needs at least 1 to go on from: give some text")
    # The model's own generation_config would fill in whatever ours leaves open, so it steps aside for the call.
    kept = model.generation_config
    model.generation_config = _config(model, max_new_tokens, temperature)
    devices = [ids.device] if ids.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = kept
    # Decoded together with the prompt: alone, the first word would lose the space in front of it.
    shown, whole = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[0], written[0]))
    return whole[len(shown) :]


def _config(model: PreTrainedModel, max_new_tokens: int, temperature: float) -> GenerationConfig:
    """Ours, with the ids that begin and end a text taken from the model's."""
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id if own is not None else model.config.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0.0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0.0,
        eos_token_id=eos,
        pad_token_id=first_eos if first_eos is not None else 0,
        **sampling,
    )
