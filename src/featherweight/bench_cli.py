"""`featherweight bench`: what compressing, training and running cost on this machine, on random weights."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)
