"""Checkpoints as Hugging Face writes them: opened lazily, seen as a tree of blocks and matrices, run block by block."""

from featherweight.models.checkpoint import Checkpoint, resolve

__all__ = ["Checkpoint", "resolve"]
