"""tune: gradients of packed layers, codes that stay, and folders that are whole whatever happens.

Shapes: S sequences, T tokens, R outputs, C inputs, G groups.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

import featherweight
from featherweight import api, formats
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.solve import Choices, solve
from featherweight.errors import RequestError
from featherweight.linear import CompressedLinear
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.load import load_dense
from featherweight.stream import tune as module
from featherweight.stream import tuning
from featherweight.stream.tune import Tuning
from featherweight.stream.tuned import TunedModel, Wanted
from featherweight.train.e2e_qp import Schedule, Trained, Tuner, divergence, rate_at
from featherweight.train.sharding import is_sharded, mine, whole
from featherweight.train.tuned_linear import TunedLinear
from featherweight.train.tuned_weights import TunedWeights
from runs import MANIFEST, model_files, recipe, same_bytes, tensors_of
from runs import featherweight as command
from tiny import add_tokenizer, make, write_text

CPU = torch.device("cpu")
SETTINGS = Tuning(samples=12, tokens=32, held_out=0.34, epochs=3, batch=4, rate=0.01)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("long") / "long.txt", words=3000))


@pytest.fixture(scope="module")
def packed(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bits with zeros."""
    out = tmp_path_factory.mktemp("packed") / "out"
    api.compress(source, out, recipe(text, bits=2, symmetric=False, search="hessian"))
    return out


# --- one layer


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(format_name: str, symmetric: bool = False, rows: int = 16, columns: int = 96) -> CompressedLinear:
    format = formats.by_name(format_name)
    grid = Grid(4, 32, symmetric, scale_dtype=format.scale_dtype(torch.float32))
    rule = Joint(grid, Pattern(keep=2, of=4)) if format_name == "sparse" else grid
    problem = LayerProblem(drawn(rows, columns, seed=1), torch.eye(columns))
    solution = solve(problem, rule, Choices(lowest_zero=format.lowest_zero(grid)))
    bias_R = drawn(rows, seed=2)
    return CompressedLinear.from_tensors(format, rule, format.pack(solution), bias_R, torch.float32, "reference")


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq_v2", "gptq", "sparse"])
def test_gradients_are_those_of_the_dense_weight(format: str) -> None:
    layer = layer_of(format)
    solution = layer.solution()
    tuned = TunedLinear(layer, "layer", zeros=format != "sparse")
    x_TC = drawn(2, 5, 96, seed=3).requires_grad_()
    upstream_TR = drawn(2, 5, 16, seed=4)
    found_TR = tuned(x_TC)
    found_TR.backward(upstream_TR)
    # by autograd, with everything spelt out
    scale_RG1 = solution.scales_RG.float().unsqueeze(-1).requires_grad_()
    zero_RG1 = solution.zeros_RG.float().unsqueeze(-1).requires_grad_()
    x2_TC = x_TC.detach().clone().requires_grad_()
    value_RC = ((solution.codes_RC.unflatten(-1, (3, 32)).float() - zero_RG1) * scale_RG1).flatten(-2)
    expected_TR = functional.linear(x2_TC, value_RC, layer.bias)
    expected_TR.backward(upstream_TR)
    torch.testing.assert_close(found_TR, expected_TR)
    torch.testing.assert_close(x_TC.grad, x2_TC.grad)
    assert scale_RG1.grad is not None and zero_RG1.grad is not None and tuned.scale.grad is not None
    # the parameter is relative to the scale it began with
    torch.testing.assert_close(tuned.scale.grad, (scale_RG1.grad * scale_RG1).squeeze(-1).detach())
    if format != "sparse":
        assert tuned.zero.grad is not None
        torch.testing.assert_close(tuned.zero.grad, zero_RG1.grad.squeeze(-1))


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq_v2", "sparse"])
def test_weights_in_training_are_stored_as_they_are(format: str) -> None:
    """Weights that moved by more than a step have other codes; a mask stays as it was."""
    layer = layer_of(format, symmetric=format != "gptq_v2")
    x_TC, before = drawn(5, 96, seed=3), layer.solution()
    tuned = TunedWeights(layer, zeros=False)
    torch.testing.assert_close(tuned(x_TC), functional.linear(x_TC, before.values(), layer.bias))
    tuned(x_TC).square().sum().backward()
    (weights,) = tuned.weights
    assert weights.grad is not None and not tuned.zeros and len(tuned.scales) == 1
    if before.keep_RC is not None:
        assert not weights.grad.flatten(-2)[~before.keep_RC].any()
    with torch.no_grad():
        weights += 1.2 * drawn(*weights.shape, seed=5)
    rule = before.rule
    stored = CompressedLinear.from_tensors(layer.format, rule, tuned.tensors(), layer.bias, torch.float32, "reference")
    torch.testing.assert_close(stored(x_TC), tuned(x_TC))
    after = stored.solution()
    assert int((after.codes_RC != before.codes_RC).sum()) > 200
    if before.keep_RC is not None:
        assert torch.equal(after.keep_RC, before.keep_RC)


