"""compress to a size, to average bits, to a share of zeros: the budget kept, a rule for each matrix, loads, resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight import api
from featherweight.errors import RequestError
from featherweight.models.checkpoint import Checkpoint
from runs import featherweight, journal, logits, recipe, shards
from tiny import add_tokenizer, make, token_ids

BUDGETS: dict[str, dict[str, Any]] = {
    "bits": {"average_bits": 4.0},
    "asymmetric": {"average_bits": 4.0, "symmetric": False, "target": "original"},
    "zeros": {"sparsity": "0.55", "non_uniform": True, "bits": 16},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("budget"), dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def made(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for name, changes in BUDGETS.items():
        api.compress(source, folder / name, recipe(text, **changes))
    return folder


def loads(folder: Path) -> None:
    model = api.load(folder, "cpu", torch.float32, kernel="dense")
    assert torch.isfinite(logits(model, token_ids(1, 16))).all()


@pytest.mark.parametrize("name", ["bits", "asymmetric"])
def test_average_bits_are_kept_to(name: str, made: Path) -> None:
    """From bytes on disk; matrices that engines fuse share a rule, others differ; the config says which is which."""
    rows = journal(made / name)
    bits = 8 * sum(row["bytes"] for row in rows) / sum(row["shape"][0] * row["shape"][1] for row in rows)
    assert 4.0 * 0.97 < bits <= 4.0
    rules = {row["name"]: (row["bits"], row["group_size"]) for row in rows}
    assert len(set(rules.values())) > 1
    for block in (0, 1):
        at = f"model.layers.{block}"
        assert len({rules[f"{at}.self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert rules[f"{at}.mlp.gate_proj"] == rules[f"{at}.mlp.up_proj"]
    shown = {row["name"]: (row["bits"], row["group_size"]) for row in api.inspect(made / name)["matrices"]}
    assert shown == rules
    loads(made / name)


def test_zeros_are_spread(made: Path) -> None:
    rows = journal(made / "zeros")
    shares = {row["name"]: float(row["sparsity"]) for row in rows}
    sizes = {row["name"]: row["shape"][0] * row["shape"][1] for row in rows}
    total = sum(shares[name] * sizes[name] for name in shares) / sum(sizes.values())
    assert 0.55 <= total < 0.57 and len(set(shares.values())) > 1
    loads(made / "zeros")


@pytest.mark.parametrize("share", [0.35, 0.5])
def test_a_size_is_met_from_below(share: float, source: Path, text: Path, tmp_path: Path) -> None:
    """Within 0.5 % of all shards, headers included, and what is coarse in so small a model: one choice, headers."""
    dense = sum(len(content) for content in shards(source).values())
    size = int(share * dense)
    result = api.compress(source, tmp_path / "out", recipe(text, size_bytes=size))
    step = max(row["bytes"] for row in journal(tmp_path / "out")) / 4
    headers = 40 * 3 * result.matrices
    assert size - 0.005 * size - step - headers <= result.bytes <= size


@pytest.mark.parametrize(
    "moment", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(9, marks=pytest.mark.slow)]
)  # measuring, calibrating, compressing
def test_stopped_while_measuring_and_resumed(moment: int, source: Path, text: Path, made: Path, tmp_path: Path) -> None:
    """Stopped when progress is told of for the n-th time, the folder ends with the same bytes and the same database."""
    chosen, out, heard = recipe(text, **BUDGETS["bits"]), tmp_path / "out", 0

    def lines(folder: Path) -> list[str]:
        return sorted((folder / "sensitivity.jsonl").read_text().splitlines())

    def stop(done: float, total: float, what: str) -> None:
        nonlocal heard
        heard += 1
        if heard == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.compress(source, out, chosen, tell=stop)
    assert 0 < len(lines(out)) <= len(lines(made / "bits"))
    api.compress(source, out, chosen)
    assert shards(out) == shards(made / "bits") and lines(out) == lines(made / "bits")


def test_the_config_names_each_matrix_once(made: Path) -> None:
    groups = Checkpoint.open(made / "bits").config["quantization_config"]["config_groups"]
    assert len(groups) > 1
    named = [name for group in groups.values() for name in group["targets"]]
    assert len(named) == len(set(named)) == 14


def test_through_the_command_line(source: Path, text: Path, tmp_path: Path) -> None:
    common = ("--calibration", str(text), "--samples", "4", "--tokens", "32")
    ran = featherweight("compress", source, tmp_path / "out", "--average-bits", "4.5", *common)
    assert ran.code == 0 and 4.2 < ran.last["bits_per_weight"] <= 4.5
    assert json.loads((tmp_path / "out" / "featherweight.json").read_text())["recipe"]["average_bits"] == 4.5
    small = featherweight("compress", source, tmp_path / "small", "--size", "10KB", *common)
    assert small.code == 2 and "10,000 bytes cannot be met: these options reach from" in small.error
    odd = featherweight("compress", source, tmp_path / "odd", "--size", "ten", *common)
    assert odd.code == 2 and "size 'ten': give a number above 0" in odd.error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"average_bits": 1.0}, "cannot be met: these options reach from 2"),
        ({"average_bits": 17.0}, "are more than the 16.0000 bits a weight of the model in 16 bits"),
        ({"size_bytes": 10**9}, "are more than"),
        ({"size_bytes": 10**5, "average_bits": 4.0}, "2 budgets were given and 1 can be kept to"),
        ({"average_bits": 4.0, "sparsity": "0.5"}, "drop the sparsity"),
        ({"non_uniform": True}, "takes a share of zeros and no bits"),
        ({"non_uniform": True, "sparsity": "2:4", "bits": 16}, "takes a share of zeros and no bits"),
        ({"average_bits": 4.0, "method": "rtn"}, "rtn reads none"),
        ({"sparsity": "0.97", "non_uniform": True, "bits": 16}, "a sparsity of 0.9700 cannot be met"),
    ],
    ids=str,
)
def test_budgets_that_cannot_be_kept(
    changes: dict[str, Any], said: str, source: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=said.replace(".", r"\.")):
        api.compress(source, tmp_path / "out", recipe(text, **changes))
    assert not (tmp_path / "out").exists()  # nothing was measured for it
