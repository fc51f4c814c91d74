"""Where each parameter of the model lies on disk: under its own name, one transformers renames, or inside a tensor that
holds what belongs to all experts.

Shapes: E experts, R outputs, C inputs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from featherweight.errors import RequestError
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.experts import Experts, find_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Part:
    """One expert's matrix or bias inside a tensor of all of them.

    Attributes:
        expert: its place on the first axis.
        start, stop, step: its outputs, as a slice; stop None is the end.
        transposed: the tensor is E x inputs x outputs.
    """

    expert: int
    start: int = 0
    stop: int | None = None
    step: int = 1
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the part, R x C (a bias: R)."""
        one = tensor[self.expert]
        return (one.T if self.transposed else one)[self.start : self.stop : self.step]


@dataclass(frozen=True)
class Source:
    """A tensor on disk by name, or a part of one."""

    name: str
    part: Part | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """What of the tensor is meant; a copy where every other row of it is, which no product takes as it lies."""
        if self.part is None:
            return tensor
        return self.part.of(tensor) if self.part.step == 1 else self.part.of(tensor).contiguous()


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, tied ones under each of their names: what a file should hold."""
    yield from module.named_parameters(remove_duplicate=False)
    for path, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


def own_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Source]:
    """Name in the module -> where it is on disk, for what the file holds under a name of its own.

    In this order: the same name; with or without the base model's prefix (files saved from the body alone); renamed,
    or taken from the tensors it would be fused to, as transformers does on loading. Raises RequestError for tensors
    that hold another number of experts than config.json says.
    """
    names = [name for name, _ in named_tensors(model)]
    prefix = model.base_model_prefix
    disk = {name: Source(found) for name in names if (found := lookup(name, prefix, checkpoint))}
    if len(disk) < len(names):
        known = renamed(checkpoint.names, model, checkpoint)
        for name in names:
            if name not in disk and (found := lookup(name, prefix, known)):
                disk[name] = known[found]
    _require_experts(checkpoint, model, disk)
    return disk


def disk_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Source]:
    """`own_names`, and for a tied tensor that the file leaves out the name of its twin."""
    own = own_names(checkpoint, model)
    twins = {id(tensor): own[name] for name, tensor in named_tensors(model) if name in own}
    found = ((name, own.get(name) or twins.get(id(tensor))) for name, tensor in named_tensors(model))
    return {name: on_disk for name, on_disk in found if on_disk}


def lookup(name: str, prefix: str, known: Any) -> str | None:
    """The name itself, or the name without or with the base model's prefix, whichever is known."""
    choices = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((choice for choice in choices if choice in known), None)


def renamed(names: Iterable[str], model: PreTrainedModel, checkpoint: Checkpoint | None = None) -> dict[str, Source]:
    """Name in the module -> where on disk, by transformers' own table of what it renames and fuses on loading.

    Tensors with all experts in them are taken apart where the `checkpoint` is given. What transformers would change in
    any other way is left out.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:  # other releases keep these elsewhere; a missing name is then an error that names it
        logging.getLogger(__name__).info("this transformers has no table of renamed weights")
        return {}
    found = _apart(names, model)
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter) and _known(step)]
    mixtures = list(find_experts(model))
    fused = {f"{path}.{name}": (path, experts) for path, experts in mixtures for name in experts.layout.parameters()}
    for name in names:
        new, piece = name, None
        for step in renamings:
            new, _ = step.rename_source_key(new)
        for step in converters:
            target, pattern = step.rename_source_key(new)
            if pattern is not None:
                new, piece = target, (step.source_patterns, pattern, new)
                break
        home = lookup(new, model.base_model_prefix, fused)
        if home is None:
            found |= {} if piece else {new: Source(name)}
        elif piece is not None and "*" in piece[1]:
            found[_unfused(home, *fused[home], *piece)] = Source(name)
        elif checkpoint is not None:
            found |= _parts(checkpoint, name, home, *fused[home])
    return found


def _apart(names: Iterable[str], model: PreTrainedModel) -> dict[str, Source]:
    """The matrices of experts that file and model call something else than we do, an expert a module."""
    there, found = set(names), {}
    for path, experts in find_experts(model):
        for at, ours in enumerate(("up_proj", "down_proj") if experts.layout.files is not None else ()):
            assert experts.layout.files is not None
            for index in range(len(experts)):
                theirs = f"{path}.expert_{index}.{experts.layout.files[at]}.weight"
                if (name := lookup(theirs, model.base_model_prefix, there)) is not None:
                    found[f"{path}.{index}.{ours}.weight"] = Source(name)
    return found


def _known(converter: Any) -> bool:
    """Whether it only puts experts, gate and up into one tensor, or turns that one round (which its shape shows)."""
    return {type(step).__name__ for step in converter.operations} <= {"MergeModulelist", "Concatenate"} or (
        "*" not in "".join(converter.source_patterns) and type(converter.operations[0]).__name__ == "Transpose"
    )


def _unfused(home: str, path: str, experts: Experts, patterns: list[str], pattern: str, name: str) -> str:
    """The module's name of a tensor that transformers would fuse with others into the parameter `home`."""
    number = re.search(r"\.(\d+)\.", name[name.rindex("experts") :])
    parameter, kind = _kind(home.removeprefix(f"{path}."))
    leaf = experts.layout.leaves(parameter)[patterns.index(pattern)]
    return f"{path}.{number[1] if number else ''}.{leaf}.{kind}"


