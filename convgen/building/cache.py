"""The cache folder: private, content-addressed, safe to share between processes.

    <cache>/<key>/<name>/       a published package, never modified again
    <cache>/<key>/entry.json    the commit marker, written last: sizes and digests of the files
    <cache>/<key>/build.log     what the compilers said
    <cache>/tmp/<key>.<random>/ a build under way; whoever holds the key's lock may delete it
    <cache>/logs/<key>.log      of the last failed build of a key
    <cache>/locks/<key>         flock'ed while a key is built: the kernel drops it with its holder
    <cache>/toolchain/<digest>  compilers that were found to work

A process that dies anywhere leaves at worst a folder without a commit marker, which the next run
takes for absent and replaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "entry.json"
KEY_DIGITS = 64
"""A key is a whole SHA-256 in hex: keys of different content never meet."""

_KEY = re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")


class BuildError(RuntimeError):
    """A package could not be built, stored or exported; the message says why and what to do."""


@dataclass(frozen=True)
class CachedPackage:
    """One committed entry of the cache."""

    key: str
    name: str
    path: Path
    """The package folder."""
    size_bytes: int
    """Of everything the entry occupies, logs included."""
    last_used: float
    """Seconds since the epoch: when the entry was last found or built."""


def cache_path() -> Path:
    """Where the cache lies: ``CONVGEN_CACHE_DIR``, or ``convgen`` in the XDG cache folder.

    Touches no file.

    Raises:
        BuildError: where neither is set and there is no home folder.
    """
    if given := os.environ.get("CONVGEN_CACHE_DIR"):
        return Path(given).expanduser().absolute()
    # The XDG specification has relative paths ignored.
    if (xdg := os.environ.get("XDG_CACHE_HOME")) and os.path.isabs(xdg):
        return Path(xdg) / "convgen"
    try:
        return Path.home() / ".cache" / "convgen"
    except RuntimeError as error:
        raise BuildError("there is no home folder: set CONVGEN_CACHE_DIR") from error


def cache_dir() -> Path:
    """The cache folder, created with mode 0700 where it is missing.

    Libraries in it are loaded into the process, so it must be nobody else's to write.

    Raises:
        BuildError: where it cannot be created or written, another user owns it, or others may
            write to it.
    """
    path = cache_path()
    advice = "set CONVGEN_CACHE_DIR to a folder of your own"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except FileExistsError as error:
        raise BuildError(f"the cache {path} is not a folder: {advice}") from error
    except OSError as error:
        raise BuildError(f"cannot create the cache {path}: {error.strerror}; {advice}") from error
    if status.st_uid != os.geteuid():
        raise BuildError(
            f"the cache {path} belongs to user {status.st_uid}, not to you "
            f"({os.geteuid()}): {advice}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"others may write to the cache {path} (mode {stat.S_IMODE(status.st_mode):04o}), "
            f"and what lies in it is loaded as code: run chmod go-w {path}"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise BuildError(f"the cache {path} is not writable: {advice}")
    return path


@contextlib.contextmanager
def locked(key: str, waiting: Callable[[], None] | None = None) -> Iterator[int]:
    """Holds the lock of a key; yields its file descriptor.

    ``waiting`` is called once if another process holds the lock. A child process that inherits
    the descriptor holds the lock too, until it ends.
    """
    descriptor = _acquire(cache_dir() / "locks" / key, waiting)
    assert descriptor is not None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lookup(key: str, name: str) -> Path | None:
    """The published package of a key if it is there and whole, else None.

    Every file is compared with the digest that was recorded when it was built, so a truncated or
    altered library is taken for absent. Notes the use for :func:`clean`.
    """
    entry = cache_dir() / key
    try:
        record = json.loads((entry / MARKER).read_text())
        if record["name"] != name or not record["files"]:
            return None
        for path, expected in record["files"].items():
            file = entry / name / path
            if file.stat().st_size != expected["size_bytes"] or sha256(file) != expected["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(entry / MARKER)
    return entry / name


def temporary(key: str) -> Path:
    """A new private folder for a build of a key; call it with the lock of the key held.

    What dead builders left is removed first: of this key and of every key that nobody builds now.
    """
    folder = _private(cache_dir() / "tmp")
    for stale in folder.iterdir():
        if stale.name.startswith(key):
            shutil.rmtree(stale, ignore_errors=True)
        else:
            _sweep(stale)
    return Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))


def commit(key: str, name: str, built: Path, details: dict[str, Any]) -> Path:
    """Publishes ``built`` (which holds the folder ``name``) as the entry of a key.

    One rename, then the marker. ``details`` is recorded in the marker beside the files' digests.
    Call it with the lock of the key held.
    """
    entry = cache_dir() / key
    files = {
        str(path.relative_to(built / name)): {
            "size_bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in sorted((built / name).rglob("*"))
        if path.is_file()
    }
    if entry.exists():
        # A damaged or uncommitted entry. Processes that loaded its libraries keep them.
        discard(entry)
    os.rename(built, entry)
    record = {"name": name, "files": files, **details}
    write_atomically(entry / MARKER, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return entry / name


def discard(folder: Path) -> None:
    """Removes an entry, its marker first so that no reader takes a half-removed one for whole."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def cached_packages() -> list[CachedPackage]:
    """What the cache holds, the most recently used first; creates nothing.

    Raises:
        BuildError: where the cache cannot be read.
    """
    found = []
    for entry in _entries():
        try:
            marker = entry / MARKER
            name = json.loads(marker.read_text())["name"]
            used = marker.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(CachedPackage(entry.name, name, entry / name, _size_bytes(entry), used))
    return sorted(found, key=lambda package: package.last_used, reverse=True)


