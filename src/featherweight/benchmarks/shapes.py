"""The shapes of well-known models as transformers' configurations, so that nothing has to be downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from featherweight.errors import RequestError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Shapes:
    """The sizes of a decoder, as its published config.json has them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    experts_per_token: int = 0
    qk_norm: bool = False

    def config(self, blocks: int | None = None) -> PretrainedConfig:
        """The configuration of a model of these shapes with `blocks` of its blocks (all of them without)."""
        from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

        common = {
            "hidden_size": self.hidden,
            "num_hidden_layers": blocks or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        if self.experts:
            experts = {"num_experts": self.experts, "num_experts_per_tok": self.experts_per_token}
            return Qwen3MoeConfig(moe_intermediate_size=self.intermediate, norm_topk_prob=True, **experts, **common)
        family = Qwen3Config if self.qk_norm else LlamaConfig
        return family(intermediate_size=self.intermediate, **common)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a block's products as an engine runs them, q/k/v and gate/up in one; experts' apart."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, queries + 2 * keys),
            "o": (queries, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }


NAMED: dict[str, Shapes] = {
    "llama-2-7b": Shapes(4096, 11008, 32, 32, 32, 128, 32000),
    "llama-2-70b": Shapes(8192, 28672, 80, 64, 8, 128, 32000),
    "llama-3-8b": Shapes(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3-70b": Shapes(8192, 28672, 80, 64, 8, 128, 128256),
    "qwen3-8b": Shapes(4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True),
    "qwen3-30b-a3b": Shapes(2048, 768, 48, 32, 4, 128, 151936, experts=128, experts_per_token=8, qk_norm=True),
}


def named(name: str) -> Shapes:
    """The shapes of a model by name. Raises RequestError, with the names there are, for another."""
    if name not in NAMED:
        raise RequestError(f"there are no shapes {name}: choose {', '.join(NAMED)}.")
    return NAMED[name]
