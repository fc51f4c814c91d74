"""compressed-tensors `pack-quantized`, read by vLLM, SGLang, transformers and llama.cpp's converter.

    weight_packed      int32 [R, ceil(C*bits/32)]   codes, along the inputs
    weight_scale       float [R, G]                 the model's dtype
    weight_zero_point  int32 [ceil(R*bits/32), G]   asymmetric only, packed along the *outputs*
    weight_shape       int64 [2]                    R, C

The package thinks of codes and zeros as signed, -2^(bits-1) .. 2^(bits-1)-1, and adds 2^(bits-1) to both before it
packs them: what lies in the file is our unsigned code and our unsigned zero, and a symmetric file, whose signed zero is
0, decodes around our `Grid.middle`. Widths that do not divide 32 (3, 5, 6, 7 bits) are packed without gaps since
compressed-tensors 0.18; up to 0.17.1 each word held floor(32/bits) codes. No version flag tells such files apart, only
their width does, and 0.17 reads ours wrong or not at all.

Source: compressed_tensors/compressors/pack_quantized/{base,helpers}.py of 0.17.0, 0.18.0 and 0.20.0.
Shapes: R outputs, C inputs, G groups, W words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.codec import pack_dense, unpack_dense, words_for
from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import AnySolution, Solution
from featherweight.errors import RequestError
from featherweight.formats.base import THE_MATRIX, Format, check_grid, require_codes, solution_of, take
from featherweight.formats.rows import grid_rows
from featherweight.formats.rules import CONFIG, Claim, Rules, grouped, require_grid

EVERY_LINEAR = "Linear"


@dataclass(frozen=True)
class CompressedTensors(Format):
    """Integer codes of 2 to 8 bits, by group or by row, with or without zeros.

    Pruned weights are codes like the others: nothing is saved, and the mask is not read back.
    """

    name: str = "compressed-tensors"
    embeddings: ClassVar[bool] = True

    def check(self, name: str, rows: int, columns: int, rule: Rule) -> None:
        check_grid(self.name, name, columns, require_grid(self.name, rule, name))

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def lowest_zero(self, grid: Grid) -> int:
        return 0

    def suffixes(self, rule: Rule) -> tuple[str, ...]:
        zeros = () if require_grid(self.name, rule, THE_MATRIX).symmetric else ("weight_zero_point",)
        return ("weight_packed", "weight_scale", *zeros, "weight_shape")

    def pack(
        self, solution: AnySolution, name: str = THE_MATRIX, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        solution = require_codes(self, solution, name)
        bits = solution.grid.stored_bits
        tensors = {
            "weight_packed": pack_dense(solution.codes_RC, bits),
            "weight_scale": solution.scales_RG.contiguous(),
            "weight_shape": torch.tensor(solution.codes_RC.shape, dtype=torch.int64, device=solution.codes_RC.device),
        }
        if not solution.grid.symmetric:
            tensors["weight_zero_point"] = pack_dense(solution.zeros_RG.T, bits).T.contiguous()
        return {suffix: tensors[suffix] for suffix in self.suffixes(solution.grid)}

    def shape(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> tuple[int, int]:
        grid = require_grid(self.name, rule, name)
        rows, columns = (int(n) for n in take(tensors, "weight_shape", name, (2,)).tolist())
        bits, packed = grid.stored_bits, take(tensors, "weight_packed", name)
        padded = -(-columns // (32 // bits))
        if packed.shape[-1] != words_for(columns, bits) and packed.shape[-1] == padded:
            raise RequestError(
                f"{name} has {padded} words a row, and {columns} inputs fill {words_for(columns, bits)}: "
                "it was packed with gaps by compressed-tensors 0.17 or older; write it again with 0.18 or later."
            )
        take(tensors, "weight_packed", name, (rows, words_for(columns, bits)))
        take(tensors, "weight_scale", name, (rows, columns // grid.width(columns, name)))
        return rows, columns

    def unpack(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> Solution:
        grid = require_grid(self.name, rule, name)
        rows, columns = self.shape(tensors, grid, name)
        bits, scales_RG = grid.stored_bits, tensors["weight_scale"]
        groups = scales_RG.shape[1]
        if grid.symmetric:
            zeros_RG = torch.full((rows, groups), grid.middle, dtype=torch.uint8, device=scales_RG.device)
        else:
            words_WG = take(tensors, "weight_zero_point", name, (words_for(rows, bits), groups))
            zeros_RG = unpack_dense(words_WG.T, bits, rows).T.contiguous()
        return solution_of(unpack_dense(tensors["weight_packed"], bits, columns), scales_RG, zeros_RG, grid)

    def code_words(self, tensors: Mapping[str, Tensor], rule: Rule) -> Tensor:
        return tensors["weight_packed"]

    def unpack_rows(self, tensors: Mapping[str, Tensor], rule: Rule, index_N: Tensor, columns: int) -> Solution:
        return grid_rows(tensors, require_grid(self.name, rule, THE_MATRIX), index_N, columns)

    def config(
        self,
        rules: Mapping[str, Rule],
        ignore: Sequence[str] = (),
        *,
        targets: Sequence[str] = (EVERY_LINEAR,),
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As `Format.config`; there is no room for `meta`. Only keys 0.17 knows: an unknown one fails the load.

        Where rules differ, each is a group whose targets are the names of its matrices: the package and vLLM compare
        a target with the module's name before its class, and vLLM with the names of what it fuses.
        """
        groups = [
            (require_grid(self.name, rule, THE_MATRIX), names) for rule, names in grouped(rules, self.name).items()
        ]
        one = len(groups) == 1
        schemes = [_scheme(grid, targets if one else names) for grid, names in groups]
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(ignore),
            "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        }

    def read(self, config: Mapping[str, Any]) -> Rules:
        groups = config.get("config_groups") or {}
        if not groups:
            raise RequestError(f"{CONFIG} has no config_groups, and 1 or more are read: the file is incomplete.")
        _refuse(config, "kv_cache_scheme", "sparsity_config", "transform_config")
        grids = {label: _group(label, group, config.get("format")) for label, group in groups.items()}
        if len(grids) == 1:
            return Rules(default=next(iter(grids.values())))
        targets = {label: groups[label].get("targets") or () for label in grids}
        return Rules(tuple(Claim.of_targets(grids[label], targets[label], EVERY_LINEAR) for label in grids))


