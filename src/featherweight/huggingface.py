"""Our own layout as a quantizer of transformers: `from_pretrained` on a folder whose quant_method is "featherweight".

A folder that names another method, gptq or compressed-tensors, is loaded by transformers' own quantizer for it, as
ever. Only who asks gets our layers and kernels for it: `from_pretrained(OUT, config=featherweight.config(OUT))`.

Compressed matrices become `CompressedLinear` modules while the model is still on meta, with buffers of the shapes and
dtypes that the file's headers state; transformers then fills them like any other tensor. So nothing is ever dense, and
what is loaded is bytes of the file. `save_pretrained` writes the same tensors and config again.

Imports transformers: only `transformers_hook` imports this module, when transformers has been imported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from featherweight import formats
from featherweight.errors import RequestError
from featherweight.linear import CompressedEmbedding, CompressedLinear
from featherweight.merged import merge, prepare
from featherweight.mixture import join_experts
from featherweight.models.experts import take_apart
from featherweight.models.headers import DTYPES, Entry, read_entries
from featherweight.models.load import fill_buffers
from featherweight.models.names import lookup, renamed

METHOD = "featherweight"


def register(tables: ModuleType) -> None:
    """Write config and quantizer into transformers' tables (the module `transformers.quantizers.auto`), once."""
    if METHOD not in tables.AUTO_QUANTIZATION_CONFIG_MAPPING:
        tables.register_quantization_config(METHOD)(FeatherweightConfig)
        tables.register_quantizer(METHOD)(FeatherweightQuantizer)


class FeatherweightConfig(QuantizationConfigMixin):
    """The `quantization_config` of a folder, key by key as it is written; or, under `stored`, that of a folder which
    names another method: such a folder is saved again as what it was."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(copy.deepcopy(settings))
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = copy.deepcopy(self.__dict__)
        return found.get("stored", found)


def config(path: str | Path, **options: Any) -> Any:
    """The transformers configuration of a checkpoint, with which `from_pretrained` loads it onto our layers.

    Args:
        path: a folder in any format we read, or a hub name.
        options: as AutoConfig.from_pretrained takes them.

    Raises RequestError for a checkpoint that is not compressed, or in a way we do not read.
    """
    from transformers import AutoConfig

    found: Any = AutoConfig.from_pretrained(path, **options)
    stored = getattr(found, "quantization_config", None)
    if stored is None:
        raise RequestError(f"{path} has no quantization_config: it is not compressed, so leave out config=.")
    formats.from_config(stored)
    if stored.get("quant_method") != METHOD:
        found.quantization_config = {"quant_method": METHOD, "stored": stored}
    return found


class FeatherweightQuantizer(HfQuantizer):
    """Loads what is compressed already; it does not compress while loading."""

    requires_calibration = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layout, self.rules = formats.from_config(quantization_config.to_dict())
        self.heads: dict[str, str] = {}
        self.leaves: dict[str, str] = {}  # what an expert's matrix is called on disk -> here

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str | Path] | None = None, **kwargs: Any
    ) -> None:
        """Put empty compressed layers where the files have compressed matrices."""
        if not checkpoint_files:
            raise RequestError(
                f"{METHOD} layers are read from files, and from_pretrained was given none: name a folder."
            )
        entries = {name: entry for path in checkpoint_files for name, entry in _entries(Path(path)).items()}
        mark = self.layout.suffixes(self.rules.distinct[0])[0]
        stored = {name.removesuffix(f".{mark}") for name in entries if name.endswith(f".{mark}")}
        self.heads = _tied_to(model, stored)
        take_apart(model)
        known = renamed([f"{name}.weight" for name in stored], cast(Any, model))
        for path, module in [(path, module) for path, module in model.named_modules() if _is_matrix(module)]:
            name = lookup(path, str(model.base_model_prefix), stored)
            if name is None and (found := lookup(f"{path}.weight", str(model.base_model_prefix), known)):
                name = known[found].name.removesuffix(".weight")
                self.leaves[name.rpartition(".")[2]] = path.rpartition(".")[2]
            if name is not None:
                model.set_submodule(path, self._empty(name, module, entries))
                stored.remove(name)
        for path in self.heads:  # nothing of it is in the files
            model.set_submodule(path, nn.Identity())
            model.all_tied_weights_keys.pop(f"{path}.weight")  # type: ignore[operator, union-attr]
        if stored:
            raise RequestError(
                f"{min(stored)} is compressed and no Linear of {type(model).__name__} ({len(stored)} such matrices): "
                "the checkpoint is of another architecture."
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Look for damage, now that there are bytes; put the heads that are tied to a compressed embedding in place,
        over the embedding's own tensors."""
        for path, module in model.named_modules():
            if isinstance(module, CompressedLinear):
                self.layout.verify(dict(module.named_buffers()), path)
        for embedding in [module for module in model.modules() if isinstance(module, CompressedEmbedding)]:
            fill_buffers(model, embedding.family, embedding.device)
        for path, source in self.heads.items():
            table = model.get_submodule(source)
            assert isinstance(table, CompressedEmbedding)
            tensors = dict(table.named_buffers())
            head = CompressedLinear.from_tensors(self.layout, table.rule, tensors, dtype=table.dtype)
            head._non_persistent_buffers_set.update(self.layout.suffixes(table.rule))  # they are saved once
            model.set_submodule(path, head)
        join_experts(model)
        merge(model)
        prepare(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """transformers' own table and, since experts are not fused here, what their matrices are called."""
        from transformers.core_model_loading import WeightRenaming

        table: list[Any] = super().update_weight_conversions(weight_conversions, model)
        names = [(disk, ours) for disk, ours in self.leaves.items() if disk != ours]
        return table + [WeightRenaming(rf"\.experts\.(\d+)\.{disk}\.", rf".experts.\1.{ours}.") for disk, ours in names]

    def _empty(
        self, name: str, module: nn.Module, entries: dict[str, tuple[Path, Entry]]
    ) -> CompressedLinear | CompressedEmbedding:
        """A layer on meta; only the tensor with its shape is read: the shapes of others are checked against it."""
        rule = self.rules.of(name)
        tensors: dict[str, Tensor] = {}
        for suffix in self.layout.suffixes(rule):
            full = f"{name}.{suffix}"
            if full not in entries:
                raise RequestError(f"{full} is in none of the checkpoint's files: download it again.")
            path, entry = entries[full]
            tensors[suffix] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            if suffix == self.layout.shape_in:
                tensors[suffix] = _read(path, full)
        bias, weight = getattr(module, "bias", None), module.weight
        assert isinstance(weight, Tensor)
        if isinstance(module, nn.Embedding):
            return CompressedEmbedding(self.layout, rule, tensors, module, weight.dtype)
        return CompressedLinear.from_tensors(self.layout, rule, tensors, bias, weight.dtype)


def _entries(path: Path) -> dict[str, tuple[Path, Entry]]:
    if path.suffix != ".safetensors":
        raise RequestError(f"{path} is not safetensors, which compressed layers are read from: download it again.")
    return {name: (path, entry) for name, entry in read_entries(path.parent, path.name).items()}


def _read(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _is_matrix(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, nn.Embedding, Conv1D))


def _tied_to(model: nn.Module, stored: set[str]) -> dict[str, str]:
    """Modules whose weight is that of a compressed one, and its path."""
    ties: Any = model.all_tied_weights_keys
    pairs = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in ties.items()}
    prefix = str(model.base_model_prefix)
    return {target: source for target, source in pairs.items() if lookup(source, prefix, stored) is not None}
