"""The folder in which a run of `tune` is prepared: its request, its state, and its result until it is put in place.

It lies beside the result, so that putting it there is renaming. Stopped at any moment, what is found here says how to
go on: a state to train from, or a result to be put in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from featherweight.errors import RequestError
from featherweight.stream.folder import JOURNAL, LOCK, MANIFEST
from featherweight.train.e2e_qp import GROUPS, State
from featherweight.train.sharding import my_part

if TYPE_CHECKING:
    from filelock import BaseFileLock

REQUEST, STATE, RESULT, BEFORE = "request.json", "state.safetensors", "result", "before"


def locked(work: Path) -> BaseFileLock:
    """Makes the folder and holds it for this process alone (a context manager); RequestError if another one has it."""
    from filelock import FileLock, Timeout

    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(f"{work} is in use by another process: wait for it.") from None
    except OSError as error:
        raise RequestError(f"{work} cannot be made ({error.strerror}): choose another folder with --to.") from error
    return lock


def begin(work: Path, request: dict[str, Any]) -> None:
    """Starts the folder, or checks that it was begun with the same request."""
    path = work / REQUEST
    if not path.exists():
        _write(path, json.dumps(request, indent=1))
        return
    before = json.loads(path.read_text())
    for part, now in request.items():
        if before.get(part) != now:
            raise RequestError(
                f"{work} was begun with another {part}: repeat the first command, or remove {work.name} to begin anew."
            )


def write_state(work: Path, state: State) -> None:
    """The state on disk, of whole parameters; whole or as it was before."""
    from safetensors.torch import save_file

    tensors = {f"{group}.{i}": tensor.cpu() for group in GROUPS for i, tensor in enumerate(getattr(state, group))}
    part = work / (STATE + ".part")
    save_file(tensors, part, metadata={"step": str(state.step), "looks": json.dumps(state.looks)})
    os.replace(part, work / STATE)


def read_state(work: Path, parameters: Sequence[Tensor]) -> State | None:
    """The state of a run that was stopped, of what this process holds of the parameters; None of one that begins."""
    from safetensors import safe_open

    if not (work / STATE).exists():
        return None
    with safe_open(work / STATE, framework="pt") as file:
        step, looks = int(file.metadata()["step"]), json.loads(file.metadata()["looks"])
        groups: dict[str, list[Tensor]] = {name: [] for name in GROUPS}
        for number, parameter in enumerate(parameters):
            for name, group in groups.items():
                group.append(my_part(file.get_tensor(f"{name}.{number}"), parameter))
    return State(step, **groups, looks=[tuple(look) for look in looks])


def note(out: Path, record: Mapping[str, Any]) -> None:
    """What was done, in the folder's manifest; layer losses of the journal no longer hold."""
    manifest = json.loads((out / MANIFEST).read_text()) if (out / MANIFEST).exists() else {}
    _write(out / MANIFEST, json.dumps({**manifest, "tuned": record}, indent=1) + "\n")
    if (out / JOURNAL).exists():
        rows = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
        _write(out / JOURNAL, "".join(json.dumps({**row, "loss": None}) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def swap(target: Path, work: Path) -> None:
    """Puts the result in the target's place; whatever moment it is stopped at, `swapped` ends it."""
    if target.exists():
        os.replace(target, work / BEFORE)
    os.replace(work / RESULT, target)


def swapped(target: Path, work: Path) -> dict[str, Any] | None:
    """The report of a run that was stopped while its result was put in place; None if there is none."""
    if not (work / BEFORE).exists():
        return None
    if not target.exists():
        os.replace(work / RESULT, target)
    shutil.rmtree(work)
    report: dict[str, Any] = json.loads((target / MANIFEST).read_text())["tuned"]["report"]
    return report
