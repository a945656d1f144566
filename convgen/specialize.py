"""The pipeline: specification -> sources -> libraries -> package in the cache -> module.

Torch is imported only with the module itself, so that ``convgen generate`` answers at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from convgen.building import cache, gpus, requests, toolchain
from convgen.building.build import BuildWarning, Library, Progress, build
from convgen.building.errors import BuildError
from convgen.building.folders import describe
from convgen.building.folders import export as export
from convgen.building.folders import load as load
from convgen.building.processor import processor_name
from convgen.building.toolchain import Commands
from convgen.engines import tuned
from convgen.engines.backends import BACKENDS, SOURCE_SUFFIX
from convgen.engines.registry import AnyPlan
from convgen.spec import ConvSpec, SpecError
from convgen.spec.dtypes import DTYPES, parse_dtype

DEFAULT_DTYPES = {"cpu": ("f32", "f64"), "cuda": ("f32",)}

_modules: dict[tuple[object, ...], ModuleType] = {}
"""What :func:`specialize` returned in this process, by its arguments."""


def specialize(
    op: str = "conv_transpose3d",
    *,
    kernel_size: int | Iterable[int],
    stride: int | Iterable[int] = 1,
    padding: int | Iterable[int] | str = 0,
    output_padding: int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
    in_channels: int | None = None,
    out_channels: int | None = None,
    activation: str | None = None,
    residual: bool = False,
    dtypes: Iterable[object] | None = None,
    backends: str | Iterable[str] | None = None,
    archs: Iterable[str] | None = None,
) -> ModuleType:
    """A module with the kernels of one layer, generated and compiled unless the cache has it.

    The module has the function and the class under torch's names, for example
    ``conv_transpose3d(input, weight, bias=None)`` and ``ConvTranspose3d(in_channels,
    out_channels)`` with torch's further arguments, which serve any batch, extents and (unless given
    here) channels. The same arguments give the same module object.

    Args:
        op: one of the six operators of ``torch.nn.functional``.
        kernel_size, stride, padding, output_padding, dilation: an int, or one per dimension;
            for convolutions also ``padding="same"`` or ``"valid"``.
        groups: divides the channels.
        in_channels, out_channels: fixed if given; kernels get faster and serve no others.
        activation: what follows in the same kernel, ``"relu"`` or ``"leaky_relu:0.01"`` for
            example; :data:`convgen.spec.activation.ACTIVATIONS` has all of them.
        residual: whether function and layer take a ``residual`` of the output's shape, which is
            added before the activation.
        dtypes: ``"f32"``, ``"f64"``, ``"f16"``, ``"bf16"`` or torch's dtypes; by default f32 and
            f64 on the CPU, f32 on CUDA.
        backends: ``"cpu"``, ``"cuda"`` or both; by default cpu, and cuda where a GPU is present.
        archs: GPU architectures such as ``"90a"`` or ``"80+ptx"``; by default the GPUs present.

    Raises:
        SpecError: for arguments that torch would refuse too, or an unknown dtype or backend.
        ToolchainError: if a compiler is missing; says what to install.
        BuildError: if a compiler fails or the cache cannot be used.
    """
    spec = ConvSpec.make(
        op,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        in_channels=in_channels,
        out_channels=out_channels,
        activation=activation,
        residual=residual,
    )
    chosen_dtypes = None if dtypes is None else _dtypes(dtypes)
    chosen_archs = None if archs is None else tuple(archs)
    wanted = "auto" if backends in (None, "auto") else _backends(backends, chosen_archs)
    arguments = (spec, chosen_dtypes, wanted, chosen_archs)
    if module := _modules.get(arguments):
        return module
    package = generate(spec, dtypes=chosen_dtypes, backends=wanted, archs=chosen_archs)
    name = requests.module_name(
        spec.name, request_of(spec, dtypes=chosen_dtypes, backends=wanted, archs=chosen_archs)
    )
    return _modules.setdefault(arguments, load(package, name))


def request_of(spec: ConvSpec, **options: object) -> dict[str, Any]:
    """What :func:`generate` was asked for, ready for JSON: what differs from its defaults."""
    plain = ConvSpec.make(spec.op, kernel_size=spec.kernel_size).to_dict()
    layer = {key: value for key, value in spec.to_dict().items() if value != plain.get(key)}
    given = {key: value for key, value in options.items() if value not in (None, "auto")}
    return {"op": spec.op, "kernel_size": list(spec.kernel_size)} | layer | given


def generate_request(request: Mapping[str, Any]) -> Path:
    """The package of a request that a module's name holds, as :func:`generate` returns it."""
    options = {key: request[key] for key in ("dtypes", "backends", "archs") if key in request}
    layer = {key: value for key, value in request.items() if key not in options}
    return generate(ConvSpec.from_dict(layer), **options)


