"""A token put together from pieces: which models it is found in, that it is theirs, and that nothing else passes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import featherweight
from featherweight.errors import FallbackWarning
from featherweight.evaluate import fused
from featherweight.evaluate.decode import Decoder
from featherweight.kernels.decode import ACTIVATIONS
from featherweight.merged import together
from featherweight.models.pieces import activation_of, rms_norm_of
from featherweight.recipe import Recipe
from tiny import SLIDING_WINDOW, make, token_ids

PROMPT, LENGTH = 5, 24  # a window slides between them
KNOWN = ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "glm4-moe"]
KNOWN += [pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "qwen3-moe", "granite-moe")]
# and of others what is said, in a word
UNKNOWN = {
    "gpt2": "q_proj",
    "phi3": "q_proj",
    "gemma2": "softcapping is set",
    "granite": "not given what comes before",
    "olmo2": "norms over more than a head",
    "cohere": "other norms",
    "starcoder2": "no RMSNorm",
    "gpt-oss": "more than q, k, v and o",
    "ernie4.5-moe": "computes something else",
}


def model_of(family: str, folder: Path, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(make(family, folder, **changes)).eval()


def written(model: Any, ids_T: Tensor) -> tuple[Decoder, Tensor]:
    """The logits of everything after the prompt."""
    decoder = Decoder(model, LENGTH)
    first_V = decoder.begin(ids_T[:PROMPT])
    later = [decoder.next(token).clone() for token in ids_T[PROMPT:]]
    return decoder, torch.stack([first_V, *later])


def whole(model: Any, ids_T: Tensor) -> Tensor:
    with torch.no_grad():
        logits_TV: Tensor = model(ids_T.unsqueeze(0)).logits[0, PROMPT - 1 :]
    return logits_TV


@pytest.mark.parametrize("family", KNOWN)
def test_the_logits_of_the_whole_text(family: str, tmp_path: Path) -> None:
    model, ids_T = model_of(family, tmp_path), token_ids(1, LENGTH)[0]
    want_TV = whole(model, ids_T)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        decoder, got_TV = written(model, ids_T)
    assert isinstance(decoder.step, fused.Step) and PROMPT < SLIDING_WINDOW < LENGTH
    torch.testing.assert_close(got_TV, want_TV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", UNKNOWN)
def test_other_models_keep_their_modules_and_say_why(family: str, tmp_path: Path) -> None:
    model, ids_T = model_of(family, tmp_path), token_ids(1, LENGTH)[0]
    with pytest.warns(FallbackWarning, match=f"the model's own modules.*since .*{UNKNOWN[family]}"):
        decoder, got_TV = written(model, ids_T)
    assert not isinstance(decoder.step, fused.Step)
    torch.testing.assert_close(got_TV, whole(model, ids_T), rtol=1e-4, atol=1e-4)


def test_what_differs_only_far_from_the_prompt_is_noticed(tmp_path: Path) -> None:
    model, ids_T = model_of("llama", tmp_path), token_ids(1, LENGTH)[0]
    block = model.model.layers[1]
    own = type(block).forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        found: Tensor = own(block, hidden_states, **kwargs)
        return found * (1.01 if int(kwargs["position_ids"].max()) > LENGTH - 3 else 1.0)

    block.forward = forward
    with pytest.warns(FallbackWarning, match="layers.1 computes something else"):
        written(model, ids_T)


def test_a_compressed_model(tmp_path: Path, text: Path) -> None:
    recipe = Recipe(group_size=32, samples=2, tokens=32, calibration=(str(text),), method="rtn")
    featherweight.compress(make("qwen2", tmp_path / "dense"), tmp_path / "out", recipe)
    model, ids_T = featherweight.load(tmp_path / "out", "cpu", torch.float32), token_ids(1, LENGTH)[0]
    want_TV = whole(model, ids_T)
    decoder, got_TV = written(model, ids_T)
    assert isinstance(decoder.step, fused.Step)
    torch.testing.assert_close(got_TV, want_TV, rtol=1e-4, atol=1e-4)


def test_the_same_tokens_as_transformers_writes() -> None:
    model, ids = featherweight.load("feather-tiny", "cpu", torch.float32), token_ids(1, 6)
    with torch.no_grad():
        want = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, 6:]
    decoder = Decoder(model, 26)
    decoder.begin(ids[0])
    got = []
    for _ in range(20):
        got.append(int(decoder.token))  # type: ignore[arg-type]
        decoder.next()
    assert isinstance(decoder.step, fused.Step) and got == want.tolist()


def test_dense_layers_multiply_as_one_and_keep_their_values() -> None:
    layers = [nn.Linear(8, rows) for rows in (4, 2, 2)]
    before, x = copy.deepcopy(layers), torch.randn(3, 8)
    product = together(layers)
    torch.testing.assert_close(product(x), torch.cat([layer(x) for layer in before], -1))
    assert all(torch.equal(new.weight, old.weight) for new, old in zip(layers, before, strict=True))
    start = layers[0].weight.untyped_storage().data_ptr()
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {start}, "one matrix"
    together(layers)
    assert layers[2].weight.untyped_storage().data_ptr() == start, "and not copied again"
    alone = [nn.Linear(8, 4), nn.Linear(8, 2, bias=False)]
    torch.testing.assert_close(together(alone)(x), torch.cat([layer(x) for layer in alone], -1))
    assert alone[0].weight.untyped_storage().data_ptr() != alone[1].weight.untyped_storage().data_ptr()


class Other(nn.Module):
    """Nearly a norm: of the mean of absolute values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_known_by_what_they_compute(dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for kind, more in ((LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0), (nn.RMSNorm, 0.0)):
        module = kind(48, eps=1e-5).to(dtype)
        nn.init.normal_(module.weight)
        found = rms_norm_of(module)
        assert found is not None and found[1] == 1e-5
        assert torch.equal(found[0], module.weight.float() + more)
    assert all(rms_norm_of(each) is None for each in (nn.LayerNorm(48), Other(48), nn.Linear(2, 2), None))


def test_activations_are_known_by_what_they_compute() -> None:
    from transformers.activations import ACT2FN

    names = {name: activation_of(ACT2FN[name], ACTIVATIONS) for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu")}
    assert names == {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": None}
    assert activation_of(None, ACTIVATIONS) is None and activation_of(nn.PReLU(), ACTIVATIONS) is None
