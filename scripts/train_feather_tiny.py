"""Train feather-tiny, the language model inside the package: a 4 M parameter Llama from a few megabytes of plain text.

    python3 scripts/train_feather_tiny.py --text wiki.txt web.txt input.txt --held-out wiki.test.raw --out DIR

With more parameters than training tokens the model would learn its text by heart, so everything here works against
that: dropout on what every block adds, strong weight decay, a running average of the weights, windows cut anew in each
epoch, and the kept weights are those with the lowest loss on the last few per cent of each training text. The held-out
file is read once, when everything is decided. The last line on stdout is one JSON object.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

END = "<|endoftext|>"
CONTEXT = 512
# What the usual training texts are, by file name: what, where from, under which licence the text is known to be.
KNOWN_TEXTS = {
    "wiki.txt": ("2,349 Wikipedia articles, plain prose", "turboderp-org/exllamav3@4f8ad012 wiki.utf8", "CC BY-SA"),
    "web.txt": ("467 web pages", "turboderp-org/exllamav3@4f8ad012 c4.utf8, first lines", "ODC-BY, Common Crawl terms"),
    "wiki.valid.raw": ("WikiText-2 raw, validation split", "Wikipedia", "CC BY-SA 3.0"),
    "wiki.test.raw": ("WikiText-2 raw, test split", "Wikipedia", "CC BY-SA 3.0"),
    "evaluation.txt": ("the first articles of WikiText-2 raw, test split", "Wikipedia", "CC BY-SA 3.0"),
    "input.txt": ("tiny Shakespeare", "karpathy/char-rnn@6f9487a6", "public domain"),
}


def arguments(what: str) -> argparse.ArgumentParser:
    """What this script and its sibling, train_feather_tiny_moe.py, both ask for."""
    parser = argparse.ArgumentParser(description=what.splitlines()[0])
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="training texts (UTF-8)")
    parser.add_argument("--held-out", type=Path, required=True, help="text for the figure that is reported")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=40, help="the schedule ends by then, or after --epochs")
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {CONTEXT} tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (every text can be written in it); adds no token of its own in front or behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """The whole text, tokenised once; int64, shape T."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def windows(tokens_T: Tensor, offset: int = 0) -> Tensor:
    """Windows of CONTEXT tokens without overlap, the incomplete last one dropped; shape S x CONTEXT."""
    tokens_T = tokens_T[offset:]
    return tokens_T[: len(tokens_T) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def batches(tokens_T: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches, size x CONTEXT; each epoch cuts its windows at another offset and shuffles them."""
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        windows_ST = windows(tokens_T, offset)
        order = torch.randperm(len(windows_ST), generator=generator)
        yield from windows_ST[order].split(size)


def build_model(vocab: int, end_id: int) -> LlamaForCausalLM:
    """Every width is a multiple of 64 and every input a multiple of 128, so that all usual group sizes divide them."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():  # as in GPT-2: what adds to the residual stream starts smaller
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout on the embedding and on what attention and MLP add: by hooks, since Llama has none there to switch on."""

    def drop(module: nn.Module, _: object, out: Tensor) -> Tensor:
        return nn.functional.dropout(out, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj", "experts")):
            module.register_forward_hook(drop)


def next_token_loss(model: PreTrainedModel, tokens_ST: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats over the CONTEXT - 1 predictions of each window; float32."""
    with torch.autocast(tokens_ST.device.type, torch.bfloat16):
        logits_STV = model(input_ids=tokens_ST, use_cache=False).logits
    return nn.functional.cross_entropy(logits_STV[:, :-1].flatten(0, 1).float(), tokens_ST[:, 1:].flatten())


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, windows_ST: Tensor, device: str) -> float:
    model.eval()
    losses = [next_token_loss(model, chunk.to(device)) * len(chunk) for chunk in windows_ST.split(16)]
    model.train()
    return float(torch.stack(losses).double().sum() / len(windows_ST))


def optimizer_for(model: PreTrainedModel, args: argparse.Namespace) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)


def rate_at(progress: float) -> float:
    """Share of the peak learning rate: 2 % warm-up, then a cosine down to 2 % of the peak."""
    if progress < 0.02:
        return max(progress, 1e-3) / 0.02
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98))


