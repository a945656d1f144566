"""Finds what compiles: the C++ compiler, nvcc, ninja, and the architectures of the GPUs present.

Knows command lines, no convolution; imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from convgen.building import cache, disk, gpus, processes

# -ffast-math is not here: it would break NaN and infinity, and link crtfastmath.o, which turns off
# denormals for the whole process. These two lift only what no kernel looks at, errno and traps.
CPP_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
"""``-march=native`` becomes ``-mcpu=native`` where the compiler spells it so.

libgomp is linked dynamically: the loader serves a library with torch's, which is loaded first and
globally, so that both share one pool of threads.
"""

# No -use_fast_math: its approximate division and flushed denormals are not fp32. ptxas reports
# resources (-v) so that spilled registers do not go unnoticed.
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")

OLDEST_NVCC = (12, 0)
"""The first release with C++17 and sm_90a."""

DEFAULT_ARCHITECTURES = ("80+ptx",)
"""Where no GPU is present: machine code of sm_80 and its PTX, which the driver compiles for newer
GPUs."""

INSTALL_CPP = "install one, for example: apt install g++ (or set CXX)"
INSTALL_CUDA = (
    'install it into this environment: pip install "cuda-toolkit[nvcc,cccl]==13.0.*" '
    "(or install the CUDA toolkit and set CUDA_HOME)"
)

# Where tools are looked for behind PATH, and the toolkit behind CUDA_HOME.
_STANDARD_FOLDERS = ("/usr/local/bin", "/usr/bin", "/bin")
_STANDARD_NVCC = "/usr/local/cuda/bin/nvcc"

# Variables that change what a compiler does without appearing on its command line.
_COMPILER_VARIABLES = (
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "LIBRARY_PATH",
    "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
)


class ToolchainError(RuntimeError):
    """A compiler, or a feature of one, is missing; the message says what to install."""


@dataclass(frozen=True)
class Commands:
    """How to compile sources to objects and objects to a shared library.

    Inputs and outputs are appended (``... -c SOURCE -o OBJECT``, ``... OBJECTS LINK_LIBRARIES -o
    LIBRARY``). ``identity`` is what decides the result and stands in no argument: the compilers'
    versions, what ``native`` means here, the environment. A compiler that ``needs_plain_folder``
    has a shell read the path of the folder that it runs in.
    """

    compile: tuple[str, ...]
    link: tuple[str, ...]
    link_libraries: tuple[str, ...]
    identity: str
    needs_plain_folder: bool = False


@dataclass(frozen=True)
class CppCompiler:
    """A C++17 compiler with OpenMP."""

    command: tuple[str, ...]
    """The absolute path of the compiler, after a launcher such as ccache if CXX has one."""
    version: str
    """All that ``--version`` prints."""
    flags: tuple[str, ...]
    target: str
    """Digest of the macros that the flags predefine: the instruction sets that native means."""

    @property
    def path(self) -> str:
        return next(word for word in reversed(self.command) if not word.startswith("-"))

    def commands(self) -> Commands:
        return Commands(
            compile=(*self.command, *self.flags),
            link=(*self.command, "-shared", "-fopenmp"),
            link_libraries=(),
            identity=f"{self.version}\n{self.target}\n{_environment()}",
        )


@dataclass(frozen=True)
class CudaCompiler:
    """nvcc, and the host compiler that it calls."""

    path: str
    version: str
    """All that ``--version`` prints."""
    release: tuple[int, int]
    host: str
    """Absolute path of the C++ compiler for host code."""
    host_version: str
    library_folder: str | None
    """Where the CUDA runtime lies if nvcc does not know it itself (pip wheels)."""

    def supported_architectures(self) -> tuple[int, ...]:
        """The architectures that this nvcc compiles for, such as ``(75, 80, 90)``."""
        return _nvcc_architectures(self.path)

    def check_architectures(self, names: Iterable[str]) -> tuple[str, ...]:
        """Canonical architectures (see :func:`parse_architecture`), in order, none twice.

        Raises:
            ToolchainError: naming what this nvcc supports where it lacks one.
        """
        canonical = tuple(dict.fromkeys(parse_architecture(name) for name in names))
        supported = self.supported_architectures()
        for name in canonical:
            if _number(name) not in supported:
                raise ToolchainError(
                    f"nvcc {'.'.join(map(str, self.release))} ({self.path}) cannot compile for "
                    f"architecture {name}: it supports {', '.join(map(str, supported))}"
                )
        return canonical

    def commands(self, architectures: Iterable[str]) -> Commands:
        """Commands for some architectures, as :meth:`check_architectures` returns them."""
        nvcc = (self.path, "-ccbin", self.host)
        targets: list[str] = []
        for name in architectures:
            number = name.removesuffix("+ptx")
            targets += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if name != number:
                targets += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        folder = () if self.library_folder is None else (f"-L{self.library_folder}",)
        return Commands(
            compile=(*nvcc, *CUDA_FLAGS, *targets),
            # The runtime is linked in, and its symbols are not exported: any torch may be loaded.
            link=(*nvcc, "-shared", "-cudart", "static"),
            link_libraries=(*folder, "-Xlinker", "--exclude-libs=ALL"),
            identity=f"{self.version}\n{self.host_version}\n{_environment()}",
            needs_plain_folder=True,
        )


def find_cpp() -> CppCompiler:
    """The C++ compiler: ``CXX`` if set, else the first of c++, g++ and clang++ that serves.

    Raises:
        ToolchainError: where none has C++17 and OpenMP; says what each lacks and what to install.
    """
    if given := os.environ.get("CXX", "").strip():
        try:
            return _cpp(tuple(shlex.split(given)))
        except (ToolchainError, ValueError) as error:
            raise ToolchainError(f"CXX={given!r} does not serve: {error}") from error
    refused = []
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name, path=_search_path()):
            try:
                return _cpp((name,))
            except ToolchainError as error:
                refused.append(str(error))
    if refused:
        raise ToolchainError(f"no C++ compiler serves ({'; '.join(refused)}): {INSTALL_CPP}")
    raise ToolchainError(f"no C++ compiler was found (c++, g++ or clang++): {INSTALL_CPP}")


def find_cuda() -> CudaCompiler:
    """nvcc: of CUDA_HOME or CUDA_PATH, on PATH, in /usr/local/cuda, or of the pip wheels.

    The first that works with the C++ compiler (``CUDAHOSTCXX`` or ``NVCC_CCBIN`` if set, else
    :func:`find_cpp`'s). One that is newer than the driver present serves only if no other does.

    Raises:
        ToolchainError: where none works; says why and what to install.
    """
    host, host_version = _cuda_host()
    driver = gpus.nvml().cuda_version
    refused, newer = [], []
    for path, library_folder in _nvcc_candidates():
        try:
            compiler = _cuda(path, library_folder, host, host_version)
        except ToolchainError as error:
            refused.append(str(error))
            continue
        if driver is None or compiler.release[0] <= driver[0]:
            return compiler
        newer.append(compiler)
    if newer:
        return newer[0]
    if refused:
        raise ToolchainError(f"no nvcc works ({'; '.join(refused)}): {INSTALL_CUDA}")
    raise ToolchainError(f"no nvcc was found: {INSTALL_CUDA}")


def find_ninja() -> str:
    """Path of ninja: the pip package's, else the one on PATH.

    Raises:
        ToolchainError: where there is none.
    """
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if os.access(path, os.X_OK):
            return str(path)
    if found := shutil.which("ninja", path=_search_path()):
        return os.path.abspath(found)
    raise ToolchainError("ninja was not found: pip install ninja")


def parse_architecture(name: str) -> str:
    """The canonical form of a GPU architecture: ``90a``, ``80`` or, with PTX too, ``80+ptx``.

    Accepts ``90a``, ``sm_90a``, ``compute_80``'s number as ``8.0``, each with or without ``+ptx``.

    Raises:
        ToolchainError: with the accepted forms.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{2,3}|\d{1,2}\.\d)([af]?)(\+ptx)?", name.strip().lower())
    if match is None:
        raise ToolchainError(
            f"architecture {name!r} is not known: give compute capabilities such as "
            f"80, 90a, sm_120 or 80+ptx"
        )
    number, suffix, ptx = match[1].replace(".", ""), match[2], match[3] or ""
    if int(number) < 75:
        raise ToolchainError(f"architecture {name!r} is too old: 75 (Turing) is the oldest")
    if (suffix == "a" and int(number) < 90) or (suffix == "f" and int(number) < 100):
        raise ToolchainError(f"architecture {name!r} does not exist: give {number}")
    return f"{number}{suffix}{ptx}"


