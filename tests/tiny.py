"""Tiny random checkpoints of many model families, for tests: a few blocks, width 64, real layouts and odd corners."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

SLIDING_WINDOW = 8
LLAMA: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GEMMA = {**LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": SLIDING_WINDOW}
OPT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "word_embed_proj_dim": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 128,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# family -> (configuration class, its arguments)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": SLIDING_WINDOW}),
    "qwen2": ("Qwen2Config", {**LLAMA, "use_sliding_window": True, "sliding_window": SLIDING_WINDOW,
                              "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 32}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 3, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3Config", LLAMA),
    "opt": ("OPTConfig", OPT),
    "opt-projected": ("OPTConfig", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt2": ("GPT2Config", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128,
                            "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-neox": ("GPTNeoXConfig", {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}),
    "bloom": ("BloomConfig", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon-new": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-old": ("FalconConfig", {**FALCON, "multi_query": False, "alibi": True, "parallel_attn": False,
                                    "bias": True}),
    "olmo2": ("Olmo2Config", LLAMA),
    "granite": ("GraniteConfig", {**LLAMA, "embedding_multiplier": 12.0, "residual_multiplier": 0.3,
                                  "logits_scaling": 2.0}),
    "cohere": ("CohereConfig", {**LLAMA, "use_qk_norm": True}),
    "starcoder2": ("Starcoder2Config", {**LLAMA, "sliding_window": SLIDING_WINDOW}),
    "one-block": ("BloomConfig", {"vocab_size": 128, "hidden_size": 64, "n_layer": 1, "n_head": 4}),
}  # fmt: skip
FAMILIES = sorted(CONFIGS)
MOE = {**LLAMA, "num_experts_per_tok": 2, "intermediate_size": 32, "moe_intermediate_size": 32}
# mixtures of experts: on disk one by one (under two sets of names), or fused (both ways round)
MOE_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**MOE, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 64}),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "num_experts": 4, "head_dim": 16}),
    "olmoe": ("OlmoeConfig", {**MOE, "num_experts": 4}),
    "deepseek-v3": ("DeepseekV3Config", {**MOE, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
                    "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}),
    "gpt-oss": ("GptOssConfig", {**MOE, "num_local_experts": 4, "head_dim": 16, "sliding_window": SLIDING_WINDOW,
                                 "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
                                     "rope_type": "default", "rope_theta": 10000.0}}),
    "granite-moe": ("GraniteMoeConfig", {**MOE, "num_local_experts": 4, "attention_multiplier": 0.25}),
    "llama4": ("Llama4TextConfig", {**MOE, "num_experts_per_tok": 1, "num_local_experts": 4, "head_dim": 16,
                                    "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1,
                                    "attention_chunk_size": 64}),
    "nemotron-h": ("NemotronHConfig", {**MOE, "layers_block_type": ["full_attention", "moe"], "n_routed_experts": 4,
                                       "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 64,
                                       "head_dim": 16}),
    "phimoe": ("PhimoeConfig", {**MOE, "num_local_experts": 4}),
    "glm4-moe": ("Glm4MoeConfig", {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
                                   "head_dim": 16, "n_group": 1, "topk_group": 1}),
    "ernie4.5-moe": ("Ernie4_5_MoeConfig", {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
                                            "moe_layer_start_index": 0}),
    "aria": ("AriaTextConfig", {**MOE, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "jetmoe": ("JetMoeConfig", {**LLAMA, "num_local_experts": 4, "kv_channels": 16}),
}  # fmt: skip
MORE_MOE_FAMILIES = ["aria", "ernie4.5-moe", "glm4-moe", "phimoe"]
# all but those that are only looked at, and one whose experts are of a kind we do not know
MOE_FAMILIES = sorted(MOE_CONFIGS.keys() - {*MORE_MOE_FAMILIES, "jetmoe"})


def make(
    family: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Save a random model of a family (with `changes` to its configuration) in `folder`, which is returned.

    Matrices are drawn with a spread of 1.5 / sqrt(inputs), vectors are moved by a tenth, so that every tensor matters.
    """
    import transformers

    name, arguments = {**CONFIGS, **MOE_CONFIGS}[family]
    config = getattr(transformers, name)(**{**arguments, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def token_ids(sequences: int, tokens: int, vocabulary: int = 128, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64, sequences x tokens; neither padding nor beginning nor end."""
    return torch.randint(3, vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


CHARACTERS = ("<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127)))


def add_tokenizer(folder: Path, bos: bool = False) -> Path:
    """Save a tokenizer of one token a character beside a tiny checkpoint (its folder is returned); `bos` puts <s> in
    front of text by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {character: index for index, character in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def write_text(path: Path, words: int = 600, seed: int = 0) -> Path:
    """A text file of random words, about five characters each."""
    draw = random.Random(seed)
    path.write_text(" ".join("".join(draw.choices("etaoinshrdlu.,", k=draw.randint(1, 8))) for _ in range(words)))
    return path
