"""Which matrix gets which rule: what each option costs on disk, what it is predicted to harm, and the best choice."""

from featherweight.plan.allocate import Allocation, Layer, Offer, allocate, allocate_milp, check_budget
from featherweight.plan.database import Database, predict
from featherweight.plan.options import Option, fitting, menu, stored_bytes

__all__ = [
    "Allocation",
    "Database",
    "Layer",
    "Offer",
    "Option",
    "allocate",
    "allocate_milp",
    "check_budget",
    "fitting",
    "menu",
    "predict",
    "stored_bytes",
]
