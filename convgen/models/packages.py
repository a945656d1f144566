"""The packages of a network, generated and compiled side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import ModuleType

from convgen.building.build import Progress, processors
from convgen.building.folders import load
from convgen.spec import ConvSpec
from convgen.specialize import generate


@dataclass(frozen=True)
class Wanted:
    """A package: one specification, for the dtypes of a network on a device."""

    spec: ConvSpec
    dtypes: tuple[str, ...]
    backend: str


@dataclass(frozen=True)
class Built:
    """A package that is there, and what it took."""

    package: ModuleType
    seconds: float
    """Until it was there; of those that others were built beside, too."""
    compiled: bool
    """False if the cache had it."""


class _Stopped(BaseException):
    """Ends the builds of other packages once one has failed, or was interrupted."""


def build(wanted: Sequence[Wanted], progress: Progress | None = None) -> dict[Wanted, Built]:
    """All packages, those that the cache lacks compiled side by side.

    Args:
        wanted: the packages.
        progress: as for :func:`convgen.specialize.generate`, over all of them.

    Raises:
        SpecError, ToolchainError, BuildError, TunedError: as ``generate`` does.
    """
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        return {}
    given = os.environ.get("CONVGEN_JOBS", "")
    cores = int(given) if given.isdigit() and int(given) else processors()
    workers = min(len(wanted), cores)
    # Twice as many compilers as cores at first, so that none idles when small packages are done.
    jobs = max(1, cores // workers if given else -(-2 * cores // workers))
    total = _Total(progress)

    def one(what: Wanted) -> tuple[Path, float, bool]:
        start = time.monotonic()
        report = total.of(what)
        path = generate(
            what.spec,
            dtypes=what.dtypes,
            backends=what.backend,
            progress=report,
            jobs=min(jobs, cores),
        )
        return path, time.monotonic() - start, total.has_compiled(what)

    found: dict[Wanted, tuple[Path, float, bool]] = {}
    with ThreadPoolExecutor(workers) as pool:
        pending = {pool.submit(one, each): each for each in wanted}
        try:
            for done in as_completed(pending):
                found[pending[done]] = done.result()
        except BaseException:
            total.stopped = True
            for each in pending:
                each.cancel()
            raise
    return {
        what: Built(load(path), seconds, compiled)
        for what, (path, seconds, compiled) in found.items()
    }


class _Total:
    """The progress of several builds as one."""

    def __init__(self, progress: Progress | None) -> None:
        self.stopped = False
        self._progress = progress
        self._parts: dict[Wanted, tuple[int, int]] = {}
        self._lock = Lock()

    def of(self, what: Wanted) -> Callable[[int, int, str], None]:
        def report(done: int, total: int, step: str) -> None:
            if self.stopped:
                raise _Stopped
            if total:
                with self._lock:
                    self._parts[what] = (done, total)
                    sums = tuple(map(sum, zip(*self._parts.values(), strict=True)))
                    if self._progress:
                        self._progress(sums[0], sums[1], f"{what.spec.name}: {step}")

        return report

    def has_compiled(self, what: Wanted) -> bool:
        return what in self._parts


def shared_output_padding(layers: Mapping[str, ConvSpec]) -> dict[str, ConvSpec]:
    """Specifications in which output padding is what most layers of the same kind have.

    It is a run-time value of a package; only the constant is a little quicker to check, and tables
    of tuned schedules go by it.
    """
    counts: dict[ConvSpec, dict[tuple[int, ...], int]] = {}
    for spec in layers.values():
        paddings = counts.setdefault(_plain(spec), {})
        paddings[spec.output_padding] = paddings.get(spec.output_padding, 0) + 1
    chosen = {
        plain: max(paddings, key=lambda padding, of=paddings: (of[padding], padding))  # type: ignore[misc]
        for plain, paddings in counts.items()
    }
    return {name: _plain(spec, chosen[_plain(spec)]) for name, spec in layers.items()}


def _plain(spec: ConvSpec, output_padding: Sequence[int] = (0,)) -> ConvSpec:
    return ConvSpec.from_dict(spec.to_dict() | {"output_padding": list(output_padding)})
