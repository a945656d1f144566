"""Package folders: copying one out of the cache, and importing one by its path."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.machinery
import importlib.util
import keyword
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from convgen.building import cache, disk, written
from convgen.building.errors import BuildError
from convgen.spec import documents
from convgen.spec.documents import DocumentError

_IGNORED = ("__pycache__", "obj", ".ninja_log", ".ninja_deps")
"""What Python and ninja leave in a package folder; no part of it."""

_BESIDE = ".convgen"
"""Suffix of the folders in which packages are replaced."""
_LONGEST_NAME_BYTES = 200
"""Of 255, what the name of a folder beside it leaves."""

_importing = threading.RLock()


def export(package: Path, out: Path, name: str | None = None) -> Path:
    """Copies a package folder to ``out/<name>``, in one step that others see whole or not at all.

    An older package there, of the same specification, is replaced (processes that loaded its
    libraries keep them), unless that would delete what convgen did not write or what was changed
    since; one with the same content is left as it is. ``out`` is created if need be.

    Args:
        package: a package folder, such as :func:`convgen.specialize.generate` returns.
        out: the folder to put it in.
        name: a name that can be imported (see :func:`unimportable`); the package's own by default.

    Returns:
        The path of the copy.

    Raises:
        BuildError: if ``name`` cannot be imported, ``package`` or what lies at the destination is
            no package of convgen, of another specification or its user's in part, or the copy
            cannot be written.
    """
    name = package.name if name is None else name
    if refusal := unimportable(name):
        raise BuildError(f"{refusal}: give another name")
    described = describe(package)
    if described is None:
        raise BuildError(f"{package} is no package of convgen: it has no spec.json of convgen's")
    target = out / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _exclusively(out):
            _sweep(target)
            if os.path.lexists(target):
                _renew(package, target, described["spec"])
            else:
                _replace(package, target, written.digests(package))
    except OSError as error:
        # copytree gathers (source, destination, message) of every file; the first tells enough.
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise BuildError(f"cannot write {target}: {why}") from error
    return target


def load(package: str | os.PathLike[str], alias: str | None = None) -> ModuleType:
    """Imports a package folder; the same module object each time, until the folder changes.

    This registers its operators with torch, which archives of torch.export and AOTInductor need
    before they are loaded.

    A package of the cache is imported as ``convgen.cached.<key>.<name>``, or ``<alias>`` in the
    place of both, unless that is another package's already; any other under its name with a digest
    of its path and files. Safe to call from several threads.

    Raises:
        BuildError: if the folder is no package of convgen.
    """
    package = Path(package).absolute()
    if not is_package(package):
        raise BuildError(f"{package} is no package of convgen: it has no spec.json of convgen's")
    with _importing:
        # Interpreted or not (see convgen.checking.interpreted) are two modules.
        interpret = os.environ.get("CONVGEN_INTERPRET", "")
        if package.parent.parent == cache.cache_path() and interpret in ("", "0"):
            return _import_alias(package, alias) if alias else _import_cached(package)
        return _import_file(package, interpret)


def unimportable(name: str) -> str:
    """Why a package cannot have a name, or had better not; empty if it may."""
    if not name.isidentifier():
        return f"name {documents.shown(name)} is not an identifier, so it cannot be imported"
    if keyword.iskeyword(name):
        return f"name {name!r} is a keyword of Python, so it cannot be imported"
    if (normal := unicodedata.normalize("NFKC", name)) != name:
        return f"name {name!r} is {normal!r} to Python, so it cannot be imported"
    if len(os.fsencode(name)) > _LONGEST_NAME_BYTES:
        return f"name {documents.shown(name)} is longer than file systems allow"
    if name in sys.stdlib_module_names or name.startswith("__"):
        return f"name {name!r} is Python's own, and would hide it"
    if name in ("torch", "convgen") or _is_installed(name):
        return f"name {name!r} would hide the package {name}"
    return ""


def _is_installed(name: str) -> bool:
    """Whether a package of that name is installed beside convgen's requirements."""
    sites = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    found = importlib.machinery.PathFinder.find_spec(name, list(dict.fromkeys(sites)))
    return found is not None and found.origin is not None


