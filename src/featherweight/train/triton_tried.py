"""Whether Triton works here: it is tried until it fails once, and no kernel of this room is tried again."""

from __future__ import annotations

from collections.abc import Callable

from featherweight.core import triton_tried

failed: list[str] = []  # why, once it has


def tried(launch: Callable[[], None]) -> bool:
    """Whether a launch worked; where it did not, one FallbackWarning."""
    return triton_tried.tried(launch, failed, "training is done by torch alone, slower and in more memory")
