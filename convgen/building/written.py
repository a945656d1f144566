"""What convgen wrote of a package folder, and what its user added or changed since.

A package that is exported has two records of its files, as ``sha256sum`` writes them: of what is
the same on every machine, which may be committed with it, and of what depends on the machine.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from convgen.building import disk
from convgen.spec import documents
from convgen.spec.documents import DocumentError

SOURCES, BUILT = "sources.sha256", "lib/built.sha256"
RECORDS = (SOURCES, BUILT)

_OF_MACHINE = re.compile(r"build\.ninja|lib/.*")
_LIBRARY = re.compile(r"lib/[^/]*\.so")
_LEFT_BEHIND = re.compile(
    r"(?s:.*/)?__pycache__(/[^/]*\.pyc(\.\d+)?)?"
    r"|obj(/(?s:.*)(\.o|\.d|tmpxft_[^/]*|\.ninja_(log|deps|lock)))?"
    r"|\.ninja_(log|deps|lock)"
)
"""Of Python and of ninja, run in the package by its user."""
_FOLDERS_LEFT_BEHIND = r"(?s:.*/)?__pycache__|obj(/.*)?"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")


def digests(package: Path) -> dict[str, str]:
    """SHA-256 of every file of a package but its records, by path; empty where there is none.

    What is no regular file, such as a link, has an empty one. Tools' leftovers are no part of it.

    Raises:
        OSError: where something in it cannot be read.
    """
    found = {}
    if package.is_dir():
        for path, status in disk.tree(package):
            if stat.S_ISDIR(status.st_mode) or path in RECORDS or _left_behind(path):
                continue
            regular = stat.S_ISREG(status.st_mode)
            found[path] = disk.sha256(package / path) if regular else ""
    return found


def record(package: Path, written: Mapping[str, str]) -> None:
    """Writes the records of what was written into a package: digests by path.

    Raises:
        OSError: where that is not possible.
    """
    for name in RECORDS:
        lines = (
            f"{digest}  {path}\n"
            for path, digest in sorted(written.items())
            if bool(_OF_MACHINE.fullmatch(path)) == (name == BUILT)
        )
        (package / name).parent.mkdir(exist_ok=True)
        disk.write_atomically(package / name, "".join(lines))


def recorded(package: Path) -> dict[str, str]:
    """SHA-256 of what convgen wrote, by path, as far as there are records."""
    found: dict[str, str] = {}
    for name in RECORDS:
        try:
            text = documents.read_text(package / name)
        except (FileNotFoundError, DocumentError):
            continue
        found |= {path: digest for digest, path in _LINE.findall(text)}
    return found


def changes(package: Path, replacement: Mapping[str, str] | None = None) -> list[str]:
    """What would be lost with a package: the paths of what was added to it or changed since.

    Neither what is the same in its ``replacement`` (the :func:`digests` of one) nor its libraries,
    which are made from its sources, nor what tools leave behind.

    Raises:
        OSError: where something in it cannot be read.
    """
    known, same = recorded(package), replacement or {}
    libraries = {path for path in known if _LIBRARY.fullmatch(path)}
    made = {*libraries, *(f"{path}.sha256" for path in libraries)}
    folders = {str(folder) for path in {*known, *same} for folder in Path(path).parents}
    found = digests(package)
    kept = [
        path
        for path, digest in found.items()
        if not digest or (path not in made and digest not in (known.get(path), same.get(path)))
    ]
    for path, status in disk.tree(package):
        is_folder = stat.S_ISDIR(status.st_mode)
        # Empty ones, too; of ninja's objects whatever there is.
        if is_folder and path not in folders and not re.fullmatch(_FOLDERS_LEFT_BEHIND, path):
            kept.append(f"{path}/")
        if path in RECORDS and not stat.S_ISREG(status.st_mode):
            kept.append(path)
    return sorted(path for path in kept if not _below(path, kept))


def listed(paths: Iterable[str]) -> str:
    """The first few of many paths, in words."""
    every = list(paths)
    more = f" and {len(every) - 4} more" if len(every) > 4 else ""
    return ", ".join(map(_shown, every[:4])) + more


def _shown(path: str) -> str:
    return path if path.isprintable() and len(path) < 80 else ascii(path[:80])


def _below(path: str, others: Iterable[str]) -> bool:
    """Whether a path lies in one of the other folders."""
    return any(other != path and other.endswith("/") and path.startswith(other) for other in others)


def _left_behind(path: str) -> bool:
    return _LEFT_BEHIND.fullmatch(path) is not None
