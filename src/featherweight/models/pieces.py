"""What a module computes, found by trying it: norms and activations, whatever family they belong to.

Shapes: D width, P probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

PROBES = 4
EPS_NAMES = ("eps", "variance_epsilon")


@torch.no_grad()
def rms_norm_of(module: object) -> tuple[Tensor, float] | None:
    """(gain_D in float32, eps) of a module that computes x / sqrt(mean(x^2) + eps) * gain; None of any other.

    The gain is the module's only parameter, or that plus one (Gemma); which, and that there is no more to it, is found
    by calling it with random rows, some so small that eps decides what becomes of them.
    """
    if not isinstance(module, nn.Module) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight_D = module.get_parameter("weight")
    eps = epsilon_of(module)
    if eps is None or weight_D.dim() != 1 or weight_D.is_meta:
        return None
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 30.0, eps**0.5, 0.1 * eps**0.5]).unsqueeze(1)
    x_PD = (torch.randn(PROBES, len(weight_D), generator=draw) * sizes).to(weight_D.device, weight_D.dtype)
    got_PD = module(x_PD)
    if not isinstance(got_PD, Tensor) or got_PD.shape != x_PD.shape:
        return None
    wide = x_PD.float()
    normed_PD = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    rounding = 2 * torch.finfo(weight_D.dtype).eps + 1e-6
    for gain_D in (weight_D.float(), weight_D.float() + 1):
        if torch.allclose(got_PD.float(), normed_PD * gain_D, rtol=rounding, atol=1e-6):
            return gain_D.detach().clone(), eps
    return None


def epsilon_of(module: nn.Module) -> float | None:
    """What a norm adds before its root, by the names families give it."""
    return next((getattr(module, name) for name in EPS_NAMES if isinstance(getattr(module, name, None), float)), None)


@torch.no_grad()
def activation_of(function: object, known: Mapping[str, Callable[[Tensor], Tensor]]) -> str | None:
    """The name by which `known` has a function of one number, found by comparing them from -8 to 8; None without."""
    if not callable(function):
        return None
    first = next(chain(function.parameters(), function.buffers()), None) if isinstance(function, nn.Module) else None
    if first is not None:
        return None
    x = torch.linspace(-8, 8, 161)
    got = function(x)
    return next((name for name, each in known.items() if torch.allclose(got, each(x), rtol=1e-5, atol=1e-6)), None)
