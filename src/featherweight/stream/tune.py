"""tune: the scales of a compressed folder trained on text as a whole, and a folder of the same format written.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight import data
from featherweight.errors import RequestError
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.load import load_tokenizer
from featherweight.models.skeleton import is_encoder_decoder
from featherweight.models.tree import checkpoint_dtype
from featherweight.stream.calibration import Tell, windows_apart
from featherweight.stream.device import compute_dtype, peak_memory_bytes
from featherweight.stream.folder import LOCK
from featherweight.stream.parallel import ALONE, World, joined
from featherweight.stream.tuned import TunedModel, Wanted, sharded
from featherweight.stream.tuning import RESULT, begin, locked, note, read_state, swap, swapped, write_state
from featherweight.train.e2e_qp import Schedule, Tuner
from featherweight.train.keeping import Keeping

TOKENS = 2048
MICRO_TOKENS = {"cpu": 2048, "cuda": 4096}  # in one pass forward and back, or more where they fit
MOST_MICRO_TOKENS = 16384  # of a small model on a GPU, whose kernels are started one by one
MICRO_SHARE = 0.4  # of the memory of a GPU
WORTH_COMPILING = 200  # passes forward and back


@dataclass(frozen=True)
class Tuning:
    """How a folder is tuned.

    Attributes:
        samples, tokens: windows of text, held-out ones among them, and their length (None: 2048 or the model's
            positions); held_out: the share of each text and of the windows that chooses the state that is kept.
        epochs, batch: steps of the optimizer are epochs x windows / batch; rate: Adam's first one, relative to each
            scale, of zeros and norms in their own unit.
        weights: train the weights too (of pruned layers those that were kept), at `weight_rate`, in steps of their
            scale: codes then move. It takes the memory of training a float model.
        zeros, norms: train these too; zeros only where the format stores them.
        seed: of the windows and of their order.
        text_share: with a dense model, the cross-entropy's share of the loss, from 0 to 1: towards lower perplexity, at
            the price of a larger divergence.
    """

    samples: int = 256
    tokens: int | None = None
    held_out: float = 0.125
    epochs: int = 1
    batch: int = 8
    rate: float = 1e-3
    zeros: bool = False
    norms: bool = False
    seed: int = 0
    weights: bool = False
    weight_rate: float = 0.03
    text_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if self.samples < 2:
            raise RequestError(
                f"tuning trains on some windows and holds out others, at least 2 in all, and {self.samples} was asked "
                "for: raise --samples."
            )
        if not 0 < self.held_out < 1:
            raise RequestError(f"held_out must lie between 0 and 1, not {self.held_out}.")
        if not 0 <= self.text_share <= 1:
            raise RequestError(f"text_share must lie between 0 and 1, not {self.text_share}.")
        for name in ("rate", "weight_rate"):
            if not 0 < getattr(self, name) < 1:
                raise RequestError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")

    @property
    def held_out_samples(self) -> int:
        """How many windows are held out: at least one, and not all."""
        return min(self.samples - 1, max(1, round(self.held_out * self.samples)))

    @property
    def steps(self) -> int:
        """Of the optimizer."""
        return math.ceil(self.epochs * (self.samples - self.held_out_samples) / self.batch)


def tune(
    path: str | Path,
    text: Sequence[str],
    to: str | Path | None = None,
    against: str | Path | None = None,
    settings: Tuning | None = None,
    device: str = "auto",
    tell: Tell | None = None,
    shard: bool | None = None,
) -> dict[str, Any]:
    """Trains the scales of the compressed folder `path` and writes the folder `to` (None: `path` itself, at once).

    With `against`, the dense model, what is lowered is KL(dense || model), or a mixture with the cross-entropy
    (`Tuning.text_share`), else the cross-entropy. Killed and called
    again it goes on, from a folder beside the result whose name ends in ".tuning". Returns the fields of `tune`'s JSON
    line: held-out KL and cross-entropy before and after, the step that was best, seconds, and peak memory. Raises
    RequestError for a folder that has no scales or cannot hold what is asked for, and for too little text.

    Of several processes (`stream.parallel`), all call it with the same arguments; each takes some of the windows of
    every step, and one writes and tells. With `shard` each holds a part of the models, without it all of them; None
    shards what is too large for one GPU (`stream.tuned`). Numbers are those of one process up to the order of sums, and
    a run that was stopped goes on with any number of processes.
    """
    with joined() as world:
        return _tune(path, text, to, against, settings or Tuning(), device, tell, shard, world)


def _tune(
    path: str | Path,
    text: Sequence[str],
    to: str | Path | None,
    against: str | Path | None,
    settings: Tuning,
    device: str,
    tell: Tell | None,
    shard: bool | None,
    world: World,
) -> dict[str, Any]:
    started = time.perf_counter()
    target = Path(path if to is None else to)
    work = target.with_name(target.name + ".tuning")
    found: dict[str, Any] | None = world.first(swapped(target, work) if world.leads else None)
    if found is not None:
        return found
    if settings.text_share and against is None:
        raise RequestError(
            f"text_share {settings.text_share} weighs the text beside a dense model, and none is given: without "
            "one the text is the whole loss; name the model (--against) or leave text_share at 0."
        )
    folder, torch_device = resolve(path), world.device(device)
    if to is not None and target.exists() and any(target.iterdir()):
        raise RequestError(f"{target} is not empty: choose a new folder, or leave --to out to tune in place.")
    job = _Job(folder, settings, against, torch_device, world, shard)
    training_ST, held_ST = job.windows(text)
    with locked(work) if world.leads else nullcontext():
        if world.leads:
            begin(work, job.request(training_ST, held_ST))
        looks, best = job.train(work, training_ST, held_ST, tell or (lambda done, total, what: None))
        (_, first_kl, first_entropy), (step, kl, entropy) = looks[0], best
        report = {
            "out": str(target),
            "kl_nats_before": first_kl,
            "kl_nats": kl,
            "cross_entropy_before": first_entropy,
            "cross_entropy": entropy,
            "best_step": step,
            "steps": looks[-1][0],
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(torch_device),
        }
        new = job.tuned.tensors(here=world.leads)
        if world.leads:
            job.write(work / RESULT, new, {**job.request(training_ST, held_ST), "looks": looks, "report": report})
            swap(target, work)
    if world.leads:
        shutil.rmtree(work)
    world.wait()
    return report


class _Job:
    """One folder in training."""

    def __init__(
        self,
        folder: Path,
        settings: Tuning,
        against: str | Path | None,
        device: torch.device,
        world: World = ALONE,
        shard: bool | None = None,
    ) -> None:
        self.checkpoint, self.settings, self.device, self.world = Checkpoint.open(folder), settings, device, world
        if is_encoder_decoder(self.checkpoint):
            raise RequestError(f"{folder} has an encoder and a decoder: tune trains decoders alone.")
        original = None if against is None else Checkpoint.open(resolve(against))
        self.teacher = None if original is None else original.fingerprint()
        dtype = compute_dtype(checkpoint_dtype(self.checkpoint), device)
        dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # gradients vanish in float16
        wanted = Wanted(self.checkpoint, original, settings.weights, settings.zeros, settings.norms, dtype, device)
        self.tuned = TunedModel(wanted, sharded(shard, wanted, world))

    def windows(self, text: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Windows to train on and windows held out, of the folder's own tokenizer."""
        settings = self.settings
        longest = getattr(self.tuned.model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
        tokens = settings.tokens or min(TOKENS, longest)
        if not 2 <= tokens <= longest:
            raise RequestError(f"--tokens {tokens} must lie between 2 and the model's {longest} positions.")
        counts = settings.samples - settings.held_out_samples, settings.held_out_samples
        tokenizer = load_tokenizer(self.checkpoint.path)
        return windows_apart(tokenizer, text, counts, settings.held_out, tokens, settings.seed, False)

    def request(self, training_ST: Tensor, held_ST: Tensor) -> dict[str, Any]:
        """What the result follows from; compared when a run goes on."""
        return {
            "settings": asdict(self.settings),
            "model": self.checkpoint.fingerprint(),
            "against": self.teacher,
            "text": [data.digest(training_ST), data.digest(held_ST)],
        }

    def _micro_tokens(self) -> int:
        """How many tokens go through the model at a time."""
        least = MICRO_TOKENS[self.device.type]
        if self.device.type != "cuda":
            return least
        config = self.tuned.model.config.get_text_config()
        # bfloat16 that a block keeps of a token (some 34 numbers for each of its width), logits and what follows them
        token_bytes = config.num_hidden_layers * config.hidden_size * 68 + config.vocab_size * 16
        room = MICRO_SHARE * torch.cuda.mem_get_info(self.device)[0]
        return int(min(MOST_MICRO_TOKENS, max(least, room / token_bytes)))

    def train(
        self, work: Path, training_ST: Tensor, held_ST: Tensor, tell: Tell
    ) -> tuple[list[tuple[int, float | None, float]], tuple[int, float | None, float]]:
        """Trains to the end; the state is on disk after every look. Returns all looks and the best."""
        settings, tuned, leads = self.settings, self.tuned, self.world.leads
        trained = tuned.parameters(settings.rate, settings.weight_rate)
        micro = max(1, self.world.first(self._micro_tokens()) // training_ST.shape[1])
        schedule = Schedule(settings.steps, settings.batch, micro, seed=settings.seed, text_share=settings.text_share)
        passes = settings.steps * settings.batch / micro / self.world.size
        pays = passes > WORTH_COMPILING and tuned.mesh is None  # compiling parameters that come and go is untried
        Keeping(tuned.blocks(), self.device, compile=pays)
        self.world.wait()  # for the folder
        state = read_state(work, [each.parameter for each in trained])
        tuner = Tuner(
            lambda ids_ST: _logits(tuned.model, ids_ST),
            None if tuned.dense is None else lambda ids_ST: _logits(tuned.dense, ids_ST),
            trained, training_ST, held_ST, schedule, state, self.world,
        )  # fmt: skip

        def keep() -> None:
            whole = tuner.whole_state()
            if leads:
                write_state(work, whole)

        keep()
        while not tuner.done:
            tuner.advance(lambda step: tell(step, settings.steps, f"step {step}") if leads else None)
            keep()
        tuner.finish()
        return tuner.state.looks, tuner.best_look

    def write(self, out: Path, new: dict[str, Tensor], record: Mapping[str, Any]) -> None:
        """The whole result folder: shards with the new tensors, everything else as it was."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        shutil.rmtree(out, ignore_errors=True)
        skipped = shutil.ignore_patterns(*self.checkpoint.shards, LOCK)
        shutil.copytree(self.checkpoint.path, out, ignore=skipped)
        for shard in self.checkpoint.shards:
            with safe_open(self.checkpoint.path / shard, framework="pt") as file:
                names = file.keys()
                tensors = {name: new.pop(name) if name in new else file.get_tensor(name) for name in names}
                save_file(tensors, out / shard, metadata=file.metadata())
            shutil.copymode(self.checkpoint.path / shard, out / shard)
        assert not new, f"{next(iter(new))} is in no shard"
        note(out, record)


def _logits(model: Any, ids_ST: Tensor) -> Tensor:
    logits_STV: Tensor = model(input_ids=ids_ST.to(model.device), use_cache=False).logits
    return logits_STV
