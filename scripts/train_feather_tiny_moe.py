"""Train feather-tiny-moe, the mixture of experts inside the package, from feather-tiny, by upcycling.

    python3 scripts/train_feather_tiny_moe.py --dense DIR --text wiki.txt web.txt --held-out wiki.test.raw --out DIR

Minutes on a CPU do not suffice to train a language model from nothing, so this one starts from a dense one: embedding,
attention and norms are copied; each MLP's inputs are put into as many clusters as there are experts, the router starts
as the clusters' centres, and each expert gets the neurons of the dense MLP that add most for the tokens of its cluster.
Then everything is trained as feather-tiny was (its script's loop), with a loss that keeps all experts of every layer
in use. The last line on stdout is one JSON object.

Shapes: S sequences, T tokens, D width, N neurons of the dense MLP, E experts, I neurons of an expert.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import train_feather_tiny as dense_script
from torch import Tensor, nn
from train_feather_tiny import CONTEXT, KNOWN_TEXTS, add_dropout, log
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

BALANCE = 0.02  # weight of the load-balancing loss of each layer (1 when all experts are used alike)
SAMPLE = 16  # windows that decide the clusters


def build_model(dense: LlamaForCausalLM, experts: int, inner: int) -> Qwen3MoeForCausalLM:
    """The dense model's shape with Qwen3-MoE's blocks, two experts a token; all but experts and routers copied."""
    config = dense.config
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    same += ("max_position_embeddings", "tie_word_embeddings", "rope_parameters", "rms_norm_eps")
    same += ("bos_token_id", "eos_token_id", "pad_token_id")
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{name: getattr(config, name) for name in same},
            moe_intermediate_size=inner,
            num_experts=experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            attn_implementation="sdpa",
            experts_implementation="eager",  # one matmul an expert: the quickest on a CPU at some hundred tokens each
        )
    )
    extra = model.load_state_dict(dense.state_dict(), strict=False).unexpected_keys
    assert all(".mlp." in name for name in extra), extra
    return model


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What comes out of each module in one forward pass, tokens flattened."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _m, _a, out: seen.append(out.flatten(0, -2))) for m in modules]
    yield seen
    for hook in hooks:
        hook.remove()


def cluster(x_TD: Tensor, count: int) -> Tensor:
    """Centres of spherical k-means over unit-length tokens, count x D."""
    x_TD = nn.functional.normalize(x_TD - x_TD.mean(0), dim=-1)
    centres_ED = x_TD[torch.randperm(len(x_TD))[:count]]
    for _ in range(20):
        nearest_T = (x_TD @ centres_ED.T).argmax(-1)
        sums_ED = torch.zeros_like(centres_ED).index_add_(0, nearest_T, x_TD)
        centres_ED = nn.functional.normalize(sums_ED, dim=-1)
    return centres_ED


@torch.no_grad()
def upcycle(model: Qwen3MoeForCausalLM, dense: LlamaForCausalLM, sample_ST: Tensor) -> None:
    """Routers from clusters of what the MLPs read, experts from the neurons that add most for each cluster.

    Qwen3 norms each head's queries and keys, Llama does not: the norms' weights start at the dense model's usual size.
    """
    for norm, linear in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
        attentions = [layer.self_attn for layer in dense.model.layers]
        with recorded([getattr(a, linear) for a in attentions]) as seen:
            dense(input_ids=sample_ST, use_cache=False)
        for layer, out_TD in zip(model.model.layers, seen, strict=True):
            getattr(layer.self_attn, norm).weight.fill_(float(out_TD.square().mean().sqrt()))
    with recorded([layer.post_attention_layernorm for layer in dense.model.layers]) as seen:
        dense(input_ids=sample_ST, use_cache=False)
    for x_TD, old, new in zip(seen, dense.model.layers, model.model.layers, strict=True):
        mlp, moe, mean_D = old.mlp, new.mlp, x_TD.mean(0)
        centres_ED = cluster(x_TD, moe.experts.num_experts)
        # Twice the cosine's spread: the first choice weighs more than the second, and neither is alone.
        scores_TE = (x_TD - mean_D) @ centres_ED.T
        moe.gate.weight.copy_(centres_ED * (1.0 / scores_TE.std()))
        act_TN = nn.functional.silu(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)
        adds_TN = act_TN.square() * mlp.down_proj.weight.square().sum(0)
        chosen_TE = nn.functional.one_hot(scores_TE.topk(2).indices, scores_TE.shape[1]).sum(1)
        picks_EI = (chosen_TE.T.to(adds_TN.dtype) @ adds_TN).topk(moe.experts.intermediate_dim).indices
        for expert, pick_I in enumerate(picks_EI):
            moe.experts.gate_up_proj[expert] = torch.cat([mlp.gate_proj.weight[pick_I], mlp.up_proj.weight[pick_I]])
            # Neurons that one of the two experts has count half, those of both count whole: 1.5 is between.
            moe.experts.down_proj[expert] = 1.5 * mlp.down_proj.weight[:, pick_I]


def balanced_loss(model: PreTrainedModel, tokens_ST: Tensor) -> Tensor:
    """Next-token loss plus the balance of each layer by itself (transformers' own pools the layers)."""
    with torch.autocast(tokens_ST.device.type, torch.bfloat16):
        out = model(input_ids=tokens_ST, use_cache=False, output_router_logits=True)
    loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), tokens_ST[:, 1:].flatten())
    config = model.config
    shares = [
        load_balancing_loss_func((logits_TE.float(),), config.num_experts, config.num_experts_per_tok)
        for logits_TE in out.router_logits
    ]
    return loss + BALANCE * torch.stack(shares).sum()