def test_nothing_of_the_size_of_the_weights_is_kept() -> None:
    tuned = TunedLinear(layer_of("compressed-tensors", rows=64, columns=96), "layer", zeros=True)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tuned(drawn(3, 96).requires_grad_())
    assert 3 * 96 in kept and max(kept) < 64 * 96 / 8


def test_what_is_stored_is_what_was_trained() -> None:
    for format in ("compressed-tensors", "gptq_v2", "gptq"):
        layer = layer_of(format)
        tuned = TunedLinear(layer, "layer", zeros=True)
        tuned.scale.data += 0.1 * drawn(16, 3)
        tuned.zero.data += 9 * drawn(16, 3, seed=5)
        stored = CompressedLinear.from_tensors(layer.format, layer.rule, tuned.tensors(), layer.bias, torch.float32)
        assert torch.equal(stored.solution().codes_RC, layer.solution().codes_RC)
        assert int(stored.solution().zeros_RG.min()) >= layer.format.lowest_zero(Grid(4, 32, symmetric=False))
        x_TC = drawn(7, 96, seed=6)
        torch.testing.assert_close(tuned(x_TC), stored(x_TC), rtol=1e-6, atol=1e-6)


def test_divergence_against_its_definition() -> None:
    logits, dense = drawn(2, 5, 11).double(), drawn(2, 5, 11, seed=1).double()
    ids_ST = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(2))
    kl = entropy = 0.0
    for s in range(2):
        for t in range(4):
            p, q = dense[s, t].softmax(-1), logits[s, t].softmax(-1)
            kl += float((p * (p / q).log()).sum()) / 8
            entropy -= float(q[ids_ST[s, t + 1]].log()) / 8
    found = divergence(logits, dense, ids_ST)
    assert [float(value) for value in found] == pytest.approx([kl, entropy], rel=1e-5)
    assert float(divergence(logits, None, ids_ST)[0]) == 0


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 3) and rates[3] == max(rates) == 1 and rates[-1] < 0.001
    assert rate_at(0, 1) == 1


# --- folders


def held_kl(source: Path, folder: Path, text: str, settings: Tuning) -> tuple[float, float]:
    """KL and cross-entropy of a folder on the held-out windows, whole models and nothing of ours but loading."""
    job = module._Job(folder, settings, None, CPU)
    _, held_ST = job.windows([text])
    with torch.no_grad():
        q = api.load(folder, "cpu", torch.float32, kernel="dense")(input_ids=held_ST).logits[:, :-1].log_softmax(-1)
        p = load_dense(source, CPU, torch.float32)(input_ids=held_ST).logits[:, :-1].log_softmax(-1)
    entropy = -q.gather(-1, held_ST[:, 1:, None]).mean()
    return float((p.exp() * (p - q)).sum(-1).mean()), float(entropy)