def train(
    model: PreTrainedModel,
    train_T: Tensor,
    choose_ST: Tensor,
    args: argparse.Namespace,
    device: str,
    objective: Callable[[PreTrainedModel, Tensor], Tensor] = next_token_loss,
) -> dict[str, float]:
    """Leaves the best averaged weights in `model`; progress runs by steps or by the clock, whichever is ahead."""
    started = time.monotonic()
    total_steps = max(1, int(args.epochs * len(train_T) / (args.batch * CONTEXT)))
    generator = torch.Generator().manual_seed(args.seed)
    optimizer, average = optimizer_for(model, args), copy.deepcopy(model)
    best, best_state, running, misses, next_look = math.inf, model.state_dict(), None, 0, 0.1
    for step, batch_ST in enumerate(batches(train_T, args.batch, generator), start=1):
        progress = min(1.0, max(step / total_steps, (time.monotonic() - started) / (60 * args.minutes)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate_at(progress)
        loss = objective(model, batch_ST.to(device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():  # a window of some hundred steps, shorter while there are fewer behind us
            keep = min(0.995, 1 - 10 / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
            running = loss.detach() if running is None else torch.lerp(running, loss.detach(), 0.02)
        if progress < next_look:
            continue
        next_look = min(progress + 0.05, 1.0)
        chosen = mean_loss(average, choose_ST, device)
        seconds = time.monotonic() - started
        log(f"{progress:4.0%}  step {step}  train {float(running):.3f}  slice {chosen:.3f}  {seconds:.0f} s")
        misses = 0 if chosen < best else misses + 1
        if chosen < best:
            best, best_state = chosen, copy.deepcopy(average.state_dict())
        if progress >= 1 or misses >= 8:
            break
    model.load_state_dict(best_state)
    return {"steps": step, "train_loss": float(running), "slice_loss": best, "seconds": time.monotonic() - started}


def card(args: argparse.Namespace, figures: dict[str, float]) -> str:
    rows = [f"| {p.name} | {' | '.join(KNOWN_TEXTS.get(p.name, ('?', '?', 'unknown')))} |" for p in args.text]
    what, source, licence = KNOWN_TEXTS.get(args.held_out.name, (args.held_out.name, "?", "unknown"))
    result = f"**{figures['perplexity']:.2f}** ({figures['nats_per_byte']:.4f} nats a byte)"
    length = f"{figures['steps']} steps of {args.batch} x {CONTEXT} tokens ({figures['epochs']:.1f} epochs)"
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# feather-tiny

A Llama of {figures["params"] / 1e6:.1f} M parameters (bf16, tied embeddings, byte-level BPE of {args.vocab} tokens,
context {CONTEXT}), trained from scratch by `scripts/train_feather_tiny.py` of featherweight. It is there to show what
compression does to a language model without a download; it writes English-looking text and knows nothing.

Perplexity on {args.held_out.name} ({what}; {source}; {licence}), read as it is, tokenised once, whole windows of
{CONTEXT}: {result}. That text was used neither to train nor to choose.

Trained for {length}: learning rate {args.lr:g}, weight decay {args.weight_decay:g},
dropout {args.dropout:g}, seed {args.seed}; weights averaged over steps, chosen by the loss on the last 3 % of each
text.

| trained on | what | from | licence of the text |
| --- | --- | --- | --- |
{chr(10).join(rows)}

The weights are under Apache-2.0 like the rest of the package; the texts are not part of it and keep their own licences.
"""


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors*"):  # a run before might have had more shards
        old.unlink()
    # Shards under 3.9 MB: small enough for any limit on a file's size, and the demo shows more than one being read.
    model.to("cpu", torch.bfloat16).save_pretrained(out, max_shard_size="3800KB")
    tokenizer.save_pretrained(out)
    config = out / "tokenizer_config.json"  # the class's old name, which transformers 4 knows too
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    for path in out.iterdir():  # shards come readable by their owner alone, and a wheel keeps that
        path.chmod(0o644)


def evaluate(out: Path, text: str, device: str) -> dict[str, float]:
    """Perplexity of the files just written, as anybody would load them."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device)
    tokens_T = encode(AutoTokenizer.from_pretrained(out), text)
    loss = mean_loss(model, windows(tokens_T), device)
    nats_per_byte = loss * len(tokens_T) / len(text.encode())
    return {"perplexity": math.exp(loss), "nats_per_byte": nats_per_byte, "held_out_tokens": len(tokens_T)}


def start(args: argparse.Namespace) -> str:
    """Seeds and threads; the device to train on."""
    torch.manual_seed(args.seed)
    disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def split(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """All training tokens in a row (T), and the windows to choose the weights by (S x CONTEXT)."""
    encoded = [encode(tokenizer, text) for text in texts]
    cuts = [int(len(tokens_T) * 0.97) for tokens_T in encoded]
    end_T = torch.tensor([tokenizer.convert_tokens_to_ids(END)])
    train_T = torch.cat([part for tokens_T, cut in zip(encoded, cuts, strict=True) for part in (tokens_T[:cut], end_T)])
    return train_T, torch.cat([windows(tokens_T[cut:]) for tokens_T, cut in zip(encoded, cuts, strict=True)])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--vocab", type=int, default=4096)
    args = parser.parse_args()
    device = start(args)
    texts = [path.read_text(encoding="utf-8") for path in args.text]
    tokenizer = train_tokenizer(texts, args.vocab)
    train_T, choose_ST = split(tokenizer, texts)
    model = build_model(args.vocab, tokenizer.convert_tokens_to_ids(END)).to(device)
    params = sum(p.numel() for p in model.parameters())
    log(f"{params:,} parameters, {len(train_T):,} training tokens, {choose_ST.numel():,} to choose by, on {device}")
    add_dropout(model, args.dropout)
    figures = train(model, train_T, choose_ST, args, device)
    save(model, tokenizer, args.out)
    figures |= {"params": params, "train_tokens": len(train_T)}
    figures["epochs"] = figures["steps"] * args.batch * CONTEXT / len(train_T)
    figures |= evaluate(args.out, args.held_out.read_text(encoding="utf-8"), device)
    (args.out / "README.md").write_text(card(args, figures), encoding="utf-8")
    figures["bytes"] = sum(path.stat().st_size for path in args.out.iterdir())
    print(json.dumps({key: round(value, 4) for key, value in figures.items()} | {"device": device}))


if __name__ == "__main__":
    main()