def describe(folder: Path) -> dict[str, Any] | None:
    """What ``spec.json`` says of a folder that convgen wrote; None of others."""
    try:
        described = documents.read(folder / "spec.json")
        ours = {"convgen", "spec"} <= described.keys() and (folder / "__init__.py").is_file()
        return described if ours else None
    except (OSError, DocumentError, AttributeError):
        return None


def is_package(folder: Path) -> bool:
    """Whether a folder was written by convgen."""
    return describe(folder) is not None


def _import_alias(package: Path, alias: str) -> ModuleType:
    home = importlib.import_module("convgen.cached")
    home.packages.setdefault(alias, package)
    if home.packages[alias] != package:  # CONVGEN_CACHE_DIR, a table or a compiler has changed
        return _import_cached(package)
    return importlib.import_module(f"{home.__name__}.{alias}")


def _import_cached(package: Path) -> ModuleType:
    home = importlib.import_module("convgen.cached")
    root = str(package.parent.parent)
    if root not in home.__path__:  # CONVGEN_CACHE_DIR was changed in this process
        home.__path__.append(root)
    # The import system remembers what folders hold; the package may be a second old.
    importlib.invalidate_caches()
    return importlib.import_module(f"{home.__name__}.{package.parent.name}.{package.name}")


def _import_file(package: Path, variant: str) -> ModuleType:
    facts = [str(package.resolve()), variant]
    for file in _files(package):
        status = (package / file).stat()
        facts.append(f"{file} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    name = f"{package.name}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _exclusively(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, which the kernel drops if the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Clears what processes left that died while they replaced a package."""
    for stale in target.parent.glob(f".{target.name}.*{_BESIDE}"):
        old = stale / "old"
        if not os.path.lexists(target) and old.is_dir():
            os.rename(old, target)  # It had been moved away: whoever asks finds it again.
        disk.remove(stale)


def _renew(package: Path, target: Path, spec: object) -> None:
    """Makes an older package equal to a new one, unless a user's work would be lost."""
    held = None if target.is_symlink() else describe(target)
    if held is None:
        raise BuildError(
            f"{target} exists and is no package of convgen: move it away, or give another name"
        )
    if held["spec"] != spec:
        raise BuildError(
            f"{target} is of another specification ({documents.shown(held.get('command'))}): "
            f"remove it, or give another name"
        )
    new, old = written.digests(package), written.digests(target)
    lost = written.changes(target, new)
    if new.items() <= old.items() and not old.keys() - new.keys() - set(lost):
        # Nothing to write. Of a package that came by other ways, such as git, there is no record.
        if written.recorded(target) != new:
            written.record(target, new)
        return
    if lost:
        raise BuildError(
            f"{target} holds what convgen did not write, or what was changed since "
            f"({written.listed(lost)}): move it away, or give another name"
        )
    _replace(package, target, new)


def _replace(package: Path, target: Path, digests: Mapping[str, str]) -> None:
    """Puts a copy of a package in the place of an older one; call it with the lock held."""
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_BESIDE, dir=target.parent))
    try:
        new, old = beside / "new", beside / "old"
        shutil.copytree(package, new, ignore=shutil.ignore_patterns(*_IGNORED))
        # The copy of a cache that is read-only is its user's own.
        new.chmod(new.stat().st_mode | 0o700)
        for path, status in list(disk.tree(new)):
            os.chmod(new / path, status.st_mode | (0o700 if (new / path).is_dir() else 0o600))
        written.record(new, digests)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _files(package: Path) -> list[str]:
    """The files of a package by their relative paths, sorted."""
    found = []
    for folder, folders, files in os.walk(package):
        folders[:] = [name for name in folders if name not in _IGNORED]
        found += [
            os.path.relpath(os.path.join(folder, name), package)
            for name in files
            if name not in _IGNORED
        ]
    return sorted(found)
