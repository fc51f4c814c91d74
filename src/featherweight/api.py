"""The Python surface: what the command line does, as functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight import data, formats
from featherweight.errors import RequestError
from featherweight.evaluate import bits_per_weight, zero_shot
from featherweight.evaluate import evaluate as evaluate_model
from featherweight.linear import CompressedEmbedding, CompressedLinear
from featherweight.merged import merge, prepare
from featherweight.mixture import join_experts
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.load import load_dense, load_tokenizer, load_with
from featherweight.models.tree import build, checkpoint_dtype
from featherweight.recipe import Recipe
from featherweight.stream.calibration import Tell
from featherweight.stream.compress import Memory, Result
from featherweight.stream.compress import compress as stream_compress
from featherweight.stream.device import compute_dtype, pick_device
from featherweight.stream.folder import journal_losses
from featherweight.stream.module import compress_module as compress_module
from featherweight.stream.tune import tune as tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    device: str = "auto",
    tell: Tell | None = None,
    memory: Memory = "auto",
) -> Result:
    """Compresses a checkpoint folder, hub name or embedded model ("feather-tiny") into `out`; see `stream.compress`.

    `tell(done, total, what)` hears of the progress in blocks. Repeated on a half-done folder, it goes on there.
    """
    return stream_compress(model, out, recipe or Recipe(), device, tell, memory=memory)


def load(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    expert_bytes: int | None = None,
) -> PreTrainedModel:
    """A transformers model of a compressed (or dense) checkpoint folder, ready to run.

    Args:
        path: a folder that `compress` wrote, any folder in a format we read, or a dense checkpoint.
        dtype: to compute in; None takes the checkpoint's, or float32 on CPUs that are slow in it.
        kernel: how compressed matrices are multiplied: "auto", "dense" (unpacked once), or another name in
            `featherweight.kernels.KERNELS`. Layers that share an input (q, k and v; gate and up) multiply as one.
        expert_bytes: leave the experts of a compressed mixture in its files, fetch each when tokens are sent to it, and
            hold so many bytes of them at most: for mixtures larger than the device, or than memory. None holds all.
    """
    folder, torch_device = resolve(path), pick_device(device)
    checkpoint = Checkpoint.open(folder)
    dtype = dtype or compute_dtype(checkpoint_dtype(checkpoint), torch_device)
    quantization = formats.config_of(checkpoint.config, checkpoint.names)
    if quantization is None:
        if expert_bytes is not None:
            raise RequestError(f"{folder} is not compressed, and only compressed experts stay in files: compress it.")
        return load_dense(folder, torch_device, dtype)
    format, rules = formats.from_config(quantization)

    def replace(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        format.verify(tensors, name)
        if isinstance(module, nn.Embedding):
            unpacked = kernel == "dense"
            return CompressedEmbedding(format, rules.of(name), tensors, module, dtype, unpacked)
        bias = tensors.pop("bias", None)
        return CompressedLinear.from_tensors(format, rules.of(name), tensors, bias, dtype, kernel)

    model = load_with(folder, replace, torch_device, dtype, expert_bytes)
    join_experts(model)
    merge(model)
    prepare(model)
    return model


def evaluate(
    model: str | Path,
    text: Sequence[str] = ("builtin:evaluation",),
    context: int | None = None,
    against: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    tell: Tell | None = None,
    tasks: Sequence[str | Path] = (),
    items: int | None = None,
) -> dict[str, Any]:
    """Perplexity of a checkpoint folder over whole windows of text, bits per weight, and distance from `against`.

    A BOS goes in front of every window exactly where the tokenizer adds one by default. `context` None is 2048, or the
    model's positions if those are fewer; `limit` takes only the first so many windows. Returns the fields of `eval`'s
    JSON line: model, perplexity, tokens, context, bits_per_weight, kl_nats (mean KL(dense || model) a prediction),
    top1_agreement, bos (the id in front of windows, or None), and tasks: for each file of zero-shot questions
    (the first `items` of each), by its name without suffix, the fields of `evaluate.ZeroShot`.
    """
    questions = {Path(task).stem: data.read_task(task)[:items] for task in tasks}
    if limit is not None and limit < 1:
        raise RequestError(f"{limit} windows were asked for and at least 1 is needed: raise --windows.")
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    bos = data.bos_of(tokenizer)
    model_config = Checkpoint.open(folder).config
    context = context or min(2048, model_config.get("max_position_embeddings") or 2048)
    ids_ST = data.evaluation_windows(data.tokens(tokenizer, text), context, bos)[:limit]
    reference = None if against is None else load(against, device, kernel="dense")

    def progress(done: int, total: int) -> None:
        if tell is not None:
            tell(done, total, f"{done} of {total} windows")

    loaded = load(folder, device, kernel="dense")
    found = evaluate_model(loaded, ids_ST, reference, 1, progress)
    return {
        "model": str(model),
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "context": context,
        "bits_per_weight": stored_bits_per_weight(folder),
        "kl_nats": found.kl_nats,
        "top1_agreement": found.top1_agreement,
        "bos": bos,
        "tasks": {
            name: asdict(zero_shot(loaded, data.encoder(tokenizer), asked, bos, _told(tell, name)))
            for name, asked in questions.items()
        },
    }


def _told(tell: Tell | None, name: str) -> Callable[[int, int], None] | None:
    return None if tell is None else lambda done, total: tell(done, total, f"{name}: {done} of {total} sequences")


def stored_bits_per_weight(folder: Path) -> float:
    """8 x bytes / weights over the matrices of the blocks, scales and zeros included."""
    return bits_per_weight(
        (matrix["bytes"], matrix["shape"][0] * matrix["shape"][1]) for matrix in inspect(folder)["matrices"]
    )


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint folder holds, from its files alone: {"format", "matrices": [name, shape, bits, ...]}.

    `sparsity` is the pattern a sparse file states ("2:4", or the share of zeros), None where it states none. `loss`
    comes from the journal `compress` left there, None without one. A dense checkpoint has the format "dense".
    """
    checkpoint = Checkpoint.open(resolve(path))
    quantization = formats.config_of(checkpoint.config, checkpoint.names)
    losses = journal_losses(checkpoint.path)
    if quantization is None:
        return {"format": "dense", "matrices": _dense_rows(checkpoint)}
    format, rules = formats.from_config(quantization)
    mark = format.suffixes(rules.distinct[0])[0]
    names = [name.removesuffix(f".{mark}") for name in checkpoint.names if name.endswith(f".{mark}")]
    rows = (_row(checkpoint, format, rules.of(name), name) for name in names)
    return {"format": format.name, "matrices": [{**row, "loss": losses.get(row["name"])} for row in rows]}


