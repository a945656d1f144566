"""``convgen.export`` and ``convgen.export_model``: layers and models as one Python file each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from convgen.building import disk, gpus, toolchain
from convgen.building.folders import describe
from convgen.building.processor import processor_name
from convgen.codegen.one_file import (
    PRECISIONS,
    Compilers,
    Contents,
    Problem,
    render_one_file,
    written_digests,
)
from convgen.codegen.render import command_line
from convgen.engines import tuned
from convgen.engines.backends import BACKENDS
from convgen.exporting import problems
from convgen.exporting.errors import ExportError
from convgen.spec import ConvSpec, SpecError, documents
from convgen.spec.dtypes import DTYPES, parse_dtype

DEFAULT_DTYPES = ("f32",)

_COMPILERS = Compilers(
    toolchain.CPP_FLAGS,
    # Without the report of ptxas, which nobody reads there.
    tuple(flag for flag in toolchain.CUDA_FLAGS if flag not in ("-Xptxas", "-v")),
    toolchain.OLDEST_NVCC,
)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    layers: tuple[ConvSpec, ...]
    left: tuple[str, ...] = ()
    """What of a model torch still computes, one line each, with the reason."""


def export(
    module_or_spec: ModuleType | ConvSpec | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtypes: Iterable[object] | None = None,
    backends: str | Iterable[str] | None = None,
    backward: bool = True,
    precision: str = "torch",
    archs: Iterable[str] | None = None,
    force: bool = False,
) -> Exported:
    """Writes one layer as a Python file that needs torch and a compiler alone.

    The file has the function and the class under torch's names, as a package has. It compiles its
    kernels when they are first called, for the GPU or CPU that it then runs on.

    Args:
        module_or_spec: a module that was generated, its folder, or a specification.
        out: the file; one that convgen did not write, or that was changed since, is not replaced.
        dtypes: ``"f32"``, ``"f64"``, ``"f16"``, ``"bf16"`` or torch's dtypes; by default those of
            the module, or f32.
        backends: ``"cpu"``, ``"cuda"`` or both; by default those of the module, or both.
        backward: whether gradients are computed, too.
        precision: what float32 is multiplied in on tensor cores: ``"torch"`` (what torch's switch
            says when a call is made), ``"match"`` (TF32 where torch allows it and the result agrees
            with torch's to 1e-4), ``"tf32"`` or ``"fp32"``.
        archs: GPU architectures for which measured schedules are taken; by default those of the
            GPUs present. The file serves any GPU.
        force: whether anything at ``out`` is replaced.

    Raises:
        SpecError, ExportError: for arguments that cannot be served; one line.
        OSError: if the file cannot be written.
    """
    spec, held = _described(module_or_spec)
    contents = _contents(
        (spec,),
        held[0] if dtypes is None else _dtypes(dtypes),
        held[1] if backends is None else _backends(backends),
        backward,
        precision,
        archs,
    )
    command = command_line(spec).replace("convgen generate", "convgen export")
    return _write(Path(out), contents, command, "torch", force)


def export_model(
    problem: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    class_name: str = "ModelNew",
    dtypes: Iterable[object] | None = None,
    backends: str | Iterable[str] | None = None,
    backward: bool = True,
    precision: str = "match",
    fixed_channels: bool = False,
    archs: Iterable[str] | None = None,
    force: bool = False,
) -> Exported:
    """Writes a problem (a file with ``Model`` and ``get_init_inputs``) with kernels for its layers.

    The problem's file is executed and stays in the new one as it is. The class ``class_name`` there
    derives from ``Model`` and exchanges the class of its convolutions once it is constructed, so
    that constructor, parameters, their initialization and the forward are the model's own.

    Args:
        problem: the file.
        class_name: of the model with the kernels.
        fixed_channels: whether the kernels serve the layers' channels alone.
        out, dtypes, backends, backward, precision, archs, force: as for :func:`export`.

    Raises:
        SpecError, ExportError: for arguments or problems that cannot be served; one line.
        OSError: if the file cannot be written.
    """
    path = Path(problem)
    if not class_name.isidentifier():
        raise ExportError(f"class {documents.shown(class_name)} is not an identifier")
    chosen = DEFAULT_DTYPES if dtypes is None else _dtypes(dtypes)
    devices = BACKENDS if backends is None else _backends(backends)
    model = problems.read(path, fixed_channels)
    contents = _contents(model.layers, chosen, devices, backward, precision, archs)
    command = f"convgen export --model {path.name}"
    if class_name != "ModelNew":
        command += f" --class {class_name}"
    if fixed_channels:
        command += " --fixed-channels"
    described = Problem(
        name=path.name,
        text=model.text,
        future=model.future,
        class_name=class_name,
        left=model.left,
        left_names=model.left_names,
        padding_modes=model.padding_modes,
    )
    return _write(Path(out), contents, command, "match", force, described)


def _write(
    out: Path,
    contents: Contents,
    command: str,
    default_precision: str,
    force: bool,
    problem: Problem | None = None,
) -> Exported:
    check_replaceable(out, force)
    if contents.dtypes != DEFAULT_DTYPES:
        command += f" --dtype {','.join(contents.dtypes)}"
    if contents.backends != BACKENDS:
        command += f" --backend {contents.backends[0]}"
    if not contents.backward:
        command += " --no-backward"
    if contents.precision != default_precision:
        command += f" --precision {contents.precision}"
    text = render_one_file(contents, _COMPILERS, f"{command} -o {out.name}", problem)
    if problem is not None:
        _check_names(problem, text)
    disk.write_anywhere(out, text)
    return Exported(out, contents.specs, problem.left if problem else ())


def check_replaceable(out: Path, force: bool = False) -> None:
    """Raises ExportError where a file is not one that convgen wrote, or was changed since."""
    if force or not out.is_file():
        return
    digests = written_digests(out.read_text(encoding="utf-8", errors="surrogateescape"))
    shown = documents.plain(str(out))
    if digests is None:
        raise ExportError(f"{shown} exists and was not written by convgen: give --force to replace")
    if digests[0] != digests[1]:
        raise ExportError(f"{shown} was changed since convgen wrote it: give --force to replace it")


def _check_names(problem: Problem, text: str) -> None:
    """Raises ExportError where a problem's names are also those of the file around it."""
    own = problems.bindings(problem.text)
    around = problems.bindings(text.replace(problem.text.strip("\n"), ""))
    for name in sorted(own.keys() & around.keys()):
        imported = {each[name].rpartition(".")[2] for each in (own, around)}
        if len(imported) > 1 or "" in imported:
            raise ExportError(
                f"{problem.name} defines {name}, which the file itself does: rename it"
            )


def _described(
    given: ModuleType | ConvSpec | str | os.PathLike[str],
) -> tuple[ConvSpec, tuple[tuple[str, ...], tuple[str, ...]]]:
    """A specification, and the dtypes and backends of the module that has it."""
    if isinstance(given, ConvSpec):
        return given, (DEFAULT_DTYPES, BACKENDS)
    folder = Path(str(given.__file__)).parent if isinstance(given, ModuleType) else Path(given)
    described = describe(folder)
    if described is None:
        raise ExportError(f"{documents.plain(str(folder))} is no generated module")
    held = described["backends"]
    dtypes = {dtype for backend in held.values() for dtype in backend["dtypes"]}
    return ConvSpec.from_dict(described["spec"]), (
        tuple(name for name in DTYPES if name in dtypes),
        tuple(name for name in BACKENDS if name in held),
    )


def _contents(
    specs: tuple[ConvSpec, ...],
    dtypes: tuple[str, ...],
    backends: tuple[str, ...],
    backward: bool,
    precision: str,
    archs: Iterable[str] | None,
) -> Contents:
    if other := next((spec for spec in specs if spec.has_epilogue), None):
        raise SpecError(
            f"{other.name} has an epilogue, which one file cannot have: export {other.linear.name} "
            "and call torch's activation behind it"
        )
    if precision not in PRECISIONS:
        raise SpecError(f"precision={precision!r}: choose from {', '.join(PRECISIONS)}")
    names = gpus.gpu_architectures() if archs is None else archs
    wanted = tuple(map(toolchain.parse_architecture, names))
    schedules = {
        (spec.name, backend): tuned.schedules(
            spec, backend, dtypes, wanted, processor_name() if backend == "cpu" else ""
        )
        for spec in specs
        for backend in backends
    }
    return Contents(specs, backends, dtypes, backward, precision, schedules)


def _backends(backends: str | Iterable[str]) -> tuple[str, ...]:
    given = {backends} if isinstance(backends, str) else set(backends)
    if not given or not given <= set(BACKENDS):
        raise SpecError(f"backends={backends!r}: give one or more of {', '.join(BACKENDS)}")
    return tuple(backend for backend in BACKENDS if backend in given)


def _dtypes(dtypes: Iterable[object]) -> tuple[str, ...]:
    given = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    try:
        names = {parse_dtype(str(dtype).removeprefix("torch.")) for dtype in given}
    except ValueError as error:
        raise SpecError(str(error)) from error
    if not names:
        raise SpecError("dtypes is empty: give at least one")
    return tuple(name for name in DTYPES if name in names)
