"""The import table: which room may import which, and what no room may do. Changing it is a visible diff."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "featherweight"

# Room (a folder or file right under the package) -> the rooms it may import; everybody may import errors and itself.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "native": set(),  # C for CPUs, and what compiles and launches CUDA C++: kernels are made of it
    "core": {"native"},  # sums and column loops that torch, or on a GPU Triton, takes several times as long for
    "codec": set(),
    "data": set(),
    "laws": set(),
    "models": set(),
    "report": set(),
    "formats": {"core", "codec"},
    "kernels": {"formats", "codec", "native"},
    "linear": {"formats", "kernels"},
    "merged": {"formats", "kernels", "linear"},
    # what runs a model's experts together: their modules, and the layers and kernels of what is inside them
    "mixture": {"models", "formats", "kernels", "linear"},
    "recipe": {"core"},
    "recipes": {"core", "recipe"},
    "plan": {"core"},
    "train": {"core", "linear"},
    "stream": {"core", "models", "data", "formats", "linear", "recipe", "train", "plan", "native"},
    # a token is put together from a model's modules, merged products and the kernels between them
    "evaluate": {"models", "data", "linear", "merged", "kernels"},
}
# The rooms that sit on top, in order; each may import everything below it.
ABOVE = [
    "huggingface",
    "transformers_hook",
    "api",
    "benchmarks",
    "demo",
    "console",
    "laws_cli",
    "bench_cli",
    "compress_cli",
    "cli",
    "vllm_plugin",
]
# The package itself hands out names of every room, but lazily: `import featherweight` alone must stay quick.
TOP = {"__init__", "__main__"}
# What `import featherweight` runs all the same: it imports the standard library alone.
AT_IMPORT = "transformers_hook"
# core is mathematics on tensors: beside the standard library it needs torch, and NumPy where a call of torch's costs
# more than its work (core/columns.py).
CORE_STRANGERS = {"transformers", "safetensors", "huggingface_hub", "typer", "rich", "filelock", "scipy"}


def allowed(room: str) -> set[str]:
    if room in TOP:
        return {*MAY_IMPORT, *ABOVE}
    if room in ABOVE:
        return {*MAY_IMPORT, "errors", *ABOVE[: ABOVE.index(room)]}
    return {"errors", *MAY_IMPORT[room]}


def imported_modules(node: ast.AST, package: list[str]) -> list[str]:
    """Absolute names of what an import statement in a module of `package` brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [f"featherweight.{alias.name}" for alias in node.names] if module == "featherweight" else [module]


def import_offences(source: str, parts: tuple[str, ...]) -> Iterator[str]:
    """Sentences about the imports of the module at src/featherweight/<parts> that the table forbids."""
    room, where = parts[0].removesuffix(".py"), "/".join(parts)
    if room not in MAY_IMPORT and room not in ABOVE and room not in TOP:
        yield f"{where}:1 the room {room} is not in the table"
        return
    tree = ast.parse(source)
    at_import = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        for module in imported_modules(node, ["featherweight", *parts[:-1]]):
            names = module.split(".")
            target = names[1] if len(names) > 1 else ""
            line = f"{where}:{getattr(node, 'lineno', 0)}"
            if names[0] != "featherweight":
                if room == "core" and names[0] in CORE_STRANGERS:
                    yield f"{line} core imports {names[0]}"
            elif room == "__init__" and id(node) in at_import and target != AT_IMPORT:
                yield f"{line} imports {target} at import time: only lazily, inside a function or for types"
            # A dunder (__version__) is the package's own name, not a room.
            elif target != room and target not in allowed(room) and not target.startswith("__"):
                yield f"{line} {room} may not import {target or 'the whole package'}"


def habit_offences(source: str, where: str) -> Iterator[str]:
    """Sentences about what no module may do: print, pickle, torch.load, environment-variable switches."""
    for node in ast.walk(ast.parse(source)):
        line = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{line} calls print"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in {"torch.load", "os.environ", "os.getenv", "os.putenv"}:
                yield f"{line} uses {name}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for name in [alias.name for alias in node.names]:
                full = f"{module}.{name}" if module else name
                if "pickle" in full or full in {"torch.load", "os.environ", "os.getenv"}:
                    yield f"{line} imports {full}"


def sources() -> list[tuple[str, tuple[str, ...]]]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files, f"no sources under {PACKAGE}"
    return [(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).parts) for path in files]


def test_every_import_is_in_the_table() -> None:
    assert [offence for source, parts in sources() for offence in import_offences(source, parts)] == []


def test_no_print_pickle_torch_load_or_environment() -> None:
    assert [offence for source, parts in sources() for offence in habit_offences(source, "/".join(parts))] == []


def test_table_has_no_cycle_and_no_utils() -> None:
    list(TopologicalSorter(MAY_IMPORT).static_order())  # raises CycleError
    assert not [parts for _, parts in sources() if any("util" in part or "helper" in part for part in parts)]


def test_what_runs_at_import_needs_only_the_standard_library() -> None:
    tree = ast.parse((PACKAGE / f"{AT_IMPORT}.py").read_text(encoding="utf-8"))
    names = {module.split(".")[0] for node in tree.body for module in imported_modules(node, ["featherweight"])}
    assert names and names <= sys.stdlib_module_names


def test_the_checks_can_fail() -> None:
    def found(source: str, *parts: str) -> list[str]:
        return list(import_offences(source, parts))

    assert found("import torch\nfrom featherweight.models import tree", "core", "sweep.py") == [
        "core/sweep.py:2 core may not import models"
    ]
    assert found("def f():\n    from ..stream.blocks import walk", "formats", "gptq.py") == [
        "formats/gptq.py:2 formats may not import stream"
    ]
    assert found("from featherweight import cli", "api.py") == ["api.py:1 api may not import cli"]
    assert found("from featherweight.api import compress", "__init__.py")
    assert found("import transformers", "core", "rules.py") == ["core/rules.py:1 core imports transformers"]
    assert found("import torch", "helpers.py") == ["helpers.py:1 the room helpers is not in the table"]
    assert not found("from . import rules\nfrom ..errors import RequestError", "core", "sweep.py")
    assert not found("def f():\n    from featherweight.api import compress", "__init__.py")
    assert not found("from featherweight import __version__, recipe", "stream", "journal.py")
    bad = "import pickle, os\nimport torch\nprint(os.environ)\ntorch.load('x')\n"
    assert [s.split(" ", 1)[0] for s in habit_offences(bad, "m.py")].count("m.py:3") == 2
    assert len(list(habit_offences(bad, "m.py"))) == 4
