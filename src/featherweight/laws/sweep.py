"""A grid of training runs, small enough to repeat: sizes x sparsities x durations, in the CSV that a law is fitted to.

Groups of runs (one size, one duration, every pattern) are trained one after the other, smallest size first. A group's
rows are added to the CSV when it is done; the group in flight is kept in a checkpoint, so a command that was stopped is
repeated until the grid is full. `ledger` names the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import RequestError
from featherweight.laws.ledger import CHECKPOINT, CSV, Rows, has, new_rows, read_rows, settle, write_rows

if TYPE_CHECKING:
    import torch

    from featherweight.laws.corpus import Corpus
    from featherweight.laws.train import Group, Trainer

LOOK = 20
"""Steps between two looks at the loss: each look waits for the device."""

Tell = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Sweep:
    """The grid and how its runs are trained.

    `sizes` are (width, blocks); `patterns` sparsities from 0 up to 1 or N:M as text; `durations` bytes seen, rounded to
    whole steps of windows x window bytes; `rate` the peak learning rate at width 256, falling as width^-1/2; `decay`
    the weight decay of the blocks; `evaluation_bytes` the most held-out bytes predicted.
    """

    sizes: tuple[tuple[int, int], ...] = ((128, 4), (256, 4), (384, 4), (640, 4))
    patterns: tuple[str, ...] = ("0", "0.5", "0.75", "0.875", "2:4")
    durations: tuple[float, ...] = (16e6, 32e6, 64e6)
    windows: int = 16
    window: int = 256
    rate: float = 2e-3
    decay: float = 0.1
    evaluation_bytes: int = 1 << 20
    seed: int = 0

    def checked(self) -> Sweep:
        """Itself, sizes and durations in ascending order and named once; RequestError for a grid that is none."""
        from featherweight.laws.schedule import pattern

        if not (self.sizes and self.patterns and self.durations):
            raise RequestError("an empty grid: give at least one size, one sparsity and one duration.")
        for width, layers in self.sizes:
            if width < 64 or width % 64 or layers < 1:
                raise RequestError(f"size {width}x{layers}: the width must be a multiple of 64, with at least 1 block.")
        for name in ("windows", "window", "rate", "evaluation_bytes"):
            if not getattr(self, name) > 0:
                raise RequestError(f"{name} is {getattr(self, name)}, but must be above 0.")
        if self.window > 32_768:
            raise RequestError(f"a window of {self.window} bytes is too long: a held-out block has room for 32768.")
        if not (self.decay >= 0 and self.seed >= 0):
            raise RequestError(f"decay {self.decay} and seed {self.seed}: neither may be below 0.")
        for duration in self.durations:
            if not 8 <= self.steps(duration) <= 1e9:
                raise RequestError(
                    f"a duration of {duration:g} bytes is {self.steps(duration)} steps of {self.windows * self.window}"
                    " bytes: a run needs from 8 to 1000000000."
                )
        names = tuple(dict.fromkeys(pattern(text).name for text in self.patterns))
        # Two durations of the same whole steps would be the same runs twice.
        durations = tuple(sorted({self.steps(duration): float(duration) for duration in self.durations}.values()))
        return replace(self, sizes=tuple(sorted(set(self.sizes))), patterns=names, durations=durations)

    def steps(self, duration: float) -> int:
        """Whole steps nearest to a duration in bytes; 0 for none, or one that is not finite."""
        return round(duration / (self.windows * self.window)) if 0 < duration < float("inf") else 0

    def groups(self) -> list[tuple[tuple[int, int], int]]:
        """(size, steps) of every group, in the order in which they are trained."""
        return [(size, self.steps(duration)) for size in self.sizes for duration in self.durations]


@dataclass(frozen=True)
class Progress:
    """Where a sweep stands. `seconds` is training time over all tries; `epochs` of the longest run over the text."""

    csv: str
    runs: int
    of: int
    done: bool
    seconds: float
    epochs: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """How to go about it; none of this changes what is trained but for rounding.

    `precision` of the products is float32, bfloat16 or auto: bfloat16 on a GPU. A folder keeps the one it began with.
    `stop_after` seconds the work is put on file and left; `save` is a folder for the trained models.
    """

    device: str = "auto"
    precision: str = "auto"
    compiled: bool | None = None
    stop_after: float | None = None
    every: float = 60.0
    micro_batches: int = 1
    save: Path | None = None


def run(sweep: Sweep, out: Path, texts: Sequence[str | Path], way: Way, tell: Tell | None = None) -> Progress:
    """Trains what is missing of the grid in `out`, until it is full or the time is up.

    Raises RequestError for a request that cannot be met: settings, text, device, or a folder begun with other settings.
    """
    import torch

    from featherweight.laws import corpus
    from featherweight.laws.train import Setting, Trainer

    began, sweep, device = time.monotonic(), sweep.checked(), pick_device(way.device)
    _check_way(way, sweep)
    text = corpus.read(texts, sweep.window, device)
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if way.precision == "auto" else way.precision)
    facts = {"text_sha256": text.sha256, "precision": str(dtype).removeprefix("torch.")}
    digest = settle(out, {**asdict(sweep), **facts})
    rows = read_rows(out / CSV)
    common = {name: getattr(sweep, name) for name in asdict(sweep) if name in Setting.__dataclass_fields__}
    setting = Setting(**common, micro_batches=way.micro_batches)
    compiled = way.compiled if way.compiled is not None else device.type == "cuda"
    trainer = Trainer(text, setting, device, dtype, compiled)
    job = _Job(sweep, out, digest, way, trainer, began, tell or _silent)
    for size in sweep.sizes:
        try:
            if not job.train_size(size, rows):
                break
        except torch.OutOfMemoryError as error:
            name = f"{size[0]}x{size[1]}"
            raise RequestError(f"size {name} does not fit on {device}: repeat with more --micro-batches.") from error
    return progress(sweep, out, text, rows)


def _silent(_done: float, _total: float, _what: str) -> None:
    pass


@dataclass
class _Job:
    """What the loop over groups needs at hand."""

    sweep: Sweep
    out: Path
    digest: str
    way: Way
    trainer: Trainer
    began: float
    tell: Tell

    def train_size(self, size: tuple[int, int], rows: Rows) -> bool:
        """Every duration of one size that is missing; whether there is time left."""
        missing = [steps for named, steps in self.sweep.groups() if named == size and not has(rows, size, steps)]
        if missing:
            self.trainer.compile()
        for steps in missing:
            group = self._group(size, steps)
            if not self._train(group, self._cost_before(size, steps)):
                return False
            _finish(self, group, rows)
        return True

    def _group(self, size: tuple[int, int], steps: int) -> Group:
        from featherweight.laws.model import Size
        from featherweight.laws.schedule import pattern
        from featherweight.laws.train import Group

        patterns = tuple(pattern(text) for text in self.sweep.patterns)
        device = self.trainer.tables[0].device
        group = Group.new(Size(*size), steps, patterns, self.trainer.setting, device)
        group.resume(self.out / CHECKPOINT, self.digest)
        return group

    def _train(self, group: Group, before: float) -> bool:
        """Trains to the end, with a checkpoint every so often; False, with a checkpoint, when the time is up."""
        from featherweight.laws.train import describe, finite

        total, each = self._cost_before(None, 0), _cost((group.size.width, group.size.layers))
        mark = saved = time.monotonic()
        self.tell(before + each * group.step, total, f"{group.size.name}: the first step, which may be compiled")
        while group.step < group.steps:
            if self._is_over():
                group.seconds += time.monotonic() - mark
                group.save(self.out / CHECKPOINT, self.digest)
                return False
            loss_M = self.trainer.step(group)
            if group.step % LOOK == 0:
                finite(loss_M.tolist(), group)
                self.tell(before + each * group.step, total, describe(group, loss_M))
            if time.monotonic() - saved > self.way.every:
                group.seconds, mark = group.seconds + time.monotonic() - mark, time.monotonic()
                group.save(self.out / CHECKPOINT, self.digest)
                saved = time.monotonic()
        group.seconds += time.monotonic() - mark
        return True

    def _is_over(self) -> bool:
        return self.way.stop_after is not None and time.monotonic() - self.began > self.way.stop_after

    def _cost_before(self, size: tuple[int, int] | None, steps: int) -> float:
        """Cost of all groups before this one, or of all there are."""
        total = 0.0
        for named, count in self.sweep.groups():
            if (named, count) == (size, steps):
                break
            total += _cost(named) * count
        return total


def _cost(size: tuple[int, int]) -> float:
    """Of a step, relative to other sizes, for the bar alone: products grow as width^2, everything else as width."""
    width, layers = size
    return layers * width * (width + 512.0)


def _finish(job: _Job, group: Group, rows: Rows) -> None:
    """Evaluates the runs of a group and puts them on file; `rows` grows by them."""
    from featherweight.laws import model

    began = time.monotonic()
    found = job.trainer.evaluate(group)
    counts = group.nonzero()
    for i, which in enumerate(group.patterns if job.way.save else ()):
        assert job.way.save is not None
        name = f"{group.size.name}-{which.name.replace(':', 'of')}-{group.steps}"
        model.save(job.way.save / name, group.size, group.params, i, group.setting.window)
    seconds = (group.seconds + time.monotonic() - began) / len(found)
    rows += new_rows(group, found, counts, seconds)
    write_rows(job.out / CSV, rows)
    (job.out / CHECKPOINT).unlink(missing_ok=True)


def progress(sweep: Sweep, out: Path, text: Corpus, rows: Rows) -> Progress:
    """Where the sweep stands, of what is on file alone: a finished command says the same each time."""
    of = len(sweep.groups()) * len(sweep.patterns)
    epochs = max(steps for _size, steps in sweep.groups()) * sweep.windows * sweep.window / len(text.train_N)
    said = f"the longest runs go through the {len(text.train_N)} bytes of training text {epochs:.2f} times"
    warnings = (said,) if epochs > 1 else ()
    seconds = round(sum(float(row["seconds"]) for row in rows), 1)
    return Progress(str(out / CSV), len(rows), of, len(rows) == of, seconds, round(epochs, 4), warnings)


# --- requests


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU; RequestError for one that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device {name!r} is not known: use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise RequestError(f"device {name!r} is not here: use auto or cpu.")
    return device


def _check_way(way: Way, sweep: Sweep) -> None:
    if way.precision not in ("auto", "bfloat16", "float32"):
        raise RequestError(f"precision {way.precision!r}: take auto, bfloat16 or float32.")
    if way.micro_batches < 1 or sweep.windows % way.micro_batches:
        raise RequestError(f"{way.micro_batches} micro-batches do not divide {sweep.windows} windows: take a divisor.")
    if way.stop_after is not None and not way.stop_after >= 0:
        raise RequestError(f"stop after {way.stop_after:g} seconds: give 0 or more.")
    try:
        if way.save is not None:
            way.save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{way.save} cannot be written to ({error.strerror or error}): name a folder.") from error
