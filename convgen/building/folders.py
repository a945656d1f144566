"""Package folders: copying one out of the cache, and importing one by its path."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.util
import json
import keyword
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from convgen.building import cache, disk
from convgen.building.errors import BuildError

_IGNORED = ("__pycache__", "obj", ".ninja_log", ".ninja_deps")
"""What Python and ninja leave in a package folder; no part of it."""

_importing = threading.RLock()


def export(package: Path, out: Path, name: str | None = None) -> Path:
    """Copies a package folder to ``out/<name>``, in one step that others see whole or not at all.

    An older package there is replaced (processes that loaded its libraries keep them); one with
    the same content is left as it is. ``out`` is created if need be.

    Args:
        package: a package folder, such as :func:`convgen.specialize.generate` returns.
        out: the folder to put it in.
        name: a Python identifier; the package's own name by default.

    Returns:
        The path of the copy.

    Raises:
        BuildError: if ``name`` is no identifier, ``package`` or what lies at the destination is
            no package of convgen, or the copy cannot be written.
    """
    name = package.name if name is None else name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise BuildError(f"{name!r} cannot be imported: give a Python identifier as the name")
    if not is_package(package):
        raise BuildError(f"{package} is no package of convgen: it has no spec.json of convgen's")
    target = out / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _exclusively(out):
            if target.is_symlink() or (target.exists() and not is_package(target)):
                raise BuildError(
                    f"{target} exists and is no package of convgen: "
                    f"move it away, or give another name"
                )
            if _digests(target) != _digests(package):
                _replace(package, target)
    except OSError as error:
        # copytree gathers (source, destination, message) of every file; the first tells enough.
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise BuildError(f"cannot write {target}: {why}") from error
    return target


def load(package: Path) -> ModuleType:
    """Imports a package folder; the same module object each time, until the folder changes.

    A package of the cache is imported as ``convgen.cached.<key>.<name>``, any other under its
    name with a digest of its path and files. Safe to call from several threads.

    Raises:
        BuildError: if the folder is no package of convgen.
    """
    package = package.absolute()
    if not is_package(package):
        raise BuildError(f"{package} is no package of convgen: it has no spec.json of convgen's")
    with _importing:
        # Interpreted or not (see convgen.checking.interpreted) are two modules.
        interpret = os.environ.get("CONVGEN_INTERPRET", "")
        if package.parent.parent == cache.cache_path() and interpret in ("", "0"):
            return _import_cached(package)
        return _import_file(package, interpret)


def is_package(folder: Path) -> bool:
    """Whether a folder was written by convgen."""
    try:
        described = json.loads((folder / "spec.json").read_text())
        return {"convgen", "spec"} <= described.keys() and (folder / "__init__.py").is_file()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


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


def _replace(package: Path, target: Path) -> None:
    """Puts a copy of a package in the place of an older one; call it with the lock held."""
    for stale in target.parent.glob(f".{target.name}.*.convgen"):
        # A process died here. If it had moved the old package away, the new one follows at once.
        shutil.rmtree(stale)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".convgen", dir=target.parent))
    try:
        new, old = beside / "new", beside / "old"
        shutil.copytree(package, new, ignore=shutil.ignore_patterns(*_IGNORED))
        # The copy of a cache that is read-only is its user's own.
        new.chmod(new.stat().st_mode | 0o700)
        for path, status in list(disk.tree(new)):
            os.chmod(new / path, status.st_mode | (0o700 if (new / path).is_dir() else 0o600))
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


def _digests(package: Path) -> dict[str, str]:
    """Digest of every file of a package; empty where there is none."""
    return {file: disk.sha256(package / file) for file in _files(package)}
