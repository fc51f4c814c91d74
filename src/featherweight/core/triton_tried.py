"""Trying a kernel of a GPU: where one fails, something slower goes on, and that is told once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from featherweight.errors import FallbackWarning


def tried(launch: Callable[[], None], failed: list[str], instead: str, what: str = "Triton") -> bool:
    """Whether a launch worked; where it did not, why goes into `failed`, for its owner to try no other, and one
    FallbackWarning says what cannot run and what happens `instead`.
    """
    try:
        launch()
    except Exception as error:  # a missing compiler, an old GPU, a driver: each raises a kind of its own
        failed.append(f"{type(error).__name__}: {error}")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        warnings.warn(f"{what} cannot run here ({reason}): {instead}.", FallbackWarning, stacklevel=3)
        return False
    return True
