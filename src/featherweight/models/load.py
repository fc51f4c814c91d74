"""Whole models: dense ones as transformers loads them, and compressed ones with modules of ours in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight.errors import RequestError
from featherweight.models.checkpoint import Checkpoint, resolve
from featherweight.models.experts import find_experts
from featherweight.models.names import Source, disk_names, lookup, renamed
from featherweight.models.offload import Remote, Shelf
from featherweight.models.skeleton import auto_class, skeleton
from featherweight.models.tree import checkpoint_dtype, find_blocks, is_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# (module name on disk, the Linear or Conv1D on meta, its tensors by suffix) -> the module to put in its place
Replace = Callable[[str, nn.Module, dict[str, Tensor]], nn.Module]
# (the model, the path of a block that has just been filled, at last "" for the model itself)
Filled = Callable[["PreTrainedModel", str], None]
READ_BYTES = 256 << 20


def load_dense(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model as transformers loads it from a local folder, in eval mode; dtype None = the checkpoint's own."""
    checkpoint = Checkpoint.open(resolve(path))
    dtype = dtype or checkpoint_dtype(checkpoint)
    skeleton(checkpoint, dtype)  # for its error: from_pretrained's own runs over many lines
    model: PreTrainedModel = auto_class(checkpoint).from_pretrained(
        checkpoint.path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    result: PreTrainedModel = model.to(device).eval()  # type: ignore[arg-type]
    return result


def load_apart(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    filled: Filled | None = None,
) -> PreTrainedModel:
    """The same model with its experts taken apart, so that every matrix of the tree is a module; `filled` as
    `load_with` has it."""

    def replace(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        raise RequestError(f"{name} is compressed: give the original checkpoint.")

    return load_with(path, replace, device, dtype, filled=filled)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; RequestError if it has none that transformers can load without remote code."""
    from transformers import AutoTokenizer

    folder = resolve(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(f"{folder} has no tokenizer that can be loaded ({reason}): add tokenizer.json.") from error
    return tokenizer


def load_with(
    path: str | Path,
    replace: Replace,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    expert_bytes: int | None = None,
    filled: Filled | None = None,
) -> PreTrainedModel:
    """The model of a compressed checkpoint, with what `replace` returns in place of compressed matrices.

    Args:
        path: the checkpoint; a `quantization_config` in its config.json is not looked at.
        replace: called for every Linear, Conv1D and Embedding with '<name>.<suffix>' tensors on disk but no
            '<name>.weight', and for a head that is tied to such an embedding: the name on disk, the module (on meta),
            its tensors by suffix (on the device, stored dtypes, a bias too; tied modules share them).
        device, dtype: of the model; None = the checkpoint's dtype. Modules from `replace` are only moved.
        expert_bytes: leave the experts of mixtures in the files and hold so many bytes of them at most (`offload`);
            None holds them all.
        filled: hears of every block when it is there and the next one is not, and of the model in the end, so that what
            is too large for the device as a whole can be shared out as it comes.

    Raises RequestError naming the parameters no tensor was found for, or an expert that is not compressed and so cannot
    be left in the files.
    """
    checkpoint = Checkpoint.open(resolve(path))
    model = skeleton(checkpoint, dtype or checkpoint_dtype(checkpoint))
    device = torch.device(device)
    for module in model.modules():
        fill_buffers(model, module, device)
    disk = disk_names(checkpoint, model)
    source = _Filled(checkpoint, replace, device, *_compressed(checkpoint, model))
    if expert_bytes is not None:
        _leave_experts(model, source, Shelf(expert_bytes))
    if filled:
        for part in _blocks(model):
            _fill(model, source, disk, part + ".")
            filled(model, part)
    _fill(model, source, disk, "")
    # Nothing is called missing: twins left out on disk were given one tensor already, unequal ones stay apart.
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    _require_none_on_meta(checkpoint, model)
    _set_generation_config(checkpoint.path, model)
    if filled:
        filled(model, "")
    return model.eval()


def _blocks(model: PreTrainedModel) -> list[str]:
    path, blocks = find_blocks(model)
    return [f"{path}.{number}" for number in range(len(blocks))]


def _fill(model: PreTrainedModel, source: _Filled, disk: dict[str, Source], prefix: str) -> None:
    """Everything below a prefix that is still on meta."""
    owners = {name: places for name, places in source.owners.items() if places[0][0].startswith(prefix)}
    for path, module in source.modules(owners):
        model.set_submodule(path, module)
        model.all_tied_weights_keys.pop(f"{path}.weight", None)
    for name in owners:
        source.owners.pop(name)
    _assign(source.checkpoint, model, disk, source.device, prefix)


Owners = dict[str, list[tuple[str, nn.Module]]]  # module name on disk -> the paths and modules (on meta) it is for


def _compressed(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[dict[str, list[str]], Owners]:
    """The suffixes of all tensors by the module they belong to on disk, and which modules are compressed there."""
    stored: dict[str, list[str]] = {}
    for name in checkpoint.names:
        parent, _, suffix = name.rpartition(".")
        stored.setdefault(parent, []).append(suffix)
    # under transformers' own names too: of these only the matrix is looked up, whatever tensors it has become
    known = renamed([f"{owner}.weight" for owner in stored], model)
    prefix, twins = model.base_model_prefix, model.all_tied_weights_keys.items()
    tied = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in twins}
    found: Owners = {}
    for path, module in list(model.named_modules()):
        if not (is_matrix(module) or isinstance(module, nn.Embedding)):
            continue
        owner = lookup(path, prefix, stored) or lookup(tied.get(path, path), prefix, stored)
        if owner is None and (full := lookup(f"{path}.weight", prefix, known)):
            owner = known[full].name.removesuffix(".weight")
        if owner is not None and "weight" not in stored[owner] and stored[owner] != ["bias"]:
            found.setdefault(owner, []).append((path, module))
    return stored, found


@dataclass
class _Filled:
    """Compressed modules, made of what the files hold of them."""

    checkpoint: Checkpoint
    replace: Replace
    device: torch.device
    stored: dict[str, list[str]]
    owners: Owners

    def modules(self, owners: Owners) -> Iterator[tuple[str, nn.Module]]:
        """What is to stand at which path."""
        sizes = {
            owner: sum(self.checkpoint.nbytes(f"{owner}.{suffix}") for suffix in self.stored[owner]) for owner in owners
        }
        for batch in _batches(sizes):
            tensors = self.checkpoint.read(f"{name}.{suffix}" for name in batch for suffix in self.stored[name])
            for name in batch:
                by_suffix = {suffix: tensors.pop(f"{name}.{suffix}").to(self.device) for suffix in self.stored[name]}
                for path, module in owners[name]:
                    yield path, self.replace(name, module, dict(by_suffix)).to(self.device)


def _leave_experts(model: PreTrainedModel, filled: _Filled, shelf: Shelf) -> None:
    """Puts a `Remote` in the place of every expert; what belongs to experts is no longer among `filled.owners`."""
    by_expert: dict[str, Owners] = {}
    for path, experts in find_experts(model):
        by_expert |= {f"{path}.{index}": {} for index in range(len(experts))}
    for owner, places in list(filled.owners.items()):
        path = places[0][0].rpartition(".")[0]
        if path in by_expert:
            by_expert[path][owner] = filled.owners.pop(owner)
    for path, owners in by_expert.items():
        expert = model.get_submodule(path)
        missing = {f"{path}.{leaf}" for leaf, module in expert.named_modules() if is_matrix(module)}
        missing -= {place for places in owners.values() for place, _ in places}
        if missing:
            raise RequestError(
                f"{min(missing)} is not compressed, and only compressed experts stay in the files: load the model "
                "without a limit for experts."
            )
        model.set_submodule(path, Remote(path, shelf, partial(_fetched, filled, path, expert, owners)))


def _fetched(filled: _Filled, path: str, expert: nn.Module, owners: Owners) -> nn.Module:
    """The expert with its matrices in place."""
    made = copy.deepcopy(expert)
    for at, module in filled.modules(owners):
        made.set_submodule(at.removeprefix(f"{path}."), module)
    return made.eval()


def _assign(
    checkpoint: Checkpoint, model: PreTrainedModel, disk: dict[str, Source], device: torch.device, prefix: str
) -> None:
    """Every tensor that is still on meta and on disk, a few at a time; tied twins get one tensor between them."""
    users: dict[str, dict[Source, list[str]]] = {}
    for name, _ in meta_tensors(model):
        if name in disk and name.startswith(prefix):
            users.setdefault(disk[name].name, {}).setdefault(disk[name], []).append(name)
    for batch in _batches({name: checkpoint.nbytes(name) for name in users}):
        tensors = checkpoint.read(batch)
        for on_disk in batch:
            tensor = tensors.pop(on_disk)
            for source, (first, *others) in users[on_disk].items():
                placed = place(model, first, source.of(tensor), device)
                for name in others:
                    share(model, name, placed)


def _batches(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names, with their bytes, in runs of about READ_BYTES: a shard is opened once for each."""
    batch: list[str] = []
    filled = 0
    for name, nbytes in sizes.items():
        batch.append(name)
        filled += nbytes
        if filled >= READ_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def _require_none_on_meta(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    left = [name for name, _ in meta_tensors(model)]
    if left:
        raise RequestError(
            f"{len(left)} parameters of {type(model).__name__} have no tensor in {checkpoint.path}, the first is "
            f"{left[0]}: the checkpoint is incomplete or of another architecture."
        )


def _set_generation_config(folder: Path, model: PreTrainedModel) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def meta_tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that are still on meta, by name (tied ones under each name)."""
    for named in (module.named_parameters, module.named_buffers):
        yield from ((name, tensor) for name, tensor in named(recurse=recurse, remove_duplicate=False) if tensor.is_meta)


def place(module: nn.Module, name: str, value: Tensor, device: torch.device) -> Tensor:
    """Put a value from disk where a meta tensor is: on the device, in the meta tensor's dtype; returns it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    value = value.to(device=device, dtype=old.dtype)
    new = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
    put(owner, leaf, new)
    return new


def share(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor that has been placed already under another name: tied weights."""
    path, _, leaf = name.rpartition(".")
    put(module.get_submodule(path), leaf, tensor)


def put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Set a module's own parameter or buffer, whichever the tensor is."""
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


@torch.no_grad()
def fill_buffers(model: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Give a module's own non-persistent buffers (rotary frequencies, embedding scales) their values, which no file
    holds: made by the family's `_init_weights`, on the CPU, as transformers does when it loads a model. Call it while
    the module's parameters are on meta, since those are initialised too."""
    names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
    names = [name for name in names if name in module._non_persistent_buffers_set]
    for name in names:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = torch.empty_like(buffer, device="cpu")
    if names:
        initialize: Any = getattr(model, "_init_weights")  # noqa: B009
        initialize(module)
    for name in names:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = buffer.to(device)
