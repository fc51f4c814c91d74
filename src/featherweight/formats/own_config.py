"""What a checkpoint in a layout of our own, sparse or sub1, says in config.json: a rule for each set of matrices.

    {"quant_method": "featherweight", "format": "sparse", "version": 1,
     "rules": [{"pattern": {"keep": 2, "of": 4}, "grid": {"bits": 4, "group_size": 128, "symmetric": true},
                "matrices": ["model.layers.0.mlp.down_proj", ...]}, ...],
     "ignore": ["lm_head"]}

`pattern` is null, {"keep", "of"} or {"sparsity", "block"}; `grid` is null where weights are floats; `matrices` is "*"
where all obey one rule. An unknown key is an error: it could change what a weight is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featherweight.core.rules import Grid, Joint, Pattern, Rule, parts
from featherweight.errors import RequestError
from featherweight.formats.rules import CONFIG, Claim, Rules, grouped

METHOD = "featherweight"
VERSION = 1
EVERYTHING = "*"
KEYS = {"quant_method", "format", "version", "rules", "ignore"}


def write(format: str, rules: Mapping[str, Rule], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of matrices by name, in the format of this name."""
    groups = grouped(rules)
    return {
        "quant_method": METHOD,
        "format": format,
        "version": VERSION,
        "rules": [
            {**_written(rule), "matrices": EVERYTHING if len(groups) == 1 else names} for rule, names in groups.items()
        ],
        "ignore": list(ignore),
    }


def read(format: str, config: Mapping[str, Any]) -> Rules:
    """The rules of a `quantization_config`; RequestError for another version, an unknown key or a wrong value."""
    if config.get("version") != VERSION:
        raise RequestError(
            f"{CONFIG}.version is {config.get('version')}, and version {VERSION} of the {format} format is read: "
            "use the release of featherweight that wrote it, or a newer one."
        )
    _require_keys(config, KEYS, KEYS, CONFIG)
    entries = config["rules"]
    if not isinstance(entries, list) or not entries:
        raise RequestError(f"{CONFIG}.rules holds no rule, and 1 or more are read: the file is incomplete.")
    return Rules(tuple(_claim(entry, f"{CONFIG}.rules[{index}]") for index, entry in enumerate(entries)))


def _written(rule: Rule) -> dict[str, Any]:
    grid, pattern = parts(rule)
    found: dict[str, Any] = {"pattern": None, "grid": None}
    if pattern is not None and pattern.of:
        found["pattern"] = {"keep": pattern.keep, "of": pattern.of}
    elif pattern is not None:
        found["pattern"] = {"sparsity": pattern.sparsity, "block": pattern.block}
    if grid is not None:
        found["grid"] = {"bits": grid.stored_bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    return found


def _claim(entry: Any, where: str) -> Claim:
    _require_keys(entry, {"pattern", "grid", "matrices"}, {"pattern", "grid", "matrices"}, where)
    matrices = entry["matrices"]
    if matrices != EVERYTHING and not (isinstance(matrices, list) and all(isinstance(name, str) for name in matrices)):
        shown = repr(matrices)[:60]
        raise RequestError(f'{where}.matrices is {shown}, and a list of names or "*" is read: correct it.')
    rule = _rule(entry["pattern"], entry["grid"], where)
    if matrices == EVERYTHING:
        return Claim(rule, everything=True)
    return Claim(rule, frozenset(matrices))


def _rule(pattern: Any, grid: Any, where: str) -> Rule:
    if pattern is None and grid is None:
        raise RequestError(f"{where} has neither pattern nor grid, and 1 of them or both are read: correct it.")
    if grid is None:
        return _pattern(pattern, f"{where}.pattern")
    return _grid(grid, f"{where}.grid") if pattern is None else Joint(_grid(grid, where), _pattern(pattern, where))


def _pattern(fields: Any, where: str) -> Pattern:
    kinds = {"keep": int, "of": int} if isinstance(fields, Mapping) and "of" in fields else _UNSTRUCTURED
    _require_keys(fields, set(kinds), set(kinds), where)
    _require_kinds(fields, kinds, where)
    return Pattern(**fields)


def _grid(fields: Any, where: str) -> Grid:
    kinds = {"bits": int, "group_size": (int, type(None)), "symmetric": bool}
    _require_keys(fields, set(kinds), set(kinds), where)
    _require_kinds(fields, kinds, where)
    return Grid(**fields)


_UNSTRUCTURED: dict[str, Any] = {"sparsity": (int, float), "block": int}


def _require_keys(fields: Any, needed: set[str], known: set[str], where: str) -> None:
    if not isinstance(fields, Mapping):
        raise RequestError(f"{where} is {str(fields)[:60]!r}, and an object is read: correct it.")
    strange, absent = sorted(set(fields) - known), sorted(needed - set(fields))
    if strange:
        raise RequestError(f"{where} has {strange[0]}, and {', '.join(sorted(known))} are read: update featherweight.")
    if absent:
        raise RequestError(f"{where} has no {absent[0]}, and it needs {', '.join(sorted(needed))}: add it.")


def _require_kinds(fields: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    for key, kind in kinds.items():
        value = fields[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RequestError(f"{where}.{key} is {value!r}, which is no value for it: correct it.")
