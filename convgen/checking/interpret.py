"""The interpreter: CUDA sources, unchanged, compiled by the C++ compiler and run on the CPU.

The headers of ``templates/cuda/host`` take the place of ``device.cuh`` and of what nvcc knows by
itself; see ``docs/interpreter.md``. The library has the same C functions as ``lib/cuda.so``, over
pointers of the CPU.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from convgen.building.build import Library, Progress, build
from convgen.building.cache import cache_path
from convgen.building.errors import BuildError
from convgen.building.toolchain import Commands, CppCompiler, find_cpp
from convgen.codegen.render import TEMPLATES

HEADERS = (
    "convgen_host.cuh",
    "half.h",
    "interpreter.h",
    "pipeline.h",
    "sm90.h",
    "tensor_core.h",
    "types.h",
)
"""What a kernel's translation unit sees, of ``templates/cuda/host``."""

_PRELUDE = "src/host/convgen_host.cuh"

# Compiled together, since headers are most of what each of them costs.
_RUNTIME = (
    ("interpreter.cpp", "shared_arrays.cpp", "warps.cpp", "copies.cpp"),
    ("pipeline.cpp", "registers.cpp", "tensor_core.cpp", "tma.cpp", "wgmma.cpp"),
)
_RUNTIME_CHECKED = (
    ("checker.cpp", "asynchronous.cpp", "clocks.cpp", "hooks.cpp", "places.cpp", "ubsan.cpp"),
)
_RUNTIME_HEADERS = (
    "checker.h",
    "clocks.h",
    "fiber.h",
    "half.h",
    "interpreter.h",
    "pipeline.h",
    "places.h",
    "sm90.h",
    "state.h",
    "tensor_core.h",
    "types.h",
)

# As in kernels for the GPU, a * b + c is one rounding: nvcc contracts by default too. (Below -O2,
# g++ contracts only with -fexpensive-optimizations; at -O0 never.)
_COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Words are read as other types than they were written, as nvcc lets one do.
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
)
_UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize=vptr")
# At every access these ask what its own check asks, too: where a pointer leads. They would make up
# half of what is compiled.
_CHECKED_ANYWAY = ("-fno-sanitize=null,object-size,pointer-overflow",)
# A kernel's shared arrays change while another thread of the block runs, that is behind any call:
# no pass may conclude that a call leaves them alone. Unique symbols would be shared between
# libraries.
_GCC = ("-fno-ipa-reference", "-fno-gnu-unique")


@dataclass(frozen=True)
class Mode:
    """How sources are compiled for the interpreter."""

    name: str
    kernel_flags: tuple[str, ...]
    runtime_flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    description: str


MODES = {
    mode.name: mode
    for mode in (
        Mode("plain", ("-O2", "-g1"), ("-O2", "-g1"), (), "fast; finds deadlocks and divergence"),
        Mode("debug", ("-O0", "-g"), ("-O2", "-g"), (), "for gdb: variables, line by line"),
        Mode(
            "checked",
            # ThreadSanitizer's calls and UBSan's, answered by the interpreter itself.
            (
                "-O1",
                "-fexpensive-optimizations",
                "-g1",
                "-fsanitize=thread",
                *_UNDEFINED,
                *_CHECKED_ANYWAY,
                "-fno-sanitize-recover=all",
                "-DCONVGEN_CHECKED",
            ),
            ("-O2", "-g1", "-DCONVGEN_CHECKED"),
            (),
            "every access: bounds, alignment, initialization, races; undefined behaviour",
        ),
        Mode(
            "address",
            (
                "-O1",
                "-fexpensive-optimizations",
                "-g1",
                "-fsanitize=address",
                *_UNDEFINED,
                *_CHECKED_ANYWAY,
                "-fno-sanitize-recover=all",
            ),
            ("-O1", "-g1", "-fsanitize=address", *_UNDEFINED, "-fno-sanitize-recover=all"),
            ("-fsanitize=address,undefined",),
            "AddressSanitizer and UBSan; the library needs a program built with them: see driver()",
        ),
    )
}
"""By name. ``checked`` is what tests and ``convgen verify --interpret`` use."""


ARCHITECTURES: Mapping[str, tuple[str, ...]] = {"80": (), "90a": ("-DCONVGEN_HOST_SM_90A",)}
"""GPUs that have their own branches in the sources, and what tells the interpreter's headers."""


