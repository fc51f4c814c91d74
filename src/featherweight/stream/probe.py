"""How far a model moves when some of its matrices change: KL to the original, from the first changed block on.

Shapes: S sequences, T tokens, N positions, V vocabulary, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.load import load_apart
from featherweight.models.tree import Block, Matrix, build

SLICE_LOGITS = 1 << 24  # compared at once
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}  # in one forward pass


class Probe:
    """A dense model on the device with the outputs of its blocks and its predictions on a few windows.

    Everything is computed in float32 unless told otherwise: in bfloat16 the KL of a good option drowns in rounding.
    Blocks before the first change are not run again: they answer with what they answered then.

    Args:
        windows_ST: int64 ids; S x T x V predictions and all blocks' outputs are kept, so take a handful.
    """

    def __init__(
        self, model: str | Path, windows_ST: Tensor, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        tree = build(Checkpoint.open(resolve(model)))
        self.model: Any = load_apart(tree.checkpoint.path, device, dtype)
        blocks = self.model.get_submodule(tree.lists[-1])
        self.blocks: list[nn.Module] = list(blocks)
        self.homes: dict[str, tuple[Block, Matrix]] = {m.name: (b, m) for b in tree.blocks for m in b.matrices}
        self.windows_ST = windows_ST.to(device)
        self.batch = max(1, BATCH_TOKENS[device.type] // windows_ST.shape[1])
        self.outputs: list[list[Any]] = []  # by batch, by block
        self.logp: list[Tensor] = []
        with torch.no_grad():
            for ids_ST in self.windows_ST.split(self.batch):
                kept: list[Any] = []
                handles = [
                    block.register_forward_hook(lambda _, __, output, kept=kept: kept.append(_detached(output)))
                    for block in self.blocks
                ]
                try:
                    self.logp.append(self._logits(ids_ST).float().log_softmax(-1))
                finally:
                    for handle in handles:
                        handle.remove()
                self.outputs.append(kept)

    def kl(self, values: Mapping[str, Tensor]) -> float:
        """Mean nats a position of KL(original || with these matrices), R x C values by matrix name."""
        first = min((self.homes[name][0].index for name in values), default=0)
        total, positions = 0.0, 0
        with torch.no_grad(), self._changed(values):
            for number, ids_ST in enumerate(self.windows_ST.split(self.batch)):
                with self._answering(first, self.outputs[number]):
                    logits_NV = self._logits(ids_ST)
                total += _kl_sum(self.logp[number], logits_NV)
                positions += len(logits_NV)
        return max(total / positions, 0.0)

    def _logits(self, ids_ST: Tensor) -> Tensor:
        """N x V: the last position of a window predicts nothing that is in it."""
        logits_NV: Tensor = self.model(input_ids=ids_ST, use_cache=False).logits[:, :-1].flatten(0, 1)
        return logits_NV

    @contextmanager
    def _changed(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with these matrices."""
        before: dict[str, Tensor] = {}
        try:
            for name, values_RC in values.items():
                block, matrix = self.homes[name]
                parameter = self.model.get_parameter(f"{block.module}.{matrix.path}.weight")
                before[name] = parameter.data
                parameter.data = (values_RC.T if matrix.transposed else values_RC).to(parameter).contiguous()
            yield
        finally:
            for name, weight in before.items():
                block, matrix = self.homes[name]
                self.model.get_parameter(f"{block.module}.{matrix.path}.weight").data = weight

    @contextmanager
    def _answering(self, first: int, outputs: list[Any]) -> Iterator[None]:
        """The blocks before `first` answer with what they answered in the original model."""
        for block, output in zip(self.blocks[:first], outputs, strict=False):
            block.__dict__["forward"] = lambda *_, output=output, **__: output
        try:
            yield
        finally:
            for block in self.blocks[:first]:
                del block.__dict__["forward"]


def _detached(output: Any) -> Any:
    """A copy: some families add to it in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(item.clone() if isinstance(item, Tensor) else item for item in output)


def _kl_sum(logp_NV: Tensor, logits_NV: Tensor) -> float:
    """Sum of KL(original || changed) over positions, a slice at a time."""
    rows = max(1, SLICE_LOGITS // logits_NV.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits_NV.device)
    for logp, logits in zip(logp_NV.split(rows), logits_NV.split(rows), strict=True):
        terms = logp.exp() * (logp - logits.float().log_softmax(-1))
        total += terms.masked_fill_(logp == -torch.inf, 0.0).sum(-1).double().sum()
    return float(total)
