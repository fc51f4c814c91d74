"""Bits per weight, always from bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from featherweight.errors import RequestError


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
