"""Bits per weight, and what a token reads: always from bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from featherweight.errors import RequestError
from featherweight.linear import CompressedEmbedding
from featherweight.models.experts import Experts


def bits_per_weight(matrices: Mapping[str, tuple[int, int]] | Iterable[tuple[int, int]]) -> float:
    """8 x stored bytes / weights over all matrices together.

    Args:
        matrices: (stored bytes with scales, zeros and masks, weights of the dense matrix), by name or in a row.

    Raises:
        RequestError: no matrix, or none with a weight.
    """
    pairs = list(matrices.values() if isinstance(matrices, Mapping) else matrices)
    stored_bytes: int = sum(stored for stored, _ in pairs)
    weights: int = sum(count for _, count in pairs)
    if weights <= 0:
        raise RequestError(
            f"bits per weight of {len(pairs)} matrices with {weights} weights is not a number: give at least one"
        )
    return 8 * stored_bytes / weights


def read_bytes(model: nn.Module) -> int:
    """Bytes of the weights that one token needs, as they are stored: all but embeddings, of which it takes a row.

    Of experts the share counts that a token is sent to (config.num_experts_per_tok; all where the model does not say).
    """
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    shares: dict[str, float] = {}
    total = 0.0
    for path, module in model.named_modules():
        stored = {
            name: each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        own = [*module._parameters.values(), *stored.values()]
        experts = len(module) if isinstance(module, Experts) else _fused_experts(module)
        if experts and chosen:
            shares[path] = min(1.0, chosen / experts)
        share = next((each for above, each in shares.items() if path == above or path.startswith(f"{above}.")), 1.0)
        if not isinstance(module, (nn.Embedding, CompressedEmbedding)):
            total += share * sum(tensor.nbytes for tensor in own if tensor is not None)
    return round(total)


def _fused_experts(module: nn.Module) -> int:
    """How many experts lie in a module's three-dimensional parameters; 0 where it has none."""
    return next((len(each) for each in module._parameters.values() if each is not None and each.dim() == 3), 0)
