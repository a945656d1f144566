"""The generated modules that lie in a folder: finding them, reading ``spec.json``, importing them.

A folder is a generated module if it holds a ``spec.json`` that names convgen and a specification;
nothing else is ever touched.
"""

from __future__ import annotations

import importlib.machinery
import keyword
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from convgen import __version__
from convgen.building import folders, written
from convgen.spec import ConvSpec, SpecError, documents
from convgen.spec.documents import DocumentError, Length
from convgen.spec.taps import dgrad_phases

METADATA = "spec.json"


class CatalogError(ValueError):
    """A module, folder or name that was given cannot serve; the message says what can."""


class _NotGenerated(CatalogError):
    """What lies at a path is nothing of convgen's."""


Word = Annotated[str, Length(1, 200)]


@dataclass(frozen=True)
class _Kernel:
    contraction: Word
    dtype: Word
    engine: Word
    schedule: dict[str, Any]


@dataclass(frozen=True)
class _Backend:
    dtypes: Annotated[tuple[Word, ...], Length(0, 100)]
    math_modes: Annotated[tuple[Word, ...], Length(0, 100)]
    kernels: Annotated[tuple[_Kernel, ...], Length(0, 1000)]


@dataclass(frozen=True)
class _Description:
    """What is read of a ``spec.json``."""

    convgen: Word
    command: Annotated[str, Length(1, 2000)]
    spec: dict[str, Any]
    backends: dict[str, Any]


_DESCRIBED = {field.name for field in fields(_Description)}


@dataclass(frozen=True)
class Generated:
    """One generated module on disk."""

    path: Path
    spec: ConvSpec
    version: str
    """Of the convgen that wrote it."""
    command: str
    """Regenerates it."""
    dtypes: dict[str, tuple[str, ...]]
    """Backends that it has sources for, and the dtypes of each."""
    kernels: dict[str, list[dict[str, Any]]]
    """Backend -> one entry per translation unit: contraction, dtype, engine, schedule."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def class_name(self) -> str:
        return self.spec.class_name

    @property
    def foreign(self) -> str | None:
        """What to say of a module of another version of convgen; None of this one's."""
        if self.version == __version__:
            return None
        return (
            f"{self.path} was written by convgen {self.version}, and this is {__version__}: "
            f"regenerate it with {self.command}"
        )

    @property
    def built(self) -> tuple[str, ...]:
        """Backends whose library lies there."""
        return tuple(
            backend for backend in self.dtypes if (self.path / "lib" / f"{backend}.so").is_file()
        )

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes of every file, by its path in the module; caches of Python left out."""
        return {
            str(path.relative_to(self.path)): path.stat().st_size
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path.parent.name != "__pycache__"
        }


def load(path: Path) -> Generated:
    """Reads a module's ``spec.json``.

    Raises:
        CatalogError: if there is no generated module at ``path``.
    """
    try:
        data = documents.read(path / METADATA)
    except FileNotFoundError:
        raise _NotGenerated(f"{path} is not a generated module") from None
    except DocumentError as error:
        raise CatalogError(f"{path / METADATA} cannot be read: {error}") from error
    if not isinstance(data, dict) or "convgen" not in data:
        raise _NotGenerated(f"{path} is not a generated module")
    try:
        described = documents.record(
            {key: value for key, value in data.items() if key in _DESCRIBED}, _Description, ""
        )
        backends = {
            backend: documents.record(held, _Backend, f"backends.{backend}")
            for backend, held in described.backends.items()
        }
        return Generated(
            path=path,
            spec=ConvSpec.from_dict(described.spec),
            version=described.convgen,
            command=described.command,
            dtypes={backend: held.dtypes for backend, held in backends.items()},
            kernels={
                backend: [dict(asdict(kernel)) for kernel in held.kernels]
                for backend, held in backends.items()
            },
        )
    except (DocumentError, SpecError) as error:
        version = documents.plain(str(data["convgen"]))
        if version != __version__:
            raise CatalogError(
                f"{path} was written by convgen {version}, and this is {__version__}, which cannot "
                f"read its {METADATA} ({error}): generate it anew"
            ) from error
        raise CatalogError(f"{path / METADATA} cannot be read: {error}") from error


def scan(folder: Path, refused: list[str] | None = None) -> list[Generated]:
    """All generated modules directly in a folder, by name; none if the folder is missing.

    Why others cannot be read, which were generated too, is appended to ``refused``.
    """
    modules = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (path / METADATA).is_file():
            try:
                modules.append(load(path))
            except CatalogError as error:
                if refused is not None and not isinstance(error, _NotGenerated):
                    refused.append(str(error))
    return modules


def find(names: Iterable[str], folder: Path, refused: list[str] | None = None) -> list[Generated]:
    """The modules of the given names in a folder, or at the given paths; all of it for no names.

    ``refused`` as for :func:`scan`.

    Raises:
        CatalogError: for a name that is neither, with the names that there are.
    """
    modules = []
    for name in dict.fromkeys(names):
        path = folder / name
        if os.sep in name or not path.is_dir():
            path = Path(name)
        if not path.is_dir():
            there = ", ".join(module.name for module in scan(folder)) or "no modules"
            raise CatalogError(f"no module {documents.shown(name)} in {folder}: it holds {there}")
        modules.append(load(path))
    return modules or scan(folder, refused)


def destination(out: Path, name: str, spec: ConvSpec) -> Path:
    """``out / name``, after checking that the specification's module can be written there.

    Leaves nothing behind.

    Raises:
        CatalogError: saying what stands in the way.
    """
    if refusal := folders.unimportable(name):
        raise CatalogError(f"{refusal}: give another --name")
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise CatalogError(f"cannot write to {out}: {existing} is not a folder")
    try:
        # Asking beforehand does not help root, nor on a file system that is mounted read-only.
        os.rmdir(tempfile.mkdtemp(prefix=".convgen-", dir=existing))
    except OSError as error:
        raise CatalogError(f"cannot write to {out}: {error.strerror} ({existing})") from error
    target = out / name
    if target.is_symlink() or (target.exists() and not (target / METADATA).is_file()):
        raise CatalogError(
            f"{target} exists and is not a generated module: remove it, or give another --name"
        )
    if target.exists() and (held := load(target)).spec != spec:
        raise CatalogError(
            f"{target} is the module of another specification ({held.command}): remove it, or give "
            f"another --name"
        )
    return target


def import_line(module: Generated) -> str:
    """The Python line that imports a module's class from a program started in this folder."""
    root, here = module.path.absolute().parent, Path.cwd()
    if root.is_relative_to(here):
        parts = root.relative_to(here).parts
        importable = all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)
        if importable and not (parts and _hidden(parts[0], here)):
            package = ".".join((*parts, module.name))
            return f"from {package} import {module.class_name}"
    return (
        f"import sys; sys.path.insert(0, {str(root)!r}); "
        f"from {module.name} import {module.class_name}"
    )


