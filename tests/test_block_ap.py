"""Block-AP: its gradients, what it may never make worse, and that what is stored is what was trained.

Shapes: S sequences, T tokens, D width, R outputs, C inputs, G groups, N inputs of one group.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight import api
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.solution import AnySolution, Solution
from featherweight.core.solve import solve
from featherweight.core.sweep import round_to_nearest
from featherweight.errors import FallbackWarning, RequestError
from featherweight.models.load import load_dense
from featherweight.recipe import Recipe
from featherweight.recipes import RECIPES
from featherweight.recipes import by_name as recipe_by_name
from featherweight.stream import compress as pipeline
from featherweight.stream import hidden
from featherweight.stream import trained as glue
from featherweight.stream.layerwise import layerwise
from featherweight.stream.tune import Tuning
from featherweight.train import block_ap as training
from featherweight.train.fake_quant import fake_quantize, softly, stored, whole
from featherweight.train.sequences import Sequences
from featherweight.train.trainable import NEAR, Trainable, TrainedFloats, TrainedGrid, TrainedRounding, beginning
from runs import featherweight, journal, model_files, recipe, shards
from tiny import add_tokenizer, make, write_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("source")))


def training_recipe(text: Path, **changes: Any) -> Recipe:
    """32 windows of 32 tokens, eight of them held out; two epochs of six steps."""
    small = {"samples": 32, "held_out": 0.25, "epochs": 2, "batch": 4, "symmetric": False, "bits": 2}
    rates = {"weight_rate": 0.0005, "scale_rate": 0.0005}
    return recipe(
        text, **{"method": "block-ap", "target": "original", "search": "hessian", **small, **rates, **changes}
    )


# --- gradients


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_straight_through_gradients_are_the_papers() -> None:
    """Element by element, as 2407.11062 defines them, negative scales and clipped weights among them."""
    weight_RGN = drawn(5, 3, 8).requires_grad_()
    scale_RG1 = (0.3 + 0.2 * drawn(5, 3, 1, seed=1)).requires_grad_()
    zero_RG1 = torch.randint(-1, 5, (5, 3, 1), generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    upstream_RGN = drawn(5, 3, 8, seed=3)
    value_RGN = fake_quantize(weight_RGN, scale_RG1, zero_RG1, 0, 3)
    value_RGN.backward(upstream_RGN)
    expected = torch.zeros_like(weight_RGN), torch.zeros_like(scale_RG1), torch.zeros_like(zero_RG1)
    clipped = 0
    for r, g, n in torch.cartesian_prod(torch.arange(5), torch.arange(3), torch.arange(8)).tolist():
        w, s, z = weight_RGN[r, g, n].item(), scale_RG1[r, g, 0].item(), zero_RG1[r, g, 0].item()
        level, up = round(w / s) + z, upstream_RGN[r, g, n].item()
        code = min(max(level, 0), 3)
        assert value_RGN[r, g, n].item() == pytest.approx((code - z) * s)
        inside = code == level
        clipped += not inside
        expected[0][r, g, n] = up if inside else 0
        expected[1][r, g, 0] += up * (round(w / s) - w / s if inside else code - z)
        expected[2][r, g, 0] += 0 if inside else -s * up
    assert 10 < clipped < 110 and bool((scale_RG1 < 0).any())
    for leaf, gradient in zip((weight_RGN, scale_RG1, zero_RG1), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_scales_of_trained_steps_have_their_true_gradient() -> None:
    """Held in steps, weights move with their scale: the gradient is that of the values themselves."""
    layer = TrainedGrid(*some_start(Grid(2, 8, symmetric=False, scale_dtype=torch.float32)), 0, relative=True)
    layer.double()
    layer.unit_RG1 = layer.unit_RG1.double()
    upstream_RC = drawn(6, 32, seed=4)
    (layer.values() * upstream_RC).sum().backward()
    before, step = layer.scale_RG1.detach().clone(), 1e-4
    for r, g in ((0, 0), (3, 2), (5, 3)):
        ends = []
        for sign in (1, -1):
            layer.scale_RG1.data = before.clone()
            layer.scale_RG1.data[r, g] += sign * step
            ends.append(float((exact_values(layer) * upstream_RC).sum()))
        assert layer.scale_RG1.grad is not None
        assert float(layer.scale_RG1.grad[r, g]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def exact_values(layer: TrainedGrid) -> Tensor:
    """Values at scales that are not rounded to what is stored: float64 differences need more digits than float32."""
    grid, scale_RG1 = layer.start.grid, layer.scale_RG1 * layer.unit_RG1
    zero_RG1 = layer.zero_RG1.double()
    return fake_quantize(layer.latent_RGN * scale_RG1, scale_RG1, zero_RG1, grid.bottom, grid.top).flatten(-2).detach()


def test_soft_steps() -> None:
    offset = torch.linspace(-1.31, 1.42, 55, dtype=torch.float64, requires_grad=True)
    for hardness in (0.0, 1.0, 7.0):
        assert torch.autograd.gradcheck(lambda x, h=hardness: softly(x, h), (offset,))
    assert torch.equal(softly(offset, 0.0), offset)
    far = (offset - offset.floor() - 0.5).abs() > 0.1
    torch.testing.assert_close(softly(offset, 200.0)[far], offset.round()[far])


def test_what_rounds_in_the_forward_pass_lets_gradients_by() -> None:
    zero = torch.tensor([-3.2, 0.4, 1.6, 9.0], requires_grad=True)
    rounded = whole(zero, 1, 3)
    rounded.sum().backward()
    assert rounded.tolist() == [1, 1, 2, 3] and zero.grad is not None and zero.grad.tolist() == [1, 1, 1, 1]
    scale = torch.tensor([0.1234567, 1.0], requires_grad=True)
    kept = stored(scale, torch.bfloat16)
    kept.sum().backward()
    assert torch.equal(kept, scale.detach().bfloat16().float()) and scale.grad is not None
    assert scale.grad.tolist() == [1, 1]


# --- one layer in training


def some_problem(rows: int = 6, columns: int = 32) -> LayerProblem:
    inputs_TC = drawn(200, columns, seed=5).float()
    return LayerProblem(drawn(rows, columns, seed=6).float(), inputs_TC.T @ inputs_TC / 200, 200)


def some_start(grid: Grid) -> tuple[Solution, Tensor]:
    problem = some_problem()
    start = round_to_nearest(problem, grid)
    return start, beginning(start, problem.weight_RC, NEAR)


GRIDS = {
    "2 asymmetric": Grid(2, 16, symmetric=False, scale_dtype=torch.bfloat16),
    "3 symmetric": Grid(3, 32, scale_dtype=torch.float16),
    "4 asymmetric": Grid(4, 8, symmetric=False, scale_dtype=torch.float32),
    "ternary": Grid(1.58, None, scale_dtype=torch.bfloat16),
}


def trainables(grid: Grid) -> dict[str, Trainable]:
    problem = some_problem()
    start, latent_RC = some_start(grid)
    joint = solve(problem, Joint(grid, Pattern(0.5)))
    floats = solve(problem, Pattern(0.5))
    assert isinstance(joint, Solution) and not isinstance(floats, Solution)
    return {
        "steps": TrainedGrid(start, latent_RC, 0, relative=True),
        "absolute": TrainedGrid(start, problem.weight_RC, 0, relative=False),
        "rounding": TrainedRounding(start, problem.weight_RC),
        "masked": TrainedGrid(joint, beginning(joint, problem.weight_RC, NEAR), 0, relative=True),
        "masked rounding": TrainedRounding(joint, problem.weight_RC),
        "floats": TrainedFloats(floats, torch.bfloat16, relative=True),
    }


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_layer_begins_where_it_was_and_is_stored_as_it_is_trained(grid: Grid) -> None:
    for kind, layer in trainables(grid).items():
        start = layer.start  # type: ignore[attr-defined]
        with torch.no_grad():
            if kind != "floats":
                torch.testing.assert_close(layer.values(), start.values(), rtol=0, atol=0)
            generator = torch.Generator().manual_seed(7)
            for parameter in (*layer.weights, *layer.steps):
                scale = 5.0 if parameter is getattr(layer, "zero_RG1", None) else 0.3
                parameter += scale * torch.randn(parameter.shape, generator=generator)
            layer.tidy()
            solution = layer.solution()
            torch.testing.assert_close(solution.values(), layer.values(), rtol=0, atol=0)
            assert not torch.equal(solution.values(), start.values()), kind
        if start.keep_RC is not None:
            assert solution.keep_RC is start.keep_RC and not solution.values()[~start.keep_RC].any()
        if isinstance(solution, Solution):
            assert int(solution.codes_RC.min()) >= grid.bottom and int(solution.codes_RC.max()) <= grid.top
            assert int(solution.zeros_RG.max()) <= grid.top
            assert solution.scales_RG.dtype == grid.scale_dtype and bool((solution.scales_RG != 0).all())
        if "rounding" in kind:
            moved = (solution.codes_RC.int() - start.codes_RC.int()).abs()
            assert int(moved.max()) == 1


def test_zeros_keep_to_what_the_format_holds() -> None:
    start, latent_RC = some_start(Grid(2, 16, symmetric=False, scale_dtype=torch.bfloat16))
    start = dataclasses.replace(start, zeros_RG=start.zeros_RG.clamp(min=1))
    layer = TrainedGrid(start, latent_RC, 1, relative=True)
    layer.zero_RG1.data -= 9
    assert layer.solution().zeros_RG.unique().tolist() == [1]


# --- one block in training


class Net(torch.nn.Module):
    """Two matrices, one of them the wrong way round as in a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(32, 6, bias=False)
        self.second = torch.nn.Module()
        self.second.weight = torch.nn.Parameter(drawn(6, 32, seed=8).float())
        self.first.weight.data = some_problem().weight_RC.clone()

    def forward(self, hidden_STD: Tensor) -> Tensor:
        found: Tensor = hidden_STD + torch.tanh(self.first(hidden_STD)) @ self.second.weight
        return found


