"""Modules over the tensors of one format: a linear layer, multiplied by the kernel picked for them, and an embedding.

Shapes: R outputs, C inputs, T tokens (any leading axes), N tokens in a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import RequestError
from featherweight.formats import AnySolution, Format, Rule, parts
from featherweight.kernels import Kernel, Restorable, Run, dequantize, pick


class Stored(nn.Module):
    """A matrix held as the tensors of a format, in buffers that bear their names on disk. (Where processes share a
    model, `train.sharding`, these are parameters, and `words` says which hold integers as floats of the same bits.)

    Those buffers are bytes of a file: moving the module moves them, but casting it (`.half()`, `.to(torch.bfloat16)`)
    changes only the dtype it computes in, never a stored scale. What is made of them for speed is kept out of the state
    dict, and made again after a move, a cast or a load. Where that can be turned back into them, they are let go
    (`release`): their places are held by tensors on meta, and their bytes made when somebody asks.
    """

    def __init__(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = format.shape(tensors, rule)
        self.format, self.rule, self.dtype = format, rule, dtype
        for suffix in format.suffixes(rule):
            self.register_buffer(suffix, tensors[suffix])
        self.words: dict[str, torch.dtype] = {}
        self._run: Any = None
        self._lent: tuple[Callable[[], AnySolution], torch.device] | None = None

    @property
    def weight(self) -> Tensor:
        """The values that are stored, rounded to the module's dtype; R x C, made anew at each access."""
        return dequantize(self.solution(), self.dtype)

    def solution(self) -> AnySolution:
        """What is stored: codes, scales and zeros, or pruned floats."""
        return self.format.unpack(self._stored(), self.rule)

    def code_words(self) -> Tensor | None:
        """The codes as `Format.code_words` has them, where they are: R x W int32, or None."""
        return self.format.code_words(self._stored(), self.rule)

    def extra_repr(self) -> str:
        grid, pattern = parts(self.rule)
        what = [f"sparsity={pattern}"] if pattern is not None else []
        if grid is not None:
            zeros = "symmetric" if grid.symmetric else "asymmetric"
            what += [f"bits={grid.bits}", f"group_size={grid.group_size or 'row'}", zeros]
        return f"format={self.format.name}, {', '.join(what)}"

    def _stored(self) -> dict[str, Tensor]:
        if self._lent is not None:
            return self.format.pack(self._lent[0]())  # type: ignore[arg-type]
        found = {suffix: getattr(self, suffix) for suffix in self.format.suffixes(self.rule)}
        return found | {suffix: found[suffix].view(dtype) for suffix, dtype in self.words.items()}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        if self._lent is not None:
            return self._lent[1]
        device: torch.device = getattr(self, self.format.suffixes(self.rule)[0]).device
        return device

    def release(self, solution: Callable[[], AnySolution]) -> bool:
        """Let the stored tensors go, and make them of `solution()` from now on; False, and nothing is let go, where
        they would not come back byte for byte."""
        stored, device = self._stored(), self.device
        made = self.format.pack(solution())  # type: ignore[arg-type]
        if not all(suffix in made and _equal_bytes(made[suffix], each) for suffix, each in stored.items()):
            return False
        for suffix, each in stored.items():
            setattr(self, suffix, each.to("meta"))
        self._lent = solution, device
        return True

    def _restore(self) -> None:
        """Hold the stored tensors again."""
        if self._lent is not None:
            stored, self._lent = self._stored(), None
            for suffix, each in stored.items():
                setattr(self, suffix, each)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._lent is not None:
            saved = {suffix: each for suffix, each in self._stored().items() if prefix + suffix in destination}
            destination.update({prefix + suffix: each for suffix, each in saved.items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        self._restore()
        before = self._stored()
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for suffix, stored in before.items():
            moved = self.get_buffer(suffix)
            if moved.dtype != stored.dtype:
                setattr(self, suffix, stored.to(moved.device))
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        """Drop what was made of the stored tensors."""
        self._run = None

    def __getstate__(self) -> dict[str, Any]:
        # The run is a closure over tensors: made again where the copy is used.
        return {**self.__dict__, "_run": None, "_lent": None, "_buffers": {**self._buffers, **self._stored()}}


def _equal_bytes(made: Tensor, stored: Tensor) -> bool:
    return made.dtype == stored.dtype and torch.equal(made.to(stored.device), stored)


class CompressedLinear(Stored):
    """y = x V^T + bias, V held as the tensors of a format; what the kernel needs beside them is made at the first call
    (or by `prepare`). `merged.merge` may have it multiply together with its neighbours."""

    _run: Run | None
    _merged: Any = None  # the `merged.Merged` it belongs to

    def __init__(
        self,
        format: Format,
        rule: Rule,
        tensors: Mapping[str, Tensor],
        bias_R: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        kernel: str = "auto",
    ) -> None:
        """Args as `from_tensors`, which is the usual way in."""
        super().__init__(format, rule, tensors, dtype)
        self.out_features, self.in_features = self.shape
        self.wanted = kernel
        if bias_R is not None and tuple(bias_R.shape) != (self.out_features,):
            raise RequestError(f"the bias has shape {tuple(bias_R.shape)}, and the matrix {self.out_features} outputs.")
        self.bias = None if bias_R is None else nn.Parameter(bias_R.detach().to(dtype), requires_grad=False)
        _ = self.kernel  # a kernel that cannot serve this layer is an error here, not in the first call

    @classmethod
    def from_tensors(
        cls,
        format: Format,
        rule: Rule,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        kernel: str = "auto",
    ) -> CompressedLinear:
        """A layer over the tensors of one matrix.

        Args:
            format: the layout of `tensors`.
            rule: the matrix's own, as `format.read` or the recipe says.
            tensors: by suffix, as `format.pack` returns them; kept, not copied.
            bias: R values, or None.
            dtype: of the activations; weights are rounded to it.
            kernel: "auto" or a name in `kernels.KERNELS`.

        Raises RequestError for tensors that contradict each other or a kernel that does not take them.
        """
        return cls(format, rule, tensors, bias, dtype, kernel)

    @property
    def kernel(self) -> Kernel:
        """The kernel that serves this layer where it now is."""
        return pick(
            self.format, self.rule, self.out_features, self.in_features, self.dtype, self.device, wanted=self.wanted
        )

    def prepare(self) -> CompressedLinear:
        """Let the kernel rearrange the weights now rather than in the first call; returns the layer."""
        if self._merged is not None and self._merged.prepare():
            return self
        # Tensors made in inference mode could not be trained through later.
        with torch.inference_mode(False), torch.no_grad():
            self._run = self.kernel.prepare(self.format, self.rule, self._stored(), self.dtype)
            if isinstance(self._run, Restorable):
                self.release(self._run.solution)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """y_TR for x_TC of the layer's dtype."""
        if self._merged is not None and self._merged.prepare():
            part: Tensor = self._merged.part(self, x)
            return part
        run = self._run or self.prepare()._run
        assert run is not None
        return run(x, self.bias)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, {super().extra_repr()}, kernel={self.wanted}"

    def _forget(self) -> None:
        super()._forget()
        if self._merged is not None:
            self._merged.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_merged": None}  # a copy multiplies alone


class CompressedEmbedding(Stored):
    """An embedding whose rows are unpacked where they are looked up; only those rows are ever floats.

    What a family does to a row (Gemma scales it) is done by its own module, which is called with the rows found as its
    whole table.
    """

    _run: Callable[[Tensor], Tensor] | None

    def __init__(
        self,
        format: Format,
        rule: Rule,
        tensors: Mapping[str, Tensor],
        family: nn.Embedding,
        dtype: torch.dtype = torch.bfloat16,
        unpacked: bool = False,
    ) -> None:
        """`family` is the module this one replaces; with `unpacked` all rows are floats, once and for all."""
        super().__init__(format, rule, tensors, dtype)
        self.num_embeddings, self.embedding_dim = self.shape
        self.unpacked = unpacked
        family = copy.deepcopy(family)
        family.padding_idx = None  # matters for gradients alone, and must lie within the table
        family.weight = nn.Parameter(torch.empty(0, self.embedding_dim, dtype=dtype), requires_grad=False)
        self._family = (family,)  # in a tuple, so that its table of no rows is nobody's parameter

    @property
    def family(self) -> nn.Embedding:
        """The family's own module, with a table of no rows."""
        return self._family[0]

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of `ids` (int64, any shape), as the family's own module gives them."""
        index_N = ids.reshape(-1)
        if self.unpacked:
            self._run = self._run or self._table()
            rows_NC = self._run(index_N)
        else:
            found = self.format.unpack_rows(self._stored(), self.rule, index_N, self.embedding_dim)
            rows_NC = dequantize(found, self.dtype)
        places = torch.arange(len(index_N), device=ids.device).view(ids.shape)
        found_TC: Tensor = torch.func.functional_call(self.family, {"weight": rows_NC}, (places,))
        return found_TC

    def _table(self) -> Callable[[Tensor], Tensor]:
        weight_RC = self.weight
        return lambda index_N: weight_RC[index_N]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        self.family._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)
