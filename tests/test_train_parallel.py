"""Training by several processes (Gloo, two on this CPU): the same numbers as one process that has all sequences.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

import os
import traceback
from contextlib import suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from featherweight import api
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid
from featherweight.core.sweep import round_to_nearest
from featherweight.errors import RequestError
from featherweight.recipe import Recipe
from featherweight.stream import tune as module
from featherweight.stream.parallel import ALONE, World
from featherweight.stream.trained import dealt
from featherweight.stream.tune import Tuning
from featherweight.train.block_ap import Schedule, block_ap, block_loss
from featherweight.train.e2e_qp import Tuner
from featherweight.train.sequences import Sequences
from featherweight.train.sharding import is_sharded, mine
from featherweight.train.step import Stepper
from featherweight.train.trainable import NEAR, Trainable, TrainedGrid, beginning
from runs import journal, model_files, processes, recipe, tensors_of
from tiny import add_tokenizer, make, write_text

TRAINING, HELD_OUT = 8, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("long") / "long.txt", words=3000)


def take_part(line: Connection, rank: int, size: int, place: Path, work: Any) -> None:
    """One of the processes: sends what `work` returns, or its error."""
    dist.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        line.send(work(World(rank, size)))
    except BaseException:
        line.send(traceback.format_exc())
    os._exit(0)


def together(place: Path, work: Any, size: int = 2) -> list[Any]:
    """What `work(world)` returned in each of some processes."""
    place.unlink(missing_ok=True)
    lines = []
    for rank in range(size):
        ours, theirs = processes().Pipe()
        processes().Process(target=take_part, args=(theirs, rank, size, place, work)).start()
        theirs.close()
        lines.append(ours)
    said = []
    for line in lines:
        assert line.poll(120), "a process hangs"
        said.append(line.recv())
    assert not [words for words in said if isinstance(words, str)], said
    return said


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_block() -> tuple[torch.nn.Linear, dict[str, Trainable], Tensor, Tensor]:
    """One matrix, and sequences with the held-out ones last."""
    net = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False))
    net[0].weight.data = drawn(32, 32)
    problem = LayerProblem(net[0].weight.detach().clone(), torch.eye(32), 1, 0.01)
    start = round_to_nearest(problem, Grid(2, 16, symmetric=False, scale_dtype=torch.float32))
    layer = TrainedGrid(start, beginning(start, problem.weight_RC, NEAR), 0, relative=True)
    inputs_STD = drawn(TRAINING + HELD_OUT, 3, 32, seed=1)
    with torch.no_grad():
        return net, {"0": layer}, inputs_STD, net(inputs_STD)  # type: ignore[return-value]


def trained_block(world: World) -> tuple[Any, list[float]]:
    """Values and held-out losses after four epochs of one step with all sequences of all processes."""
    torch.set_num_threads(1)
    net, layers, inputs_STD, targets_STD = small_block()
    mine = [*range(TRAINING)[world.split(TRAINING)], *range(TRAINING, TRAINING + HELD_OUT)[world.split(HELD_OUT)]]
    held_out = len(range(HELD_OUT)[world.split(HELD_OUT)])
    sequences = Sequences(inputs_STD[mine], targets_STD[mine], held_out, torch.device("cpu"))
    schedule = Schedule(4, TRAINING, 0.02, 0.01, True, 0)
    outcome = block_ap(net, net, layers, sequences, schedule, lambda share: None, world)
    return outcome.solutions["0"].values().numpy(), [outcome.start, outcome.best, float(outcome.epoch)]


def averaged_gradient(world: World) -> Any:
    """Of one matrix after one step on this process's sequences, added up."""
    net, layers, inputs_STD, targets_STD = small_block()
    part = world.split(TRAINING)
    stepper = Stepper(net, layers, net, partial(block_loss, each_token_alike=True), world)
    with stepper.placed():
        pace = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
        stepper.step(inputs_STD[:TRAINING][part], targets_STD[:TRAINING][part], pace, 0.0)
    found = stepper.leaves[0].grad
    assert found is not None
    return found.numpy()


