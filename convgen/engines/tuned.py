"""Tables of measured schedules: what ``convgen tune`` found, and ``convgen generate`` takes.

A table is JSON, ``{"version": 1, "winners": [...]}``. The user's own lies at ``CONVGEN_TUNED``, by
default in the XDG data folder, and comes before those that ship with the package
(``convgen/tables``). ``CONVGEN_TUNED=0`` switches all of them off.

A winner holds for one specification, contraction, dtype or math mode, and device. It also says for
how large a call it was found. Generated kernels serve calls of any size: of several sizes, the one
that took longest counts, unless the caller names a size.

What a table says becomes C++. So an entry is used only if its fields have their types and ranges
and the family finds its schedule legal; what is not used is warned of.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from convgen.engines.registry import AnyPlan, Unit, units
from convgen.spec import CONTRACTIONS, ConvSpec, documents
from convgen.spec.documents import DocumentError, Length, OneOf, Range

VARIABLE = "CONVGEN_TUNED"
VERSION = 1

ALIKE = {"f16tc": "bf16tc", "bf16tc": "f16tc"}
"""Modes whose kernels take equally long: one has the other's winners where it has none."""

GAIN = 1.02
"""A schedule must be faster than the default by so much to replace it.

The package's own tables hold no others. A user's does, since what won there outranks those.
"""

_SHIPPED = Path(__file__).parents[1] / "tables"


Word = Annotated[str, Length(1, 200)]
Channels = Annotated[int, Range(1, 1 << 30)]
Milliseconds = Annotated[float, Range(0, 1e12)]

_SHOWN_WARNINGS = 5


class TunedError(RuntimeError):
    """A table cannot be read or written; the message says which, why, and what to do."""


class TunedWarning(UserWarning):
    """An entry of a table is not used, because this version of convgen cannot have it."""


@dataclass(frozen=True)
class Winner:
    """The fastest schedule of one contraction of a specification on one device."""

    spec: Word
    """Canonical name, channels included where they are fixed."""
    contraction: Annotated[str, OneOf(CONTRACTIONS)]
    kind: Word
    """Dtype or math mode."""
    device: Annotated[str, Length(0, 200)]
    """Name of the GPU or processor."""
    architecture: Annotated[str, Length(0, 20)]
    """Of the GPU, as ``90a``; empty for a processor."""
    size: Annotated[int, Range(0, 64)]
    """Class of the call's extents: see :func:`size_class`."""
    channels: tuple[Channels, Channels]
    """Of the call, coarse and fine."""
    schedule: Mapping[str, Any]
    ms: Milliseconds
    default_ms: Milliseconds
    """What the default took in the same run."""
    convgen: Word
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


@dataclass(frozen=True)
class Table:
    """What a file holds."""

    winners: tuple[tuple[Winner, str], ...]
    """Each with the name of its entry, for messages."""
    others: tuple[Any, ...]
    """Entries that are no winners, as they are there."""
    warnings: tuple[str, ...]


def size_class(batch: int, extents: Iterable[int]) -> int:
    """Class of a call's extents: the binary logarithm of its coarse positions, rounded."""
    return round(math.log2(max(1, batch * math.prod(extents))))


def user_table() -> Path | None:
    """Where the user's table lies; None if tables are switched off.

    Raises:
        TunedError: where that is below a home or a working folder that does not exist.
    """
    given = os.environ.get(VARIABLE, "")
    if given == "0":
        return None
    data = os.environ.get("XDG_DATA_HOME", "")
    try:
        if given:
            return Path(given).expanduser().absolute()
        # The XDG specification has relative paths ignored.
        folder = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    except (RuntimeError, OSError) as error:
        what = f"{VARIABLE}={documents.plain(given)} is nowhere" if given else "there is no home"
        raise TunedError(f"{what} ({error}): set {VARIABLE} to a file (0 for none)") from error
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
    # An epilogue takes the schedule of what comes before it.
    winners = [(winner, where) for winner, where in _all() if winner.spec == spec.linear.name]
    if not winners:
        return found
    architectures = tuple(architectures)
    wanted = {name.partition("+")[0].rstrip("af") for name in architectures}
    for unit in units(backend, spec.geometry, dtypes):
        contraction, kind = unit.key
        here = [
            (winner, where)
            for winner, where in winners
            if winner.contraction == contraction
            and (
                winner.architecture.rstrip("af") in wanted
                if backend == "cuda"
                else not winner.architecture and winner.device == device
            )
        ]
        alike = ALIKE.get(unit.problem.kind, "") + unit.family.suffix
        legal = _legal(unit, [entry for entry in here if entry[0].kind == kind])
        legal = legal or _legal(unit, [entry for entry in here if entry[0].kind == alike])
        if not legal:
            continue
        if size is None:
            winner, plan = max(legal, key=lambda each: each[0].ms)
        else:
            winner, plan = min(legal, key=lambda each: abs(each[0].size - size))
        # What spills on an architecture that it was not measured on is not for a module for it.
        others = [a for a in architectures if a.partition("+")[0] != winner.architecture]
        if not unit.family.refusal(plan, others):
            found[unit.key] = plan.schedule
    return found


