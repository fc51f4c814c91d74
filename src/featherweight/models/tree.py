"""The tree of a checkpoint: its blocks and their matrices, found from the module structure and the names on disk.

Shapes: R outputs, C inputs. A Linear lies on disk as R x C, a Conv1D (GPT-2) as C x R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from featherweight.errors import RequestError
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.experts import router_paths
from featherweight.models.names import Part, Source, disk_names, named_tensors
from featherweight.models.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a block, to be compressed.

    Attributes:
        name: the tensor name on disk without '.weight'.
        path: module path inside the block, such as 'self_attn.q_proj'.
        weight, bias: tensor names on disk; bias None where there is none.
        rows, columns: R outputs and C inputs.
        transposed: module and file hold C x R (Conv1D).
        part, bias_part: of an expert's matrix that lies in a tensor of all experts: where; None where the tensor is the
            matrix's alone.
    """

    name: str
    path: str
    weight: str
    bias: str | None
    rows: int
    columns: int
    transposed: bool
    part: Part | None = None
    bias_part: Part | None = None


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        index: its place in the model.
        module: module path in the model, such as 'model.layers.0'.
        matrices: every Linear and Conv1D but routers, in the order of the modules.
        tensors: every tensor name on disk in the block, used by the model or not, sorted.
        routers: names on disk, like those of matrices, of what sends tokens to experts: left as they are.
    """

    index: int
    module: str
    matrices: tuple[Matrix, ...]
    tensors: tuple[str, ...]
    routers: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelTree:
    """A checkpoint as a model.

    Attributes:
        checkpoint: where the tensors are.
        model: the transformers model, all of it on the meta device.
        blocks: the blocks in order.
        rest: tensor names outside the blocks (embedding, final norm, head), sorted.
        dtype: what the weights are in: the configuration's dtype, else that of most bytes on disk.
        disk: module parameter or persistent buffer name -> where it is on disk; tied names share one.
        lists: module paths of the lists of blocks, such as 'model.layers': one, or an encoder's and then a decoder's.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    blocks: tuple[Block, ...]
    rest: tuple[str, ...]
    dtype: torch.dtype
    disk: dict[str, Source]
    lists: tuple[str, ...]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All there is to compress, in the order of the blocks."""
        return tuple(matrix for block in self.blocks for matrix in block.matrices)


def build(checkpoint: Checkpoint) -> ModelTree:
    """Find blocks and matrices. RequestError for: an unknown architecture, a checkpoint that is quantized already, a
    parameter without a tensor or of another shape, another number of experts than config.json says, tensors that blocks
    share, and weights that are not a Linear, Conv1D, embedding, norm, router or experts we know, by tensor name."""
    if quantization := checkpoint.config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise RequestError(f"{checkpoint.path} is quantized already ({method}): give the original checkpoint.")
    dtype = checkpoint_dtype(checkpoint)
    model = skeleton(checkpoint, dtype)
    lists = find_lists(model)
    routers = router_paths(model)
    for path, modules in lists.items():
        _refuse_unsupported(path, modules, routers)
    disk = disk_names(checkpoint, model)
    _require_all(checkpoint, model, disk)
    paths = [f"{path}.{index}" for path, modules in lists.items() for index in range(len(modules))]
    blocks = tuple(_block(checkpoint, model, disk, index, path, routers) for index, path in enumerate(paths))
    taken = _require_disjoint(blocks)
    rest = tuple(name for name in checkpoint.names if name not in taken)
    return ModelTree(checkpoint, model, blocks, rest, dtype, disk, tuple(lists))


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


def find_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists of blocks by module path, in the order they run: that of a decoder, or an encoder's and a decoder's."""
    if not model.config.is_encoder_decoder:
        path, blocks = find_blocks(model)
        return {path: blocks}
    found = {}
    for part in (model.get_encoder(), model.get_decoder()):
        path, blocks = find_blocks(part)
        found[f"{next(name for name, module in model.named_modules() if module is part)}.{path}"] = blocks
    return found


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