@pytest.mark.slow
def test_two_train_a_block_as_one(tmp_path: Path) -> None:
    (one, other), alone = together(tmp_path / "a", averaged_gradient), averaged_gradient(ALONE)
    assert (one == other).all()
    np.testing.assert_allclose(one, alone, rtol=1e-5, atol=1e-7)
    (values, losses), (theirs, their_losses) = together(tmp_path / "b", trained_block)
    expected, expected_losses = trained_block(ALONE)
    assert (values == theirs).all() and losses == their_losses
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert losses == pytest.approx(expected_losses, rel=1e-5) and losses[1] < losses[0]


def compressed(source: Path, out: Path, chosen: Recipe, _world: World) -> int:
    torch.set_num_threads(1)
    return api.compress(source, out, chosen, "cpu").matrices


class Stop(BaseException):
    """Stands in for SIGKILL."""


def tuned(
    source: Path, folder: Path, to: Path, text: Path, settings: Tuning, _world: World, **named: Any
) -> dict[str, Any]:
    torch.set_num_threads(1)
    return api.tune(folder, [str(text)], to=to, against=source, settings=settings, device="cpu", **named)


def after_a_look(tuner: Tuner, tick: Any, whole: Any = Tuner.advance) -> None:
    if tuner.state.step:
        raise Stop
    whole(tuner, tick)


def shared(source: Path, folder: Path, work: Path, text: Path, settings: Tuning, world: World) -> Any:
    """Two runs of which each process holds a part: one to its end, one that is stopped. The bytes held here of a model
    and its original, those of all of both, and whether the packed codes are shared as well."""
    arguments = (source, folder, work / "shared", text, settings, world)
    report = tuned(*arguments, shard=True)
    with pytest.MonkeyPatch.context() as patch, suppress(Stop):
        patch.setattr(Tuner, "advance", after_a_look)
        tuned(source, folder, work / "stopped", text, settings, world, shard=True)
    job = module._Job(folder, settings, source, torch.device("cpu"), world, shard=True)
    assert job.tuned.dense is not None
    tensors = [*job.tuned.model.parameters(), *job.tuned.dense.parameters()]
    words = [layer.layer.weight_packed for layer in job.tuned.layers.values()]
    sizes = [sum(t.numel() * t.element_size() for t in each) for each in (map(mine, tensors), tensors)]
    return report, sizes, all(map(is_sharded, words))


@pytest.mark.slow
def test_two_share_one_model(source: Path, long_text: Path, tmp_path: Path) -> None:
    """Scales, norms, codes and the original in parts on two processes: the numbers are those of one process, which
    goes on where two were stopped."""
    api.compress(source, tmp_path / "out", recipe(long_text, bits=2, symmetric=False, search="hessian"), "cpu")
    settings = Tuning(samples=11, tokens=32, held_out=0.28, epochs=2, batch=3, rate=0.01, norms=True)  # uneven shares
    work = partial(shared, source, tmp_path / "out", tmp_path, long_text, settings)
    (report, sizes, words_too), other = together(tmp_path / "a", work)
    assert report["kl_nats"] == other[0]["kl_nats"] < report["kl_nats_before"]
    assert words_too and sizes[0] < 0.55 * sizes[1] and sizes[0] + other[1][0] >= sizes[1]
    assert (tmp_path / "stopped.tuning").exists() and not (tmp_path / "shared.tuning").exists()
    for name in ("stopped", "one"):
        tuned(source, tmp_path / "out", tmp_path / name, long_text, settings, ALONE)
    expected = tensors_of(tmp_path / "one")
    for name in ("stopped", "shared"):
        for tensor, found in tensors_of(tmp_path / name).items():
            if tensor.endswith("scale") or "norm" in tensor:
                torch.testing.assert_close(found.float(), expected[tensor].float(), rtol=2**-7, atol=0)
            else:
                assert torch.equal(found, expected[tensor])
    assert model_files(tmp_path / "shared").keys() == model_files(tmp_path / "one").keys()