def small_block(schedule: training.Schedule) -> tuple[Net, dict[str, Trainable], Sequences]:
    net = Net()
    inputs_STD = drawn(60, 8, 32, seed=9).float()
    with torch.no_grad():
        targets_STD = net(inputs_STD)
    grid = Grid(2, 16, symmetric=False, scale_dtype=torch.float32)
    layers: dict[str, Trainable] = {}
    for path, weight_RC in (("first", net.first.weight.detach()), ("second", net.second.weight.detach().T)):
        problem = LayerProblem(weight_RC.contiguous(), torch.eye(weight_RC.shape[1]))
        rule = grid if path == "first" else dataclasses.replace(grid, group_size=3)
        start = round_to_nearest(problem, rule)
        layers[path] = TrainedGrid(start, beginning(start, problem.weight_RC, NEAR), 0, relative=True)
    layers["second"].transposed = True
    return net, layers, Sequences(inputs_STD, targets_STD, 12, CPU)


SCHEDULE = training.Schedule(5, 4, 0.01, 0.005, True, 0)


def test_training_lowers_the_held_out_loss_and_leaves_the_module_alone() -> None:
    net, layers, sequences = small_block(SCHEDULE)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    shares: list[float] = []
    outcome = training.block_ap(net, net, layers, sequences, SCHEDULE, shares.append)
    assert outcome.finite and outcome.best < 0.8 * outcome.start and outcome.epoch > 0
    assert len(shares) == 5 * 12 and shares == sorted(shares)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [name for name, _ in net.named_parameters()] == ["first.weight", "second.weight"]
    net.first.weight.data = outcome.solutions["first"].values()
    net.second.weight.data = outcome.solutions["second"].values().T
    with torch.no_grad():
        held = slice(48, 60)
        actual = training.block_loss(net(sequences.inputs_STD[held]), sequences.targets_STD[held], True)
    assert float(actual) == pytest.approx(outcome.best, rel=1e-5)


