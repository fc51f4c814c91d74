"""Lets `AutoModelForCausalLM.from_pretrained` load our own layout once `import featherweight` has been said.

transformers keeps its quantizers in two tables and looks for no plugins, so somebody has to write into the tables, and
`import featherweight` must not import transformers (seconds) to do so. Where transformers has its tables already, ours
is registered at once. Otherwise one finder waits, first in `sys.meta_path`, for exactly the module with the tables: it
steps aside at its first use, lets the usual machinery find and run that module, and registers when it has run. Nothing
of transformers is replaced or patched, no other import is touched, and a program that never imports transformers pays
one comparison of strings an import.

Imports the standard library alone, and little of it (`importlib.abc` would take longer than all the rest): this runs in
every `import featherweight`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLES = "transformers.quantizers.auto"


def install() -> None:
    """Register with transformers now, or as soon as it has its tables; to be called any number of times."""
    tables = sys.modules.get(TABLES)
    if tables is not None:
        _register(tables)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register(tables: ModuleType) -> None:
    from featherweight.huggingface import register

    register(tables)


class _Waiting:
    """Finds nothing itself: hears when `TABLES` is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _then_register(spec.loader)
        return spec


def _then_register(loader: object) -> None:
    """Have this loader register after it has run its module; the loader is otherwise as it was."""
    run = loader.exec_module  # type: ignore[attr-defined]

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module  # type: ignore[attr-defined]
        run(module)
        _register(module)

    loader.exec_module = exec_module  # type: ignore[attr-defined]
