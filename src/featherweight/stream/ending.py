"""The end of a block's forward pass, kept until its last matrix is solved.

Where the last matrix adds its outputs to the residual stream and nothing follows, a pass without it leaves two things:
what it is given, and the stream without its part. Both do not depend on it, so once it is solved and stored, its
product with the one, added to the other, is the block's output: the block need not be run once more.

Shapes: S sequences, T tokens, D width, C inputs of the last matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from featherweight.stream.hidden import HiddenStates, room


class Ending:
    """What is kept of one block after the other; `states` are the hidden states in front of it, and hold the stream
    without the last matrix once a pass has been kept."""

    def __init__(self, states: HiddenStates) -> None:
        self.states = states
        self.inputs: HiddenStates | None = None
        self.path: str | None = None  # of the last matrix, once a pass is kept

    def takes(self, columns: int) -> bool:
        """Whether the inputs of a matrix with so many columns can be kept near."""
        if self.inputs is not None and self.inputs.states_STD.shape[-1] == columns:
            return True
        self.close()
        sequences, tokens, _ = self.states.states_STD.shape
        size_bytes = sequences * tokens * columns * self.states.states_STD.dtype.itemsize
        near = "device" if self.states.device.type == "cuda" else "memory"
        if room(size_bytes, self.states.device, self.states.sharers, self.states.low) != near:
            return False
        self.inputs = self.states.another("ending", columns, self.states.states_STD.shape[1])
        return True

    def keep(self, path: str, at: slice, inputs_STC: Tensor, stream_STD: Tensor) -> None:
        """One batch: what the matrix at `path` is given, and what the block returns without its outputs."""
        assert self.inputs is not None
        self.path = path
        self.inputs.states_STD[at] = inputs_STC.reshape(*stream_STD.shape[:-1], -1)
        self.states.states_STD[at] = stream_STD

    def finish(self, module: nn.Module, batch: int) -> bool:
        """Makes the block's outputs of what is kept, with the last matrix as it is now; False if nothing is kept."""
        if self.path is None:
            return False
        assert self.inputs is not None
        last, self.path = module.get_submodule(self.path), None
        for at, inputs_STC in self.inputs.batches(batch):
            stream_STD = self.states.states_STD[at].to(self.states.device, non_blocking=True)
            self.states.states_STD[at] = stream_STD + last(inputs_STC)
        return True

    def close(self) -> None:
        """Lets go of the memory."""
        if self.inputs is not None:
            self.inputs.close()
        self.inputs = self.path = None


@contextmanager
def without_outputs(module: nn.Module) -> Iterator[None]:
    """A Linear or Conv1D answers with zeros meanwhile, which cost nothing."""
    weight = module.get_parameter("weight")
    rows = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
    module.__dict__["forward"] = lambda inputs: inputs.new_zeros((*inputs.shape[:-1], rows))
    try:
        yield
    finally:
        del module.__dict__["forward"]
