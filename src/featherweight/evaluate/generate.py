"""A look at what a model writes, and how fast.

On a GPU a token is one CUDA graph (`decode`) where the model allows it; else transformers' own loop runs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning, RequestError
from featherweight.evaluate.decode import Decoder, unsuited
from featherweight.evaluate.size import read_bytes

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """A continuation, and the time it took.

    Attributes:
        text: without the prompt and without special tokens.
        prompt_tokens, new_tokens: how many (an end-of-text token counts).
        prefill_s: until the first new token; decode_s: from it to the last.
        read_bytes: of the weights that one token needs, as they are stored.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    read_bytes: int

    @property
    def tokens_per_s(self) -> float | None:
        """After the first; None where there is only one."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None

    @property
    def read_gbps(self) -> float | None:
        """Weights read, a second, while decoding."""
        return None if self.tokens_per_s is None else self.read_bytes * self.tokens_per_s / 1e9


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The text that `write` writes, alone."""
    return write(model, tokenizer, prompt, max_new_tokens, temperature, seed).text


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Written:
    """The model's continuation of `prompt`.

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
    if model.config.is_encoder_decoder:
        raise RequestError(
            f"a {type(model).__name__} has an encoder and a decoder, which answers a text and does not go on with it: "
            "call the `generate` of the loaded model itself."
        )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[1] == 0:
        raise RequestError("the prompt has 0 tokens and this model needs at least 1 to go on from: give some text")
    loop = _by_graph if ids.is_cuda and unsuited(model) is None else _by_transformers
    new, times = loop(model, ids, _config(model, max_new_tokens, temperature), seed)
    # Decoded together with the prompt: alone, the first word would lose the space in front of it.
    whole_T = torch.cat((ids[0], torch.tensor(new, dtype=ids.dtype, device=ids.device)))
    shown, whole = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[0], whole_T))
    spent = times[0], times[-1] - times[0]
    return Written(whole[len(shown) :], ids.shape[1], len(new), *spent, read_bytes(model))


def _by_transformers(
    model: PreTrainedModel, ids: Tensor, config: GenerationConfig, seed: int
) -> tuple[list[int], list[float]]:
    """New tokens, and the seconds at which each was there, by transformers' loop."""
    start, times = time.perf_counter(), list[float]()

    def note(written: Tensor, scores: Tensor, **_: Any) -> Tensor:
        times.append(time.perf_counter() - start)
        return torch.zeros(len(written), dtype=torch.bool, device=written.device)

    # The model's own generation_config would fill in whatever ours leaves open, so it steps aside for the call.
    kept = model.generation_config
    model.generation_config = config
    devices = [ids.device] if ids.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            written: Any = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=[note])
    finally:
        model.generation_config = kept
    return written[0, ids.shape[1] :].tolist(), times


def _by_graph(
    model: PreTrainedModel, ids: Tensor, config: GenerationConfig, seed: int
) -> tuple[list[int], list[float]]:
    """The same by `Decoder`; by transformers after all, with a warning, where that fails."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    start, most = time.perf_counter(), int(config.max_new_tokens)
    draw = _drawing(config, ids.device, seed) if config.do_sample else None
    try:
        decoder = Decoder(model, ids.shape[1] + most)
        logits_V = decoder.begin(ids[0])
        new, times = list[int](), list[float]()
        while True:
            token = decoder.token if draw is None else draw(logits_V)
            assert token is not None
            new.append(int(token))
            times.append(time.perf_counter() - start)
            if len(new) == most or new[-1] in ends:
                break
            logits_V = decoder.next(None if draw is None else token)
    except RuntimeError as error:
        said = str(error).splitlines()[0][:200]
        warnings.warn(f"transformers' own loop generates, since a CUDA graph fails: {said}", FallbackWarning, 3)
        return _by_transformers(model, ids, config, seed)
    return new, times


def _drawing(config: GenerationConfig, device: torch.device, seed: int) -> Callable[[Tensor], Tensor]:
    """The next token of logits_V, drawn at the temperature."""
    draw = torch.Generator(device).manual_seed(seed)
    return lambda logits_V: torch.multinomial((logits_V.float() / config.temperature).softmax(-1), 1, generator=draw)


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
