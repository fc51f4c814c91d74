"""Whether Triton works here: it is tried until it fails once, and that is told once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from featherweight.errors import FallbackWarning

failed: list[str] = []  # why, once it has


def tried(launch: Callable[[], None]) -> bool:
    """Whether a launch worked; where it did not, one FallbackWarning, and no kernel of this room is tried again."""
    try:
        launch()
    except Exception as error:  # a missing compiler, an old GPU, a driver: Triton raises a kind of its own for each
        failed.append(f"{type(error).__name__}: {error}")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        warnings.warn(
            f"Triton cannot run here ({reason}): training is done by torch alone, slower and in more memory.",
            FallbackWarning,
            stacklevel=2,
        )
        return False
    return True