def clean(*, name: str | None = None, unused_days: float = 0.0) -> tuple[int, int]:
    """Removes packages from the cache; returns how many and their size in bytes.

    Args:
        name: only packages of this name, such as ``conv_transpose3d_k3_s2``; all of them if None.
        unused_days: only packages that were last used at least this many days ago.

    Also removes what dead builds left. A key that is being built at the moment is left alone.

    Raises:
        BuildError: where the cache cannot be read or written.
    """
    if not cache_path().is_dir():
        return 0, 0
    root = cache_dir()
    before = time.time() - unused_days * 86400
    whole = {package.key: package for package in cached_packages()}
    removed = freed_bytes = 0
    for entry in _entries():
        package = whole.get(entry.name)
        # An entry without a marker belongs to nobody: it goes in any case.
        if package and ((name and package.name != name) or package.last_used > before):
            continue
        lock = root / "locks" / entry.name
        descriptor = _acquire(lock, blocking=False)
        if descriptor is None:
            continue
        try:
            size = _size_bytes(entry)
            discard(entry)
            (root / "logs" / f"{entry.name}.log").unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        except OSError as error:
            raise BuildError(f"cannot remove {entry}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        removed += package is not None
        freed_bytes += size
    for stale in _list(root / "tmp"):
        freed_bytes += _size_bytes(stale) if _sweep(stale) else 0
    if name is None and not unused_days:
        for leftover in _list(root / "logs") + _list(root / "toolchain"):
            leftover.unlink(missing_ok=True)
    return removed, freed_bytes


def note(kind: str, digest: str) -> None:
    """Remembers a fact, such as that a compiler works; a cache that refuses it is no error."""
    with contextlib.suppress(OSError, BuildError):
        write_atomically(_private(cache_dir() / kind) / digest, "")


def noted(kind: str, digest: str) -> bool:
    """Whether :func:`note` was called with these arguments since the cache was last cleaned."""
    try:
        return (cache_path() / kind / digest).exists()
    except BuildError:
        return False


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that readers see the old content or the new, never a part."""
    descriptor, temporary_name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary_name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary_name)
        raise


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _acquire(
    path: Path, waiting: Callable[[], None] | None = None, blocking: bool = True
) -> int | None:
    """A descriptor that holds the lock of a file, or None where that would mean waiting."""
    _private(path.parent)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
            # clean() deletes lock files while holding them: a lock on a deleted file is no lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sweep(stale: Path) -> bool:
    """Removes a build folder unless its builder is alive; whether it did."""
    key = stale.name.split(".")[0]
    if not _KEY.fullmatch(key):
        return False
    descriptor = _acquire(stale.parent.parent / "locks" / key, blocking=False)
    if descriptor is None:
        return False
    try:
        shutil.rmtree(stale, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _entries() -> list[Path]:
    return [path for path in _list(cache_path()) if _KEY.fullmatch(path.name)]


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BuildError(f"cannot read the cache {folder}: {error.strerror}") from error


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if not path.is_dir() else 0
    return total