def test_training_that_only_harms_keeps_the_start() -> None:
    wild = dataclasses.replace(SCHEDULE, weight_rate=0.9, scale_rate=0.9, epochs=2)
    net, layers, sequences = small_block(wild)
    codes = {path: layer.solution().codes_RC for path, layer in layers.items()}
    outcome = training.block_ap(net, net, layers, sequences, wild, lambda share: None)
    assert (outcome.epoch, outcome.best) == (0, outcome.start)
    assert all(torch.equal(solution.codes_RC, codes[path]) for path, solution in outcome.solutions.items())


def test_held_out_sequences_are_not_trained_on() -> None:
    net, layers, sequences = small_block(SCHEDULE)
    training.block_ap(net, net, layers, sequences, SCHEDULE, lambda share: None)
    again, others, changed = small_block(SCHEDULE)
    changed.inputs_STD[-1] *= 1.5  # what is held out decides which epoch is kept: here the last one both times
    one_epoch = dataclasses.replace(SCHEDULE, epochs=1)
    first = training.block_ap(again, again, others, changed, one_epoch, lambda share: None)
    net, layers, sequences = small_block(SCHEDULE)
    second = training.block_ap(net, net, layers, sequences, one_epoch, lambda share: None)
    assert first.epoch == second.epoch == 1 and first.best != second.best
    for path, solution in first.solutions.items():
        torch.testing.assert_close(second.solutions[path].values(), solution.values(), rtol=0, atol=0)


