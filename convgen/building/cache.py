"""The cache folder: private, content-addressed, safe to share between processes.

    <cache>/<key>/<name>/       a published package, never modified again
    <cache>/<key>/entry.json    the commit marker, written last: sizes and digests of the files
    <cache>/<key>/build.log     what the compilers said
    <cache>/tmp/<key>.<random>/ a build under way; whoever holds the key's lock may delete it
    <cache>/logs/<key>.log      of the last failed build of a key
    <cache>/locks/<key>         flock'ed while a key is built: the kernel drops it with its holder
    <cache>/locks/in_use        locked by processes that use entries, a byte for each key
    <cache>/toolchain/<digest>  compilers that were found to work
    <cache>/templates/<digest>  templates as Jinja2 compiled them

A process that dies anywhere leaves at worst a folder without a commit marker, which the next run
takes for absent and replaces; so it does with whatever else is found under one of these names.
Reading needs no lock and writes nothing that it could not do without, so that a cache may lie where
only its owner can write.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convgen.building import disk, locks
from convgen.building.errors import BuildError
from convgen.spec import documents

MARKER = "entry.json"
KINDS = ("logs", "toolchain", "templates")
"""Folders of files that the cache could do without: see :func:`keep`."""

KEY_DIGITS = 64
"""A key is a whole SHA-256 in hex: keys of different content never meet."""

_KEY = re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")
_LARGEST_BYTES = 1 << 24
"""Of a file that is read whole."""

_ADVICE = "set CONVGEN_CACHE_DIR to a folder of your own"


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


@dataclass(frozen=True)
class _Record:
    """What a commit marker says."""

    name: str
    files: dict[str, tuple[int, str]]
    """Size in bytes and SHA-256 of every file of the package, by its path there."""
    size_bytes: int
    """Of the whole entry when it was built."""
    last_used: float


def cache_path() -> Path:
    """Where the cache lies: ``CONVGEN_CACHE_DIR``, or ``convgen`` in the XDG cache folder.

    Touches no file.

    Raises:
        BuildError: where neither is set and there is no home folder, or that of ``~user``.
    """
    if given := os.environ.get("CONVGEN_CACHE_DIR"):
        try:
            return Path(given).expanduser().absolute()
        except (RuntimeError, OSError) as error:  # ~nobody; a working folder that was deleted
            shown = documents.plain(given)
            raise BuildError(
                f"CONVGEN_CACHE_DIR={shown} is nowhere ({error}): {_ADVICE}"
            ) from error
    # The XDG specification has relative paths ignored.
    if (xdg := os.environ.get("XDG_CACHE_HOME")) and os.path.isabs(xdg):
        return Path(xdg) / "convgen"
    try:
        return Path.home() / ".cache" / "convgen"
    except RuntimeError as error:
        raise BuildError("there is no home folder: set CONVGEN_CACHE_DIR") from error


def trusted_path() -> Path:
    """The cache folder, to read from: it may be missing, and need not be one's own to write.

    Libraries in it are loaded into the process. So its owner must be root or oneself, and nobody
    else may write to it. The folders that it lies in are not asked.

    Raises:
        BuildError: where it is no folder, or not to be trusted.
    """
    path = cache_path()
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as error:
        raise BuildError(f"cannot read the cache {path}: {error.strerror}; {_ADVICE}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise BuildError(f"the cache {path} is not a folder: {_ADVICE}")
    if why := disk.distrust(status):
        own = status.st_uid in (0, os.geteuid())
        raise BuildError(
            f"the cache {path} {why}, and what lies in it is loaded as code: "
            + (f"run chmod go-w {path}" if own else _ADVICE)
        )
    return path


def cache_dir() -> Path:
    """The cache folder, to write into; created with mode 0700 where it is missing.

    Raises:
        BuildError: where it cannot be created or written, or is not to be trusted.
    """
    path = trusted_path()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot create the cache {path}: {error.strerror}; {_ADVICE}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise BuildError(f"the cache {path} is not writable: {_ADVICE}")
    return path


@contextlib.contextmanager
def locked(key: str, waiting: Callable[[], None] | None = None) -> Iterator[int]:
    """Holds the lock of a key; yields its file descriptor.

    ``waiting`` is called once if another process holds the lock. A child process that inherits
    the descriptor holds the lock too, until it ends.
    """
    descriptor = locks.acquire(cache_dir() / "locks" / key, waiting)
    assert descriptor is not None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lookup(key: str, name: str) -> Path | None:
    """The published package of a key if it is there, whole and to be trusted, else None.

    Every file is compared with the digest that was recorded when it was built, so a truncated or
    altered library is taken for absent; so is an entry that holds anything else, or that somebody
    else owns or may write to. What is found is in use until this process ends.
    """
    return lookup_in(trusted_path(), key, name)


def lookup_in(root: Path, key: str, name: str) -> Path | None:
    """:func:`lookup` in a cache folder that was found to be trusted."""
    entry = root / key
    if not os.path.lexists(entry):
        return None
    locks.hold(root / "locks", key)
    record = _read_marker(entry)
    if record is None or record.name != name or not _is_whole(entry, record):
        return None
    with contextlib.suppress(OSError):
        os.utime(entry / MARKER, follow_symlinks=False)
    return entry / name


def _is_whole(entry: Path, record: _Record) -> bool:
    """Whether an entry holds the recorded files, and nothing else that Python could import."""
    package = entry / record.name
    found = set()
    try:
        for folder in (entry, package):
            if not _is_trusted_folder(os.lstat(folder)):
                return False
        for path, status in disk.tree(package):
            # Compiled modules are of Python, for who imports the package as it lies there.
            ignored = "__pycache__" in path.split("/")
            if _is_trusted_folder(status):
                continue
            if not stat.S_ISREG(status.st_mode) or disk.distrust(status):
                return False
            if ignored:
                continue
            expected = record.files.get(path)
            if expected is None or expected != (status.st_size, disk.sha256(package / path)):
                return False
            found.add(path)
    except OSError:
        return False
    return found == record.files.keys()


def _is_trusted_folder(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode) and not disk.distrust(status)


def _read_marker(entry: Path) -> _Record | None:
    """The commit marker of an entry, or None where there is none or it is damaged."""
    try:
        marker = entry / MARKER
        data = json.loads(disk.read_regular(marker, _LARGEST_BYTES))
        files = {
            path: (int(facts["size_bytes"]), str(facts["sha256"]))
            for path, facts in data["files"].items()
        }
        name, size = data["name"], int(data["size_bytes"])
        if not files or not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            return None
        return _Record(name, files, size, marker.lstat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    except RecursionError:  # of JSON that is nested deeply
        return None


def temporary(key: str) -> Path:
    """A new private folder for a build of a key; call it with the lock of the key held.

    What dead builders left is removed first: of this key and of every key that nobody builds now.
    """
    folder = disk.own_folder(cache_dir() / "tmp")
    for stale in _list(folder):
        if stale.name.startswith(key):
            with contextlib.suppress(OSError):
                disk.remove(stale)
        else:
            sweep(stale)
    return Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))


def commit(key: str, name: str, built: Path, details: dict[str, Any]) -> Path:
    """Publishes ``built`` (which holds the folder ``name``) as the entry of a key, in use.

    One rename, then the marker. ``details`` is recorded in the marker beside the files' digests.
    Call it with the lock of the key held.
    """
    root = cache_dir()
    entry = root / key
    files = {}
    for path, status in list(disk.tree(built)):
        # Whatever the umask: nobody else may write to what is loaded as code.
        os.chmod(built / path, stat.S_IMODE(status.st_mode) & ~0o022)
        if path.startswith(f"{name}/") and stat.S_ISREG(status.st_mode):
            files[path.removeprefix(f"{name}/")] = {
                "size_bytes": status.st_size,
                "sha256": disk.sha256(built / path),
            }
    # A damaged or uncommitted entry. Processes that loaded its libraries keep them.
    discard(entry)
    locks.hold(root / "locks", key)
    os.rename(built, entry)
    size = disk.size_bytes(entry)
    record = {"name": name, "size_bytes": size, "files": dict(sorted(files.items())), **details}
    disk.write_atomically(entry / MARKER, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return entry / name


def discard(entry: Path) -> None:
    """Removes an entry, its marker first so that no reader takes a half-removed one for whole."""
    if entry.is_dir() and not entry.is_symlink():
        disk.remove(entry / MARKER)
    disk.remove(entry)


def cached_packages() -> list[CachedPackage]:
    """What the cache holds, the most recently used first; creates nothing.

    Raises:
        BuildError: where the cache cannot be read.
    """
    found = []
    for entry in entries():
        if record := _read_marker(entry):
            found.append(
                CachedPackage(
                    entry.name,
                    record.name,
                    entry / record.name,
                    record.size_bytes,
                    record.last_used,
                )
            )
    return sorted(found, key=lambda package: package.last_used, reverse=True)


def entries() -> list[Path]:
    """Everything in the cache that has the name of a key, committed or not.

    Raises:
        BuildError: where the cache cannot be read.
    """
    return [path for path in _list(cache_path()) if is_key(path.name)]


def is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


def sweep(stale: Path) -> bool:
    """Removes what lies in ``tmp`` unless it is of a builder that is alive; whether it did."""
    key = stale.name.split(".")[0]
    descriptor = None
    try:
        if is_key(key):
            descriptor = locks.acquire(stale.parent.parent / "locks" / key, blocking=False)
            if descriptor is None:
                return False
        disk.remove(stale)
        return True
    except OSError:
        return False
    finally:
        if descriptor is not None:
            os.close(descriptor)


def keep(kind: str, name: str, content: str | bytes) -> Path:
    """Writes a file into the folder ``kind`` of the cache, of :data:`KINDS`; its path.

    Raises:
        BuildError, OSError: where that is not possible.
    """
    path = disk.own_folder(cache_dir() / kind) / name
    if path.is_dir():
        disk.remove(path)
    disk.write_atomically(path, content)
    return path


def note(kind: str, digest: str, content: str | bytes = "") -> None:
    """Remembers a fact, such as that a compiler works; a cache that refuses it is no error."""
    with contextlib.suppress(OSError, BuildError):
        keep(kind, digest, content)


def recall(kind: str, digest: str) -> bytes | None:
    """The content that :func:`note` was given, or None: also where it is not to be trusted."""
    try:
        folder = trusted_path() / kind
        if _is_trusted_folder(os.lstat(folder)):
            return disk.read_regular(folder / digest, _LARGEST_BYTES)
    except (OSError, BuildError):
        pass
    return None


def noted(kind: str, digest: str) -> bool:
    """Whether :func:`note` was called with these arguments since the cache was last cleaned."""
    try:
        return stat.S_ISREG(os.lstat(cache_path() / kind / digest).st_mode)
    except (OSError, BuildError):
        return False


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BuildError(f"cannot read the cache {folder}: {error.strerror}") from error
