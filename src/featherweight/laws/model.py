"""Small byte-level decoders, M of them trained side by side: every parameter has a leading axis of runs.

Blocks are Qwen3's (pre-norm RMSNorm, rotary positions, normalised queries and keys, causal attention, SwiGLU), all
gains held at 1, no biases; embedding and output head are separate and never pruned. So a trained run is saved as a
Hugging Face checkpoint that anything loads.

Shapes: M runs, L layers, B windows, T bytes of a window, K = B T bytes, V = 256 byte values, D width, F features of the
MLP, H heads, E head size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BYTES, HEAD = 256, 64
EPSILON, THETA = 1e-6, 10_000.0
PARTS = {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("o_proj",), "gate_up": ("gate_proj", "up_proj"),
         "down": ("down_proj",)}  # fmt: skip
"""The stacked tensors of the blocks, and the matrices, each pruned on its own, that lie in them one below the other."""


@dataclass(frozen=True)
class Size:
    """One dense size: width (a multiple of 64, the head size) and number of blocks."""

    width: int
    layers: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.layers}"

    @property
    def features(self) -> int:
        """8/3 of the width, to the next multiple of 64: about 12 D^2 weights a block."""
        return 64 * max(1, round(self.width * 8 / 3 / 64))

    @property
    def parameters(self) -> int:
        """Weights of the blocks' matrices, zeros included: what is pruned, and the only ones counted."""
        return sum(math.prod(shape) for name, shape in self.shapes().items() if name in PARTS)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one run's parameters; matrices are outputs x inputs, as in a checkpoint, stacked over the layers."""
        d, f = self.width, self.features
        block = {"qkv": (3 * d, d), "out": (d, d), "gate_up": (2 * f, d), "down": (d, f)}
        stacked = {name: (self.layers, *shape) for name, shape in block.items()}
        return {"embedding": (BYTES, d), **stacked, "head": (BYTES, d)}


def initial(size: Size, runs: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """float32 parameters with a leading axis of `runs` equal copies.

    Matrices are normal with standard deviation inputs^-1/2, those that write to the residual stream (2 L)^-1/2 of it;
    the head starts at 0, so every model starts at ln 256 nats a byte.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in size.shapes().items():
        deviation = {"embedding": 0.5, "head": 0.0}.get(name, shape[-1] ** -0.5)
        if name in ("out", "down"):
            deviation *= (2 * size.layers) ** -0.5
        one = torch.randn(shape, generator=generator) * deviation
        found[name] = one.to(device).expand(runs, *shape).clone()
    return found


def rotary(length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos_TE and sin_TE of the rotary positions, both halves of a head turned by the same angles."""
    speed = THETA ** (-torch.arange(0, HEAD, 2, device=device, dtype=torch.float32) / HEAD)
    angle_TE = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speed).repeat(1, 2)
    return angle_TE.cos().to(dtype), angle_TE.sin().to(dtype)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPSILON)


def _turned(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos_TE + torch.cat((-right, left), dim=-1) * sin_TE


def _attention(x_MKD: Tensor, qkv: Tensor, out: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    runs, tokens, width = x_MKD.shape
    length = len(cos_TE)
    all_MKX = torch.bmm(x_MKD, qkv.mT).view(runs * tokens // length, length, 3, width // HEAD, HEAD)
    q, k, v = (each.transpose(1, 2) for each in all_MKX.unbind(2))
    q, k = (_turned(_norm(each), cos_TE, sin_TE) for each in (q, k))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.bmm(mixed.transpose(1, 2).reshape(runs, tokens, width), out.mT)


def _mlp(x_MKD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate_MKF, up_MKF = torch.bmm(x_MKD, gate_up.mT).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate_MKF) * up_MKF, down.mT)


def losses(params: Mapping[str, Tensor], bytes_BT: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Mean cross-entropy of each run, M, in nats per byte, of windows of T + 1 bytes: every one but the first.

    Computed in the dtype of the tables; norms, softmax and loss in float32. The embedding is a product with one-hot
    rows: its gradient is then a product, too, and not a scatter of K rows onto 256.
    """
    dtype = cos_TE.dtype
    w = {name: value.to(dtype) for name, value in params.items()}
    ids_K, targets_K = bytes_BT[:, :-1].flatten(), bytes_BT[:, 1:].flatten()
    runs = w["head"].shape[0]
    hot_KV = (ids_K[:, None] == torch.arange(BYTES, device=ids_K.device, dtype=ids_K.dtype)).to(dtype)
    x_MKD = torch.bmm(hot_KV.expand(runs, -1, -1), w["embedding"])
    layers = zip(*(w[name].unbind(1) for name in PARTS), strict=True)
    for qkv, out, gate_up, down in layers:
        x_MKD = x_MKD + _attention(_norm(x_MKD), qkv, out, cos_TE, sin_TE)
        x_MKD = x_MKD + _mlp(_norm(x_MKD), gate_up, down)
    logits_MKV = torch.bmm(_norm(x_MKD), w["head"].mT).float()
    targets_X = targets_K.long().expand(runs, -1).flatten()
    return F.cross_entropy(logits_MKV.flatten(0, 1), targets_X, reduction="none").view(runs, -1).mean(1)


# --- a trained run as a Hugging Face checkpoint


def named(size: Size, params: Mapping[str, Tensor], run: int) -> dict[str, Tensor]:
    """The float32 tensors of one run under their names in a Qwen3 checkpoint."""
    one = {name: value[run].detach().cpu() for name, value in params.items()}
    found = {"model.embed_tokens.weight": one["embedding"], "lm_head.weight": one["head"]}
    found["model.norm.weight"] = torch.ones(size.width)
    for layer in range(size.layers):
        at = f"model.layers.{layer}"
        for name, parts in PARTS.items():
            room = "self_attn" if name in ("qkv", "out") else "mlp"
            for part, weight in zip(parts, one[name][layer].chunk(len(parts)), strict=True):
                found[f"{at}.{room}.{part}.weight"] = weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{norm}.weight"] = torch.ones(size.width)
        for norm in ("q_norm", "k_norm"):
            found[f"{at}.self_attn.{norm}.weight"] = torch.ones(HEAD)
    return {name: value.contiguous().clone() for name, value in found.items()}


def config(size: Size, length: int) -> dict[str, Any]:
    """config.json of such a checkpoint; `length` is the window it was trained on."""
    heads = size.width // HEAD
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": BYTES, "hidden_size": size.width,
        "intermediate_size": size.features, "num_hidden_layers": size.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": HEAD, "hidden_act": "silu", "max_position_embeddings": length,
        "rms_norm_eps": EPSILON, "rope_theta": THETA, "attention_bias": False, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": "float32",
    }  # fmt: skip


def tokenizer() -> dict[str, Any]:
    """tokenizer.json of a tokenizer whose ids are the UTF-8 bytes: byte-level BPE without a merge.

    Byte-level BPE writes a byte that is no printable Latin-1 letter as the letter 256 + its rank among those.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [value for value in range(BYTES) if value not in plain]
    letters = {chr(value if value in plain else 256 + others.index(value)): value for value in range(BYTES)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": letters, "merges": []}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}


def save(folder: Path, size: Size, params: Mapping[str, Tensor], run: int, length: int) -> None:
    """Writes one run into `folder` as a Hugging Face checkpoint with a byte tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(named(size, params, run), folder / "model.safetensors", metadata={"format": "pt"})
    files = {"config.json": config(size, length), "tokenizer.json": tokenizer(),
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
