"""The tree of a checkpoint: its blocks and their matrices, found from the module structure and the names on disk.

Shapes: R outputs, C inputs. A Linear lies on disk as R x C, a Conv1D (GPT-2) as C x R.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight.errors import RequestError
from featherweight.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a block, to be compressed.

    Attributes:
        name: the tensor name on disk without '.weight'.
        path: module path inside the block, such as 'self_attn.q_proj'.
        weight, bias: tensor names on disk; bias None where there is none.
        rows, columns: R outputs and C inputs.
        transposed: the file holds C x R (Conv1D).
    """

    name: str
    path: str
    weight: str
    bias: str | None
    rows: int
    columns: int
    transposed: bool


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        index: its place in the model.
        module: module path in the model, such as 'model.layers.0'.
        matrices: every Linear and Conv1D, in the order of the modules.
        tensors: every tensor name on disk in the block, used by the model or not, sorted.
    """

    index: int
    module: str
    matrices: tuple[Matrix, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ModelTree:
    """A checkpoint as a model.

    Attributes:
        checkpoint: where the tensors are.
        model: the transformers model, all of it on the meta device.
        blocks: the blocks in order.
        rest: tensor names outside the blocks (embedding, final norm, head), sorted.
        dtype: what the weights are in: the configuration's dtype, else that of most bytes on disk.
        disk: module parameter or persistent buffer name -> tensor name on disk; tied names share one.
        blocks_path: module path of the list of blocks, such as 'model.layers'.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    blocks: tuple[Block, ...]
    rest: tuple[str, ...]
    dtype: torch.dtype
    disk: dict[str, str]
    blocks_path: str

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All there is to compress, in the order of the blocks."""
        return tuple(matrix for block in self.blocks for matrix in block.matrices)


def build(checkpoint: Checkpoint) -> ModelTree:
    """Find blocks and matrices. RequestError for: an unknown architecture, a checkpoint that is quantized already, a
    parameter without a tensor or of another shape, tensors that blocks share, and weights that are not a Linear,
    Conv1D, embedding or norm (fused experts), by tensor name."""
    if quantization := checkpoint.config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise RequestError(f"{checkpoint.path} is quantized already ({method}): give the original checkpoint.")
    dtype = checkpoint_dtype(checkpoint)
    model = skeleton(checkpoint, dtype)
    path, modules = find_blocks(model)
    _refuse_unsupported(path, modules)
    disk = disk_names(checkpoint, model)
    _require_all(checkpoint, model, disk)
    blocks = tuple(_block(checkpoint, disk, index, f"{path}.{index}", module) for index, module in enumerate(modules))
    taken = _require_disjoint(blocks)
    rest = tuple(name for name in checkpoint.names if name not in taken)
    return ModelTree(checkpoint, model, blocks, rest, dtype, disk, path)


def checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the weights: config.json's, else the one with most bytes on disk."""
    config = checkpoint.config
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str) and isinstance(dtype := getattr(torch, named.removeprefix("torch."), None), torch.dtype):
        return dtype
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint.names:
        if (dtype := checkpoint.dtype(name)).is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + checkpoint.nbytes(name)
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of config.json without its weights (meta device), in eval mode, never with remote code.

    `dtype` is that of the parameters, but for modules the family keeps in float32. Any quantization_config is left
    out. Raises RequestError naming the model type and the transformers version for an unknown architecture.
    """
    import transformers

    kind = checkpoint.config.get("model_type")
    try:
        config = _config(checkpoint)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # a family's own code reads the configuration here: anything may come out of it
        raise RequestError(
            f"{checkpoint.path} has model type {kind!r}, of which transformers {transformers.__version__} makes no "
            f"causal language model ({_first_line(error)}): use a decoder-only model, or another transformers."
        ) from error
    _keep_in_fp32(model, dtype)
    result: PreTrainedModel = model.eval().requires_grad_(False)
    return result


def _config(checkpoint: Checkpoint) -> PretrainedConfig:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As from_pretrained does: some parameters stay float32 in a float16 model, `strict` ones in a bfloat16 one too."""
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else set()
    if dtype == torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if keep:
        for name, parameter in model.named_parameters():
            if keep.intersection(name.split(".")):
                parameter.data = parameter.data.float()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path of the list of modules with the most parameters, and the list: the transformer's blocks."""
    best, best_size, best_path = None, 0, ""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best_size:  # strictly: of a list and a list inside it, the outer comes first
                best, best_size, best_path = module, size, path
    if best is None:
        raise RequestError(f"{type(model).__name__} has no list of blocks: this architecture is not supported.")
    return best_path, best


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, tied ones under each of their names: what a file should hold."""
    yield from module.named_parameters(remove_duplicate=False)
    for path, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


def own_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """Name in the module -> name on disk, for what the file holds under a name of its own.

    In this order: the same name; with or without the base model's prefix (files saved from the body alone); renamed
    as transformers does on loading.
    """
    names = [name for name, _ in named_tensors(model)]
    disk = {name: found for name in names if (found := _lookup(name, model.base_model_prefix, checkpoint))}
    if len(disk) < len(names) and (renamed := _renamed(checkpoint, model)):
        for name in names:
            if name not in disk and (found := _lookup(name, model.base_model_prefix, renamed)):
                disk[name] = renamed[found]
    return disk


def disk_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """`own_names`, and for a tied tensor that the file leaves out the name of its twin."""
    own = own_names(checkpoint, model)
    twins = {id(tensor): own[name] for name, tensor in named_tensors(model) if name in own}
    found = ((name, own.get(name) or twins.get(id(tensor))) for name, tensor in named_tensors(model))
    return {name: on_disk for name, on_disk in found if on_disk}


def _lookup(name: str, prefix: str, known: Any) -> str | None:
    choices = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((choice for choice in choices if choice in known), None)


def _renamed(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """Name after transformers' own renaming on loading -> name on disk. Tensors it would fuse or split are left out."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # other releases keep these elsewhere; a missing name is then an error that names it
        logging.getLogger(__name__).info("this transformers has no table of renamed weights")
        return {}
    transforms = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    renamed = {}
    for name in checkpoint.names:
        new = name
        for step in transforms:
            new, _ = step.rename_source_key(new)
        renamed[new] = name
    return renamed