def _row(checkpoint: Checkpoint, format: formats.Format, rule: formats.Rule, name: str) -> dict[str, Any]:
    """What the files say of one compressed matrix."""
    grid, pattern = formats.parts(rule)
    suffixes = format.suffixes(rule)
    tensors = checkpoint.read([f"{name}.{suffix}" for suffix in suffixes])
    by_suffix = {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes}
    floats = [8 * tensor.itemsize for tensor in by_suffix.values() if tensor.is_floating_point()]
    sparsity = None if pattern is None else str(pattern) if pattern.of else pattern.sparsity
    return {
        "name": name,
        "shape": list(format.shape(by_suffix, rule, name)),
        "bits": floats[0] if grid is None else grid.bits,
        "group_size": None if grid is None else grid.group_size,
        "symmetric": None if grid is None else grid.symmetric,
        "sparsity": sparsity,
        "bytes": sum(checkpoint.nbytes(f"{name}.{suffix}") for suffix in suffixes),
    }


def _dense_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    matrices = build(checkpoint).matrices
    common = {"group_size": None, "symmetric": None, "sparsity": None, "loss": None}
    return [
        {
            "name": m.name,
            "shape": [m.rows, m.columns],
            "bits": 8 * checkpoint.dtype(m.weight).itemsize,
            **common,
            "bytes": m.rows * m.columns * checkpoint.dtype(m.weight).itemsize,
        }
        for m in matrices
    ]
