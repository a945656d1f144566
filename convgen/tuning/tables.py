"""Adds what won to a table: see :mod:`convgen.engines.tuned`, which reads them."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from convgen.building.disk import write_atomically
from convgen.engines.tuned import VARIABLE, VERSION, TunedError, Winner, read


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