def _kind(parameter: str) -> tuple[str, str]:
    weight = parameter.removesuffix("_bias")
    return weight, "weight" if weight == parameter else "bias"


def _parts(checkpoint: Checkpoint, name: str, home: str, path: str, experts: Experts) -> dict[str, Source]:
    """The pieces of a tensor on disk that holds all experts."""
    layout = experts.layout
    parameter, kind = _kind(home.removeprefix(f"{path}."))
    leaves = layout.leaves(parameter)
    first = experts.expert(0).get_parameter(f"{leaves[0]}.{kind}")
    rows, columns = first.shape[0] * len(leaves), first.shape[1:]
    shape = checkpoint.shape(name)
    as_module = (len(experts), *columns, rows) if layout.transposed else (len(experts), rows, *columns)
    swapped = (as_module[0], *as_module[:0:-1])
    if shape not in (as_module, swapped):
        raise RequestError(
            f"{name} has shape {list(shape)} on disk, config.json asks for {list(as_module)} ({len(experts)} experts): "
            "config.json and weights do not belong together."
        )
    transposed = kind == "weight" and layout.transposed == (shape == as_module)
    return {
        f"{path}.{expert}.{leaf}.{kind}": Source(
            name, Part(expert, *layout.rows(number, first.shape[0], leaves), transposed)
        )
        for expert in range(len(experts))
        for number, leaf in enumerate(leaves)
    }


def _require_experts(checkpoint: Checkpoint, model: PreTrainedModel, disk: dict[str, Source]) -> None:
    """As many experts on disk as config.json says, and all of them fused or none."""
    fused: dict[bool, str] = {}
    for path, experts in find_experts(model):
        inside = [f"{path}.{name}" for name, _ in named_tensors(experts)]
        sources = [disk[name] for name in inside if name in disk]
        for source in sources:
            fused.setdefault(source.part is not None, source.name)
        if len(fused) > 1:
            raise RequestError(
                f"{fused[True]} holds all experts and {fused[False]} is one expert's, where a checkpoint has one kind "
                "of the two: save it again with transformers."
            )
        found = _expert_numbers(checkpoint, [source.name for source in sources if source.part is None])
        prefix = "" if experts.layout.files is None else "expert_"
        if found and found != {f"{prefix}{index}" for index in range(len(experts))}:
            raise RequestError(
                f"{path} has {len(found)} experts on disk and config.json says {len(experts)}: config.json and weights "
                "do not belong together."
            )


def _expert_numbers(checkpoint: Checkpoint, names: list[str]) -> set[str]:
    """The experts that are on disk beside these tensors, by what stands in their names between `experts.` and a dot."""
    homes = {name[: name.rindex("experts.") + len("experts.")] for name in names if "experts." in name}
    return {
        name.removeprefix(home).split(".")[0] for home in homes for name in checkpoint.names if name.startswith(home)
    }