def library(
    name: str,
    sources: Mapping[str, str],
    mode: str = "checked",
    *,
    architecture: str = "80",
    progress: Progress | None = None,
) -> Path:
    """Compiles CUDA sources for the interpreter.

    Args:
        name: names the folder in the cache.
        sources: text of every ``.cu`` file and of the headers beside them, by file name.
        mode: a key of :data:`MODES`.
        architecture: of :data:`ARCHITECTURES`, what the sources are compiled as.
        progress: as for :func:`convgen.building.build.build`.

    Returns:
        The shared library, in the cache; it exports what the sources export, and
        ``convgen_interpret_register`` and ``convgen_interpret_forget`` (see ``state.h``).

    Raises:
        BuildError: with the compiler's message, for a source that uses what the interpreter lacks.
        ToolchainError: if there is no C++ compiler.
    """
    compiler = find_cpp()
    runtime = _runtime(compiler, MODES[mode])
    files = {f"src/{file}": text for file, text in sources.items()}
    files |= {f"src/host/{file}": _text(file) for file in HEADERS}
    units = sorted(path for path in files if path.endswith(".cu"))
    commands = _commands(compiler, MODES[mode], MODES[mode].kernel_flags)
    defines = ARCHITECTURES[architecture]
    commands = Commands(
        # The file's own suffix means CUDA to some compilers.
        compile=(
            *commands.compile,
            *defines,
            "-include",
            _PRELUDE,
            "-x",
            "c++",
        ),
        link=(*commands.link, "-shared", "-pthread"),
        link_libraries=(_LINKED_RUNTIME, "-ldl"),
        identity=f"{commands.identity}\n{runtime.relative_to(cache_path())}",
    )
    target = f"lib/{LIBRARY}"
    unit = Library(target, tuple(units), commands, ((_LINKED_RUNTIME, runtime),))
    return build(name, files, [unit], progress=progress) / target


LIBRARY = "cuda_interpreted.so"
_LINKED_RUNTIME = "obj/interpreter.o"


def package_library(
    package: Path, mode: str = "checked", *, progress: Progress | None = None
) -> Path:
    """:func:`library` of the CUDA sources of a generated package, as they are on disk.

    Raises:
        BuildError: if it has none, or as :func:`library` does.
    """
    folder = package / "src" / "cuda"
    sources = {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".cu", ".cuh", ".h")
    }
    if not any(file.endswith(".cu") for file in sources):
        raise BuildError(
            f"{package} has no CUDA sources: generate it with --backend cuda (no GPU is needed)"
        )
    # The folder may have any name, and this one becomes part of a file for ninja.
    name = re.sub(r"[^A-Za-z0-9_]", "_", package.resolve().name)[:100] or "package"
    return library(name, sources, mode, progress=progress)


def driver() -> Path:
    """A program, built with AddressSanitizer and UBSan, that calls an ``address`` library.

    See ``templates/cuda/host/driver.cpp`` for its arguments and files.
    """
    compiler, mode = find_cpp(), MODES["address"]
    commands = _commands(compiler, mode, mode.runtime_flags)
    commands = Commands(
        compile=commands.compile,
        link=commands.link,
        link_libraries=("-ldl",),
        identity=commands.identity,
    )
    files = {
        "src/driver.cpp": _text("driver.cpp"),
        "src/convgen_abi.h": (TEMPLATES / "common" / "convgen_abi.h").read_text(),
    }
    target = "lib/driver"
    return build("interpreter_driver", files, [Library(target, ("src/driver.cpp",), commands)]) / (
        target
    )


def _runtime(compiler: CppCompiler, mode: Mode) -> Path:
    """The interpreter itself, one object file per mode, which every library links in."""
    sources = _RUNTIME + (_RUNTIME_CHECKED if mode.name == "checked" else ())
    files = {f"src/{file}": _text(file) for file in (*chain(*sources), *_RUNTIME_HEADERS)}
    units = [f"src/with_{together[0]}" for together in sources]
    for unit, together in zip(units, sources, strict=True):
        files[unit] = "".join(f'#include "{file}"\n' for file in together)
    commands = _commands(compiler, mode, mode.runtime_flags)
    commands = Commands(
        compile=commands.compile,
        link=(*compiler.command, "-r", "-nostdlib"),
        link_libraries=(),
        identity=commands.identity,
    )
    target = "lib/interpreter.o"
    library = Library(target, tuple(units), commands)
    return build(f"interpreter_{mode.name}", files, [library]) / target


def _commands(compiler: CppCompiler, mode: Mode, flags: tuple[str, ...]) -> Commands:
    known = compiler.commands()
    native = (
        "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    )
    gcc = () if "clang" in compiler.version.lower() else _GCC
    return Commands(
        compile=(*compiler.command, *_COMMON, native, *gcc, *flags),
        link=(*compiler.command, *mode.link_flags),
        link_libraries=(),
        identity=known.identity,
    )


def _text(file: str) -> str:
    return (TEMPLATES / "cuda" / "host" / file).read_text()
