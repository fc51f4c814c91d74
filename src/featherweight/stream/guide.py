"""How much each token matters to each matrix: one backward pass of the whole model over the calibration windows.

A layer's loss tr(D H D^T) counts an error at every token alike. What the model's answers feel is, to second order,
sum over t of (g_t . D x_t)^2 with g_t the gradient of the log-likelihood of a label drawn from the model itself (the
expectation over labels is the Hessian of KL(model || changed model)). With g_t g_t^T replaced by its mean diagonal
w_t, the layer's loss keeps its form and H becomes sum w_t x_t x_t^T (GuidedQuant, 2505.07004, with one group).

Shapes: S sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featherweight.errors import FeatherweightError, RequestError
from featherweight.models.experts import find_experts
from featherweight.models.load import load_dense
from featherweight.models.tree import ModelTree
from featherweight.stream.hidden import free_memory_bytes
from featherweight.stream.parallel import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 1.5  # times the weights' bytes: the model, and the activations of one window
Weights = dict[str, Tensor]  # by matrix name on disk: float32, S x T, on the CPU


def token_weights(
    tree: ModelTree,
    ids_ST: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    tick: Callable[[float], None],
    world: World = ALONE,
) -> Weights:
    """Mean squared gradient of each matrix's outputs, token by token, averaged over outputs; none for experts.

    Labels are drawn from the model's own predictions, those of window n by `seed` + n: of several processes each goes
    through its own windows, all of the model on each. `tick` hears the share that is done, 0 .. 1. Raises RequestError
    where the model does not fit on the device as a whole.
    """
    _check_room(tree, device, dtype, world)
    mine = world.split(len(ids_ST))
    ids_ST = ids_ST[mine]
    model = load_dense(tree.checkpoint.path, device, dtype)
    model.requires_grad_(False)
    experts = tuple(f"{path}." for path, _ in find_experts(tree.model))
    names = {f"{block.module}.{matrix.path}": matrix.name for block in tree.blocks for matrix in block.matrices}
    names = {path: name for path, name in names.items() if not path.startswith(experts)}
    weights = {name: torch.zeros(ids_ST.shape) for name in names.values()}
    generator = torch.Generator(device)
    model.enable_input_require_grads()
    for number, ids_T in enumerate(ids_ST):
        generator.manual_seed(seed + mine.start + number)
        handles = [
            model.get_submodule(path).register_forward_hook(_listener(weights[name], number))
            for path, name in names.items()
        ]
        try:
            with torch.enable_grad():
                _log_likelihood(model, ids_T.to(device), generator).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
        tick((number + 1) / len(ids_ST))
    silent = [name for name, found_ST in weights.items() if not found_ST.any()]
    if silent:
        raise FeatherweightError(f"{silent[0]} has no gradient: this architecture cannot be guided; drop --guide.")
    return weights


def normalised(weights_ST: Tensor, power: float, world: World = ALONE) -> Tensor:
    """Weights to some power, of mean 1 over all processes' tokens; power 0 counts every token alike."""
    raised_ST = weights_ST.double().clamp(min=torch.finfo(torch.float32).tiny).pow(power)
    total = torch.stack([raised_ST.sum(), raised_ST.new_tensor(raised_ST.numel())])
    world.sum_(total)
    return (raised_ST / (total[0] / total[1])).float()


def _listener(into_ST: Tensor, number: int) -> Callable[..., None]:
    """A forward hook that asks the output's gradient to be measured when it comes."""

    def measure(gradient: Tensor) -> None:
        into_ST[number] += gradient.float().square().mean(-1).flatten().cpu()

    def hook(_module: object, _args: object, output: Tensor) -> None:
        output.register_hook(measure)

    return hook


def _log_likelihood(model: PreTrainedModel, ids_T: Tensor, generator: torch.Generator) -> Tensor:
    """Sum over positions of the log-likelihood of a label drawn from the prediction there, nats."""
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0].float()
    with torch.no_grad():
        labels_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=generator).squeeze(-1)
    return -torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")


def _check_room(tree: ModelTree, device: torch.device, dtype: torch.dtype, world: World) -> None:
    needed = int(ROOM * dtype.itemsize * sum(parameter.numel() for parameter in tree.model.parameters()))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes() // world.size
    if needed > free:
        raise RequestError(
            f"--guide runs the whole model backwards, which takes about {needed:,} bytes, and {free:,} are free on "
            f"{device}: drop --guide or use a larger device."
        )
