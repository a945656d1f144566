"""What leaves the cache: what its user wants deleted, and what is beyond its limit in size."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

from convgen.building import disk, locks
from convgen.building.cache import (
    KINDS,
    cache_dir,
    cache_path,
    cached_packages,
    discard,
    entries,
    is_key,
    sweep,
)
from convgen.building.errors import BuildError

DEFAULT_LIMIT_BYTES = 5 << 30


def limit_bytes() -> int | None:
    """``CONVGEN_CACHE_BYTES``, how large the cache may become; None for any size.

    Raises:
        BuildError: if it is no number of bytes.
    """
    given = os.environ.get("CONVGEN_CACHE_BYTES", "").strip()
    if not given:
        return DEFAULT_LIMIT_BYTES
    if not (given.isascii() and given.isdigit() and len(given) < 20):
        raise BuildError(
            f"CONVGEN_CACHE_BYTES={given[:40]!r} is no number of bytes: give one such as "
            f"{DEFAULT_LIMIT_BYTES}, or 0 for no limit"
        )
    return int(given) or None


def make_room() -> None:
    """Removes entries until the cache is within its limit: the least recently used first.

    None that is in use or being built. What cannot be removed stays.
    """
    limit = limit_bytes()
    if limit is None:
        return
    sizes = {package.key: package.size_bytes for package in cached_packages()}
    # What has no marker is of no use to anybody: it goes first.
    broken = {entry.name: disk.size_bytes(entry) for entry in entries() if entry.name not in sizes}
    total = sum(sizes.values()) + sum(broken.values())
    for key in (*broken, *reversed(sizes)):
        if total <= limit:
            return
        with contextlib.suppress(OSError):
            if _remove(key, spare_used=True):
                total -= sizes.get(key, 0) + broken.get(key, 0)


def clean(*, name: str | None = None, unused_days: float | None = None) -> tuple[int, int]:
    """Removes packages from the cache; returns how many and their size in bytes.

    Args:
        name: only packages of this name, such as ``conv_transpose3d_k3_s2``; all of them if None.
        unused_days: only packages that were last used at least this many days ago, and that no
            process uses now; if None, those in use, too.

    Also removes what dead builds left. Without arguments, all that convgen has ever written into
    the cache goes. A key that is being built at the moment is left alone.

    Raises:
        BuildError: where the cache cannot be read or written.
    """
    if not os.path.lexists(cache_path()):
        return 0, 0
    root = cache_dir()
    before = math.inf if unused_days is None else time.time() - unused_days * 86400
    whole = {package.key: package for package in cached_packages()}
    removed = freed_bytes = 0
    try:
        for entry in entries():
            package = whole.get(entry.name)
            # An entry without a marker belongs to nobody: it goes in any case.
            if package and ((name and package.name != name) or package.last_used > before):
                continue
            size = disk.size_bytes(entry)
            if _remove(entry.name, spare_used=package is not None and unused_days is not None):
                removed += package is not None
                freed_bytes += size
        for stale in _children(root / "tmp"):
            size = disk.size_bytes(stale)
            freed_bytes += size if sweep(stale) else 0
        if name is None and unused_days is None:
            for kind in KINDS:
                for leftover in _children(root / kind):
                    disk.remove(leftover)
            _remove_locks(root / "locks")
    except OSError as error:
        raise BuildError(f"cannot clean the cache {root}: {error}") from error
    return removed, freed_bytes


def _remove(key: str, spare_used: bool) -> bool:
    """Removes an entry unless it is being built or, to be spared, in use; whether it did."""
    root = cache_dir()
    lock = root / "locks" / key
    descriptor = locks.acquire(lock, blocking=False)
    if descriptor is None:
        return False
    try:
        with locks.unused(lock.parent, key) as is_unused:
            if spare_used and not is_unused:
                return False
            discard(root / key)
        disk.remove(root / "logs" / f"{key}.log")
        lock.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _remove_locks(folder: Path) -> None:
    """Removes what lies in the folder of locks, but for locks that are held."""
    for lock in _children(folder):
        if lock.name == locks.IN_USE:
            with locks.unused(folder) as is_unused:
                if is_unused:
                    disk.remove(lock)
        elif not is_key(lock.name):
            disk.remove(lock)
        elif (descriptor := locks.acquire(lock, blocking=False)) is not None:
            disk.remove(lock)
            os.close(descriptor)


def _children(folder: Path) -> list[Path]:
    """What lies in one of convgen's folders, which is made one if something else lies there."""
    return sorted(disk.own_folder(folder).iterdir()) if os.path.lexists(folder) else []
