"""Files that may be anything: read, written and removed whatever is found in their place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def distrust(status: os.stat_result) -> str | None:
    """Why nothing may be loaded as code from a file or folder; None if it may.

    Its owner must be root or oneself, and nobody else may write to it.
    """
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}, neither to you ({os.geteuid()}) nor to root"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(status.st_mode):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def tree(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything in a folder, links not followed: the path in it, and what lstat says.

    Raises:
        OSError: where something in it cannot be read.
    """
    pending = [""]
    while pending:
        inner = pending.pop()
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                path = f"{inner}/{entry.name}" if inner else entry.name
                status = entry.stat(follow_symlinks=False)
                yield path, status
                if stat.S_ISDIR(status.st_mode):
                    pending.append(path)


def size_bytes(path: Path) -> int:
    """What lies at a path takes, as far as it can be read; links count as themselves."""
    total = 0
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size
        for _, status in tree(path):
            total += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return total


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file that may be trusted; never waits for a FIFO or a device.

    Raises:
        OSError: if it is none, or larger than ``most_bytes``.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most_bytes or distrust(status):
            raise OSError(f"{path} cannot be read as a file of at most {most_bytes} bytes")
        return file.read(most_bytes)


def remove(path: Path) -> None:
    """Removes what lies at a path, of any kind, mode and depth; it may be missing.

    Raises:
        OSError: where that is not allowed.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(path)
        return
    _open_up(path)
    # Inner folders are brought up to the top first, so that no depth is too much for a path or
    # for Python's stack.
    while inner := _entries(path):
        for entry in inner:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            _open_up(entry.path)
            for deeper in _entries(entry.path):
                if deeper.is_dir(follow_symlinks=False):
                    _open_up(deeper.path)
                    os.rename(deeper.path, path / secrets.token_hex(16))
                else:
                    os.unlink(deeper.path)
            os.rmdir(entry.path)
    os.rmdir(path)


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _open_up(folder: Path | str) -> None:
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)


def own_folder(folder: Path) -> Path:
    """A private folder at this path, in the place of anything else that lies there."""
    try:
        status = os.lstat(folder)
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            if status.st_mode & 0o722 != 0o700:
                os.chmod(folder, 0o700)
            return folder
        remove(folder)
    with contextlib.suppress(FileExistsError):  # by another process, at the same time
        os.mkdir(folder, 0o700)
    return folder


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that readers see the old content or the new, never a part."""
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")
    descriptor, temporary_name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary_name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary_name)
        raise


def write_anywhere(path: Path, text: str) -> None:
    """Writes a file, or the one that a link leads to, atomically; a pipe or device as it is."""
    real = Path(os.path.realpath(path))
    if _is_special(real):
        with open(_open_special(real), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    else:
        write_atomically(real, text)


def check_writable(path: Path, parents: bool = False) -> None:
    """Tries whether :func:`write_anywhere` can write a file, and leaves no trace.

    With ``parents`` folders that are missing will be made.

    Raises:
        OSError: if not.
    """
    real = Path(os.path.realpath(path))
    if _is_special(real):
        os.close(_open_special(real))
        return
    if real.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = real.parent
    while parents and not os.path.lexists(folder):
        folder = folder.parent
    # Asking beforehand does not help root, nor on a file system that is mounted read-only.
    descriptor, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=folder)
    os.close(descriptor)
    os.unlink(name)


def _is_special(path: Path) -> bool:
    """Whether something lies there that is neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _open_special(path: Path) -> int:
    """Opens a pipe or device; a FIFO that nobody reads is an error, not a wait."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    return descriptor


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_SPECIAL = re.compile(r"[\x00-\x1f\x7f\"'$`\\]")


def is_plain(path: str) -> bool:
    """Whether a path means itself inside a shell's double quotes, and in an unquoted list of paths.

    nvcc puts the paths of its sources, of itself, of its host compiler and of its temporary files
    between such quotes and calls a shell, which executes what is special there.
    """
    return not _SPECIAL.search(path)


@contextlib.contextmanager
def plain_temporary() -> Iterator[Path]:
    """A private temporary folder whose path is plain (see :func:`is_plain`).

    Raises:
        OSError: where there is no place for one.
    """
    places = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    for place in map(os.path.realpath, places):
        if not is_plain(place):
            continue
        try:
            folder = Path(tempfile.mkdtemp(prefix="convgen-", dir=place))
        except OSError:
            continue
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                remove(folder)
        return
    raise OSError(f"no temporary folder can be created: set TMPDIR (tried {', '.join(places)})")
