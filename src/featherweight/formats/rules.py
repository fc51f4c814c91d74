"""Rules as a file can speak of them, and which matrix of a checkpoint obeys which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from featherweight.core.rules import Grid, Joint, Pattern, Rule, grid_of
from featherweight.errors import RequestError

CONFIG = "quantization_config"
REGEX = "re:"


def stored_grid(grid: Grid) -> Grid:
    """What a config says of a grid: bits (ternary as two), group size and symmetry; the rest is the default."""
    return Grid(bits=grid.stored_bits, group_size=grid.group_size, symmetric=grid.symmetric)


def stored_pattern(pattern: Pattern) -> Pattern:
    """The same pattern with only the fields that count: N:M, or sparsity and block."""
    if pattern.of:
        return Pattern(keep=pattern.keep, of=pattern.of)
    return Pattern(sparsity=pattern.sparsity, block=pattern.block)


def stored_rule(rule: Rule) -> Rule:
    """Of rules that a file tells apart no longer, the one it is read as."""
    if isinstance(rule, Joint):
        return Joint(stored_grid(rule.grid), stored_pattern(rule.pattern))
    return stored_grid(rule) if isinstance(rule, Grid) else stored_pattern(rule)


def require_grid(format: str, rule: Rule, name: str) -> Grid:
    """The grid of a rule, for formats that hold codes only (zeros are codes like others); RequestError without one."""
    grid = grid_of(rule)
    if grid is None:
        raise RequestError(
            f"{name} is pruned ({rule}) and not rounded, and {format} stores codes only: use --format sparse or "
            "dense, or give bits too."
        )
    return grid


@dataclass(frozen=True)
class Claim:
    """A rule and the matrices it is for.

    Attributes:
        rule: what they obey.
        names: their names on disk.
        patterns: regular expressions that match the beginning of other names.
        everything: whether it is for every matrix.
    """

    rule: Rule
    names: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()
    everything: bool = False

    @classmethod
    def of_targets(cls, rule: Rule, targets: Iterable[str], everything: str = "") -> Claim:
        """From names and "re:" regular expressions; the target `everything` stands for every matrix."""
        targets = list(targets)
        try:
            patterns = tuple(re.compile(target[len(REGEX) :]) for target in targets if target.startswith(REGEX))
        except re.error as error:
            raise RequestError(f"{CONFIG} has a target that is no regular expression ({error}): correct it.") from error
        names = frozenset(target for target in targets if not target.startswith(REGEX))
        return cls(rule, names, patterns, everything in names)

    def __contains__(self, name: str) -> bool:
        return self.everything or name in self.names or any(pattern.match(name) for pattern in self.patterns)


@dataclass(frozen=True)
class Rules:
    """Which rule a matrix obeys, by its name on disk.

    Attributes:
        claims: rules of some matrices.
        default: the rule of all others, None where there is none.
    """

    claims: tuple[Claim, ...] = ()
    default: Rule | None = None

    @property
    def distinct(self) -> tuple[Rule, ...]:
        """Every rule once, the default first."""
        default = () if self.default is None else (self.default,)
        return tuple(dict.fromkeys((*default, *(claim.rule for claim in self.claims))))

    def of(self, name: str) -> Rule:
        """The rule of one matrix; RequestError where two claim it, or none."""
        found = [claim.rule for claim in self.claims if name in claim]
        if len(found) > 1:
            raise RequestError(f"{CONFIG} has {len(found)} rules for {name}, and a matrix obeys 1: correct them.")
        if not found and self.default is None:
            raise RequestError(f"{CONFIG} has {len(self.claims)} rules, and none is for {name}: add it to one of them.")
        return found[0] if found or self.default is None else self.default


def grouped(rules: Mapping[str, Rule], format: str | None = None) -> dict[Rule, list[str]]:
    """The names by rule as stored (of a `format` that holds codes only, by grid), in the order they come in."""
    assert rules, "a checkpoint has matrices"
    groups: dict[Rule, list[str]] = {}
    for name, rule in rules.items():
        stored = stored_rule(rule) if format is None else stored_grid(require_grid(format, rule, name))
        groups.setdefault(stored, []).append(name)
    return groups
