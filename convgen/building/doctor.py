"""What this machine has to compile and run kernels with, and what to install for what is missing.

Looks, and changes nothing; imports no torch.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata

from convgen import __version__
from convgen.building import cache, cleaning, gpus, toolchain
from convgen.building.errors import BuildError
from convgen.building.toolchain import ToolchainError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    what: str
    found: str
    """What was found; empty if nothing was."""
    advice: str = ""
    """What to do about it; empty where all is well."""
    needed: bool = False
    """Whether nothing works without it."""

    @property
    def ok(self) -> bool:
        return not self.advice


def examine() -> list[Finding]:
    """Everything that convgen depends on, in the order in which a user would set it up."""
    architectures = gpus.gpu_architectures()
    return [
        Finding("convgen", __version__),
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
        _torch(bool(architectures)),
        _ninja(),
        _cpp(),
        _cuda(),
        _gpu(architectures),
        _cache(),
    ]


def _torch(gpu: bool) -> Finding:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Finding("PyTorch", "", "pip install torch", needed=True)
    if gpu and version.endswith("+cpu"):
        return Finding("PyTorch", version, "a GPU is present: install a CUDA build of torch")
    return Finding("PyTorch", version)


def _ninja() -> Finding:
    try:
        return Finding("ninja", toolchain.find_ninja())
    except ToolchainError as error:
        return Finding("ninja", "", str(error), needed=True)


def _cpp() -> Finding:
    try:
        compiler = toolchain.find_cpp()
    except ToolchainError as error:
        return Finding("C++ compiler", "", str(error), needed=True)
    return Finding("C++ compiler", f"{compiler.version.splitlines()[0]} ({compiler.path})")


def _cuda() -> Finding:
    try:
        compiler = toolchain.find_cuda()
    except ToolchainError as error:
        return Finding("CUDA compiler", "", str(error))
    release = ".".join(map(str, compiler.release))
    return Finding("CUDA compiler", f"nvcc {release} ({compiler.path})")


def _gpu(architectures: tuple[str, ...]) -> Finding:
    found = ", ".join(f"sm_{name}" for name in architectures)
    return Finding("GPU", found or "none; the cpu backend serves, cuda modules compile")


def _cache() -> Finding:
    try:
        path = cache.trusted_path()
        packages = cache.cached_packages()
        limit = cleaning.limit_bytes()
    except BuildError as error:
        return Finding("Cache", "", str(error), needed=True)
    size_mib = sum(package.size_bytes for package in packages) / 2**20
    count = f"{len(packages)} package{'s' * (len(packages) != 1)}"
    most = "" if limit is None else f" of {limit / 2**20:,.0f}"
    notes = ", read-only" if path.exists() and not os.access(path, os.W_OK) else ""
    return Finding("Cache", f"{path} ({count}, {size_mib:.1f}{most} MiB{notes})")