def _require_all(checkpoint: Checkpoint, model: PreTrainedModel, disk: dict[str, str]) -> None:
    for name, tensor in named_tensors(model):
        if name not in disk:
            raise RequestError(
                f"{name} of {type(model).__name__} has no tensor among the {len(checkpoint.names)} in "
                f"{checkpoint.path}: the checkpoint is incomplete or of another architecture."
            )
        if checkpoint.shape(disk[name]) != tuple(tensor.shape):
            raise RequestError(
                f"{disk[name]} has shape {list(checkpoint.shape(disk[name]))} on disk, config.json asks for "
                f"{list(tensor.shape)}: config.json and weights do not belong together."
            )


def matrices_outside(tree: ModelTree) -> list[str]:
    """Module paths of every Linear and Conv1D outside the blocks (the head), which are left as they are."""
    inside = f"{tree.blocks_path}."
    return [path for path, module in tree.model.named_modules() if is_matrix(module) and not path.startswith(inside)]


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a Linear or transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _refuse_unsupported(path: str, blocks: nn.Module) -> None:
    """No matrix may be skipped in silence: stop at weights that are in no known kind of module."""
    odd = []
    for inner, module in blocks.named_modules():
        known = is_matrix(module) or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > (2 if known else 1):
                odd.append((f"{path}.{inner}.{name}", parameter.shape, type(module).__name__))
    if not odd:
        return
    name, shape, kind = next((found for found in odd if len(found[1]) > 2), odd[0])  # experts explain their routers
    if len(shape) > 2:
        raise RequestError(
            f"{name} has shape {list(shape)} ({kind}), where at most 2 dimensions are allowed: mixtures of experts "
            "with fused 3-D tensors are not supported by this version."
        )
    raise RequestError(
        f"{name} has shape {list(shape)} in a {kind}, which is neither Linear, Conv1D, Embedding nor a norm: this "
        "architecture is not supported by this version."
    )


def _block(checkpoint: Checkpoint, disk: dict[str, str], index: int, path: str, block: nn.Module) -> Block:
    used = {disk[f"{path}.{name}"] for name, _ in named_tensors(block)}
    prefixes = tuple(
        {disk[full].removesuffix(name) for name, _ in named_tensors(block)
         if disk[full := f"{path}.{name}"].endswith(f".{name}")}
    )  # fmt: skip
    unused = (name for name in checkpoint.names if prefixes and name.startswith(prefixes))
    matrices = (_matrix(disk, path, inner, module) for inner, module in block.named_modules() if is_matrix(module))
    return Block(index, path, tuple(matrices), tuple(sorted(used.union(unused))))


def _matrix(disk: dict[str, str], path: str, inner: str, module: nn.Module) -> Matrix:
    assert isinstance(module.weight, Tensor)
    transposed = not isinstance(module, nn.Linear)
    rows, columns = reversed(module.weight.shape) if transposed else module.weight.shape
    weight = disk[f"{path}.{inner}.weight"]
    bias = disk[f"{path}.{inner}.bias"] if getattr(module, "bias", None) is not None else None
    return Matrix(weight.removesuffix(".weight"), inner, weight, bias, rows, columns, transposed)


def _require_disjoint(blocks: tuple[Block, ...]) -> set[str]:
    owner: dict[str, str] = {}
    for block in blocks:
        for name in block.tensors:
            if owner.setdefault(name, block.module) != block.module:
                raise RequestError(
                    f"{name} belongs to both {owner[name]} and {block.module}, where one block is allowed: weights "
                    "shared between blocks are not supported by this version."
                )
    return set(owner)