def _require_all(checkpoint: Checkpoint, model: PreTrainedModel, disk: dict[str, Source]) -> None:
    for name, tensor in named_tensors(model):
        if name not in disk:
            raise RequestError(
                f"{name} of {type(model).__name__} has no tensor among the {len(checkpoint.names)} in "
                f"{checkpoint.path}: the checkpoint is incomplete or of another architecture."
            )
        source = disk[name]
        if source.part is None and checkpoint.shape(source.name) != tuple(tensor.shape):
            raise RequestError(
                f"{source.name} has shape {list(checkpoint.shape(source.name))} on disk, config.json asks for "
                f"{list(tensor.shape)}: config.json and weights do not belong together."
            )


def matrices_left(tree: ModelTree) -> list[str]:
    """What is left as it is, by name: every Linear and Conv1D outside the blocks (the head), and routers."""
    inside = tuple(f"{path}." for path in tree.lists)
    outside = [path for path, module in tree.model.named_modules() if is_matrix(module) and not path.startswith(inside)]
    return outside + [router for block in tree.blocks for router in block.routers]


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a Linear or transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _refuse_unsupported(path: str, blocks: nn.Module, routers: set[str]) -> None:
    """No matrix may be skipped in silence: stop at weights that are in no known kind of module."""
    odd = []
    for inner, module in blocks.named_modules(prefix=path):
        known = is_matrix(module) or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > (2 if known or inner in routers else 1):
                odd.append((f"{inner}.{name}", parameter.shape, type(module).__name__))
    if not odd:
        return
    name, shape, kind = next((found for found in odd if len(found[1]) > 2), odd[0])  # experts explain their routers
    if len(shape) > 2:
        raise RequestError(
            f"{name} has shape {list(shape)} ({kind}), where at most 2 dimensions are allowed: mixtures of experts "
            "with 3-D tensors of this kind are not supported by this version."
        )
    raise RequestError(
        f"{name} has shape {list(shape)} in a {kind}, which is neither Linear, Conv1D, Embedding, a norm nor a "
        "router beside experts: this architecture is not supported by this version."
    )


def _block(
    checkpoint: Checkpoint, model: PreTrainedModel, disk: dict[str, Source], index: int, path: str, routers: set[str]
) -> Block:
    block = model.get_submodule(path)
    names = [name for name, _ in named_tensors(block)]
    used = {disk[f"{path}.{name}"].name for name in names}
    prefixes = tuple(
        {found.removesuffix(name) for name in names
         if (found := disk[f"{path}.{name}"].name).endswith(f".{name}")}
    )  # fmt: skip
    unused = (name for name in checkpoint.names if prefixes and name.startswith(prefixes))
    inside = [name for name in sorted(routers) if name.startswith(f"{path}.")]
    matrices = (
        _matrix(disk, model.base_model_prefix, path, inner, module)
        for inner, module in block.named_modules()
        if is_matrix(module) and f"{path}.{inner}" not in inside
    )
    left = (disk[f"{router}.weight"].name.removesuffix(".weight") for router in inside if f"{router}.weight" in disk)
    return Block(index, path, tuple(matrices), tuple(sorted(used.union(unused))), tuple(left))


def _matrix(disk: dict[str, Source], prefix: str, path: str, inner: str, module: nn.Module) -> Matrix:
    assert isinstance(module.weight, Tensor)
    transposed = not isinstance(module, nn.Linear)
    rows, columns = reversed(module.weight.shape) if transposed else module.weight.shape
    full = f"{path}.{inner}"
    weight, bias = disk[f"{full}.weight"], disk.get(f"{full}.bias")
    name = weight.name.removesuffix(".weight")
    if weight.part is not None:  # it gets a name of its own, like its module's
        name = full if weight.name.startswith(f"{prefix}.") else full.removeprefix(f"{prefix}.")
    return Matrix(
        name,
        inner,
        weight.name,
        None if bias is None else bias.name,
        rows,
        columns,
        transposed,
        weight.part,
        None if bias is None else bias.part,
    )


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
