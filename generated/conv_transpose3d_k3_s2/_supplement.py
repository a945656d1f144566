"""Kernels that the package lacks, for autocast or another device: built when first asked for.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

convgen builds them, if this version of it is installed, as a package of its own in the cache. The
calls that need them are the other package's from there on. Elsewhere, and where
CONVGEN_NO_BUILD=1 forbids to compile, an error says which call makes a package that has them.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch

from ._library import COMMAND, FOLDERS, INTERPRETED
from ._runtime import BACKENDS, NAME

VERSION = "0.1.0"

CALL = "convgen.specialize('conv_transpose3d', kernel_size=3, stride=2"
"""The call of convgen that makes this package, but for its dtypes and backends."""

DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
"""All that kernels can be generated for."""

_others: dict[tuple[str, torch.dtype], Any] = {}
"""Where the kernels for a device type and dtype are, once asked for; None for this package."""


def check_generated(device: torch.device, dtype: torch.dtype) -> None:
    """Raises RuntimeError where there are no kernels for a device and dtype, nor will be any."""
    if dtype in BACKENDS.get(device.type, ()):
        return
    # Of a GPU that is not here, a tracer asks for shapes alone.
    if device.type != "cuda" or dtype not in DTYPES or torch.cuda.is_available():
        kernels_elsewhere(device, dtype)


def kernels_elsewhere(device: torch.device, dtype: torch.dtype) -> Any:
    """The module `_kernels` with what this package lacks, built if need be; None if it has all.

    Raises:
        RuntimeError: where convgen cannot build it, with what to call.
    """
    wanted = device.type, dtype
    if wanted not in _others:
        _others[wanted] = None if _is_here(*wanted) else _build(*wanted)
    return _others[wanted]


def _is_here(backend: str, dtype: torch.dtype) -> bool:
    if dtype not in BACKENDS.get(backend, ()):
        return False
    return INTERPRETED or any((folder / f"lib/{backend}.so").exists() for folder in FOLDERS)


def _build(backend: str, dtype: torch.dtype) -> Any:
    if dtype not in DTYPES or backend not in ("cpu", "cuda"):
        raise RuntimeError(_impossible(backend, dtype))
    cause: Exception | None = None
    if INTERPRETED:
        why = "CONVGEN_INTERPRET runs the CUDA kernels that are there"
    elif os.environ.get("CONVGEN_NO_BUILD", "0") not in ("", "0"):
        why = "CONVGEN_NO_BUILD forbids to compile them now"
    else:
        try:
            version = import_module("convgen").__version__
            if version == VERSION:
                specialize: Any = import_module("convgen.specialize")
                other = specialize.supplement(FOLDERS[0], backend, DTYPES[dtype])
                return import_module(f"{other.__name__}._kernels")
            why = f"convgen {version}, which is installed, is not the {VERSION} that wrote this"
        except ImportError as error:
            why, cause = "convgen, which would compile them now, is not installed", error
        except (RuntimeError, ValueError, OSError) as error:
            why, cause = f"convgen could not compile them now: {error}", error
    raise RuntimeError(_advice(backend, dtype, why)) from cause


def _impossible(backend: str, dtype: torch.dtype) -> str:
    if dtype in DTYPES:
        return f"{NAME} has no kernels for {backend}: convgen generates them for cpu and cuda"
    if dtype.is_complex:
        what = "convolve real and imaginary parts by themselves and add up"
    else:
        what = "convert the tensors to one of these, for example by .float()"
    return (
        f"{NAME} has no kernels for {dtype}, and none can be generated: there are kernels for "
        f"{', '.join(map(str, DTYPES))} alone; {what}"
    )


def _advice(backend: str, dtype: torch.dtype, why: str) -> str:
    """What is lacking, and the calls that make a package which has it and all of this one."""
    names = {DTYPES[dtype], *(name for kinds in BACKENDS.values() for name in kinds.values())}
    dtypes = [name for name in DTYPES.values() if name in names]
    backends = [name for name in ("cpu", "cuda") if name in {backend, *BACKENDS}]
    options = f"--dtype {','.join(dtypes)}"
    if backend not in BACKENDS:
        has = f"is generated for {' and '.join(BACKENDS)}, not for {backend}"
    elif dtype in BACKENDS[backend]:
        has = f"was not compiled for {backend} here"
    else:
        has = f"has {backend} kernels for {', '.join(map(str, BACKENDS[backend]))}, not for {dtype}"
    if backends != ["cpu"]:
        options += " --backend " + ("auto" if len(backends) > 1 else backends[0])
    return (
        f"{NAME} {has}: run `{COMMAND} {options}`, "
        f"or call `{CALL}, dtypes={dtypes}, backends={backends})` ({why})"
    )
