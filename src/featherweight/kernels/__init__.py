"""Products with compressed weights: one file a kernel family; `pick` chooses, the reference kernel serves all."""

from featherweight.kernels.base import Case, Kernel, Restorable, Run
from featherweight.kernels.pick import KERNELS, machine, pick, reasons
from featherweight.kernels.reference import dequantize, linear

__all__ = ["KERNELS", "Case", "Kernel", "Restorable", "Run", "dequantize", "linear", "machine", "pick", "reasons"]
