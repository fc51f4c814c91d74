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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight import data, formats
from featherweight.errors import RequestError
from featherweight.linear import CompressedEmbedding, CompressedLinear
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.load import load_dense, load_tokenizer, load_with
from featherweight.models.skeleton import is_encoder_decoder
from featherweight.models.tree import checkpoint_dtype, disk_names, find_blocks
from featherweight.stream.calibration import Tell, windows_apart
from featherweight.stream.device import compute_dtype, peak_memory_bytes
from featherweight.stream.folder import LOCK
from featherweight.stream.parallel import ALONE, World, joined
from featherweight.stream.tuning import RESULT, begin, locked, note, read_state, swap, swapped, write_state
from featherweight.train.e2e_qp import Schedule, Tuner
from featherweight.train.keeping import Keeping
from featherweight.train.tuned_linear import Rounded, TunedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_SCALE = 0.05  # of the one it began with
TOKENS = 2048
MICRO_TOKENS = {"cpu": 2048, "cuda": 4096}  # in one pass forward and back
WORTH_COMPILING = 200  # passes forward and back


@dataclass(frozen=True)
class Tuning:
    """How a folder is tuned.

    Attributes:
        samples, tokens: windows of text, held-out ones among them, and their length (None: 2048 or the model's
            positions); held_out: the share of each text and of the windows that chooses the state that is kept.
        epochs, batch, rate: see `train.e2e_qp.Schedule`; steps are epochs x windows / batch.
        zeros, norms: train these too; zeros only where the format stores them.
        seed: of the windows and of their order.
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
        if not 0 < self.rate < 1:
            raise RequestError(f"rate must lie between 0 and 1, not {self.rate}.")

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
) -> dict[str, Any]:
    """Trains the scales of the compressed folder `path` and writes the folder `to` (None: `path` itself, at once).

    With `against`, the dense model, what is lowered is KL(dense || model), else the cross-entropy. Killed and called
    again it goes on, from a folder beside the result whose name ends in ".tuning". Returns the fields of `tune`'s JSON
    line: held-out KL and cross-entropy before and after, the step that was best, seconds, and peak memory. Raises
    RequestError for a folder that has no scales or cannot hold what is asked for, and for too little text.

    Of several processes (`stream.parallel`), all call it with the same arguments; each takes some of the windows of
    every step, and one writes and tells.
    """
    with joined() as world:
        return _tune(path, text, to, against, settings or Tuning(), device, tell, world)


def _tune(
    path: str | Path,
    text: Sequence[str],
    to: str | Path | None,
    against: str | Path | None,
    settings: Tuning,
    device: str,
    tell: Tell | None,
    world: World,
) -> dict[str, Any]:
    started = time.perf_counter()
    target = Path(path if to is None else to)
    work = target.with_name(target.name + ".tuning")
    found: dict[str, Any] | None = world.first(swapped(target, work) if world.leads else None)
    if found is not None:
        return found
    folder, torch_device = resolve(path), world.device(device)
    if to is not None and target.exists() and any(target.iterdir()):
        raise RequestError(f"{target} is not empty: choose a new folder, or leave --to out to tune in place.")
    job = _Job(folder, settings, against, torch_device, world)
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
        if world.leads:
            job.write(work / RESULT, {**job.request(training_ST, held_ST), "looks": looks, "report": report})
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
    ) -> None:
        self.checkpoint, self.settings, self.device = Checkpoint.open(folder), settings, device
        self.world = world
        if is_encoder_decoder(self.checkpoint):
            raise RequestError(f"{folder} has an encoder and a decoder: tune trains decoders alone.")
        quantization = formats.config_of(self.checkpoint.config, self.checkpoint.names)
        if quantization is None:
            raise RequestError(f"{folder} is dense: tune takes a folder that compress wrote.")
        self.format, self.rules = formats.from_config(quantization)
        dtype = compute_dtype(checkpoint_dtype(self.checkpoint), device)
        self.dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # gradients vanish in float16
        self.layers: dict[str, TunedLinear] = {}
        self.tables: set[str] = set()  # names of rounded embeddings
        self.model = load_with(folder, self._replace, device, self.dtype)
        self.norms = self._norms() if settings.norms else {}
        self.dense: PreTrainedModel | None = None
        self.teacher: str | None = None
        if against is not None:
            self.dense = load_dense(resolve(against), device, self.dtype).requires_grad_(False)
            self.teacher = Checkpoint.open(resolve(against)).fingerprint()
            sizes = [model.get_input_embeddings().num_embeddings for model in (self.dense, self.model)]
            if sizes[0] != sizes[1]:
                raise RequestError(f"{against} knows {sizes[0]} tokens and {folder} {sizes[1]}: give its own original.")

    def _replace(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        rule = self.rules.of(name)
        self.format.shape(tensors, rule, name)  # for an error that names the matrix
        if isinstance(module, nn.Embedding):
            self.tables.add(name)
            return CompressedEmbedding(self.format, rule, tensors, module, self.dtype)
        bias = tensors.pop("bias", None)
        layer = CompressedLinear.from_tensors(self.format, rule, tensors, bias, self.dtype, "reference")
        if name in self.tables:  # a head tied to the embedding, which stays as it is
            return layer
        self.layers[name] = TunedLinear(layer, name, self.settings.zeros).prepare()
        return self.layers[name]

    def _norms(self) -> dict[str, nn.Parameter]:
        """The norms' vectors by name on disk, in float32 behind what the model computes with."""
        from torch.nn.utils import parametrize

        disk = disk_names(self.checkpoint, self.model)
        found: dict[str, nn.Parameter] = {}
        for path, module in list(self.model.named_modules()):
            if "norm" not in type(module).__name__.lower():
                continue
            for name, parameter in list(module.named_parameters(recurse=False)):
                on_disk = disk[f"{path}.{name}"].name
                parametrize.register_parametrization(
                    module, name, Rounded(self.checkpoint.dtype(on_disk), self.dtype), unsafe=True
                )
                original = module.parametrizations[name].original  # type: ignore[index,union-attr]
                assert isinstance(original, nn.Parameter)
                value = self.checkpoint.read([on_disk])[on_disk].float().to(parameter.device)
                original.data = value
                original.requires_grad = True
                found[on_disk] = original
        return found

    def windows(self, text: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Windows to train on and windows held out, of the folder's own tokenizer."""
        settings = self.settings
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
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

    def train(
        self, work: Path, training_ST: Tensor, held_ST: Tensor, tell: Tell
    ) -> tuple[list[tuple[int, float | None, float]], tuple[int, float | None, float]]:
        """Trains to the end; the state is on disk after every look. Returns all looks and the best."""
        settings = self.settings
        parameters: list[nn.Parameter] = []
        floors: list[float | None] = []
        for layer in self.layers.values():
            parameters.append(layer.scale)
            floors.append(LEAST_SCALE)
            if settings.zeros:
                parameters.append(layer.zero)
                floors.append(None)
        parameters += self.norms.values()
        floors += [None] * len(self.norms)
        micro = max(1, MICRO_TOKENS[self.device.type] // training_ST.shape[1])
        schedule = Schedule(settings.steps, settings.batch, micro, settings.rate, seed=settings.seed)
        passes = settings.steps * settings.batch / micro / self.world.size
        Keeping(find_blocks(self.model)[1], self.device, compile=passes > WORTH_COMPILING)
        self.world.wait()  # for the folder
        state = read_state(work, self.device)
        tuner = Tuner(
            lambda ids_ST: _logits(self.model, ids_ST),
            None if self.dense is None else lambda ids_ST: _logits(self.dense, ids_ST),
            parameters, floors, training_ST, held_ST, schedule, state, self.world,
        )  # fmt: skip
        leads = self.world.leads
        if leads:
            write_state(work, tuner.state)
        while not tuner.done:
            tuner.advance(lambda step: tell(step, settings.steps, f"step {step}") if leads else None)
            if leads:
                write_state(work, tuner.state)
        tuner.finish()
        return tuner.state.looks, tuner.best_look

    @torch.no_grad()
    def write(self, out: Path, record: Mapping[str, Any]) -> None:
        """The whole result folder: shards with new scales (zeros, norms), everything else as it was."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        new = {name: value.to(self.checkpoint.dtype(name)).cpu() for name, value in self.norms.items()}
        for name, layer in self.layers.items():
            new |= {f"{name}.{suffix}": tensor.cpu() for suffix, tensor in layer.tensors().items()}
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