def _scheme(grid: Grid, targets: Sequence[str]) -> dict[str, Any]:
    """One entry of `config_groups`."""
    weights = {
        "num_bits": grid.stored_bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}


def _group(label: str, group: Any, layout: Any) -> Grid:
    """The grid of one entry of `config_groups`; `layout` is the format of entries that name none."""
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise RequestError(f"{CONFIG}.config_groups.{label} spells out no weights: presets by name are not read.")
    _refuse(group, "input_activations", "output_activations")
    layout = group.get("format") or layout
    if layout != "pack-quantized":
        raise RequestError(f"{CONFIG}.format is {layout}, and only pack-quantized is read: convert the checkpoint.")
    return _grid(group["weights"])


def _refuse(config: Mapping[str, Any], *keys: str) -> None:
    """Raise RequestError for settings that change what the model computes in ways we would drop."""
    for key in keys:
        if config.get(key):
            raise RequestError(f"{CONFIG} has {key}, which is not read: use a checkpoint where it is null.")


def _grid(weights: Mapping[str, Any]) -> Grid:
    """The grid of one `weights` entry."""
    allowed = {
        "type": ("int",),
        "strategy": ("group", "channel"),
        "dynamic": (False, None),
        # "weight" (alias "static") orders the columns while solving only; "group" stores them in another order.
        "actorder": (None, False, "weight", "static"),
    }
    defaults = {"type": "int", "strategy": "group" if (weights.get("group_size") or -1) > 0 else "channel"}
    for key, values in allowed.items():
        value = weights.get(key) or defaults.get(key)
        if value not in values:
            raise RequestError(f"{CONFIG} says weights.{key} {value}, and {' or '.join(map(str, values))} is read.")
    size = weights.get("group_size") or -1
    if (size > 0) != ((weights.get("strategy") or defaults["strategy"]) == "group"):
        raise RequestError(
            f"{CONFIG} says strategy {weights.get('strategy')} with group_size {size}: it takes both or none."
        )
    return Grid(
        bits=weights.get("num_bits", 8),
        group_size=size if size > 0 else None,
        symmetric=bool(weights.get("symmetric", True)),
    )