def generate(
    spec: ConvSpec,
    *,
    dtypes: Iterable[object] | None = None,
    backends: str | Iterable[str] | None = None,
    archs: Iterable[str] | None = None,
    progress: Progress | None = None,
    jobs: int | None = None,
) -> Path:
    """The package folder of a specification in the cache, compiled unless it is there.

    The folder belongs to the cache: :func:`export` copies it elsewhere, :func:`load` imports it.
    By default it holds the sources of both backends, so that they are the same on every machine,
    and the libraries that serve this one.

    Args:
        spec: the layer.
        dtypes, backends, archs: as for :func:`specialize`.
        progress: ``progress(done, total, what)``, called while compiling and, of long kernels,
            while rendering (``total`` is 0 then).
        jobs: compilers that run side by side; by default ``CONVGEN_JOBS``, or one for each
            processor.

    Raises:
        SpecError, ToolchainError, BuildError: as :func:`specialize` does.
        TunedError: if a table of tuned schedules cannot be read.
    """
    archs = None if archs is None else tuple(archs)
    auto = backends in (None, "auto")
    chosen = _backends(backends, archs)
    given = None if dtypes is None else _dtypes(dtypes)
    commands = {backend: compile_commands(backend, archs) for backend in chosen}
    schedules = {
        backend: tuned.schedules(
            spec,
            backend,
            given or DEFAULT_DTYPES[backend],
            commands[backend][1],
            processor_name() if backend == "cpu" else "",
        )
        for backend in chosen
    }

    def on_unit(path: str) -> None:
        if progress:
            progress(0, 0, f"render {path}")

    files = render(spec, BACKENDS if auto else chosen, given, schedules, on_unit)
    libraries = [_library(backend, files, commands[backend][0]) for backend in chosen]
    return build(spec.name, files, libraries, progress=progress, jobs=jobs)


def supplement(package: Path, backend: str, dtype: str) -> ModuleType:
    """A module with the kernels that a package lacks for a backend and dtype, of its specification.

    For generated packages, which call it when they are first asked for such kernels. It warns
    before it compiles, since that takes seconds.

    Raises:
        SpecError, ToolchainError, BuildError, TunedError: as :func:`generate` does.
    """
    described = describe(package)
    if described is None:
        raise BuildError(f"{package} has no spec.json of convgen's, which says what to compile")
    spec = ConvSpec.from_dict(described["spec"])
    warned = False

    def warn(done: int, total: int, what: str) -> None:
        nonlocal warned
        if total and not warned:  # 0 while it renders
            warnings.warn(
                f"{package.name} lacks {dtype} kernels for {backend}, and is asked for them: "
                "compiling them for the cache, once for this machine",
                BuildWarning,
                stacklevel=2,
            )
            warned = True

    return load(generate(spec, dtypes=(dtype,), backends=(backend,), progress=warn))


def render(
    spec: ConvSpec,
    backends: Iterable[str] = BACKENDS,
    dtypes: Iterable[object] | None = None,
    schedules: Mapping[str, Mapping[tuple[str, str], Any]] | None = None,
    on_unit: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Text of every file of a package but ``build.ninja``, which depends on the machine.

    A function of its arguments and of convgen's version; ``dtypes`` of None are
    :data:`DEFAULT_DTYPES`. ``schedules`` are other than the families' defaults, by backend, then by
    contraction and dtype or math mode. ``on_unit`` as for
    :func:`convgen.codegen.render.render_kernels`.
    """
    # Imported here because of jinja2: neither `convgen --help` nor a module found again needs it.
    from convgen.codegen.package import render_package
    from convgen.codegen.render import CompiledTemplates, environment, render_kernels

    environment().bytecode_cache = CompiledTemplates(
        partial(cache.recall, "templates"), partial(cache.note, "templates")
    )
    chosen = None if dtypes is None else _dtypes(dtypes)
    files: dict[str, str] = {}
    plans: dict[str, list[AnyPlan]] = {}
    for backend in backends:
        sources, plans[backend] = render_kernels(
            spec,
            backend,
            chosen or DEFAULT_DTYPES[backend],
            (schedules or {}).get(backend),
            on_unit,
        )
        files |= sources
    return files | render_package(spec, plans, files)


def compile_commands(backend: str, archs: Sequence[str] | None) -> tuple[Commands, tuple[str, ...]]:
    """The commands that compile a backend, and the GPU architectures that they compile for."""
    if backend == "cpu":
        return toolchain.find_cpp().commands(), ()
    nvcc = toolchain.find_cuda()
    chosen = (
        toolchain.default_architectures(nvcc) if archs is None else nvcc.check_architectures(archs)
    )
    return nvcc.commands(chosen), tuple(chosen)


def _library(backend: str, files: Iterable[str], commands: Commands) -> Library:
    """The library of a backend: its translation units, and the commands that compile them."""
    suffix = SOURCE_SUFFIX[backend]
    sources = sorted(
        path for path in files if path.startswith(f"src/{backend}/") and path.endswith(suffix)
    )
    return Library(f"lib/{backend}.so", tuple(sources), commands)


def _backends(backends: str | Iterable[str] | None, archs: Sequence[str] | None) -> tuple[str, ...]:
    """The backends to generate, in canonical order."""
    if backends is None or backends == "auto":
        # Whoever names a GPU architecture wants kernels for it, with a GPU here or without.
        gpu = archs is not None or bool(gpus.gpu_architectures())
        return ("cpu", "cuda") if gpu else ("cpu",)
    given = {backends} if isinstance(backends, str) else set(backends)
    if not given or not given <= set(BACKENDS):
        raise SpecError(
            f"backends={backends!r}: give one or more of {', '.join(BACKENDS)}, or 'auto'"
        )
    if archs is not None and "cuda" not in given:
        raise SpecError(f"archs={list(archs)} needs the cuda backend")
    return tuple(backend for backend in BACKENDS if backend in given)


def _dtypes(dtypes: Iterable[object]) -> tuple[str, ...]:
    """Canonical names in canonical order, none twice; raises SpecError for an unknown dtype."""
    given = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    if not given:
        raise SpecError("dtypes is empty: give at least one, or None for the defaults")
    try:
        # str(torch.float32) is "torch.float32".
        names = {parse_dtype(str(dtype).removeprefix("torch.")) for dtype in given}
    except ValueError as error:
        raise SpecError(str(error)) from error
    return tuple(name for name in DTYPES if name in names)