def default_architectures(compiler: CudaCompiler) -> tuple[str, ...]:
    """What to compile for: the GPUs present, else :data:`DEFAULT_ARCHITECTURES`.

    A GPU newer than nvcc gets PTX of the newest architecture that nvcc knows.
    """
    present = gpus.gpu_architectures()
    if not present:
        return DEFAULT_ARCHITECTURES
    supported = compiler.supported_architectures()
    known = [name for name in present if _number(name) in supported]
    if len(known) < len(present):
        known.append(f"{max(supported)}+ptx")
    return compiler.check_architectures(known)


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says about one kernel on one architecture."""

    kernel: str
    """Its C++ name without parameters; mangled where binutils' c++filt is missing."""
    architecture: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int

    @property
    def spills(self) -> bool:
        """Whether the kernel uses local memory, which lies in slow device memory."""
        return bool(self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes)


def ptxas_resources(log: str) -> list[KernelResources]:
    """The kernels that a log of ``nvcc -Xptxas -v`` reports on, in its order."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
        r"(?:(?!Compiling entry function).)*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    found = list(pattern.finditer(log))
    return [
        KernelResources(
            kernel=kernel,
            architecture=match["arch"],
            registers=int(match["registers"]),
            stack_bytes=int(match["stack"]),
            spill_store_bytes=int(match["stores"]),
            spill_load_bytes=int(match["loads"]),
        )
        for match, kernel in zip(found, _readable(m["kernel"] for m in found), strict=True)
    ]


def build_environment() -> dict[str, str]:
    """The environment that compilers run in: the caller's, messages in English, a usable PATH."""
    return {**os.environ, "LC_ALL": "C", "PATH": _search_path()}