def _hidden(name: str, here: Path) -> bool:
    """Whether ``import name`` finds another package than the plain folder ``here / name``.

    A folder without ``__init__.py`` is found last, after every installed package of its name.
    """
    if (here / name / "__init__.py").is_file():
        return False
    found = importlib.machinery.PathFinder.find_spec(name)
    return found is not None and found.origin is not None


def remove(module: Generated) -> None:
    """Deletes a generated module.

    Raises:
        CatalogError: if it holds anything that convgen does not write, or cannot be deleted.
    """
    if module.path.is_symlink():
        raise CatalogError(f"{module.path} is a link: remove it by hand")
    try:
        if kept := written.changes(module.path):
            raise CatalogError(
                f"{module.path} holds what convgen did not write, or what was changed since: "
                f"move {written.listed(kept)} first"
            )
        # spec.json goes last, so that what an interrupted removal leaves is still recognized.
        for path in module.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != METADATA:
                path.unlink()
        shutil.rmtree(module.path)
    except OSError as error:
        raise CatalogError(f"cannot remove {module.path}: {error.strerror}") from error


def phases(spec: ConvSpec) -> dict[str, list[dict[str, Any]]]:
    """The phases of dgrad in each spatial dimension: residue, and ``[tap, offset]`` pairs.

    Output ``o = q * stride + residue`` reads tap ``t`` at ``i = q + offset``.
    """
    g, lead = spec.geometry, 3 - spec.ndim
    return {
        axis: [
            {"residue": phase.residue, "taps": [[tap.index, tap.offset] for tap in phase.taps]}
            for phase in dgrad_phases(g.kernel[d], g.stride[d], g.padding[d], g.dilation[d])
        ]
        for d, axis in enumerate("DHW")
        if d >= lead
    }


def summary(module: Generated) -> dict[str, Any]:
    """What ``convgen list --json`` says about a module."""
    return {
        "name": module.name,
        "path": str(module.path),
        "command": module.command,
        "convgen": module.version,
        "foreign": module.foreign,
        "dtypes": module.dtypes,
        "built": module.built,
        "size_bytes": sum(module.files.values()),
    }


def details(module: Generated) -> dict[str, Any]:
    """What ``convgen show --json`` says about a module."""
    return {
        **summary(module),
        "import": import_line(module),
        "spec": module.spec.to_dict(),
        "phases": phases(module.spec),
        "kernels": module.kernels,
        "files": module.files,
    }