@pytest.mark.slow
def test_two_compress_and_tune(source: Path, long_text: Path, tmp_path: Path) -> None:
    """Block by block as near the original as one process comes; and, from one folder, the same scales."""
    small = {"samples": 33, "held_out": 0.25, "epochs": 2, "batch": 4, "symmetric": False, "bits": 2}
    rates = {"weight_rate": 0.0005, "scale_rate": 0.0005}
    chosen = recipe(long_text, **{"method": "block-ap", "target": "original", "search": "hessian", **small, **rates})
    assert together(tmp_path / "a", partial(compressed, source, tmp_path / "two", chosen)) == [14, 14]
    api.compress(source, tmp_path / "one", chosen)
    for one, other in zip(journal(tmp_path / "two"), journal(tmp_path / "one"), strict=True):
        assert one["name"] == other["name"] and one["block_loss"] < one["block_loss_before"]
        assert one["block_loss"] == pytest.approx(other["block_loss"], rel=0.05)
    settings = Tuning(samples=13, tokens=32, held_out=0.34, epochs=2, batch=3, rate=0.01)  # no even shares
    arguments = partial(tuned, source, tmp_path / "one", tmp_path / "tuned two", long_text, settings)
    first, second = together(tmp_path / "b", arguments)
    assert first["kl_nats"] == second["kl_nats"] < first["kl_nats_before"]
    alone = tuned(source, tmp_path / "one", tmp_path / "tuned one", long_text, settings, ALONE)
    assert first["kl_nats"] == pytest.approx(alone["kl_nats"], rel=1e-4)
    ours, theirs = tensors_of(tmp_path / "tuned two"), tensors_of(tmp_path / "tuned one")
    for name, tensor in theirs.items():
        if name.endswith("scale"):
            torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(ours[name], tensor)
    assert model_files(tmp_path / "tuned two").keys() == model_files(tmp_path / "tuned one").keys()
    assert not (tmp_path / "tuned two.tuning").exists()


def test_windows_are_dealt_evenly() -> None:
    for samples, size in ((32, 2), (33, 2), (37, 3), (12, 4)):
        chosen = Recipe(method="block-ap", samples=samples, held_out=0.25, batch=size, tokens=32)
        ids_ST = torch.arange(samples)[:, None]
        order = dealt(ids_ST, chosen, World(0, size))[:, 0]
        assert sorted(order.tolist()) == list(range(samples))
        training = samples - chosen.held_out_samples
        for rank in range(size):
            world = World(rank, size)
            mine = order[world.split(samples)]
            held = len(range(chosen.held_out_samples)[world.split(chosen.held_out_samples)])
            assert bool((mine[: len(mine) - held] < training).all()) and bool(
                (mine[len(mine) - held :] >= training).all()
            )
    assert dealt(ids_ST, chosen, ALONE) is ids_ST


def test_what_cannot_be_dealt() -> None:
    chosen, ids_ST = Recipe(method="block-ap", samples=8, batch=4, tokens=32), torch.zeros(8, 1)
    with pytest.raises(RequestError, match=r"3 processes were to share steps of 4 .* evenly: use --batch 6"):
        dealt(ids_ST, chosen, World(0, 3))
    with pytest.raises(RequestError, match=r"--shard shares a model among processes and 1 was started"):
        api.tune("feather-tiny", [], to="nowhere", shard=True)
    with pytest.raises(RequestError, match=r"process 0 of 2 has 2 sequences to train on and a step takes 4 from each"):
        dealt(torch.zeros(4, 1), chosen.but(samples=4, batch=8), World(0, 2))
