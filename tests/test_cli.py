"""The command line: JSON last lines as documented, what is printed where, seeds, Ctrl-C, and memory."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight import api
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid
from featherweight.data import evaluation_windows
from featherweight.data import tokens as tokens_of
from featherweight.errors import RequestError
from featherweight.models.load import load_dense, load_tokenizer
from featherweight.recipe import Recipe
from featherweight.recipes import RECIPES, by_name
from featherweight.stream import compress as pipeline
from runs import Ran, featherweight, journal, model_files, shards
from tiny import add_tokenizer, make

COMPRESS = {"out": str, "matrices": int, "bits_per_weight": float, "bytes": int, "seconds": float,
            "peak_memory_bytes": int, "phase_seconds": dict}  # fmt: skip
EVAL = {"model": str, "perplexity": float, "tokens": int, "context": int, "bits_per_weight": float}
NONE = type(None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make("llama", tmp_path_factory.mktemp("source")))


def compress(source: Path, out: Path, text: Path, *options: object) -> Ran:
    small = ("--group-size", 32, "--samples", 4, "--tokens", 32, "--refine", 1, "--calibration", text)
    return featherweight("compress", source, out, *small, *options)


@pytest.fixture(scope="module")
def ran(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return compress(source, tmp_path_factory.mktemp("ran") / "out", text)


@pytest.fixture(scope="module")
def out(ran: Ran) -> Path:
    return Path(ran.last["out"])


def assert_shape(values: dict[str, Any], shape: dict[str, type]) -> None:
    """Exactly these keys, in this order, of exactly these types."""
    assert {key: type(value) for key, value in values.items()} == shape
    assert list(values) == list(shape)


# --- compress


def test_compress(ran: Ran, out: Path, source: Path, text: Path) -> None:
    assert ran.code == 0
    assert_shape(ran.last, COMPRESS)
    assert len(ran.out.splitlines()) == 1  # all else goes to stderr
    last = ran.last
    assert last["matrices"] == 14 == len(journal(out))
    assert last["bytes"] == sum(map(len, shards(out).values()))
    assert 4.5 < last["bits_per_weight"] < 5.1  # fp32 scales of 32 weights are one bit each, and the shapes
    assert 0 < last["seconds"] < 60 and 50 << 20 < last["peak_memory_bytes"] < 8 << 30
    stated = next(line for line in ran.err.splitlines() if line.startswith("recipe "))
    values = json.loads(stated.partition(": ")[2])
    assert Recipe(**{**values, "calibration": tuple(values["calibration"])}).digest() in stated


def test_every_option_reaches_the_recipe(source: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option sets its field and no other; without options, the recipe is as shipped."""
    given: list[Recipe] = []

    def catch(_model: object, _out: object, chosen: Recipe, *_rest: object) -> None:
        given.append(chosen)
        raise RequestError("seen")

    monkeypatch.setattr(api, "compress", catch)
    options: dict[str, tuple[object, str, object]] = {
        "--bits": (3, "bits", 3), "--group-size": (16, "group_size", 16), "--method": ("rtn", "method", "rtn"),
        "--format": ("gptq", "format", "gptq"), "--calibration": (text, "calibration", (str(text),)),
        "--samples": (7, "samples", 7), "--tokens": (9, "tokens", 9), "--search": ("mse", "search", "mse"),
        "--order": ("pivot", "order", "pivot"), "--damping": (0.5, "damping", 0.5), "--refine": (0, "refine", 0),
        "--target": ("drifted", "target", "drifted"), "--pull": (0.75, "pull", 0.75), "--seed": (5, "seed", 5),
        "--chat-template": (None, "chat_template", True), "--asymmetric": (None, "symmetric", False),
    }  # fmt: skip
    for name, shipped in RECIPES.items():
        assert featherweight("compress", source, "x", "--recipe", name).error == "seen"
        assert given.pop() == shipped()
    for option, (value, field, expected) in options.items():
        assert featherweight("compress", source, "x", option, *([] if value is None else [value])).error == "seen"
        assert given.pop() == by_name("default").but(**{field: expected}), option
    featherweight("compress", source, "x", "--group-size", "row", "--calibration", "a.txt", "--calibration", "b.txt")
    assert (given[-1].group_size, given[-1].calibration) == (None, ("a.txt", "b.txt"))
    featherweight("compress", source, "x", "--true-sequential", "--target", "drifted")
    assert given[-1].true_sequential and not given[0].true_sequential
    featherweight("compress", source, "x", "--recipe", "papers.rtn", "--bits", 1.58, "--asymmetric", "--symmetric")
    assert (given[-1].bits, given[-1].symmetric, given[-1].method) == (1.58, True, "rtn")
    featherweight("compress", source, "x", "--scales-from", "updated", "--order", "natural")
    assert (given[-1].scales_from, given[-1].order) == ("updated", "natural")


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_runs(name: str, source: Path, text: Path, tmp_path: Path) -> None:
    ran = featherweight(
        "compress", source, tmp_path / "out", "--recipe", name, "--group-size", 32, "--samples", 2, "--tokens", 32,
        "--calibration", text,
    )  # fmt: skip
    assert ran.code == 0 and ran.last["matrices"] == 14
    assert torch.isfinite(api.load(tmp_path / "out")(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_recipe_of_ones_own(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from featherweight.recipe import Recipe\n\n"
        "def small():\n    return Recipe(method='rtn', bits=2, group_size=32)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert featherweight("compress", source, tmp_path / "out", "--recipe", "mine:small").code == 0
    assert {row["bits"] for row in journal(tmp_path / "out")} == {2}


def test_the_seed_decides_the_bytes(source: Path, text: Path, out: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1), ("other-again", 1)):
        assert compress(source, tmp_path / name, text, "--seed", seed).code == 0
    assert model_files(tmp_path / "same") == model_files(out)
    assert shards(tmp_path / "other") == shards(tmp_path / "other-again") != shards(out)


def test_the_command_does_what_python_does(source: Path, text: Path, out: Path, tmp_path: Path) -> None:
    chosen = Recipe(group_size=32, samples=4, tokens=32, refine=1, calibration=(str(text),))
    result = api.compress(source, tmp_path / "out", chosen)
    assert model_files(tmp_path / "out") == model_files(out)
    assert result.bytes == sum(map(len, shards(out).values()))


def test_ctrl_c_says_how_to_go_on(
    source: Path, text: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, blocks = pipeline.layerwise, 0

    def solve(*arguments: Any) -> Any:
        nonlocal blocks
        blocks += 1
        if blocks == 2:
            raise KeyboardInterrupt
        return inner(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "layerwise", solve)
        stopped = compress(source, tmp_path / "out", text)
    assert stopped.code == 1 and stopped.out == "" and "Traceback" not in stopped.err
    said = stopped.err.strip().splitlines()[-1]
    assert str(tmp_path / "out") in said and "repeat the command to go on" in said
    assert not (tmp_path / "out" / "config.json").exists()
    assert compress(source, tmp_path / "out", text).code == 0
    assert model_files(tmp_path / "out") == model_files(out)


# --- eval


def direct_perplexity(model: Any, source: Path, text: Path, context: int, windows: int) -> float:
    tokens_T = tokens_of(load_tokenizer(source), [str(text)])
    ids_ST = evaluation_windows(tokens_T, context)[:windows]
    with torch.no_grad():
        logp = model(ids_ST).logits[:, :-1].double().log_softmax(-1)
    return math.exp(-logp.gather(-1, ids_ST[:, 1:, None]).mean())


def test_eval_of_a_dense_model(source: Path, text: Path) -> None:
    ran = featherweight("eval", source, "--text", text, "--context", 64, "--windows", 5)
    assert ran.code == 0 and len(ran.out.splitlines()) == 1
    assert_shape(ran.last, {**EVAL, "kl_nats": NONE, "top1_agreement": NONE})
    expected = direct_perplexity(load_dense(source, "cpu", torch.float32), source, text, 64, 5)
    assert ran.last["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (ran.last["model"], ran.last["tokens"], ran.last["context"]) == (str(source), 5 * 63, 64)
    assert ran.last["bits_per_weight"] == 32
    assert "no BOS in front of windows" in ran.err


def test_eval_against_the_dense_model(source: Path, out: Path, text: Path, ran: Ran) -> None:
    found = featherweight("eval", out, "--text", text, "--context", 64, "--windows", 5, "--against", source).last
    assert_shape(found, {**EVAL, "kl_nats": float, "top1_agreement": float})
    expected = direct_perplexity(api.load(out, kernel="dense"), source, text, 64, 5)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["bits_per_weight"] == pytest.approx(ran.last["bits_per_weight"])
    assert 0.001 < found["kl_nats"] < 2 and 0.3 < found["top1_agreement"] < 1
    itself = featherweight("eval", source, "--text", text, "--context", 64, "--windows", 2, "--against", source).last
    assert itself["kl_nats"] == 0 and itself["top1_agreement"] == 1
    alone = featherweight("eval", out, "--text", text, "--context", 64, "--windows", 5).last
    assert alone["kl_nats"] is None and alone["perplexity"] == found["perplexity"]


def test_eval_says_where_it_puts_a_bos(tmp_path: Path, text: Path) -> None:
    with_bos = add_tokenizer(make("llama", tmp_path / "source"), bos=True)
    ran = featherweight("eval", with_bos, "--text", text, "--context", 64, "--windows", 2)
    assert "BOS (id 1) in front of every window" in ran.err
    assert "bos" not in ran.last


def test_windows_end_where_the_model_does(source: Path) -> None:
    """Left open, the context is what the model takes, and the text the embedded one."""
    assert featherweight("eval", source, "--windows", 1).last["context"] == 128


# --- generate, inspect


def test_generate(source: Path, out: Path) -> None:
    for model in (source, out):
        ran = featherweight("generate", model, "the rain", "--max-new-tokens", 12)
        assert ran.code == 0
        assert_shape(ran.last, {"model": str, "prompt": str, "text": str})
        assert ran.last["model"] == str(model) and ran.last["prompt"] == "the rain"
        assert ran.out.startswith("the rain" + ran.last["text"] + "\n") and 0 < len(ran.last["text"]) <= 12 * len(
            "<unk>"
        )
    sampled = [
        featherweight("generate", out, "the rain", "--temperature", 2, "--max-new-tokens", 12, "--seed", seed).last[
            "text"
        ]
        for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_inspect(source: Path, out: Path, ran: Ran) -> None:
    row = {"name": str, "shape": list, "bits": int, "group_size": int, "symmetric": bool, "sparsity": type(None)}
    row |= {"bytes": int, "loss": float}
    found = featherweight("inspect", out)
    assert_shape(found.last, {"format": str, "matrices": list})
    assert found.last["format"] == "compressed-tensors" and len(found.out.splitlines()) == 1
    matrices = found.last["matrices"]
    for matrix in matrices:
        assert_shape(matrix, row)
        assert matrix["name"] in found.err
    fields = ("name", "shape", "bits", "group_size", "symmetric", "bytes", "loss")
    by_name_of = lambda rows: {r["name"]: {f: r[f] for f in fields} for r in rows}  # noqa: E731
    assert by_name_of(matrices) == by_name_of(journal(out)) and len(matrices) == 14
    weights = sum(math.prod(matrix["shape"]) for matrix in matrices)
    assert 8 * sum(m["bytes"] for m in matrices) / weights == pytest.approx(ran.last["bits_per_weight"])
    dense = featherweight("inspect", source).last
    assert dense["format"] == "dense" and {m["name"] for m in dense["matrices"]} == {m["name"] for m in matrices}
    assert all((m["bits"], m["bytes"]) == (32, 4 * math.prod(m["shape"])) for m in dense["matrices"])


def test_inspect_of_a_gptq_file_without_its_journal(source: Path, text: Path, tmp_path: Path) -> None:
    options = ("--format", "gptq", "--asymmetric", "--bits", 3, "--group-size", "row")
    ran = compress(source, tmp_path / "out", text, *options)
    (tmp_path / "out" / "journal.jsonl").unlink()
    found = featherweight("inspect", tmp_path / "out").last
    assert found["format"] == "gptq" and len(found["matrices"]) == 14
    kinds = {(m["bits"], m["group_size"], m["symmetric"], m["loss"]) for m in found["matrices"]}
    assert kinds == {(3, None, False, None)}
    assert {m["name"].rpartition(".")[2]: m["shape"] for m in found["matrices"]}["down_proj"] == [64, 128]
    assert ran.code == 0


# --- the package


def test_help_in_a_process_of_its_own() -> None:
    ran = subprocess.run([sys.executable, "-m", "featherweight", "--help"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stderr == ""
    for command in ("compress", "eval", "generate", "inspect", "demo"):
        assert f" {command} " in ran.stdout


def test_help_of_every_command() -> None:
    for command in ("compress", "eval", "generate", "inspect", "demo"):
        ran = featherweight(command, "--help")
        assert ran.code == 0 and ran.err == "" and "Usage" in ran.out
    assert featherweight().code != 0


def test_names_of_the_package() -> None:
    import featherweight as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    assert package.compress is api.compress and package.Recipe is Recipe
    with pytest.raises(AttributeError, match="no attribute 'decompress'"):
        _ = package.decompress


def test_solve_one_layer() -> None:
    import featherweight as package

    generator = torch.Generator().manual_seed(0)
    weight_RC, x_TC = (torch.randn(shape, generator=generator) for shape in ((16, 64), (256, 64)))
    problem = LayerProblem(weight_RC, x_TC.T @ x_TC / 256)
    solution = package.solve(problem, Grid(bits=4, group_size=32))
    delta_RC = weight_RC - solution.values()
    assert solution.certificate == pytest.approx(float(((delta_RC @ problem.damped()) * delta_RC).sum()), rel=1e-3)
    unpolished = package.solve(problem, Grid(bits=4, group_size=32), package.Choices(refine=0))
    assert unpolished.certificate > solution.certificate


# --- memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_this_process_s_own() -> None:
    """Whatever started it: a notebook, a server, a test run."""
    code = (
        "import torch; from featherweight.stream.device import peak_memory_bytes; "
        "print(peak_memory_bytes(torch.device('cpu')), open('/proc/self/status').read())"
    )
    ballast = bytearray(1 << 30)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    del ballast
    peak, _, status = ran.stdout.partition(" ")
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert int(peak) == pytest.approx(own * 1024, rel=0.05)


def peak_of(blocks: int, folder: Path, text: Path) -> int:
    """Peak memory of `compress` in a process of its own, on a model of so many blocks, 13 MB each in float32."""
    source = add_tokenizer(
        make("llama", folder / str(blocks), dtype=torch.bfloat16, num_hidden_layers=blocks, hidden_size=512,
             intermediate_size=1408, num_attention_heads=8, num_key_value_heads=8)
    )  # fmt: skip
    command = [sys.executable, "-m", "featherweight", "compress", str(source), str(folder / f"{blocks}-out"),
               "--recipe", "papers.gptq", "--samples", "4", "--tokens", "64", "--calibration", str(text)]  # fmt: skip
    # By way of a small shell: the system counts what the parent held at the fork as the child's peak.
    shell = ["sh", "-c", f"{shlex.join(command)}; exit $?"]
    ran = subprocess.run(shell, capture_output=True, text=True, timeout=560)
    assert ran.returncode == 0, ran.stderr
    shutil.rmtree(source)
    peak: int = json.loads(ran.stdout.splitlines()[-1])["peak_memory_bytes"]
    return peak


@pytest.mark.slow
def test_memory_grows_with_the_block_and_not_with_their_number(tmp_path: Path, text: Path) -> None:
    few, many = (peak_of(blocks, tmp_path, text) for blocks in (30, 60))
    assert many < 1.1 * few, f"{few / 1e6:.0f} MB for 30 blocks, {many / 1e6:.0f} MB for 60"
