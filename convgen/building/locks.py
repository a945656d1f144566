"""Who builds and who uses an entry of the cache: locks that the kernel drops with their holders.

A key is *built* under a lock of its own file. It is *in use* while a process that has found it
lives: each process holds a shared lock on one byte per key of a common file, by one descriptor that
its forks inherit. Neither is needed to read, and neither can be taken where nothing may be written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from convgen.building import disk

IN_USE = "in_use"
"""The file in the folder of locks whose bytes stand for the keys in use."""

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, process
_everything = (0, 0)

_guard = threading.Lock()
_descriptors: dict[Path, int] = {}
_held: set[tuple[Path, str]] = set()


def acquire(
    path: Path, waiting: Callable[[], None] | None = None, blocking: bool = True
) -> int | None:
    """A descriptor that holds the lock of a file, or None where that would mean waiting.

    What is no file, in the file's place, is removed.
    """
    disk.own_folder(path.parent)
    while True:
        descriptor = _open_regular(path)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not blocking:
                    os.close(descriptor)
                    return None
                if waiting is not None:
                    waiting()
                    waiting = None
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Lock files are deleted by who holds them: a lock on a deleted file is no lock.
            if _is_still_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def hold(folder: Path, key: str) -> None:
    """Has a key in use until this process, and all that were forked from it, have ended.

    Where the locks cannot be written, as in a cache that is read-only, nothing is held: who can
    write there has to know that others read.

    Args:
        folder: of the cache's locks.
        key: of the entry.
    """
    with _guard, contextlib.suppress(OSError):
        if (folder, key) in _held:
            return
        if os.access(folder.parent, os.W_OK):
            disk.own_folder(folder)
        while True:
            if folder not in _descriptors:
                _descriptors[folder] = _open_to_hold(folder / IN_USE)
            descriptor = _descriptors[folder]
            # Waits while the entry is being removed, which takes milliseconds.
            _lock(descriptor, fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, _byte(key))
            if _is_still_at(descriptor, folder / IN_USE):
                break
            # The cache was emptied, which spares nothing that this process used before.
            os.close(_descriptors.pop(folder))
            _held.difference_update({pair for pair in _held if pair[0] == folder})
        _held.add((folder, key))


@contextlib.contextmanager
def unused(folder: Path, key: str | None = None) -> Iterator[bool]:
    """Whether no process uses a key, or any key at all; none can begin to until the end of this.

    Where that cannot be known, the answer is that one does.
    """
    try:
        disk.own_folder(folder)
        # A descriptor of its own: the locks of this process must be seen, too.
        descriptor = _open_regular(folder / IN_USE)
    except OSError:
        yield False
        return
    try:
        try:
            where = _everything if key is None else _byte(key)
            _lock(descriptor, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, where)
            free = _is_still_at(descriptor, folder / IN_USE)
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def _byte(key: str) -> tuple[int, int]:
    """Where the byte of a key lies, and how long it is; 60 bits of a SHA-256 do not meet."""
    return int(key[:15], 16), 1


def _lock(descriptor: int, how: int, kind: int, where: tuple[int, int]) -> None:
    fcntl.fcntl(descriptor, how, _FLOCK.pack(kind, os.SEEK_SET, *where, 0))


def _open_regular(path: Path) -> int:
    """Opens a file to lock it, created or put in the place of what is no file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
                raise
        else:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
        disk.remove(path)


def _open_to_hold(path: Path) -> int:
    try:
        return _open_regular(path)
    except OSError:
        # Not one's own to write; for a shared lock, reading it is enough.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
