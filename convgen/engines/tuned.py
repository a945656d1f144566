"""Tables of measured schedules: what ``convgen tune`` found, and ``convgen generate`` takes.

A table is JSON, ``{"version": 1, "winners": [...]}``. The user's own lies at ``CONVGEN_TUNED``, by
default in the XDG data folder, and comes before those that ship with the package
(``convgen/tables``). ``CONVGEN_TUNED=0`` switches all of them off.

A winner holds for one specification, contraction, dtype or math mode, and device. It also says for
how large a call it was found. Generated kernels serve calls of any size: of several sizes, the one
that took longest counts, unless the caller names a size.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from convgen.engines.registry import units
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
    """What the default took in the same run."""
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
    for unit in units(backend, spec.geometry, dtypes):
        contraction, kind = unit.key
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
        alike = ALIKE.get(unit.problem.kind, "") + unit.family.suffix
        matching = matching or [w for w in here if w.kind == alike]
        if not matching:
            continue
        if size is None:
            winner = max(matching, key=lambda w: w.ms)
        else:
            winner = min(matching, key=lambda w: abs(w.size - size))
        try:
            plan = unit.with_schedule(unit.family.read_schedule(winner.schedule))
            refusal = unit.family.refusal(plan)
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
        if not unit.family.refusal(plan, others):
            found[unit.key] = plan.schedule
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


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"the table of tuned schedules {path} cannot be read ({error}): delete it, or set "
        f"{VARIABLE} to another file (0 for none)"
    )