def test_tuning_towards_the_dense_model(source: Path, packed: Path, long_text: str, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    report = featherweight.tune(packed, [long_text], to=out, against=source, settings=SETTINGS, device="cpu")
    assert report["kl_nats"] < 0.97 * report["kl_nats_before"] and 0 < report["best_step"] <= report["steps"] == 6
    before, after = held_kl(source, packed, long_text, SETTINGS), held_kl(source, out, long_text, SETTINGS)
    assert before == pytest.approx((report["kl_nats_before"], report["cross_entropy_before"]), rel=1e-4)
    assert after == pytest.approx((report["kl_nats"], report["cross_entropy"]), rel=1e-4)
    changed = changes(packed, out)
    assert changed == {name for name in tensors_of(out) if name.endswith("weight_scale")} and len(changed) == 14
    assert json.loads((out / MANIFEST).read_text())["tuned"]["report"]["kl_nats"] == report["kl_nats"]
    assert {row["loss"] for row in api.inspect(out)["matrices"]} == {None}
    assert not (tmp_path / "tuned.tuning").exists()


def changes(one: Path, other: Path) -> set[str]:
    """Names of the tensors that differ; both folders have the same names, shapes and dtypes."""
    before, after = tensors_of(one), tensors_of(other)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    return {name for name in before if not same_bytes(before[name], after[name])}


def test_tuning_on_the_text_itself_with_zeros_and_norms(packed: Path, long_text: str, tmp_path: Path) -> None:
    settings = Tuning(samples=16, tokens=32, held_out=0.25, epochs=2, batch=4, rate=0.02, zeros=True, norms=True)
    report = api.tune(packed, [long_text], to=tmp_path / "out", settings=settings, device="cpu")
    assert report["kl_nats"] is None and report["cross_entropy"] < report["cross_entropy_before"]
    changed = changes(packed, tmp_path / "out")
    assert {name.rpartition(".")[2] for name in changed} >= {"weight_scale", "weight"}
    assert all("norm" in name for name in changed if name.endswith(".weight"))
    assert not [name for name in changed if name.endswith("weight_packed")]
    job = module._Job(tmp_path / "out", settings, None, CPU)
    with torch.no_grad():
        held_ST = job.windows([long_text])[1]
        logits = api.load(tmp_path / "out", "cpu", torch.float32, kernel="dense")(input_ids=held_ST).logits
    entropy = functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_ST[:, 1:].flatten())
    assert float(entropy) == pytest.approx(report["cross_entropy"], rel=1e-4)


@pytest.mark.parametrize("changes_", [{"format": "gptq", "bits": 3}, {"bits": 4, "sparsity": "2:4"}], ids=str)
def test_other_formats(changes_: dict[str, Any], source: Path, text: Path, long_text: str, tmp_path: Path) -> None:
    api.compress(source, tmp_path / "out", recipe(text, search="hessian", **changes_))
    before = tensors_of(tmp_path / "out")
    report = api.tune(tmp_path / "out", [long_text], against=source, settings=SETTINGS, device="cpu")
    assert report["kl_nats"] < report["kl_nats_before"]
    after = tensors_of(tmp_path / "out")
    assert {n for n in before if not same_bytes(before[n], after[n])} == {n for n in before if "scale" in n}


