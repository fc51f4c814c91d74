"""`featherweight laws sweep`: the pruning schedule, runs trained side by side, stopping and going on, bad requests.

Shapes: M runs, X matrices, N weights of a matrix.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from featherweight.errors import RequestError
from featherweight.laws import corpus, finding, forms, ledger, points, schedule
from featherweight.laws import sweep as sweeping
from featherweight.laws.model import BYTES, PARTS, Size, losses, rotary
from featherweight.laws.schedule import Pattern, pattern
from featherweight.laws.sweep import Sweep, Way
from featherweight.laws.train import CLIP, Group, Setting, Trainer, rate_at
from runs import featherweight

CPU = torch.device("cpu")
SIZE, STEPS = Size(64, 1), 24
SETTING = Setting(windows=4, window=32, evaluation_bytes=512)
PATTERNS = tuple(map(pattern, ("0", "0.5", "0.875", "2:4")))
TINY = ("--windows", 4, "--window", 32, "--evaluation-bytes", 512, "--device", "cpu", "--bootstraps", 0)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 kB of words from a vocabulary of a hundred: three blocks, of which the first is held out."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(100)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choices(words, k=30_000))[:150_000])
    return path


@pytest.fixture(scope="module")
def trainer(text: Path) -> Trainer:
    return Trainer(corpus.read([text], SETTING.window, CPU), SETTING, CPU, torch.float32, False)


def train(trainer: Trainer, patterns: tuple[Pattern, ...] = PATTERNS, until: int = STEPS) -> Group:
    group = Group.new(SIZE, STEPS, patterns, trainer.setting, CPU)
    while group.step < until:
        trainer.step(group)
    return group


# --- schedule


@pytest.mark.parametrize("steps", [8, 24, 101, 977, 3906])
def test_schedule(steps: int) -> None:
    shares = [schedule.share_at(step, steps) for step in range(steps)]
    first, last = schedule.ramp(steps)
    assert set(shares[: first + 1]) == {0.0} and set(shares[last:]) == {1.0}
    assert shares == sorted(shares)
    middle = (first + last) // 2
    assert 1 - shares[middle] == pytest.approx((1 - (middle - first) / (last - first)) ** 3)
    assert abs(sum(shares[first:last]) / (last - first) - 0.75) < 0.6 / (last - first)
    updates = [step for step in range(steps) if schedule.is_update(step, steps)]
    assert updates[-1] == last and updates[0] > first
    assert len(updates) <= 55 and (steps < 400 or len(updates) >= 48)


@pytest.mark.parametrize("ties", [False, True])
def test_keep_largest_drops_exactly_the_least(ties: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    score_XN = torch.rand(6, 97, generator=generator)
    if ties:
        score_XN = (score_XN * 4).floor()
    zeros_X = torch.tensor([0, 1, 30, 60, 96, 97])
    mask_XN = schedule.keep_largest(score_XN, zeros_X)
    assert ((~mask_XN).sum(1) == zeros_X).all()
    for score_N, mask_N, zeros in zip(score_XN, mask_XN, zeros_X, strict=True):
        order = score_N.argsort(stable=True)
        assert not mask_N[order[:zeros]].any() and mask_N[order[zeros:]].all()


def test_grouped_ramp() -> None:
    weight_XN = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    for share in (0.0, 0.25, 0.5, 1.0):
        mask_XN = schedule.mask(weight_XN, pattern("2:4"), share)
        per_group = mask_XN.unflatten(1, (-1, 4)).sum(2)
        assert ((per_group == 2).sum(1) == round(share * 16)).all() and ((per_group == 4) | (per_group == 2)).all()
    full_XN = schedule.mask(weight_XN, pattern("2:4"), 1.0)
    weakest = weight_XN.abs().unflatten(1, (-1, 4)).sort(2).values[:, :, 1]
    assert ((weight_XN.abs().unflatten(1, (-1, 4)) > weakest[:, :, None]).flatten(1) == full_XN).all()


def test_rate() -> None:
    rates = [rate_at(step, 200, 2.0) for step in range(200)]
    assert max(rates) == 2.0 == rates[9] and rates[0] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.02


# --- training


def test_a_group_is_its_runs_one_by_one(trainer: Trainer) -> None:
    together = train(trainer)
    found = trainer.evaluate(together)
    for i, which in enumerate(PATTERNS):
        alone = train(trainer, (which,))
        assert trainer.evaluate(alone)[0] == pytest.approx(found[i], abs=1e-5)
        for name, value in alone.params.items():
            torch.testing.assert_close(value[0], together.params[name][i], rtol=1e-4, atol=1e-5)
            if name in PARTS:
                assert torch.equal(alone.masks[name][0], together.masks[name][i])
    assert found[0] < torch.tensor(float(BYTES)).log() - 1  # they learn


def test_masks_hold_to_the_end(trainer: Trainer) -> None:
    group = train(trainer, until=schedule.ramp(STEPS)[0] + 1)
    assert group.nonzero() == [SIZE.parameters] * 4
    while group.step <= schedule.ramp(STEPS)[1]:
        trainer.step(group)
    fixed = {name: mask.clone() for name, mask in group.masks.items()}
    while group.step < STEPS:
        trainer.step(group)
    assert all(torch.equal(fixed[name], mask) for name, mask in group.masks.items())
    assert group.nonzero() == [round(SIZE.parameters * (1 - which.sparsity)) for which in PATTERNS]
    for name, parts in PARTS.items():
        matrices = group.params[name].unflatten(2, (len(parts), -1))
        zero_M = (matrices == 0).float().mean(dim=(-1, -2)).flatten(1)
        for run, which in enumerate(PATTERNS):
            assert (zero_M[run] == which.sparsity).all(), (name, which.name)
        assert ((group.params[name][3].unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()


def test_a_dense_run_is_adamw(trainer: Trainer) -> None:
    group = Group.new(SIZE, STEPS, PATTERNS[:1], SETTING, CPU)
    leaves = {name: value.clone().requires_grad_() for name, value in group.params.items()}
    blocks, others = [leaves[n] for n in PARTS], [leaves[n] for n in leaves if n not in PARTS]
    kinds: list[dict[str, Any]] = [{"params": blocks, "weight_decay": SETTING.decay}, {"params": others}]
    optimizer = torch.optim.AdamW(kinds, betas=(0.9, 0.95), weight_decay=0.0)
    while group.step < STEPS:
        for kind in optimizer.param_groups:
            kind["lr"] = rate_at(group.step, STEPS, SETTING.rate * 2)
        optimizer.zero_grad()
        losses(leaves, group.batch(trainer.corpus), *trainer.tables).sum().backward()
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), CLIP)
        optimizer.step()
        trainer.step(group)
    for name, value in leaves.items():
        torch.testing.assert_close(group.params[name], value.detach(), rtol=1e-3, atol=2e-5)


def test_micro_batches_do_not_matter(trainer: Trainer) -> None:
    parts = Trainer(trainer.corpus, Setting(**{**vars(SETTING), "micro_batches": 2}), CPU, torch.float32, False)
    torch.testing.assert_close(parts.evaluate(train(parts)), trainer.evaluate(train(trainer)), rtol=1e-3, atol=1e-3)


def test_a_saved_run_is_a_checkpoint_of_transformers(text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    grid = Sweep(((128, 2),), ("0.5",), (32 * 4 * 8,), 4, 32, evaluation_bytes=512)
    sweeping.run(grid, tmp_path / "out", [text], Way("cpu", save=tmp_path / "models"))
    (folder,) = (tmp_path / "models").iterdir()
    assert folder.name == "128x2-0.5-8"
    ids_BT = torch.randint(BYTES, (2, 33), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = model(input_ids=ids_BT, labels=ids_BT).loss
    stored = load_file(folder / "model.safetensors")
    stacked = {"embedding": stored["model.embed_tokens.weight"], "head": stored["lm_head.weight"]}
    for name, parts in PARTS.items():
        rows = [[t for n, t in stored.items() if f"layers.{i}." in n and f".{p}." in n] for i in (0, 1) for p in parts]
        stacked[name] = torch.cat([row[0] for row in rows]).unflatten(0, (2, -1))
    ours = losses({name: value[None] for name, value in stacked.items()}, ids_BT, *rotary(32, CPU, torch.float32))
    assert float(ours) == pytest.approx(float(theirs), abs=1e-4)
    assert AutoTokenizer.from_pretrained(folder)("a é\n").input_ids == list("a é\n".encode())


# --- text


def test_the_stream_depends_on_seed_and_step_alone(trainer: Trainer) -> None:
    one, other = (Group.new(SIZE, STEPS, PATTERNS[:1], SETTING, CPU) for _ in range(2))
    one.step = other.step = 5
    other.batch(trainer.corpus)
    other.step = 300
    late = other.batch(trainer.corpus)
    one.step = 300
    assert torch.equal(one.batch(trainer.corpus), late) and late.shape == (4, 33)
    one.step = 301
    assert not torch.equal(one.batch(trainer.corpus), late)


def test_held_out_text_is_not_trained_on(text: Path, tmp_path: Path) -> None:
    block = corpus.BLOCK_BYTES
    (tmp_path / "a").write_bytes(bytes([1]) * block + bytes([2]) * (49 * block))
    (tmp_path / "b").write_bytes(bytes([1]) * 100 + bytes([3]) * 0)
    found = corpus.read([tmp_path / "a", tmp_path / "b"], 16, CPU)
    assert set(found.train_N.tolist()) == {2} and set(found.held_N.tolist()) == {1}
    held = found.held_out(17, 160)
    assert held.shape == (10, 17)
    assert corpus.read([text], 16, CPU).held_out(17, 10**9).shape == ((block - 1) // 16, 17)


# --- the command


def command(out: Path, text: Path, *more: object) -> Any:
    sizes = ("--sizes", "64x1", "--sparsities", "0,0.5,2:4", "--durations", "1024,2048")
    return featherweight("laws", "sweep", out, "--text", text, *sizes, *TINY, *more)


def test_sweep_stopped_and_repeated(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = command(tmp_path / "whole", text)
    assert whole.code == 0, whole.err
    assert list(whole.last) == ["csv", "runs", "of", "done", "seconds", "epochs", "warnings", "law"]
    assert (whole.last["runs"], whole.last["of"], whole.last["done"]) == (6, 6, True)
    stops = iter([False] * 5 + [True] + [False] * 13 + [True])
    monkeypatch.setattr(sweeping._Job, "_is_over", lambda _self: next(stops, False))
    parts = [command(tmp_path / "parts", text).last for _ in range(3)]
    assert [(part["runs"], part["done"]) for part in parts] == [(0, False), (3, False), (6, True)]
    assert "law" not in parts[0]
    one, other = (ledger.read_rows(tmp_path / name / ledger.CSV) for name in ("whole", "parts"))
    assert [{**row, "seconds": ""} for row in one] == [{**row, "seconds": ""} for row in other]
    assert not (tmp_path / "parts" / ledger.CHECKPOINT).exists()
    before = (tmp_path / "whole" / ledger.CSV).stat().st_mtime_ns
    assert command(tmp_path / "whole", text).out == whole.out
    assert (tmp_path / "whole" / ledger.CSV).stat().st_mtime_ns == before
    assert points.read(tmp_path / "whole" / ledger.CSV).parameters_P.tolist() == [
        float(row["nonzero_parameters"]) for row in one
    ]
    assert any("cannot identify" in line or "cannot fix" in line for line in whole.last["law"]["unknown"])


def test_stop_after_nothing(text: Path, tmp_path: Path) -> None:
    last = command(tmp_path / "out", text, "--stop-after", 0).last
    assert (last["runs"], last["done"]) == (0, False) and (tmp_path / "out" / ledger.CHECKPOINT).exists()


def test_a_grid_names_everything_once() -> None:
    grid = Sweep(((128, 1), (64, 1), (64, 1)), ("0.50", "0.5", "2:4"), (32768, 33000, 200000), 4, 32).checked()
    assert grid.sizes == ((64, 1), (128, 1)) and grid.patterns == ("0.5", "2:4") and len(grid.durations) == 3
    near = Sweep(durations=(16_000_000, 16_001_000)).checked()
    assert len(near.durations) == 1 and near.groups()[0] == ((128, 4), 3906)


def test_more_than_one_epoch_is_said(text: Path, tmp_path: Path) -> None:
    grid = Sweep(((64, 1),), ("0",), (4e5,), 64, 64, evaluation_bytes=512)
    found = sweeping.run(grid, tmp_path / "out", [text], Way("cpu", stop_after=0))
    assert found.epochs == pytest.approx(4e5 / (150_000 - 65_536), rel=0.01)
    assert "4.7" in found.warnings[0] and "times" in found.warnings[0]


def planted(tmp_path: Path, gain: float = 1.5) -> Path:
    """A finished sweep whose losses follow a known law, its 2:4 runs with non-zeros worth `gain` dense ones."""
    co = forms.plain((0.55, 0.7, 0.6, 0.35, 0.5, 0.45, 0.9), 1e6, 3e7)
    lines: list[list[object]] = []
    for width, dense in ((128, 8e5), (256, 3.1e6), (384, 7.1e6), (640, 2e7)):
        for name, s in (("0", 0.0), ("0.5", 0.5), ("0.75", 0.75), ("0.875", 0.875), ("2:4", 0.5)):
            for d in (1.6e7, 3.2e7, 6.4e7):
                n = dense * (1 - s)
                value = forms.loss(co, 0.0, gain * n, d) if ":" in name else forms.loss(co, s, n, d)
                lines.append([s, n, d, float(value), name, dense, width, 4, round(d / 16384), 1.0, 0])
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([ledger.COLUMNS, *lines])
    return path


def test_the_finding_recovers_a_planted_law(tmp_path: Path) -> None:
    path = planted(tmp_path)
    found = finding.finding(ledger.read_rows(path), bootstraps=3)
    co = forms.plain((0.55, 0.7, 0.6, 0.35, 0.5, 0.45, 0.9), 1e6, 3e7)
    assert found["coefficients"]["b_N"] == pytest.approx(0.35, rel=1e-2)
    for row in found["gains"]:
        assert row["gain"] == pytest.approx(float(forms.size_gain(co, row["sparsity"])), rel=1e-2)
        assert row["interval"][0] <= row["gain"] * 1.001 and row["interval"][1] >= row["gain"] * 0.999
    assert [round(row["paper"], 2) for row in found["gains"]] == [1.59, 2.16, 2.63]
    assert found["extrapolation"]["runs"] == 12 and found["extrapolation"]["largest"] < 0.001
    assert found["grouped_gains"][0]["gain"] == pytest.approx(1.5, rel=1e-2)
    assert len(found["unknown"]) == 1 and "a factor of S for 2:4" in found["unknown"][0]
    json.dumps(found)
    ran = featherweight("laws", "fit", path, "--bootstraps", 0, "--starts", 2, "--report", tmp_path / "fit.html")
    assert ran.code == 0 and ran.last["points"] == 60


def test_a_factor_on_the_edge_is_not_given_out(tmp_path: Path) -> None:
    """N:M patterns that are worth the same at 2:4 and 1:4, and unlike dense, send b_S to its bound."""
    rows = ledger.read_rows(planted(tmp_path))
    flat = [{**row, "pattern": "1:4", "sparsity": "0.75"} for row in rows if row["pattern"] == "2:4"]
    found = finding.finding([*rows, *flat], bootstraps=0)
    assert "grouped_law" not in found and "edge of 0.02 to 8" in found["unknown"][0]


def test_a_factor_of_its_own_for_two_grouped_patterns(tmp_path: Path) -> None:
    rows = ledger.read_rows(planted(tmp_path))
    sparser = [{**row, "pattern": "1:4"} for row in rows if row["pattern"] == "0.75"]
    found = finding.finding([*rows, *sparser], bootstraps=0)
    assert set(found["grouped_law"]) == {"a_S", "b_S", "c_S"} and not found["unknown"]
    assert [row["pattern"] for row in found["grouped_gains"]] == ["1:4", "2:4"]


def test_report_page(tmp_path: Path) -> None:
    name = tmp_path / "<b>&runs.csv"
    planted(tmp_path).rename(name)
    page = tmp_path / "fit.html"
    assert featherweight("laws", "fit", name, "--bootstraps", 2, "--starts", 1, "--report", page).code == 0
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 2 == html.count("</svg>") and "<script" not in html and "<?xml" not in html
    assert "&lt;b&gt;&amp;runs.csv" in html and "<b>&runs" not in html
    assert all(f"<td>{coefficient}</td>" in html for coefficient in forms.NAMES) and "95 % interval" in html
    fetched = [part for part in ("src=", "@import", "<link", "<img") if part in html]
    assert not fetched
    assert "ends in .html" in refused("laws", "fit", "t5", "--report", tmp_path / "fit.htm")
    assert "is not there" in refused("laws", "fit", "t5", "--report", tmp_path / "no" / "fit.html")


# --- bad requests


def refused(*arguments: object) -> str:
    """What the command says as it exits with 2: one sentence, nothing on stdout."""
    said = featherweight(*arguments).error
    assert said.endswith(".")
    return said


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "sparsity of one": (("--sparsities", "0,1"), "sparsity 1 is out of range"),
    "negative sparsity": (("--sparsities", "-0.5"), "out of range"),
    "a sparsity that is no number": (("--sparsities", "half"), "'half'"),
    "not a pattern": (("--sparsities", "4:4"), "from 1 to M - 1"),
    "zero duration": (("--durations", "0"), "above 0"),
    "short duration": (("--durations", "200"), "from 8 to"),
    "no size": (("--sizes", "64"), "width x blocks"),
    "odd width": (("--sizes", "100x2"), "multiple of 64"),
    "no blocks": (("--sizes", "64x0"), "at least 1 block"),
    "no windows": (("--windows", 0), "windows is 0"),
    "long window": (("--window", 100_000), "is too long"),
    "micro-batches": (("--micro-batches", 3), "3 micro-batches do not divide 4"),
    "negative stop": (("--stop-after", -1), "0 or more"),
    "negative seed": (("--seed", -1), "below 0"),
    "negative rate": (("--rate", -1), "rate is -1.0"),
    "no such precision": (("--precision", "int8"), "'int8'"),
    "no such device": (("--device", "tpu"), "device 'tpu'"),
    "bootstraps": (("--bootstraps", -1), "at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name: str, text: Path, tmp_path: Path) -> None:
    options, expected = BAD[name]
    assert expected in refused("laws", "sweep", tmp_path / "out", "--text", text, *TINY, *options)
    assert not (tmp_path / "out").exists()


def test_bad_text(tmp_path: Path) -> None:
    assert "no text" in refused("laws", "sweep", tmp_path / "out", *TINY)
    assert "cannot be read" in refused("laws", "sweep", tmp_path / "out", "--text", tmp_path / "missing.txt", *TINY)
    assert "cannot be read" in refused("laws", "sweep", tmp_path / "out", "--text", tmp_path, *TINY)
    (tmp_path / "short.txt").write_text("too short")
    said = refused("laws", "sweep", tmp_path / "out", "--text", tmp_path / "short.txt", *TINY)
    assert "9 bytes" in said and "at least 65569" in said


def test_a_folder_of_another_sweep(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(out, text, "--stop-after", 0).code == 0
    both = ("laws", "sweep", out, "--text", text, "--sizes", "64x1", "--durations", "1024,2048", *TINY)
    said = refused(*both, "--sparsities", "0,0.75")
    assert "other settings" in said and "patterns" in said and "0.75" in said
    assert "precision" in refused(*both, "--sparsities", "0,0.5,2:4", "--precision", "bfloat16")
    assert "text_sha256" in refused(*both, "--text", text, "--sparsities", "0,0.5,2:4")
    (out / ledger.CSV).write_text("a,b\n1,2\n")
    assert "not as a sweep writes it" in refused(*both, "--sparsities", "0,0.5,2:4")
    (out / ledger.CSV).unlink()
    (out / ledger.CHECKPOINT).write_bytes(b"torn")
    assert "delete it" in refused(*both, "--sparsities", "0,0.5,2:4")
    (out / ledger.SETTINGS).write_text("{")
    assert "no file of a sweep" in refused(*both)
    (out / ledger.SETTINGS).unlink()
    (out / ledger.CSV).write_text("a,b\n1,2\n")
    assert "another program wrote it" in refused(*both)


def test_a_diverged_run_is_named(trainer: Trainer) -> None:
    group = train(trainer, until=1)
    group.params["head"][2] = float("nan")
    with pytest.raises(RequestError, match=r"sparsity 0\.875: the loss is no longer finite at step 1 of 24"):
        trainer.evaluate(group)


def test_no_room_on_the_device(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: Trainer, _group: Group) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Trainer, "step", full)
    with pytest.raises(RequestError, match="size 64x1 does not fit on cpu: repeat with more --micro-batches"):
        sweeping.run(Sweep(((64, 1),), ("0",), (4e5,)), tmp_path / "out", [text], Way("cpu"))


def test_without_scipy(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "pip install 'featherweight[laws]'" in refused("laws", "sweep", tmp_path / "out", "--text", text, *TINY)
