"""The laws themselves: predicted loss as a function of sparsity, non-zero parameters and data, with gradients.

Units: S, the share of weights that are zero, in [0, 1); N, non-zero parameters, a plain count; D, tokens or images, a
plain count; losses in nats (a language model) or whatever the fitted runs recorded.
Source of the joint law and its published coefficients: Frantar et al., arXiv 2309.08520; of the dense law: Hoffmann et
al., arXiv 2203.15556; of effective parameters: Frantar et al., arXiv 2502.16440; of capacity from the error on a
Gaussian: arXiv 2506.01863.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from featherweight.errors import RequestError


@dataclass(frozen=True)
class Coefficients:
    """The seven numbers of L(S, N, D) = (a_S (1-S)^b_S + c_S) N^-b_N + (a_D / D)^b_D + c.

    a_S and c_S: loss times parameters^b_N; b_S, b_N, b_D: no unit; a_D: tokens or images; c: loss.
    """

    a_S: float
    b_S: float
    c_S: float
    b_N: float
    a_D: float
    b_D: float
    c: float

    @classmethod
    def of(cls, values: Any) -> Coefficients:
        """From seven numbers in order."""
        return cls(*(float(value) for value in values))

    def as_tuple(self) -> tuple[float, ...]:
        """The seven numbers in order; `dataclasses.astuple` copies deeply, which every step of a fit would pay."""
        return (self.a_S, self.b_S, self.c_S, self.b_N, self.a_D, self.b_D, self.c)


NAMES = tuple(field.name for field in fields(Coefficients))
SPARSITY_NAMES = ("a_S", "b_S", "c_S")


def plain(normalised: tuple[float, ...], parameters: float, data: float) -> Coefficients:
    """From N in units of `parameters` and a data term e (D / `data`)^-b_D to plain counts.

    `normalised` is (a_S, b_S, c_S, b_N, e, b_D, c), the order of the published notebook.
    """
    a_s, b_s, c_s, b_n, amplitude, b_d, c = normalised
    unit = parameters**b_n
    return Coefficients(a_s * unit, b_s, c_s * unit, b_n, data * amplitude ** (1 / b_d), b_d, c)


# The published vectors, turned into plain units: N in millions; D in 1e5 steps of 65,536 tokens, or in 1e9 images.
PUBLISHED = {
    "t5": plain((0.56778512, 0.72161276, 1.52265016, 0.24513173, 0.63361517, 0.20270772, 0.65074219), 1e6, 65_536e5),
    "vit": plain((1.30485411, 0.82101251, 2.07506343, 0.39222675, 0.27818217, 0.88979104, 4.51669257), 1e6, 1e9),
}


def loss(co: Coefficients, sparsity: Any, parameters: Any, data: Any) -> Any:
    """L(S, N, D) of arrays that broadcast; the unit of the fitted losses (arXiv 2309.08520, equation 1)."""
    import numpy as np

    kept, parameters, data = 1 - np.asarray(sparsity), np.asarray(parameters, float), np.asarray(data, float)
    return (co.a_S * kept**co.b_S + co.c_S) * parameters**-co.b_N + (co.a_D / data) ** co.b_D + co.c


def gradients(co: Coefficients, sparsity: Any, parameters: Any, data: Any) -> Any:
    """dL / d(a_S, b_S, c_S, b_N, a_D, b_D, c) for each of P points: P x 7, in the units of loss over coefficient."""
    import numpy as np

    log_kept, log_n = np.log1p(-np.asarray(sparsity, float)), np.log(np.asarray(parameters, float))
    power_n, power_s = np.exp(-co.b_N * log_n), np.exp(co.b_S * log_kept)
    log_d = np.log(co.a_D) - np.log(np.asarray(data, float))
    data_term = np.exp(co.b_D * log_d)
    term_n = power_s * power_n
    found = np.empty((*np.broadcast_shapes(term_n.shape, data_term.shape), 7))
    found[..., 0] = term_n
    found[..., 1] = co.a_S * log_kept * term_n
    found[..., 2] = power_n
    found[..., 3] = -(co.a_S * power_s + co.c_S) * power_n * log_n
    found[..., 4] = data_term * (co.b_D / co.a_D)
    found[..., 5] = data_term * log_d
    found[..., 6] = 1.0
    return found


def with_sparsity_factor(co: Coefficients, a_s: float, b_s: float, c_s: float) -> Coefficients:
    """The N:M variant: another pattern changes the factor of S alone, and N, D and c keep what they had."""
    return replace(co, a_S=a_s, b_S=b_s, c_S=c_s)


def chinchilla(factor: float, b_n: float, a_d: float, b_d: float, c: float) -> Coefficients:
    """The dense law factor N^-b_N + (a_D / D)^b_D + c: the joint one with a factor that does not see S."""
    return Coefficients(0.0, 1.0, factor, b_n, a_d, b_d, c)


def size_gain(co: Coefficients, sparsity: Any) -> Any:
    """How many times larger a dense model of equal loss and data is than the non-zeros of a sparse one.

    ((a_S (1-S)^b_S + c_S) / (a_S + c_S))^(-1 / b_N): solving L(S, N, D) = L(0, gain N, D); no unit.
    """
    import numpy as np

    factor = (co.a_S * (1 - np.asarray(sparsity)) ** co.b_S + co.c_S) / (co.a_S + co.c_S)
    return factor ** (-1 / co.b_N)


# --- Capacity: what share of a dense 16-bit model's parameters a format is worth.

# eff of weight-only formats, trained in the format (arXiv 2502.16440). 4 bits is confirmed; 2 and 1 are as recalled.
MEASURED_EFF = {4: 0.923, 2: 0.702, 1: 0.466}
# The uniform centred grid of 2^b levels whose clip, in standard deviations, has the least error on a Gaussian.
GAUSSIAN_CLIP = {1: 0.798, 2: 1.494, 3: 2.051, 4: 2.514, 5: 2.916, 6: 3.277, 8: 3.885}
# tanh(slope * log_{1/4} GMSE)^power through MEASURED_EFF: least squares on the three; the largest miss is 0.0013.
CAPACITY_SLOPE, CAPACITY_POWER = 0.42831, 0.64045


def gaussian_error(bits: int) -> float:
    """Mean squared error of the best uniform 2^bits-level grid on N(0, 1); relative to the variance, so no unit."""
    import numpy as np

    if bits not in GAUSSIAN_CLIP:
        raise RequestError(f"{bits} bits has no known grid: take one of {', '.join(map(str, GAUSSIAN_CLIP))} or 16.")
    clip, levels = GAUSSIAN_CLIP[bits], 2**bits
    # The mid-points of 200,000 slices of [-10, 10]: good to 1e-6 for every grid here.
    x = (np.arange(200_000) + 0.5) / 10_000 - 10
    step = 2 * clip / (levels - 1)
    code = np.clip(np.round((x + clip) / step), 0, levels - 1)
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    return float(((x - (code * step - clip)) ** 2 * density).sum() / 10_000)


def capacity(gaussian_mse: float) -> float:
    """eff from a format's error on N(0, 1): tanh(slope log_{1/4} GMSE)^power, 0 at GMSE = 1 and 1 at none.

    The form is that of arXiv 2506.01863 with its ceiling held at 1; slope and power are ours (MEASURED_EFF).
    """
    import math

    return math.tanh(CAPACITY_SLOPE * -math.log(gaussian_mse, 4)) ** CAPACITY_POWER


def eff(bits: int) -> float:
    """Effective parameters per stored parameter of a weight-only format, trained in it; 16 bits is 1; no unit.

    Measured where MEASURED_EFF has it, predicted by `capacity` from `gaussian_error` elsewhere. Raises RequestError for
    a width that has neither.
    """
    return 1.0 if bits == 16 else MEASURED_EFF[bits] if bits in MEASURED_EFF else capacity(gaussian_error(bits))


def effective(co: Coefficients, sparsity: float, bits: int, nonzero: float) -> float:
    """Dense 16-bit parameters of equal loss: N size_gain(S) eff(bits); that the two multiply is from 2506.01863."""
    return float(nonzero * size_gain(co, sparsity) * eff(bits))


def as_dict(co: Coefficients) -> dict[str, float]:
    """The coefficients by name, in order."""
    return dict(zip(NAMES, co.as_tuple(), strict=True))
