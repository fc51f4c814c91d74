"""A recipe: everything that decides what a compressed model's bytes are, as one frozen value."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch

from featherweight.core.problem import Order
from featherweight.core.rules import Grid, Joint, Pattern, Rule, Search
from featherweight.core.solve import Choices, Mask, Method
from featherweight.core.sweep import ScalesFrom
from featherweight.errors import RequestError

RecipeMethod = Literal[Method, "block-ap"]
FLOAT_BITS = 16  # weights that are not rounded: the checkpoint's own dtype
WEIGHT_RATES = {"weights": 0.001, "rounding": 0.003}
DAMPING, PRUNING_DAMPING = 0.1, 0.03
CHOICES = {
    "method": get_args(RecipeMethod),
    "start": get_args(Method),
    "tune": ("weights", "rounding"),
    "units": ("steps", "absolute"),
    "mask": get_args(Mask),
    "search": get_args(Search),
    "order": get_args(Order),
    "scales_from": get_args(ScalesFrom),
    "target": ("drifted", "original"),
    "starved": ("shared", "round", "error"),
    "diverged": ("restore", "error"),
}


@dataclass(frozen=True)
class Recipe:
    """How to compress a model. `replace(recipe, bits=3)` derives one from another.

    Attributes:
        method: "gptq" (error-compensating sweep), "obq" (greedy, slow), "rtn" (round to nearest or prune the
            smallest, no calibration text) or "block-ap" (train each block towards its original output).
        start: the method whose solution block-ap begins with; tune: what it trains beside scales: "weights" by
            straight-through (and zeros), or the "rounding" of each weight to one of three codes.
        epochs, batch, weight_rate, scale_rate: of block-ap (`train.block_ap.Schedule`); weight_rate None is 0.003 for
            rounding and 0.001 for weights. held_out: the share of the
            samples, drawn from a part of the text of their own, that choose the state that is kept.
        units: with "steps", rates are in steps of the grid and errors relative to each token's size; with "absolute",
            both are as EfficientQAT has them.
        sparsity: None, the share of zeros ("0.5") or kept weights of so many neighbours ("2:4"); mask: how they are
            chosen, resolve and swaps: what is done for the others afterwards; see `core.solve.Choices`.
        bits: 2 .. 8, 1.58 for ternary, or 16 to leave what is not pruned in the checkpoint's dtype; group_size: inputs
            sharing a scale, None for the whole row.
        symmetric: no zero points; search, order, scales_from, damping: see `Grid`, `LayerProblem` and `sweep`.
        damping: None is 0.1, or 0.03 where weights are pruned.
        refine: rounds of descent after the sweep (`core.refine`), 0 for none; release: with sparsity and bits, let
            descent move the zeros as well (`core.release`).
        target: whose output each matrix is to match: that of its own inputs as the compressed blocks before it make
            them ("drifted", GPTQ), or that of the original model ("original", in the spirit of GPTAQ and Qronos), the
            residual stream included, with each block's last matrix solved after the others: two more forward passes.
        pull: with target "original", how far the weights are moved towards undoing the drift, 0 .. 1.
        sink_share: the least share of H's trace that the windows' first tokens hold in what attention reads: every
            token attends to them, so an error there is an error everywhere; 0 counts them like any other.
        guide: from 0 to 1: the power of each token's weight in H, which one backward pass of the whole model measures
            (`stream.guide`; it must fit on the device); 0 counts every token alike and needs no such pass. An
            expert's tokens count alike.
        true_sequential: collect each group's inputs after the groups before it in the block are compressed.
        starved: what to do for an expert that is sent fewer tokens than it has inputs: let the layer's other tokens
            count too ("shared"), round it to nearest ("round"), or stop ("error").
        diverged: what to do where block-ap's loss is no longer finite: give the block the solution it began with
            ("restore"), or stop ("error").
        route_all: calibrate every expert on every token; where tokens go in the model stays as it is.
        drop_special: leave special tokens (beginnings, ends, padding) out of what experts are calibrated on.
        size_bytes: a size for all shards; average_bits: bits per weight of the matrices, from bytes on disk;
            non_uniform: with sparsity, the share of zeros of the whole. With one of these each matrix gets a rule of
            its own, where it harms the model least (`plan`); bits and group_size are then not used.
        embedding_bits: of the embedding and the head, rounded to nearest in groups of `group_size`; 16 leaves them. Not
            every engine loads a model whose embedding is rounded (docs/formats.md).
        format: the file format by name; "auto" is compressed-tensors, or sparse where weights are pruned.
        calibration: text sources ("builtin" is the embedded text).
        samples, tokens: calibration windows and their length, None for 2048 or the model's positions if fewer; seed:
            which windows.
    """

    method: RecipeMethod = "gptq"
    start: Method = "gptq"
    tune: Literal["weights", "rounding"] = "weights"
    epochs: int = 4
    batch: int = 4
    weight_rate: float | None = None
    scale_rate: float = 0.002
    held_out: float = 0.125
    units: Literal["steps", "absolute"] = "steps"
    sparsity: str | None = None
    mask: Mask = "admm"
    resolve: int = Choices.resolve
    swaps: int = Choices.swaps
    bits: float = 4
    group_size: int | None = 128
    symmetric: bool = True
    search: Search = "hessian"
    mirror: bool = True
    order: Order = "activation"
    scales_from: ScalesFrom = "original"
    damping: float | None = None
    refine: int = 1
    release: bool = True
    target: Literal["drifted", "original"] = "original"
    pull: float = 0.5
    sink_share: float = 0.05
    guide: float = 0.0
    size_bytes: int | None = None
    average_bits: float | None = None
    non_uniform: bool = False
    embedding_bits: float = FLOAT_BITS
    true_sequential: bool = False
    starved: Literal["shared", "round", "error"] = "shared"
    diverged: Literal["restore", "error"] = "restore"
    route_all: bool = False
    drop_special: bool = False
    format: str = "auto"
    calibration: tuple[str, ...] = ("builtin",)
    chat_template: bool = False
    samples: int = 128
    tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                known = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
                raise RequestError(f"{name} must be {known}, not {getattr(self, name)!r}.")
        if self.samples < 1:
            raise RequestError(f"samples must be 1 or more, not {self.samples}.")
        if self.tokens is not None and self.tokens < 2:
            raise RequestError(f"tokens must be 2 or more, not {self.tokens}.")
        if self.damping is not None and not 0 <= self.damping <= 10:
            raise RequestError(f"damping must lie between 0 and 10 (times the mean diagonal of H), not {self.damping}.")
        for name in ("refine", "resolve", "swaps"):
            if getattr(self, name) < 0:
                raise RequestError(f"{name} must be 0 rounds or more, not {getattr(self, name)}.")
        for name in ("pull", "guide"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        if not 0 <= self.sink_share < 1:
            raise RequestError(f"sink_share must be at least 0 and less than 1, not {self.sink_share}.")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed must lie between 0 and 2^63 - 1, not {self.seed}.")
        if self.scales_from == "updated" and self.order != "natural":
            raise RequestError(
                f"scales from updated weights need the natural order, not {self.order}: use --order natural."
            )
        if self.trains:
            self._check_training()
        self.rule(torch.float16)
        self.embedding_rule(torch.float16)
        if self.budget is not None and "rtn" in (self.method, self.trains and self.start):
            raise RequestError("a budget is spent by what calibration text says, and rtn reads none: use gptq.")
        if self.format == "sub1" and (self.size_bytes or self.average_bits):
            raise RequestError("a budget chooses among 2 to 8 bits, and sub1 stores 2 or fewer: use another format.")

    def _check_training(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        for name, rate in (("weight_rate", self.first_weight_rate), ("scale_rate", self.scale_rate)):
            if not 0 <= rate < 1:
                raise RequestError(f"{name} must be at least 0 and less than 1, not {rate}.")
        if not 0 < self.held_out < 1:
            raise RequestError(f"held_out must lie between 0 and 1, not {self.held_out}.")
        if self.samples < 2:
            raise RequestError(
                f"block-ap trains on some samples and holds out others, at least 2 in all, and {self.samples} was "
                "asked for: raise --samples."
            )
        if self.target != "original":
            raise RequestError(f"block-ap trains towards the original model, not target {self.target}: drop --target.")

    def rule(self, scale_dtype: torch.dtype) -> Rule:
        """The rule of every matrix, with scales in the dtype the format stores."""
        pattern = None if self.sparsity is None else Pattern.of_text(self.sparsity)
        if self.bits == FLOAT_BITS:
            if pattern is None:
                raise RequestError(f"{FLOAT_BITS} bits without sparsity leave nothing to do: ask for 8 or fewer.")
            return pattern
        grid = Grid(self.bits, self.group_size, self.symmetric, self.search, scale_dtype, self.mirror)
        return grid if pattern is None else Joint(grid, pattern)

    def embedding_rule(self, scale_dtype: torch.dtype) -> Grid | None:
        """The grid of the embedding and the head, None where they stay floats."""
        if self.embedding_bits == FLOAT_BITS:
            return None
        return Grid(self.embedding_bits, self.group_size, self.symmetric, self.search, scale_dtype, self.mirror)

    @property
    def trains(self) -> bool:
        return self.method == "block-ap"

    @property
    def first_weight_rate(self) -> float:
        """`weight_rate`, or what is best for what is tuned where it is left open (docs/log.md)."""
        return WEIGHT_RATES[self.tune] if self.weight_rate is None else self.weight_rate

    @property
    def held_out_samples(self) -> int:
        """How many of the samples are held out: at least one, and not all."""
        return min(self.samples - 1, max(1, round(self.held_out * self.samples)))

    @property
    def prunes(self) -> bool:
        return self.sparsity is not None

    @property
    def budget(self) -> tuple[Literal["bytes", "bits", "sparsity"], float] | None:
        """What the model as a whole is to keep to, and how much; None where every matrix has the same rule."""
        asked = {"bytes": self.size_bytes, "bits": self.average_bits}
        given = [(unit, amount) for unit, amount in asked.items() if amount is not None]
        if self.non_uniform:
            if self.sparsity is None or ":" in self.sparsity or self.bits != FLOAT_BITS:
                raise RequestError("non-uniform sparsity takes a share of zeros and no bits: add --sparsity 0.6, say.")
            given.append(("sparsity", float(self.sparsity)))
        elif self.prunes and given:
            raise RequestError("a size or average bits choose among grids without zeros: drop the sparsity.")
        if len(given) > 1:
            raise RequestError(f"{len(given)} budgets were given and 1 can be kept to: drop all but one.")
        return given[0] if given else None  # type: ignore[return-value]

    @property
    def relative_damping(self) -> float:
        """`damping`, or what is best for the rule where it is left open (docs/log.md)."""
        if self.damping is not None:
            return self.damping
        return PRUNING_DAMPING if self.prunes else DAMPING

    @property
    def format_name(self) -> str:
        """`format`, or the one that stores this rule in the fewest bytes."""
        if self.format != "auto":
            return self.format
        return "sparse" if self.prunes else "compressed-tensors"

    def choices(self, lowest_zero: int, value_dtype: torch.dtype) -> Choices:
        """What the solver of one layer is told: the recipe's part of it, and the two limits of the format."""
        names = ("mask", "order", "scales_from", "refine", "release", "resolve", "swaps")
        own = {name: getattr(self, name) for name in names}
        method = self.start if self.method == "block-ap" else self.method
        return Choices(method, **own, lowest_zero=lowest_zero, value_dtype=value_dtype)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `drop_special` only where it is asked for, as recipes older than it do not know it."""
        found = {**asdict(self), "calibration": list(self.calibration)}
        return found if self.drop_special else {name: value for name, value in found.items() if name != "drop_special"}

    def digest(self) -> str:
        """Twelve hex digits that name this recipe."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def but(self, **changes: Any) -> Recipe:
        """This recipe with some fields changed; None leaves a field as it is; an unknown field is an error."""
        known = {name: value for name, value in changes.items() if value is not None}
        for name in known:
            if name not in self.__dataclass_fields__:
                raise RequestError(f"a recipe has no field {name!r}: it has {', '.join(self.__dataclass_fields__)}.")
        return replace(self, **known)
