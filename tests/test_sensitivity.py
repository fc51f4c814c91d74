"""The sensitivity database of the embedded model: measured, stopped and gone on with, calibrated, predicted with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight import data
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.solve import Choices, solve
from featherweight.errors import RequestError
from featherweight.evaluate import evaluate
from featherweight.models.checkpoint import EMBEDDED, Checkpoint, resolve
from featherweight.models.load import load_dense, load_tokenizer
from featherweight.models.tree import build
from featherweight.plan import Database, Option, allocate, predict
from featherweight.recipe import Recipe
from featherweight.stream.probe import Probe
from featherweight.stream.sensitivity import calibrate, measure
from tiny import add_tokenizer, make

RECIPE = Recipe(samples=4, tokens=64, sink_share=0.0)
GRIDS = [Grid(bits, 128, search="minmax", mirror=False, scale_dtype=torch.bfloat16) for bits in (2, 3, 4)]
OPTIONS = [Option.of(rule) for rule in (*GRIDS, Pattern(keep=2, of=4), Joint(GRIDS[2], Pattern(0.5)))]
LABELS = ["2b-g128", "3b-g128", "4b-g128", "2:4", "50%+4b-g128"]
CHOICES = Choices(refine=0, mask="wanda", resolve=2)


def windows(source: str, count: int, length: int) -> Tensor:
    """Windows of a text for the embedded model."""
    tokens_T = data.tokens(load_tokenizer(EMBEDDED), [source])
    return data.evaluation_windows(tokens_T, length)[::5][:count]


@pytest.fixture(scope="module")
def probes_ST() -> Tensor:
    return windows("builtin", 3, 96)


@pytest.fixture(scope="module")
def probe() -> Probe:
    """On other text than what losses are calibrated on."""
    return Probe(EMBEDDED, windows("builtin:evaluation", 3, 96), torch.device("cpu"))


@pytest.fixture(scope="module")
def kept() -> dict[tuple[str, str], Tensor]:
    return {}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, kept: dict[tuple[str, str], Tensor]) -> Path:
    path = tmp_path_factory.mktemp("database") / "feather.jsonl"

    def keep(name: str, label: str, values_RC: Tensor) -> None:
        kept[name, label] = values_RC

    measure(EMBEDDED, path, RECIPE, OPTIONS, "cpu", CHOICES, keep=keep)
    return path


@pytest.fixture(scope="module")
def calibrated(measured: Path, kept: dict[tuple[str, str], Tensor], probes_ST: Tensor) -> Iterator[Database]:
    path = measured.with_name("calibrated.jsonl")
    shutil.copy(measured, path)
    database = Database.open(path)
    yield calibrate(
        EMBEDDED, database, probes_ST, RECIPE, OPTIONS, "cpu", CHOICES, values=lambda name, label: kept[name, label]
    )


def test_every_matrix_and_option_is_there(measured: Path) -> None:
    database = Database.open(measured)
    tree = build(Checkpoint.open(resolve(EMBEDDED)))
    matrices = [matrix for block in tree.blocks for matrix in block.matrices]
    assert list(database.rows) == [matrix.name for matrix in matrices]
    for matrix in matrices:
        row = database.rows[matrix.name]
        assert list(row.options) == LABELS and (row.rows, row.columns) == (matrix.rows, matrix.columns)
        two, three, four = (row.options[label] for label in LABELS[:3])
        assert two.loss > three.loss > four.loss > 0 and two.relative_error > three.relative_error > four.relative_error
        assert two.bytes < three.bytes < four.bytes == OPTIONS[2].bytes(matrix.rows, matrix.columns)
        assert row.options["2:4"].kept == row.options["50%+4b-g128"].kept == matrix.rows * matrix.columns // 2
        assert two.relative_loss == pytest.approx(two.loss / row.energy) and two.relative_error <= two.relative_loss
    fused = {layer.group for layer in database.layers()}
    assert len(fused) == 4 * len(tree.blocks)  # q k v, o, gate up, down


def test_numbers_are_those_of_the_solver_on_the_original_inputs(tmp_path: Path, text: Path) -> None:
    source = add_tokenizer(make("gpt2", tmp_path / "source"))
    recipe = Recipe(samples=4, tokens=32, sink_share=0.0, calibration=(str(text),))
    options = [Option.of(Grid(3, 32)), Option.of(Pattern(0.5)), Option.of(None)]
    values: dict[tuple[str, str], Tensor] = {}
    database = measure(
        source,
        tmp_path / "d",
        recipe,
        options,
        "cpu",
        CHOICES,
        keep=lambda name, label, v: values.update({(name, label): v}),
    )
    model: Any = load_dense(source)
    heard: list[Tensor] = []
    path = "transformer.h.1.mlp.c_proj"
    name = next(n for n in database.rows if n.endswith("h.1.mlp.c_proj"))
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    from featherweight.stream.compress import calibration_ids

    ids_ST = calibration_ids(source, recipe)
    with torch.no_grad():
        model(ids_ST)
    x_TC = heard[0].flatten(0, -2)
    weight_RC = model.get_submodule(path).weight.T.detach()
    problem = LayerProblem(weight_RC, x_TC.T @ x_TC / len(x_TC), len(x_TC), recipe.relative_damping)
    for option in options[:2]:
        assert option.rule is not None
        solution = solve(problem, option.rule, CHOICES)
        found = database.rows[name].options[option.label]
        assert found.loss == pytest.approx(solution.certificate, rel=0.05)
        output_TR = x_TC @ (weight_RC - values[name, option.label]).T
        wanted = output_TR.square().sum() / (x_TC @ weight_RC.T).square().sum()
        assert found.relative_error == pytest.approx(float(wanted), rel=1e-2)
    assert database.rows[name].options["dense"].loss == 0.0 and database.damage(name, "dense") == 0.0


def test_a_killed_run_goes_on(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lines = tmp_path / "half.jsonl", measured.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:13]) + lines[13][:50])  # 12 matrices: one block and most of the next
    solved: list[str] = []
    measure(EMBEDDED, path, RECIPE, OPTIONS, "cpu", CHOICES, keep=lambda name, label, _: solved.append(name))
    again = path.read_text().splitlines()
    assert len(again) == len(lines) and not any(".layers.0." in name for name in solved)
    for before, now in zip(map(json.loads, lines[1:]), map(json.loads, again[1:]), strict=True):
        assert before["name"] == now["name"]
        for label in LABELS:
            assert now["options"][label]["loss"] == pytest.approx(before["options"][label]["loss"], rel=1e-4)

    def fail(*_: object) -> None:
        raise AssertionError("a complete database needs no walk")

    monkeypatch.setattr("featherweight.stream.walk.BlockRunner", fail)
    assert measure(EMBEDDED, path, RECIPE, OPTIONS, "cpu", CHOICES).rows == Database.open(path).rows


def test_another_request_is_refused(measured: Path, tmp_path: Path, text: Path, probes_ST: Tensor) -> None:
    for recipe, options, words in (
        (RECIPE.but(damping=0.2), OPTIONS, r'recipe = {"damping": 0.1}, and now {"damping": 0.2}'),
        (RECIPE.but(seed=1), OPTIONS, "ids_sha256"),
        (RECIPE, OPTIONS[:2], 'options = {"4b-g128".*and now nothing more'),
        (RECIPE, [Option("2b-g128", GRIDS[1]), *OPTIONS[1:]], "options"),
        (RECIPE, [OPTIONS[0], OPTIONS[0]], "two options have one label"),
        (Recipe(method="rtn"), OPTIONS, "need calibration text"),
        (RECIPE, [Option.of(Grid(4, 96))], "which none of 4b-g96 divides"),
    ):
        with pytest.raises(RequestError, match=words):
            measure(EMBEDDED, measured, recipe, options, "cpu", CHOICES)
    other = add_tokenizer(make("llama", tmp_path / "other"))
    with pytest.raises(RequestError, match="was measured with"):
        recipe = RECIPE.but(calibration=(str(text),))
        measure(other, measured, recipe, [Option.of(Grid(4, 32))], "cpu")
    part = tmp_path / "part.jsonl"
    part.write_text("".join(measured.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RequestError, match=r"lacks model.layers.3.*measure to the end"):
        calibrate(EMBEDDED, Database.open(part), probes_ST, RECIPE, OPTIONS, "cpu", CHOICES)
    with pytest.raises(RequestError, match="has no option 9b, only 2b-g128"):
        calibrate(EMBEDDED, Database.open(measured), probes_ST, RECIPE, OPTIONS, "cpu", CHOICES, points=["9b"])


def test_the_probe_measures_the_kl_of_the_whole_model(
    probe: Probe, kept: dict[tuple[str, str], Tensor], measured: Path
) -> None:
    dense, changed = (load_dense(EMBEDDED, dtype=torch.float32) for _ in range(2))
    for block in (0, 2, 3):
        names = [name for name in Database.open(measured).rows if f".layers.{block}." in name][-2:]
        values = {name: kept[name, "2b-g128"] for name in names}
        changed.load_state_dict(dense.state_dict())
        for name, values_RC in values.items():
            changed.get_submodule(name).weight.data.copy_(values_RC)  # type: ignore[union-attr, operator]
        wanted = evaluate(changed, probe.windows_ST, dense).kl_nats
        assert wanted and probe.kl(values) == pytest.approx(wanted, rel=1e-3)
        assert probe.kl(values) == probe.kl(values)
    assert probe.kl({}) < 1e-9


def test_predictions_pass_through_what_was_measured_and_rank_options(
    calibrated: Database, kept: dict[tuple[str, str], Tensor], probe: Probe, probes_ST: Tensor
) -> None:
    names = list(calibrated.rows)
    assert set(calibrated.points) == set(names)
    same_text = Probe(EMBEDDED, probes_ST, torch.device("cpu"))
    for name in names[::9]:
        label = next(iter(calibrated.points[name]))
        assert predict(calibrated, {name: label}) == pytest.approx(same_text.kl({name: kept[name, label]}), rel=1e-3)
    predicted = [predict(calibrated, dict.fromkeys(names, label)) for label in LABELS]
    truth = [probe.kl({name: kept[name, label] for name in names}) for label in LABELS]
    assert predicted[0] > predicted[1] > predicted[2]
    assert truth[0] > truth[1] > truth[2]
    assert predicted[0] > max(predicted[3:]) and min(predicted[3:]) > predicted[2]
    assert truth[0] > max(truth[3:]) and min(truth[3:]) > truth[2]
    assert all(0.4 < one / other < 2.5 for one, other in zip(predicted, truth, strict=True))


def test_allocation_from_the_database(calibrated: Database, kept: dict[tuple[str, str], Tensor], probe: Probe) -> None:
    names = list(calibrated.rows)
    uniform = dict.fromkeys(names, "3b-g128")
    budget = sum(calibrated.rows[name].options["3b-g128"].bytes for name in names)
    found = allocate(calibrated.layers(), budget)
    assert 0.97 * budget <= found.bytes <= budget  # few options, coarse steps
    assert predict(calibrated, found.choices) == pytest.approx(found.damage)
    assert found.damage <= predict(calibrated, uniform)
    choices = found.choices
    assert choices["model.layers.0.self_attn.q_proj"] == choices["model.layers.0.self_attn.v_proj"]
    assert probe.kl({n: kept[n, choices[n]] for n in names}) < probe.kl({n: kept[n, uniform[n]] for n in names})


def test_calibration_solves_again_what_was_not_kept_and_goes_on(
    calibrated: Database, kept: dict[tuple[str, str], Tensor], tmp_path: Path, probes_ST: Tensor
) -> None:
    path = tmp_path / "again.jsonl"
    path.write_text("".join(calibrated.path.read_text().splitlines(keepends=True)[:-7]))
    database = Database.open(path)
    calibrate(EMBEDDED, database, probes_ST, RECIPE, OPTIONS, "cpu", CHOICES)
    assert database.points.keys() == calibrated.points.keys()
    for name, points in calibrated.points.items():
        for label, (error, kl) in points.items():
            assert database.points[name][label] == pytest.approx((error, kl), rel=0.05)

    def values(name: str, label: str) -> Tensor:
        return kept[name, label]

    calibrate(
        EMBEDDED,
        database,
        probes_ST[:1],
        RECIPE,
        OPTIONS,
        "cpu",
        CHOICES,
        values=values,
        points=["3b-g128"],
        unit="group",
    )
    database = Database.open(path)
    assert {tuple(points) for points in database.points.values()} == {("3b-g128",)}
    q, k = (database.points[f"model.layers.1.self_attn.{which}_proj"]["3b-g128"][1] for which in "qk")
    assert q == k
