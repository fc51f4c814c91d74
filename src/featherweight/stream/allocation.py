"""From a budget to a rule for every matrix: measure what each option harms, then spend the budget where it pays most.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from featherweight import data
from featherweight.core.rules import Grid, Pattern, Rule
from featherweight.errors import RequestError
from featherweight.formats import Format
from featherweight.models.load import load_tokenizer
from featherweight.models.tokens import token_matrices
from featherweight.models.tree import ModelTree
from featherweight.plan import Layer, Offer, Option, allocate, check_budget, fitting, menu, stored_bytes
from featherweight.plan.options import kept_weights
from featherweight.recipe import Recipe
from featherweight.stream.calibration import Tell
from featherweight.stream.parallel import ALONE, World
from featherweight.stream.sensitivity import calibrate, measure, quick

DATABASE = "sensitivity.jsonl"
PROBE_WINDOWS, PROBE_TOKENS = 4, 256  # of the calibration text, that losses are turned into nats on
SPARSITIES = tuple(n / 20 for n in range(20))
HEADER_BYTES = 84  # of a tensor in a shard's header, its name apart: no less, and seldom 20 more
SHARD_BYTES = 64


def allocated_rules(
    tree: ModelTree, recipe: Recipe, format: Format, out: Path, device: str, tell: Tell, world: World = ALONE
) -> dict[str, Rule]:
    """The rule of each matrix, by name, that harms the model least within the recipe's budget.

    The sensitivities are measured on the way, into `out`, where they stay: a run that is stopped goes on there. Several
    processes measure together, and all take what process 0 chooses. Raises RequestError for a budget that no choice
    meets, naming the nearest that one does.
    """
    assert recipe.budget is not None
    unit, amount = recipe.budget
    options = _options(recipe, format.scale_dtype(tree.dtype))
    fixed = _fixed(tree, recipe, format, options)
    path = tree.checkpoint.path
    choices = replace(quick(recipe), mask="sparsegpt", resolve=0)  # of twenty sparsities, none needs its best mask
    database = measure(path, out / DATABASE, recipe, options, device, choices, tell, world=world)
    windows_ST = world.first_tensor(lambda: _probe_windows(path, recipe))
    assert windows_ST is not None
    database = calibrate(path, database, windows_ST, recipe, options, device, choices, tell, world=world)
    found: dict[str, str] = world.first(dict(allocate(database.layers(), amount, unit, fixed).choices))
    rules = {option.label: option.rule for option in options}
    chosen: dict[str, Rule] = {}
    for matrix in tree.matrices:  # in this order, whoever measured them
        rule = rules[found[matrix.name]]
        assert rule is not None, "leaving a matrix as it is is no option here"
        chosen[matrix.name] = rule
    return chosen


def _probe_windows(path: Path, recipe: Recipe) -> Tensor:
    """Other windows of the calibration text than those that losses are measured on."""
    tokenizer = load_tokenizer(path)
    text = data.calibration_text(tokenizer, recipe.calibration, recipe.chat_template)
    length = min(PROBE_TOKENS, recipe.tokens or PROBE_TOKENS)
    encode, bos = data.encoder(tokenizer), data.bos_of(tokenizer)
    return data.calibration_windows(encode, text, PROBE_WINDOWS, length, recipe.seed + 1, bos)


def check_reach(tree: ModelTree, recipe: Recipe, format: Format) -> None:
    """Raises RequestError for a budget that no choice can meet, from the shapes alone, before anything is measured."""
    assert recipe.budget is not None
    unit, amount = recipe.budget
    options = _options(recipe, format.scale_dtype(tree.dtype))
    layers = [
        Layer(
            m.name,
            m.rows * m.columns,
            tuple(
                Offer(option.label, 0.0, option.bytes(m.rows, m.columns), kept_weights(option.rule, m.rows, m.columns))
                for option in fitting(options, m.columns, m.name)
            ),
        )
        for m in tree.matrices
    ]
    check_budget(layers, amount, unit, _fixed(tree, recipe, format, options))


def _fixed(tree: ModelTree, recipe: Recipe, format: Format, options: tuple[Option, ...]) -> int:
    """Bytes of a budget of bytes that no choice can change."""
    if recipe.size_bytes is None:
        return 0
    return fixed_bytes(tree, format.suffixes(_any_rule(options)), recipe.embedding_rule(format.scale_dtype(tree.dtype)))


def fixed_bytes(tree: ModelTree, suffixes: tuple[str, ...], tokens: Grid | None = None) -> int:
    """What the shards hold besides the packed matrices' bytes: other tensors, and all headers, no less.

    `tokens` is what embedding and head are rounded to, None where they are not.
    """
    rounded = () if tokens is None else token_matrices(tree)
    weights = {matrix.weight for matrix in (*tree.matrices, *rounded)}
    names = [name for name in tree.checkpoint.names if name not in weights]
    headers = [len(name) + HEADER_BYTES for name in names]
    packed = (*tree.matrices, *rounded)
    headers += [len(f"{m.name}.{suffix}") + HEADER_BYTES for m in packed for suffix in suffixes]
    stored = sum(stored_bytes(tokens, m.rows, m.columns) for m in rounded)
    return sum(map(tree.checkpoint.nbytes, names)) + stored + sum(headers) + SHARD_BYTES * (len(tree.blocks) + 1)


def _options(recipe: Recipe, scale_dtype: torch.dtype) -> tuple[Option, ...]:
    """What a matrix may become: for a size, grids of every width; for a sparsity, more or fewer zeros."""
    assert recipe.budget is not None
    if recipe.budget[0] == "sparsity":
        return tuple(Option.of(Pattern(share)) for share in SPARSITIES)
    return menu(patterns=False, joint=False, symmetric=recipe.symmetric, scale_dtype=scale_dtype, search=recipe.search)


def _any_rule(options: tuple[Option, ...]) -> Rule:
    rule = options[0].rule
    if rule is None:
        raise RequestError("there is no option but leaving matrices as they are: allow others.")
    return rule