@torch.inference_mode()
def tokens_per_expert(model: PreTrainedModel, windows_ST: Tensor) -> list[list[float]]:
    """For each layer the share of all choices that went to each expert."""
    model.eval()
    logits = model(input_ids=windows_ST, use_cache=False, output_router_logits=True).router_logits
    count = model.config.num_experts
    picked = [logits_TE.topk(model.config.num_experts_per_tok).indices.flatten() for logits_TE in logits]
    return [(torch.bincount(picked_T, minlength=count) / len(picked_T)).tolist() for picked_T in picked]


def card(args: argparse.Namespace, figures: dict[str, float], shares: list[list[float]]) -> str:
    rows = [f"| {p.name} | {' | '.join(KNOWN_TEXTS.get(p.name, ('?', '?', 'unknown')))} |" for p in args.text]
    what, source, licence = KNOWN_TEXTS.get(args.held_out.name, (args.held_out.name, "?", "unknown"))
    least, most, minutes = min(map(min, shares)), max(map(max, shares)), figures["seconds"] / 60
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# feather-tiny-moe

A Qwen3-MoE of {figures["params"] / 1e6:.1f} M parameters (bf16, tied embeddings, feather-tiny's tokenizer, context
{CONTEXT}): {args.experts} experts of {args.inner} neurons in each block, two for each token. Made from feather-tiny by
`scripts/train_feather_tiny_moe.py` of featherweight: embedding and attention copied, experts begun as those neurons of
its MLPs that matter most to a cluster of tokens, then all weights trained on. It is there so that what compression does
to experts can be seen without a download; it knows nothing, and is worse than the dense model it came from.

Perplexity on {args.held_out.name} ({what}; {source}; {licence}), read as it is,
tokenised once, whole windows of {CONTEXT}: **{figures["perplexity"]:.2f}** ({figures["nats_per_byte"]:.4f} nats a
byte); feather-tiny: {figures["dense_perplexity"]:.2f}. That text was used neither to
train nor to choose. There each expert gets between {least:.1%} and {most:.1%} of its layer's choices
(alike would be {1 / args.experts:.1%}).

Trained for {figures["steps"]:.0f} steps of {args.batch} x {CONTEXT} tokens ({figures["epochs"]:.2f} epochs,
{minutes:.0f} minutes): learning rate {args.lr:g}, weight decay {args.weight_decay:g}, dropout {args.dropout:g}, balance
{BALANCE:g}, seed {args.seed};
weights averaged over steps, chosen by the loss on an eighth of the last 3 % of each text.

| trained on | what | from | licence of the text |
| --- | --- | --- | --- |
{chr(10).join(rows)}

The weights are under Apache-2.0 like the rest of the package; the texts are not part of it and keep their own licences.
"""


def main() -> None:
    parser = dense_script.arguments(__doc__)
    parser.set_defaults(lr=1e-3, weight_decay=0.1, dropout=0.05, minutes=15, epochs=4)
    parser.add_argument("--dense", type=Path, required=True, help="feather-tiny's folder")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--inner", type=int, default=128, help="neurons of an expert")
    args = parser.parse_args()
    device = dense_script.start(args)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    train_T, choose_ST = dense_script.split(tokenizer, [path.read_text(encoding="utf-8") for path in args.text])
    dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.float32)
    model = build_model(dense, args.experts, args.inner)
    upcycle(model, dense, next(dense_script.batches(train_T, SAMPLE, torch.Generator().manual_seed(args.seed))))
    params, choose_ST = sum(p.numel() for p in model.parameters()), choose_ST[::8]
    began = dense_script.mean_loss(model.to(device), choose_ST, device)
    log(f"{params:,} parameters, {len(train_T):,} training tokens, loss at the start {began:.3f}, on {device}")
    add_dropout(model, args.dropout)
    figures = dense_script.train(model, train_T, choose_ST, args, device, balanced_loss)
    dense_script.save(model, tokenizer, args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as they are: a loaded tokenizer writes where it was from
        (args.out / name).write_bytes((args.dense / name).read_bytes())
    figures |= {"params": params, "train_tokens": len(train_T), "first_loss": began}
    figures["epochs"] = figures["steps"] * args.batch * CONTEXT / len(train_T)
    held_out = args.held_out.read_text(encoding="utf-8")
    figures["dense_perplexity"] = dense_script.evaluate(args.dense, held_out, device)["perplexity"]
    figures |= dense_script.evaluate(args.out, held_out, device)
    sample_ST = dense_script.windows(dense_script.encode(tokenizer, held_out))[:64]
    shares = tokens_per_expert(AutoModelForCausalLM.from_pretrained(args.out), sample_ST)
    (args.out / "README.md").write_text(card(args, figures, shares), encoding="utf-8")
    figures["bytes"] = sum(path.stat().st_size for path in args.out.iterdir())
    print(json.dumps({key: round(value, 4) for key, value in figures.items()} | {"device": device, "shares": shares}))


if __name__ == "__main__":
    main()