FLOATS = pytest.param({"bits": 16, "sparsity": "0.5"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("changes_", [{"bits": 4, "sparsity": "2:4"}, FLOATS], ids=str)
def test_weights_too(changes_: dict[str, Any], source: Path, text: Path, long_text: str, tmp_path: Path) -> None:
    """What is stored is what was trained; where nothing is better, every tensor is what it was."""
    api.compress(source, tmp_path / "out", recipe(text, search="hessian", **changes_))
    settings = replace(SETTINGS, weights=True, weight_rate=0.05)
    arguments: dict[str, Any] = {"to": tmp_path / "new", "against": source, "settings": settings, "device": "cpu"}
    report = api.tune(tmp_path / "out", [long_text], **arguments)
    after = held_kl(source, tmp_path / "new", long_text, settings)
    assert after == pytest.approx((report["kl_nats"], report["cross_entropy"]), rel=1e-3)
    changed = {name.rpartition(".")[2] for name in changes(tmp_path / "out", tmp_path / "new")}
    if report["best_step"]:
        assert report["kl_nats"] < report["kl_nats_before"] and changed <= {
            "weight_packed",
            "weight_scale",
            "weight_values",
        }
    else:
        assert changed == set()


def test_tuning_that_only_harms_leaves_every_tensor(source: Path, packed: Path, long_text: str, tmp_path: Path) -> None:
    settings = Tuning(samples=16, tokens=32, held_out=0.25, batch=2, rate=0.9)
    report = api.tune(packed, [long_text], to=tmp_path / "out", against=source, settings=settings, device="cpu")
    assert report["best_step"] == 0 and report["kl_nats"] == report["kl_nats_before"]
    assert report["steps"] < settings.steps  # it stopped early
    assert changes(packed, tmp_path / "out") == set()


class Stop(BaseException):
    """Stands in for SIGKILL."""


def stopping(at: int) -> Any:
    def tell(done: float, _total: float, _what: str) -> None:
        if done >= at:
            raise Stop

    return tell


@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["in place", "to"])
def test_killed_and_resumed(
    in_place: bool, source: Path, text: Path, packed: Path, long_text: str, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    api.tune(packed, [long_text], to=whole, against=source, settings=SETTINGS, device="cpu")
    folder = tmp_path / "out"
    api.compress(source, folder, recipe(text, bits=2, symmetric=False, search="hessian"))
    untouched = model_files(folder)
    to = None if in_place else tmp_path / "new"
    arguments: dict[str, Any] = {"to": to, "against": source, "settings": SETTINGS, "device": "cpu"}
    for at in (1, 5):
        with pytest.raises(Stop):
            api.tune(folder, [long_text], **arguments, tell=stopping(at))
        assert model_files(folder) == untouched
    api.tune(folder, [long_text], **arguments)
    done = folder if to is None else to
    assert model_files(done) == model_files(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"whole", "out", done.name})


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_the_result_is_put_in_place(
    renames: int,
    source: Path,
    text: Path,
    packed: Path,
    long_text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "out"
    api.compress(source, folder, recipe(text, bits=2, symmetric=False, search="hessian"))
    untouched, real, done = model_files(folder), os.replace, [0]

    def counting(one: Any, other: Any) -> None:
        if Path(one).is_dir():
            done[0] += 1
            if done[0] > renames:
                raise Stop
        real(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counting)
        with pytest.raises(Stop):
            api.tune(folder, [long_text], against=source, settings=SETTINGS, device="cpu")
    assert folder.exists() == (renames == 0)
    report = api.tune(folder, [long_text], against=source, settings=SETTINGS, device="cpu")
    assert report["best_step"] > 0 and model_files(folder) != untouched
    api.tune(packed, [long_text], to=tmp_path / "whole", against=source, settings=SETTINGS, device="cpu")
    assert model_files(folder) == model_files(tmp_path / "whole")
    assert not (tmp_path / "out.tuning").exists()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """Of one process: what it shares it has all of, and everything else is as among many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_shared_model_is_what_it_was(group: None, source: Path, packed: Path) -> None:
    """Codes, scales, norms and the original as parts of parameters: the same outputs, gradients and files. (Among two
    processes: `test_train_parallel`.)"""
    wanted = Wanted(Checkpoint.open(packed), Checkpoint.open(source), False, False, True, torch.float32, CPU)
    plain, shared = TunedModel(wanted, False), TunedModel(wanted, True)
    ids_ST = torch.arange(24).view(2, 12)
    for model in (plain, shared):
        logits_STV, dense_STV = model.model(input_ids=ids_ST).logits, model.dense(input_ids=ids_ST).logits
        divergence(logits_STV, dense_STV, ids_ST)[0].backward()
    for one, other in zip(*(model.parameters(0.1, 0.1) for model in (plain, shared)), strict=True):
        assert is_sharded(other.parameter) and not is_sharded(one.parameter)
        torch.testing.assert_close(mine(other.parameter.grad), one.parameter.grad)
        assert torch.equal(whole(mine(other.parameter), other.parameter), one.parameter)
    assert all(is_sharded(layer.layer.weight_packed) for layer in shared.layers.values())
    stored, found = plain.tensors(here=True), shared.tensors(here=True)
    assert stored.keys() == found.keys() and all(torch.equal(found[name], stored[name]) for name in stored)
    assert shared.tensors(here=False) == {}


# --- bad requests


def refused(match: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        api.tune(*arguments, **{"settings": SETTINGS, "device": "cpu", **named})
    assert "\n" not in str(caught.value)


def test_bad_requests(source: Path, packed: Path, text: Path, long_text: str, tmp_path: Path) -> None:
    refused("is dense: tune takes a folder that compress wrote", source, [long_text])
    api.compress(source, tmp_path / "symmetric", recipe(text))
    with_zeros = Tuning(samples=16, tokens=32, zeros=True)
    refused(
        r"layers\.0\.self_attn\.q_proj is symmetric, and its compressed-tensors file holds no zeros: drop --zeros",
        tmp_path / "symmetric", [long_text], settings=with_zeros,
    )  # fmt: skip
    api.compress(source, tmp_path / "sparse", recipe(text, bits=16, sparsity="0.5"))
    refused("is pruned and not rounded: it has no scales", tmp_path / "sparse", [long_text])
    api.compress(source, tmp_path / "joint", recipe(text, bits=4, symmetric=False, sparsity="0.5"))
    refused("is pruned, and its zeros mark", tmp_path / "joint", [long_text], settings=with_zeros)
    refused("is not empty: choose a new folder", packed, [long_text], to=source)
    other = add_tokenizer(make("llama", tmp_path / "other", vocab_size=160))
    refused("knows 160 tokens and .* 128: give its own original", packed, [long_text], against=other)
    refused("beside a dense model, and none is given", packed, [long_text], settings=Tuning(text_share=0.2))
    short = write_text(tmp_path / "short.txt", words=8)
    refused(r"of the text held out .* tokens and one window needs 32", packed, [str(short)])
    refused(r"--tokens 999 must lie between 2 and the model's 128", packed, [long_text], settings=Tuning(tokens=999))
    for changes_, match in (
        ({"samples": 1}, "at least 2 in all, and 1 was asked for"),
        ({"epochs": 0}, "epochs must be 1 or more, not 0"),
        ({"batch": 0}, "batch must be 1 or more, not 0"),
        ({"held_out": 1.0}, r"held_out must lie between 0 and 1, not 1\.0"),
        ({"rate": 0.0}, r"rate must lie between 0 and 1, not 0\.0"),
        ({"weight_rate": 1.0}, r"weight_rate must lie between 0 and 1, not 1\.0"),
        ({"text_share": 1.5}, r"text_share must lie between 0 and 1, not 1\.5"),
    ):
        with pytest.raises(RequestError, match=match):
            Tuning(**changes_)


def test_a_config_of_another_group_size_is_refused(packed: Path, long_text: str, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 16
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    refused(r"_proj.weight_scale has shape \(\d+, 2\), and .* ask for \(\d+, 4\)", tmp_path / "other", [long_text])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_of_the_text_in_the_loss(share: float) -> None:
    """Nothing but the text at 1, nothing but the dense model at 0, between them between the two."""
    draw = torch.Generator().manual_seed(0)
    ids_ST, dense_V = torch.randint(0, 3, (8, 16), generator=draw).clamp(max=1), torch.tensor([0.0, 0.0, 3.0])

    def tuned(share: float, dense: Any) -> Tuner:
        parameter = torch.nn.Parameter(torch.zeros(3))
        schedule = Schedule(steps=40, batch=4, micro=4, patience=40, text_share=share)
        tuner = Tuner(
            lambda ids: parameter.expand(*ids.shape, 3), dense, [Trained(parameter, 0.2)], ids_ST, ids_ST, schedule
        )
        while not tuner.done:
            tuner.advance(lambda step: None)
        tuner.finish()
        return tuner

    def dense(ids: Tensor) -> Tensor:
        return dense_V.expand(*ids.shape, 3)

    tuner = tuned(share, dense)
    _, kl, entropy = tuner.best_look
    frequency_V = torch.bincount(ids_ST[:, 1:].flatten(), minlength=3) / ids_ST[:, 1:].numel()
    # what lowers a mixture of cross-entropies most
    best_V = (1 - share) * dense_V.softmax(0) + share * frequency_V
    assert torch.allclose(tuner.parameters[0].softmax(0), best_V, atol=0.04)
    assert kl is not None and (1 - share) * kl + share * entropy == min(
        tuner._judged(look) for look in tuner.state.looks
    )
    if share == 1.0:
        assert torch.equal(tuner.parameters[0], tuned(0.0, None).parameters[0])


def test_a_loss_that_is_no_number_ends_tuning_with_the_best_state() -> None:
    """From the third step on the model answers with NaN."""
    parameter, steps = torch.nn.Parameter(torch.ones(3)), [0]

    def logits(ids_ST: Tensor) -> Tensor:
        steps[0] += torch.is_grad_enabled()
        broken = torch.nan if steps[0] >= 3 else 1.0
        return functional.one_hot(ids_ST, 3) * parameter * broken

    ids_ST = torch.randint(0, 3, (4, 8), generator=torch.Generator().manual_seed(0))
    schedule = Schedule(steps=8, batch=2, micro=2)
    tuner = Tuner(logits, None, [Trained(parameter, 0.1)], ids_ST, ids_ST, schedule)
    while not tuner.done:
        tuner.advance(lambda step: None)
    tuner.finish()
    assert tuner.state.step == 3 and tuner.best_look[0] in (0, 1, 2) and bool(parameter.isfinite().all())


def test_going_on_with_another_request_is_refused(source: Path, packed: Path, long_text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        api.tune(packed, [long_text], to=out, settings=SETTINGS, device="cpu", tell=stopping(1))
    refused("was begun with another settings", packed, [long_text], to=out, settings=Tuning(samples=16, tokens=32))
    refused("was begun with another against", packed, [long_text], to=out, against=source)
    lock = tuning.locked(tmp_path / "out.tuning")
    refused("is in use by another process", packed, [long_text], to=out)
    lock.release()


def test_the_command_line(source: Path, packed: Path, long_text: str, tmp_path: Path) -> None:
    numbers = {"--samples": 8, "--tokens": 32, "--held-out": 0.25, "--batch": 2, "--rate": 0.01}
    options = [*(part for pair in numbers.items() for part in pair), "--norms", "--weights", "--device", "cpu"]
    ran = command("tune", packed, "--text", long_text, "--to", tmp_path / "out", "--against", source, *options)
    assert ran.code == 0, ran.err
    assert ran.last["out"] == str(tmp_path / "out") and ran.last["kl_nats"] <= ran.last["kl_nats_before"]
    assert "is dense" in command("tune", source, "--text", long_text, *options).error


def test_a_rounded_embedding_stays_as_it_is(source: Path, long_text: str, tmp_path: Path) -> None:
    """Under a tied head, whose scales are the embedding's: both are left alone, and gradients pass."""
    api.compress(source, tmp_path / "out", recipe(Path(long_text), bits=2, embedding_bits=8), "cpu")
    report = api.tune(tmp_path / "out", [long_text], tmp_path / "new", source, SETTINGS, "cpu")
    assert report["kl_nats"] < report["kl_nats_before"]
    before, after = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "new")
    embedding = [name for name in before if "embed_tokens" in name]
    assert len(embedding) == 3 and all(torch.equal(before[name], after[name]) for name in embedding)