def _search_path() -> str:
    """PATH, and behind it the standard folders: compilers look for ``as`` and ``ld`` there."""
    folders = (*os.environ.get("PATH", "").split(os.pathsep), *_STANDARD_FOLDERS)
    return os.pathsep.join(dict.fromkeys(folder for folder in folders if folder))


def _environment() -> str:
    return "".join(f"{v}={os.environ[v]}\n" for v in _COMPILER_VARIABLES if v in os.environ)


def _run(*command: str, stdin: str = "") -> str:
    """What a command prints; raises ToolchainError with the end of its messages if it fails."""
    return _output(command, stdin, tuple(sorted(build_environment().items())))


@functools.lru_cache(maxsize=64)
def _output(command: tuple[str, ...], stdin: str, environment: tuple[tuple[str, str], ...]) -> str:
    try:
        result = processes.output(command, stdin, dict(environment), timeout_s=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{command[0]} does not run: {error}") from error
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        telling = [line for line in said if "error" in line] or said[-1:] or ["it says nothing"]
        raise ToolchainError(f"{command[0]} failed: {telling[0].strip()}")
    return result.stdout


def _cpp(command: tuple[str, ...]) -> CppCompiler:
    resolved = shutil.which(command[0], path=_search_path()) if command else None
    if resolved is None:
        raise ToolchainError(f"{command[0] if command else 'it'} was not found")
    words = [os.path.abspath(resolved), *command[1:]]
    for index, word in enumerate(words[1:], 1):
        # "ccache g++": the compiler proper becomes a path too, for nvcc.
        if not word.startswith("-") and (found := shutil.which(word, path=_search_path())):
            words[index] = os.path.abspath(found)
    version = _run(*words, "--version")
    flags: tuple[str, ...] = CPP_FLAGS
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        flags = tuple("-mcpu=native" if flag == "-march=native" else flag for flag in flags)
    # One preprocessor run answers three questions: whether the flags are known, whether OpenMP's
    # header is there, and which instruction sets "native" stands for.
    macros = _run(*words, *flags, "-include", "omp.h", "-dM", "-E", "-x", "c++", "-")
    if "#define _OPENMP " not in macros:
        raise ToolchainError(f"{words[-1]} has no OpenMP")
    target = hashlib.sha256("\n".join(sorted(macros.splitlines())).encode()).hexdigest()
    return CppCompiler(tuple(words), version, flags, target)


def _cuda_host() -> tuple[str, str]:
    """Path and version of the host compiler for nvcc."""
    for variable in ("CUDAHOSTCXX", "NVCC_CCBIN"):
        if given := os.environ.get(variable, "").strip():
            path = shutil.which(given, path=_search_path())
            if path is None:
                raise ToolchainError(f"{variable}={given!r} was not found")
            return os.path.abspath(path), _run(os.path.abspath(path), "--version")
    compiler = find_cpp()
    return compiler.path, compiler.version


def _nvcc_candidates() -> Iterable[tuple[str, str | None]]:
    """Paths of nvcc, best first, each with the folder of the runtime library if it needs one."""
    places = [
        os.path.join(os.environ[variable], "bin", "nvcc")
        for variable in ("CUDA_HOME", "CUDA_PATH")
        if os.environ.get(variable)
    ]
    places.append(shutil.which("nvcc", path=_search_path()) or "")
    places.append(_STANDARD_NVCC)
    candidates: list[tuple[str, str | None]] = [(place, None) for place in places]
    candidates += [(str(root / "bin" / "nvcc"), str(root / "lib")) for root in _wheel_roots()]
    seen = set()
    for place, library_folder in candidates:
        path = os.path.abspath(place) if place else ""
        if path and path not in seen and os.access(path, os.X_OK):
            seen.add(path)
            # CUDA_HOME, or an activated environment's PATH, may point into the wheels.
            inside = Path(path).parent.parent / "lib"
            wheel = library_folder is None and (inside / "libcudart_static.a").exists()
            yield path, str(inside) if wheel else library_folder


def _wheel_roots() -> list[Path]:
    """The ``nvidia/cu<major>`` folders of the pip wheels, the newest first."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    roots = [root for folder in folders for root in Path(folder).glob("cu[0-9]*")]
    return sorted(roots, key=lambda root: int(re.sub(r"\D", "", root.name)), reverse=True)


def _cuda(path: str, library_folder: str | None, host: str, host_version: str) -> CudaCompiler:
    for what, place in (("nvcc", path), ("the C++ compiler that it calls", host)):
        if not disk.is_plain(place):
            raise ToolchainError(
                f"nvcc hands paths to a shell, which would execute what stands in that of {what}, "
                f"{place!r}: make a link to it under a path without quotes, $, `, \\ and line "
                f"breaks, and set CUDA_HOME (or CUDAHOSTCXX) to that"
            )
    version = _run(path, "--version")
    match = re.search(r"release (\d+)\.(\d+)", version)
    if match is None:
        raise ToolchainError(f"{path} --version names no release")
    release = int(match[1]), int(match[2])
    if release < OLDEST_NVCC:
        raise ToolchainError(
            f"{path} is release {match[1]}.{match[2]}, "
            f"and {'.'.join(map(str, OLDEST_NVCC))} is the oldest that serves"
        )
    # That the headers are there and accept the host compiler takes a preprocessor run of 100 ms,
    # so it is remembered.
    facts = "\n".join((path, version, host, host_version, _environment()))
    digest = hashlib.sha256(facts.encode()).hexdigest()
    if not cache.noted("toolchain", digest):
        _run(path, "-ccbin", host, "-std=c++17", "-E", "-x", "cu", "-", stdin="int main;\n")
        cache.note("toolchain", digest)
    return CudaCompiler(path, version, release, host, host_version, library_folder)


@functools.lru_cache(maxsize=8)
def _nvcc_architectures(path: str) -> tuple[int, ...]:
    listed = _run(path, "--list-gpu-arch")
    return tuple(sorted({int(number) for number in re.findall(r"compute_(\d+)", listed)}))


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def _readable(mangled: Iterable[str]) -> list[str]:
    """C++ names without parameters; as they are where there is no c++filt."""
    names = list(mangled)
    try:
        # From -p on, parameters and return types are left out.
        readable = _run("c++filt", "-p", stdin="\n".join(names)).split("\n") if names else []
    except ToolchainError:
        return names
    return readable if len(readable) == len(names) else names
