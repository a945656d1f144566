"""Tables of measured schedules: what ``convgen tune`` found, and ``convgen generate`` takes.

A table is JSON, ``{"version": 1, "winners": [...]}``. The user's own lies at ``CONVGEN_TUNED``, by
default in the XDG data folder, and comes before those that ship with the package
(``convgen/tables``). ``CONVGEN_TUNED=0`` switches all of them off.

A winner holds for one specification, contraction, dtype or math mode, and device. It also says for
how large a call it was found. Generated kernels serve calls of any size: of several sizes, the one
that took longest counts, unless the caller names a size.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from convgen.building.cache import write_atomically
from convgen.engines import CONTRACTIONS, KernelPlan, units
from convgen.spec import ConvSpec

VARIABLE = "CONVGEN_TUNED"
VERSION = 1

ALIKE = {"f16tc": "bf16tc", "bf16tc": "f16tc"}
"""Modes whose kernels take equally long: one has the other's winners where it has none."""

_SHIPPED = Path(__file__).parents[1] / "tables"


class TunedError(RuntimeError):
    """A table cannot be read or written; the message says which, why, and what to do."""


class TunedWarning(UserWarning):
    """An entry of a table is not used, because this version of convgen cannot have it."""


@dataclass(frozen=True)
class Winner:
    """The fastest schedule of one contraction of a specification on one device."""

    spec: str
    """Canonical name, channels included where they are fixed."""
    contraction: str
    kind: str
    """Dtype or math mode."""
    device: str
    """Name of the GPU or processor."""
    architecture: str
    """Of the GPU, as ``90a``; empty for a processor."""
    size: int
    """Class of the call's extents: see :func:`size_class`."""
    channels: tuple[int, int]
    """Of the call, coarse and fine."""
    schedule: Mapping[str, Any]
    ms: float
    default_ms: float
    """What the engine's own choice took in the same run."""
    convgen: str
    """Version that measured it."""

    @property
    def key(self) -> tuple[object, ...]:
        """What a newer measurement replaces."""
        return (
            self.spec,
            self.contraction,
            self.kind,
            self.device,
            self.architecture,
            self.size,
            self.channels,
        )


def size_class(batch: int, extents: Iterable[int]) -> int:
    """Class of a call's extents: the binary logarithm of its coarse positions, rounded."""
    return round(math.log2(max(1, batch * math.prod(extents))))


def user_table() -> Path | None:
    """Where the user's table lies; None if tables are switched off."""
    given = os.environ.get(VARIABLE, "")
    if given == "0":
        return None
    if given:
        return Path(given).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification has relative paths ignored.
    folder = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return folder / "convgen" / "tuned.json"


def schedules(
    spec: ConvSpec,
    backend: str,
    dtypes: Iterable[str],
    architectures: Iterable[str],
    device: str,
    size: int | None = None,
) -> dict[tuple[str, str], Any]:
    """The measured schedules for a specification, by contraction and dtype or math mode.

    Args:
        spec, backend, dtypes: what is generated.
        architectures: that it is compiled for, as ``90a``; none for the CPU.
        device: name of the processor here (GPUs go by their architecture).
        size: class of the calls to expect; by default the winner that took longest counts.

    Raises:
        TunedError: if a table cannot be read.
    """
    found: dict[tuple[str, str], Any] = {}
    winners = [w for w in _all() if w.spec == spec.name]
    if not winners:
        return found
    architectures = tuple(architectures)
    wanted = {name.partition("+")[0].rstrip("af") for name in architectures}
    for engine, kind in units(backend, spec.geometry, dtypes):
        for contraction in CONTRACTIONS:
            here = [
                w
                for w in winners
                if w.contraction == contraction
                and (
                    w.architecture.rstrip("af") in wanted
                    if backend == "cuda"
                    else not w.architecture and w.device == device
                )
            ]
            matching = [w for w in here if w.kind == kind]
            matching = matching or [w for w in here if w.kind == ALIKE.get(kind)]
            if not matching:
                continue
            if size is None:
                winner = max(matching, key=lambda w: w.ms)
            else:
                winner = min(matching, key=lambda w: abs(w.size - size))
            try:
                schedule = engine.read_schedule(contraction, winner.schedule)
                plan = KernelPlan(spec.geometry, contraction, kind, engine.name, schedule)
                refusal = engine.refusal(plan)
            except (TypeError, KeyError, ValueError) as error:
                refusal = str(error)
            if refusal:
                warnings.warn(
                    f"the tuned schedule of {contraction} {kind} of {spec.name} is not used: "
                    f"{refusal}; run convgen tune again",
                    TunedWarning,
                    stacklevel=2,
                )
                continue
            # What spills on an architecture that it was not measured on is not for a module for it.
            others = [a for a in architectures if a.partition("+")[0] != winner.architecture]
            if not engine.refusal(plan, others):
                found[contraction, kind] = schedule
    return found


def _all() -> list[Winner]:
    """Winners of all tables; the user's replace the package's."""
    path = user_table()
    if path is None:
        return []
    tables = [*sorted(_SHIPPED.glob("*.json")), path]
    return list({winner.key: winner for table in tables for winner in read(table)}.values())


def read(path: Path) -> list[Winner]:
    """The winners in a table; none if there is no such file.

    Raises:
        TunedError: if it cannot be read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TunedError(_unreadable(path, error)) from error
    return _read(path, status.st_mtime_ns, status.st_size)


@cache
def _read(path: Path, changed_ns: int, size_bytes: int) -> list[Winner]:
    """:func:`read`, once for each state of the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}, not {VERSION}")
        return [_winner(entry) for entry in data["winners"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TunedError(_unreadable(path, error)) from error


def _winner(entry: Mapping[str, Any]) -> Winner:
    names = [field.name for field in fields(Winner)]
    values = {name: entry[name] for name in names}
    coarse, fine = entry["channels"]
    return Winner(**{**values, "channels": (int(coarse), int(fine))})


def store(winners: Iterable[Winner], path: Path) -> int:
    """Adds winners to a table, in place of older ones of the same key; how many there are now.

    Another process may add to it at the same time; a killed one leaves the table as it was.

    Raises:
        TunedError: if the table cannot be read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            table = {winner.key: winner for winner in [*read(path), *winners]}
            rows = sorted(table.values(), key=lambda w: tuple(map(str, w.key)))
            text = json.dumps(
                {"version": VERSION, "winners": [asdict(winner) for winner in rows]}, indent=1
            )
            write_atomically(path, text + "\n")
            return len(table)
    except OSError as error:
        raise TunedError(
            f"cannot write the table {path}: {error.strerror}; set {VARIABLE} to another file"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"the table of tuned schedules {path} cannot be read ({error}): delete it, or set "
        f"{VARIABLE} to another file (0 for none)"
    )


@cache
def processor_name() -> str:
    """Name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()