# --- the whole of compress


CASES: dict[str, dict[str, Any]] = {
    "2 asymmetric": {},
    "3 symmetric": {"bits": 3, "symmetric": True, "group_size": 64},
    "4 asymmetric, gptq": {"bits": 4, "format": "gptq_v2"},
    "ternary": {"bits": 1.58, "symmetric": True},
    "from rounding": {"start": "rtn"},
    "as published": {"start": "rtn", "units": "absolute", "search": "minmax"},
    "rounding": {"tune": "rounding"},
    "2:4 and 4 bits": {"bits": 4, "sparsity": "2:4"},
    "half, floats": {"bits": 16, "sparsity": "0.5"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_model_trained_block_by_block(
    changes: dict[str, Any], source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = training_recipe(text, **changes)
    starts: list[Mapping[str, AnySolution]] = []

    def noting(*arguments: Any) -> Mapping[str, AnySolution]:
        starts.append(layerwise(*arguments))
        return starts[-1]

    monkeypatch.setattr(glue, "layerwise", noting)
    result = api.compress(source, tmp_path / "out", chosen)
    rows = journal(tmp_path / "out")
    assert result.matrices == len(rows) == 14
    for row in rows:
        assert row["block_loss"] <= row["block_loss_before"] and (row["epoch"] > 0) == (
            row["block_loss"] < row["block_loss_before"]
        )
        assert row["loss"] > 0 and 0 < row["relative_loss"] < 1
    assert rows[0]["epoch"] > 0
    assert rows[0]["block_loss"] == pytest.approx(first_block_loss(source, tmp_path / "out", chosen), rel=1e-3)
    model = api.load(tmp_path / "out", "cpu", torch.float32, kernel="reference")
    for number, (layers, start) in enumerate(zip(model.model.layers, starts, strict=True)):
        for path, before in start.items():
            after = layers.get_submodule(path).solution()
            assert torch.equal(after.values(), before.values()) == (rows[7 * number]["epoch"] == 0)
            if before.keep_RC is not None:
                assert torch.equal(after.keep_RC, before.keep_RC)
                assert not after.values()[~before.keep_RC].any()


def first_block_loss(source: Path, out: Path, chosen: Recipe) -> float:
    """The held-out loss of the first block of the stored model, by transformers alone."""
    ids_ST = pipeline.calibration_ids(source, chosen)
    assert ids_ST is not None
    held_ST = ids_ST[-chosen.held_out_samples :]
    with torch.no_grad():
        outputs = [
            model(input_ids=held_ST, output_hidden_states=True).hidden_states[1]
            for model in (api.load(out, "cpu", torch.float32, kernel="dense"), load_dense(source, CPU, torch.float32))
        ]
    error_ST, power_ST = (outputs[0] - outputs[1]).square().mean(-1), outputs[1].square().mean(-1)
    return float((error_ST / power_ST if chosen.units == "steps" else error_ST).mean())


def test_resumed_as_uninterrupted(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that was stopped has its hidden states in files, the other one in memory."""
    chosen, places = training_recipe(text), set()
    inner = hidden.room

    def room(*arguments: Any) -> str:
        places.add(inner(*arguments))
        return inner(*arguments)

    monkeypatch.setattr(hidden, "room", room)

    class Stop(Exception):
        pass

    def stopping(done: float, _total: float, _what: str) -> None:
        if done > 1.5:
            raise Stop

    api.compress(source, tmp_path / "whole", chosen)
    assert places == {"memory"}
    monkeypatch.setattr(hidden, "MOST_MEMORY_BYTES", 0)
    with pytest.raises(Stop):
        api.compress(source, tmp_path / "out", chosen, tell=stopping)
    assert len(shards(tmp_path / "out")) == 2
    api.compress(source, tmp_path / "out", chosen)
    assert places == {"memory", "disk"} and not list((tmp_path / "out").glob("*scratch"))
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


def test_a_loss_that_is_not_finite_leaves_the_block_as_it_was(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = training_recipe(text, epochs=3)
    api.compress(source, tmp_path / "calm", chosen)
    blocks, inner = [0], glue.block_ap

    def failing(module: Any, run: Any, layers: Any, *rest: Any) -> training.Outcome:
        """The second block's weights become NaN after two epochs."""
        blocks[0] += 1
        if blocks[0] == 2:
            steps, real = [0], training.Stepper.step

            def step(*arguments: Any) -> None:
                real(*arguments)
                steps[0] += 1
                if steps[0] == 14:
                    next(iter(layers.values())).weights[0].data += torch.nan

            monkeypatch.setattr(training.Stepper, "step", step)
        return inner(module, run, layers, *rest)

    monkeypatch.setattr(glue, "block_ap", failing)
    with pytest.warns(FallbackWarning, match=r"block of model\.layers\.1\.self_attn\.q_proj .* not finite"):
        api.compress(source, tmp_path / "out", chosen)
    rows, calm = journal(tmp_path / "out"), journal(tmp_path / "calm")
    assert [row.get("not_finite") for row in rows] == 7 * [None] + 7 * [1.0]
    assert all(row["epoch"] == 0 and row["block_loss"] == row["block_loss_before"] for row in rows[7:])
    assert [row["block_loss"] for row in rows[:7]] == [row["block_loss"] for row in calm[:7]]
    assert shards(tmp_path / "out").keys() == shards(tmp_path / "calm").keys()
    blocks[0] = 0
    with pytest.raises(RequestError, match=r"layers\.1\.self_attn\.q_proj .* not finite: .* or use --diverged restore"):
        api.compress(source, tmp_path / "stopped", chosen.but(diverged="error"))
    assert len(shards(tmp_path / "stopped")) == 2


def test_recipes_of_the_paper() -> None:
    for name, bits, group in (("w2g64", 2, 64), ("w3g128", 3, 128), ("w4g128", 4, 128)):
        found = RECIPES[f"papers.efficientqat_{name}"]()
        assert (found.bits, found.group_size, found.symmetric, found.search) == (bits, group, False, "minmax")
        assert (found.start, found.epochs, found.batch, found.scale_rate) == ("rtn", 2, 2, 1e-4)
        assert found.weight_rate == (2e-5 if bits == 2 else 1e-5)
        assert found.samples - found.held_out_samples == 4096 and found.held_out_samples == 64
    for name in ("best_2bit", "best_3bit"):
        assert recipe_by_name(name).trains


def test_held_out_windows_share_no_text_with_the_others(source: Path, tmp_path: Path) -> None:
    """Every word is there once; each source gives its end to the held-out windows."""
    files = []
    for letter in "ab":
        files.append(tmp_path / f"{letter}.txt")
        files[-1].write_text(" ".join(f"{letter}{number:05d}" for number in range(500)))
    chosen = training_recipe(files[0], calibration=tuple(map(str, files)), samples=40, tokens=60)
    ids_ST = pipeline.calibration_ids(source, chosen)
    assert ids_ST is not None and len(ids_ST) == 40 and chosen.held_out_samples == 10
    tokenizer = pipeline_tokenizer(source)
    words = [
        {word for row in part.tolist() for word in tokenizer.decode(row).split()[1:-1]}
        for part in (ids_ST[:-10], ids_ST[-10:])
    ]
    assert all(len({word[0] for word in part}) == 2 for part in words)
    assert not words[0] & words[1]


def test_text_that_is_held_out_and_trained_on_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    """A second file that holds the first one three times."""
    (tmp_path / "again.txt").write_text(3 * text.read_text())
    chosen = training_recipe(text, calibration=(str(text), str(tmp_path / "again.txt")), samples=256, held_out=0.1)
    with pytest.raises(RequestError, match=r"\d+% of the text held out is in the text trained on too, and at most 10%"):
        pipeline.calibration_ids(source, chosen)
    assert pipeline.calibration_ids(source, chosen.but(calibration=(str(text),))) is not None


def pipeline_tokenizer(source: Path) -> Any:
    from featherweight.models.load import load_tokenizer

    return load_tokenizer(source)


# --- bad requests


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one sample": ({"samples": 1}, r"at least 2 in all, and 1 was asked for: raise --samples"),
    "target": ({"target": "drifted"}, r"towards the original model, not target drifted"),
    "held out": ({"held_out": 1.0}, r"held_out must lie between 0 and 1, not 1\.0"),
    "nothing held out": ({"held_out": 0.0}, r"held_out must lie between 0 and 1, not 0\.0"),
    "epochs": ({"epochs": 0}, r"epochs must be 1 or more, not 0"),
    "batch": ({"batch": 0}, r"batch must be 1 or more, not 0"),
    "rate": ({"weight_rate": 1.0}, r"weight_rate must be at least 0 and less than 1, not 1\.0"),
    "start": ({"start": "block-ap"}, r"start must be gptq, obq or rtn, not 'block-ap'"),
    "tune": ({"tune": "zeros"}, r"tune must be weights or rounding, not 'zeros'"),
}


@pytest.mark.parametrize(("changes", "sentence"), BAD.values(), ids=BAD)
def test_bad_requests(changes: dict[str, Any], sentence: str, text: Path) -> None:
    with pytest.raises(RequestError, match=sentence):
        training_recipe(text, **changes)


def test_too_little_text_to_hold_any_out(source: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "short.txt", words=20)
    with pytest.raises(RequestError, match=r"held out .*, the calibration text has \d+ tokens and one window needs 32"):
        api.compress(source, tmp_path / "out", training_recipe(text))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_command_line(source: Path, text: Path, tmp_path: Path) -> None:
    options = "--method block-ap --bits 3 --group-size 32 --samples 6 --tokens 32 --epochs 1 --batch 2 --held-out 0.34"
    ran = featherweight("compress", source, tmp_path / "out", *options.split(), "--calibration", text)
    assert ran.code == 0 and ran.last["matrices"] == 14, ran.err
    refused = featherweight("compress", source, tmp_path / "no", *options.replace("--samples 6", "--samples 1").split())
    assert "at least 2" in refused.error


def test_no_warning_by_default(source: Path, text: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        api.compress(source, tmp_path / "out", training_recipe(text, epochs=1))


@pytest.mark.slow
def test_two_bits_of_a_real_model(tmp_path: Path) -> None:
    """feather-tiny at equal bytes: less KL than the default, on held-out text (by a quarter) and on another kind."""
    small = {"samples": 256, "tokens": 256}
    default = Recipe(bits=2, group_size=64, symmetric=False).but(**small)
    found = {}
    for name, chosen in (("default", default), ("best", recipe_by_name("best_2bit").but(epochs=3, **small))):
        result = api.compress("feather-tiny", tmp_path / name, chosen, "cpu")
        settings = Tuning(samples=256, tokens=256, batch=4, rate=0.01)
        tuned = api.tune(
            tmp_path / name, ["builtin"], to=tmp_path / f"{name} tuned", against="feather-tiny", settings=settings,
            device="cpu",
        )  # fmt: skip
        other = [
            api.evaluate(tmp_path / f, context=512, against="feather-tiny")["kl_nats"] for f in (name, f"{name} tuned")
        ]
        found[name] = (result.bytes, tuned["kl_nats_before"], tuned["kl_nats"], *other)
    bytes_before, start, scales_alone, other_start, _ = found["default"]
    assert found["best"][0] == bytes_before
    assert found["best"][1] < 0.75 * start and found["best"][2] < 0.68 * start and scales_alone < 0.85 * start
    assert found["best"][3] < 0.82 * other_start and found["best"][4] < 0.8 * other_start