def _legal(unit: Unit, entries: Iterable[tuple[Winner, str]]) -> list[tuple[Winner, AnyPlan]]:
    """The winners whose schedules a unit can have; of the same key the last one."""
    legal = {}
    for winner, where in entries:
        try:
            plan = unit.with_schedule(unit.family.read_schedule(winner.schedule))
            refusal = unit.family.refusal(plan)
        except DocumentError as error:
            refusal = str(error)
        if refusal:
            warnings.warn(
                f"{where}: the tuned schedule is not used: {refusal}; run convgen tune again",
                TunedWarning,
                stacklevel=3,
            )
        else:
            legal[winner.key] = (winner, plan)
    return list(legal.values())


def _all() -> list[tuple[Winner, str]]:
    """Winners of all tables, each with its name for messages; the user's come last."""
    path = user_table()
    if path is None:
        return []
    return [entry for table in [*sorted(_SHIPPED.glob("*.json")), path] for entry in _of(table)]


def _of(path: Path) -> tuple[tuple[Winner, str], ...]:
    table = read_table(path)
    for message in table.warnings:
        warnings.warn(message, TunedWarning, stacklevel=4)
    return table.winners


def read(path: Path) -> list[Winner]:
    """The winners in a table; none if there is no such file. Warns of entries that are none.

    Raises:
        TunedError: if it cannot be read.
    """
    return [winner for winner, _ in _of(path)]


def read_table(path: Path) -> Table:
    """All that is in a table; nothing if there is no such file.

    Raises:
        TunedError: if it cannot be read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return Table((), (), ())
    except OSError as error:
        raise TunedError(_unreadable(path, error.strerror or str(error))) from error
    return _read(path, status.st_mtime_ns, status.st_size)


@cache
def _read(path: Path, changed_ns: int, size_bytes: int) -> Table:
    """:func:`read_table`, once for each state of the file."""
    try:
        data = documents.read(path)
    except FileNotFoundError:
        return Table((), (), ())
    except DocumentError as error:
        raise TunedError(_unreadable(path, str(error))) from error
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version != VERSION:
        raise TunedError(_unreadable(path, f"it has no version {VERSION}"))
    if not isinstance(data.get("winners"), list):
        raise TunedError(_unreadable(path, "it has no list of winners"))
    winners, others, messages = [], [], []
    for number, entry in enumerate(data["winners"]):
        where = f"{path}, winners[{number}]"
        try:
            winner = documents.record(entry, Winner, "")
        except DocumentError as error:
            others.append(entry)
            messages.append(f"{where} is not used: {error}")
            continue
        what = f"{winner.contraction} {winner.kind} of {winner.spec}"
        winners.append((winner, f"{where} ({documents.plain(what)})"))
    if len(messages) > _SHOWN_WARNINGS:
        more = f"{path}: {len(messages) - _SHOWN_WARNINGS} more entries are not used"
        messages = [*messages[:_SHOWN_WARNINGS], more]
    return Table(tuple(winners), tuple(others), tuple(messages))


def _unreadable(path: Path, why: str) -> str:
    return (
        f"the table of tuned schedules {path} cannot be read ({why}): move it away, or set "
        f"{VARIABLE} to another file (0 for none)"
    )
