"""The model that `tune` trains: layers over packed codes, their scales (zeros, norms) parameters; its original too.

Of several processes each has all of it, or, where that is too large for a GPU, a part (`train.sharding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from featherweight import formats
from featherweight.errors import RequestError
from featherweight.linear import CompressedEmbedding, CompressedLinear
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.load import load_apart, load_dense, load_with
from featherweight.models.tree import disk_names, find_blocks
from featherweight.stream.parallel import World
from featherweight.train.e2e_qp import Trained
from featherweight.train.sharding import gathered, mesh_of, shard
from featherweight.train.tuned_linear import Rounded, TunedLinear
from featherweight.train.tuned_weights import TunedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_SCALE = 0.05  # of the one it began with
WHOLE_SHARE = 0.5  # of a GPU's memory: what takes more is sharded


@dataclass(frozen=True)
class Wanted:
    """What is trained of which folder, in which dtype, towards which original, where."""

    checkpoint: Checkpoint
    original: Checkpoint | None
    weights: bool
    zeros: bool
    norms: bool
    dtype: torch.dtype
    device: torch.device


def sharded(asked: bool | None, wanted: Wanted, world: World) -> bool:
    """Whether processes share one model: as asked for, else where one alone would take WHOLE_SHARE of a GPU.

    What it would take are the original and twice the packed folder, since what is trained, with gradients and averages,
    is about as large as the codes (groups of 64). Where it fits, every process has the whole: less is sent about.
    """
    if world.size == 1:
        if asked:
            raise RequestError(
                "--shard shares a model among processes and 1 was started: use torchrun --nproc-per-node 2, or drop it."
            )
        return False
    if asked is not None or wanted.device.type != "cuda":
        return bool(asked)
    size_bytes = 2 * _size_bytes(wanted.checkpoint) + (_size_bytes(wanted.original) if wanted.original else 0)
    room_bytes = WHOLE_SHARE * torch.cuda.get_device_properties(wanted.device).total_memory
    return world.add_up(int(size_bytes > room_bytes)) > 0


def _size_bytes(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.nbytes(name) for name in checkpoint.names)


class TunedModel:
    """The models of one run of `tune`, and what is trained of them, by names on disk.

    Attributes:
        model, dense: the one in training and its original (None: the text itself is trained on).
        layers: the trained layers; norms: what the trained norms' vectors are parameters of.
    """

    def __init__(self, wanted: Wanted, shared: bool) -> None:
        self.wanted = wanted
        quantization = formats.config_of(wanted.checkpoint.config, wanted.checkpoint.names)
        if quantization is None:
            raise RequestError(f"{wanted.checkpoint.path} is dense: tune takes a folder that compress wrote.")
        self.format, self.rules = formats.from_config(quantization)
        self.layers: dict[str, TunedLinear | TunedWeights] = {}
        self.norms: dict[str, nn.Module] = {}
        self.tables: set[str] = set()  # names of rounded embeddings
        self.mesh = mesh_of(wanted.device) if shared else None
        folder, where = wanted.checkpoint.path, (wanted.device, wanted.dtype)
        self.model = load_with(folder, self._replace, *where, filled=self._filled)
        self.dense = None if wanted.original is None else self._original(wanted.original)

    def _original(self, original: Checkpoint) -> PreTrainedModel:
        where, mesh = (self.wanted.device, self.wanted.dtype), self.mesh
        if mesh is None:
            dense = load_dense(original.path, *where).requires_grad_(False)
        else:
            dense = load_apart(original.path, *where, lambda model, path: shard(model.get_submodule(path), mesh))
        sizes = [model.get_input_embeddings().num_embeddings for model in (dense, self.model)]
        if sizes[0] != sizes[1]:
            raise RequestError(
                f"{original.path} knows {sizes[0]} tokens and {self.wanted.checkpoint.path} {sizes[1]}: give its own "
                "original."
            )
        return dense

    def _replace(self, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        rule, dtype = self.rules.of(name), self.wanted.dtype
        self.format.shape(tensors, rule, name)  # for an error that names the matrix
        if isinstance(module, nn.Embedding):
            self.tables.add(name)
            return CompressedEmbedding(self.format, rule, tensors, module, dtype)
        bias = tensors.pop("bias", None)
        layer = CompressedLinear.from_tensors(self.format, rule, tensors, bias, dtype, "reference")
        if name in self.tables:  # a head tied to the embedding, which stays as it is
            return layer
        if self.wanted.weights:
            self.layers[name] = TunedWeights(layer, self.wanted.zeros)
        else:
            self.layers[name] = TunedLinear(layer, name, self.wanted.zeros).prepare()
        return self.layers[name]

    def _filled(self, model: PreTrainedModel, path: str) -> None:
        if self.wanted.norms:
            self._train_norms(model, path and f"{path}.")
        if self.mesh is not None:
            shard(model.get_submodule(path), self.mesh)

    def _train_norms(self, model: PreTrainedModel, inside: str) -> None:
        """The norms' vectors in float32 behind what the model computes with."""
        from torch.nn.utils import parametrize

        checkpoint, disk = self.wanted.checkpoint, disk_names(self.wanted.checkpoint, model)
        for path, module in list(model.named_modules()):
            if "norm" not in type(module).__name__.lower() or not f"{path}.".startswith(inside):
                continue
            for name, _ in list(module.named_parameters(recurse=False)):
                on_disk = disk[f"{path}.{name}"].name
                rounded = Rounded(checkpoint.dtype(on_disk), self.wanted.dtype)
                parametrize.register_parametrization(module, name, rounded, unsafe=True)
                owner = module.parametrizations[name]  # type: ignore[index,union-attr]
                assert isinstance(owner, nn.Module)
                value = checkpoint.read([on_disk])[on_disk].float().to(self.wanted.device)
                owner.original = nn.Parameter(value)
                self.norms[on_disk] = owner

    def parameters(self, rate: float, weight_rate: float) -> list[Trained]:
        """What is trained, how fast, and the least value of each."""
        found: list[Trained] = []
        for layer in self.layers.values():
            if isinstance(layer, TunedWeights):
                found += [Trained(weights, weight_rate) for weights in layer.weights]
                found += [Trained(scale, rate, LEAST_SCALE) for scale in layer.scales]
                found += [Trained(zero, rate) for zero in layer.zeros]
                continue
            found.append(Trained(layer.scale, rate, LEAST_SCALE))
            if self.wanted.zeros:
                found.append(Trained(layer.zero, rate))
        return found + [Trained(owner.get_parameter("original"), rate) for owner in self.norms.values()]

    def blocks(self) -> nn.ModuleList:
        """Of the model in training."""
        return find_blocks(self.model)[1]

    @torch.no_grad()
    def tensors(self, here: bool) -> dict[str, Tensor]:
        """What a file holds of what was trained, on the CPU; nothing unless `here`. All that share a model call it."""
        found: dict[str, Tensor] = {}
        left: dict[str, nn.Module] = {**self.layers, **self.norms}
        for part in (*self.blocks(), self.model):
            inside = set(part.modules())
            layers = {name: left.pop(name) for name, module in list(left.items()) if module in inside}
            with gathered(part):
                for name, module in layers.items() if here else ():
                    found |= self._tensors_of(name, module)
        return found

    def _tensors_of(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        if isinstance(module, TunedLinear | TunedWeights):
            found = {f"{name}.{suffix}": tensor for suffix, tensor in module.tensors().items()}
        else:
            found = {name: module.get_parameter("original").to(self.wanted.checkpoint.dtype(name))}
        return {
            key: tensor.detach().to("cpu", copy=True) for key, tensor in found.items()
        }  # what is gathered goes away
