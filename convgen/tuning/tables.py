"""Adds what won to a table: see :mod:`convgen.engines.tuned`, which reads them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from convgen.building import disk
from convgen.engines.tuned import VARIABLE, VERSION, TunedError, Winner, read_table


def store(winners: Iterable[Winner], path: Path) -> int:
    """Adds winners to a table, in place of older ones of the same key; how many there are now.

    Another process may add to it at the same time; a killed one leaves the table as it was.

    Raises:
        TunedError: if the table cannot be read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            held = read_table(path)
            table = {winner.key: winner for winner in [*(w for w, _ in held.winners), *winners]}
            rows = sorted(table.values(), key=lambda w: tuple(map(str, w.key)))
            # What this version cannot use is not its to delete.
            entries = [*map(asdict, rows), *held.others]
            text = json.dumps({"version": VERSION, "winners": entries}, indent=1)
            disk.write_anywhere(path, text + "\n")
            return len(table)
    except OSError as error:
        raise _unwritable(path, error) from error


def check_writable(path: Path) -> None:
    """Tries whether a table can be written, and leaves no trace.

    Raises:
        TunedError: if not.
    """
    try:
        disk.check_writable(path, parents=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> TunedError:
    return TunedError(
        f"cannot write the table {path}: {error.strerror}; set {VARIABLE} to another file"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Opening a FIFO for writing alone would wait for whoever reads it.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    lock = os.open(path.with_name(path.name + ".lock"), flags, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
