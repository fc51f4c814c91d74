"""GPTQ checkpoints, as AutoGPTQ began them and GPTQModel writes them today.

    qweight  int32   [C*bits/32, R]   codes, packed along the inputs
    qzeros   int32   [G, R*bits/32]   zeros, packed along the outputs
    scales   float16 [G, R]
    g_idx    int32   [C]              the group of each input

It is the bit stream of `codec.bits`, transposed. Version 1 ("gptq") stores zero - 1, and every loader adds the 1 back,
so a zero of 0 would wrap around; version 2 ("gptq_v2") stores the zero itself. We write g_idx in order (input // group
size): any other order costs engines a gather at run time, and several refuse it.

Source: the layout that AutoGPTQ, GPTQModel and vLLM's auto_gptq.py share; no loader of theirs is run in our tests.
Shapes: R outputs, C inputs, G groups, W words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from featherweight.codec import pack_dense, unpack_dense
from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import AnySolution, Solution
from featherweight.errors import RequestError
from featherweight.formats.base import THE_MATRIX, Format, require_codes, solution_of, take
from featherweight.formats.rules import CONFIG, REGEX, Claim, Rules, grouped, require_grid

BITS = (2, 3, 4, 8)
SKIP, CHANGE = "-:", "+:"
OVERRIDES = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class Gptq(Format):
    """Integer codes of 2, 3, 4 or 8 bits with float16 scales; pruned weights are codes like the others.

    Attributes:
        zero_offset: what was subtracted from a zero before it was stored: 1 in version 1, 0 in version 2.
    """

    name: str = "gptq"
    zero_offset: int = 1

    def check(self, name: str, rows: int, columns: int, rule: Rule) -> None:
        grid = require_grid(self.name, rule, name)
        bits = grid.stored_bits
        if bits not in BITS:
            raise RequestError(f"{name} wants {bits} bits, and {self.name} has {_listed(BITS)}: use another format.")
        multiple = 32 // gcd(bits, 32)
        for count, what in ((rows, "outputs"), (columns, "inputs")):
            if count % multiple:
                raise RequestError(
                    f"{name} has {count} {what}, and {self.name} at {bits} bits needs a multiple of {multiple}: "
                    "use compressed-tensors or leave this matrix out (ignore)."
                )
        grid.width(columns, name)
        if grid.scale_dtype != torch.float16:
            raise RequestError(f"{name} has {grid.scale_dtype} scales, and {self.name} stores torch.float16: use them.")

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def lowest_zero(self, grid: Grid) -> int:
        return self.zero_offset

    def suffixes(self, rule: Rule) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", "g_idx")

    def pack(
        self, solution: AnySolution, name: str = THE_MATRIX, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        solution = require_codes(self, solution, name)
        bits, columns = solution.grid.stored_bits, solution.codes_RC.shape[1]
        return {
            "qweight": pack_dense(solution.codes_RC, bits).T.contiguous(),
            "qzeros": pack_dense((solution.zeros_RG - self.zero_offset).T, bits),
            "scales": solution.scales_RG.T.contiguous(),
            "g_idx": _in_order(columns, solution.grid.width(columns), solution.codes_RC.device),
        }

    def shape(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> tuple[int, int]:
        grid = require_grid(self.name, rule, name)
        words, rows = take(tensors, "qweight", name).shape
        columns = words * 32 // grid.stored_bits
        groups = columns // grid.width(columns, name)
        take(tensors, "scales", name, (groups, rows))
        take(tensors, "qzeros", name, (groups, rows * grid.stored_bits // 32))
        take(tensors, "g_idx", name, (columns,))
        return rows, columns

    def unpack(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> Solution:
        grid = require_grid(self.name, rule, name)
        rows, columns = self.shape(tensors, grid, name)
        bits, order = grid.stored_bits, tensors["g_idx"]
        if not torch.equal(order.long(), _in_order(columns, grid.width(columns), order.device).long()):
            raise RequestError(
                f"{name}.g_idx orders the inputs by activation (desc_act), and input // {grid.width(columns)} is read: "
                "use a checkpoint made with desc_act false or static groups."
            )
        zeros_RG = unpack_dense(tensors["qzeros"], bits, rows).T.contiguous() + self.zero_offset
        if int(zeros_RG.max()) > grid.top or int(zeros_RG.min()) < self.zero_offset:
            # Loaders disagree on whether such a field means 0 or 2^bits.
            raise RequestError(
                f"{name}.qzeros stores {grid.top}, and in {self.name}, which adds 1, the largest is {grid.top - 1}: "
                "if it was written as gptq_v2, set checkpoint_format to that."
            )
        codes_RC = unpack_dense(tensors["qweight"].T, bits, columns)
        return solution_of(codes_RC, tensors["scales"].T.contiguous(), zeros_RG, grid)

    def code_words(self, tensors: Mapping[str, Tensor], rule: Rule) -> Tensor:
        return tensors["qweight"].T

    def config(
        self,
        rules: Mapping[str, Rule],
        ignore: Sequence[str] = (),
        *,
        targets: Sequence[str] = ("Linear",),
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As `Format.config`; `targets` are the linear layers. quantize_config.json wants the same dict.

        Where rules differ, the one of most matrices is the config's and the others are GPTQModel's "+:" overrides,
        which it and vLLM match from the start of a module's name.
        """
        groups = grouped(rules, self.name)
        common = max(groups, key=lambda rule: len(groups[rule]))
        config = {
            **_settings(require_grid(self.name, common, THE_MATRIX)),
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["featherweight"], "static_groups": True, **(meta or {})},
        }
        # The head is skipped by lm_head; every other exception is a "-:" rule, which GPTQModel and vLLM both match
        # from the start of the module's name.
        dynamic: dict[str, Any] = {_skip_rule(entry): {} for entry in ignore if entry != "lm_head"}
        for rule, names in groups.items():
            if rule != common:
                key = f"{CHANGE}^(?:{'|'.join(map(re.escape, names))})$"
                dynamic[key] = _settings(require_grid(self.name, rule, THE_MATRIX))
        return config | ({"dynamic": dynamic} if dynamic else {})

    def read(self, config: Mapping[str, Any]) -> Rules:
        words = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
        if words != "int32":
            raise RequestError(f"{CONFIG}.pack_dtype is {words}, and int32 is read: convert the checkpoint.")
        claims = []
        for target, change in (config.get("dynamic") or {}).items():
            if target.startswith(SKIP) or not change:
                continue
            unknown = sorted(set(change) - set(OVERRIDES))
            if unknown:
                raise RequestError(
                    f"{CONFIG}.dynamic changes {unknown[0]} for {target}, and {', '.join(OVERRIDES)} are read: "
                    "convert the checkpoint."
                )
            grid = self._grid({**config, **change})
            claims.append(Claim.of_targets(grid, [REGEX + target.removeprefix(CHANGE)]))
        return Rules(tuple(claims), self._grid(config))

    def _grid(self, settings: Mapping[str, Any]) -> Grid:
        bits, size = settings.get("bits"), settings.get("group_size", -1)
        if bits not in BITS:
            raise RequestError(f"{CONFIG}.bits is {bits}, and {self.name} has {_listed(BITS)}.")
        symmetric = bool(settings.get("sym", True))
        return Grid(bits=bits, group_size=size if size and size > 0 else None, symmetric=symmetric)


def _settings(grid: Grid) -> dict[str, Any]:
    """A grid in the words of quantize_config.json."""
    size = -1 if grid.group_size is None else grid.group_size
    return {"bits": grid.stored_bits, "group_size": size, "desc_act": False, "sym": grid.symmetric}


def _in_order(columns: int, width: int, device: torch.device) -> Tensor:
    """g_idx of groups that lie in the order of the inputs."""
    return torch.arange(columns, dtype=torch.int32, device=device) // width


def _skip_rule(entry: str) -> str:
    return f"{SKIP}{entry[3:]}" if entry.startswith(REGEX) else f"{SKIP}^{re.escape(entry)}$"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
