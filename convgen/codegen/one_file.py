"""A layer, or a model with its layers, as one Python file: what a user calls, runtime and sources.

The file does what a package does, for any number of layers, with torch and a compiler alone. Its
text keeps to what checkers of generated code let through (``templates/export``): there is neither
``try`` nor ``pass`` in it, and in a file for float32 no conversion to half.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from convgen import __version__
from convgen.codegen.render import Schedules, headers, render_template, render_unit
from convgen.engines import tensor_cores
from convgen.engines.backends import SOURCE_SUFFIX
from convgen.engines.implicit_gemm import common as implicit_gemm
from convgen.engines.registry import units
from convgen.spec import CONTRACTIONS, ConvSpec
from convgen.spec.dtypes import DTYPES, TENSOR_CORE_MODES

PRECISIONS = ("torch", "match", "tf32", "fp32")
"""How float32 is multiplied on tensor cores: as torch's switch says, as TF32 where that agrees with
torch's result, as TF32 always, or as accurately as float32."""

OLDEST_TORCH = "2.9"
"""The first release with ``torch.backends.cudnn.conv.fp32_precision``."""

_NOTES = {
    "torch": "Float32 is multiplied as TF32 on a GPU where torch allows it\n"
    "(torch.backends.cudnn.conv.fp32_precision), else as accurately as float32.",
    "match": "Float32 is multiplied as TF32 on a GPU where torch allows it and the result agrees\n"
    "with torch's: the first call of a kind compares them. Else it is as accurate as float32.",
    "tf32": "Float32 is multiplied as TF32 on a GPU, whatever torch's switch says.",
    "fp32": "Float32 is as accurate as float32 on a GPU, whatever torch's switch says.",
}

_DIGEST, _NAMESPACE, _PROBLEM = "@DIGEST@", "@NAMESPACE@", "@PROBLEM@"

_FIRST_LINES = re.compile(
    r"# Written by convgen \S+\. SHA-256 of all that follows the next line:\n"
    r"# (?P<digest>[0-9a-f]{64})\n"
)


@dataclass(frozen=True)
class Contents:
    """What a file holds kernels for."""

    specs: tuple[ConvSpec, ...]
    """The layers; no two of them with the same constants."""
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    backward: bool
    """Whether gradients are computed, too."""
    precision: str
    """One of :data:`PRECISIONS`."""
    schedules: Mapping[tuple[str, str], Schedules]
    """Other than the families' defaults, by name of the layer and backend."""

    @property
    def modes(self) -> dict[str, tuple[str, ...]]:
        """Of each dtype, itself and the math modes that may be asked for."""
        unused = {"tf32": "tf32x3", "fp32": "tf32"}.get(self.precision)
        return {
            dtype: (dtype, *(m for m in TENSOR_CORE_MODES.get(dtype, ()) if m != unused))
            for dtype in self.dtypes
        }


@dataclass(frozen=True)
class Problem:
    """The source of a model whose layers are replaced."""

    name: str
    """Of its file."""
    text: str
    """Its source, but for imports from ``__future__``."""
    future: tuple[str, ...]
    """What it imports from there."""
    class_name: str
    """Of the model with the kernels."""
    left: tuple[str, ...]
    """What torch still computes, one line each."""
    left_names: tuple[str, ...]
    """The layers among it, by their names in the model."""
    padding_modes: bool
    """Whether a layer pads its input by other numbers than zeros."""


@dataclass(frozen=True)
class Compilers:
    """How a file compiles its sources."""

    cpp_flags: tuple[str, ...]
    nvcc_flags: tuple[str, ...]
    oldest_nvcc: tuple[int, int]


def render_one_file(
    contents: Contents, compilers: Compilers, command: str, problem: Problem | None = None
) -> str:
    """The text of a file, a function of the arguments and of convgen's version.

    ``command`` is the command line that writes it. Without a problem, ``contents`` has one layer.
    """
    assert problem is not None or len(contents.specs) == 1
    sources = render_sources(contents)
    backends = contents.backends
    spec = contents.specs[0]
    needed = {"cpu": "c++ with OpenMP for the CPU", "cuda": "nvcc for an NVIDIA GPU"}
    if problem is None:
        title = f"{spec.op} with its constants compiled into the kernels, in one file."
        summary = (
            f"`{spec.class_name}` and `{spec.op}` stand for torch's; `SPEC` is what is constant."
        )
    else:
        title = (
            f"The model of {problem.name} with kernels compiled for its convolutions, in one file."
        )
        summary = f"`{problem.class_name}` takes the place of `Model`."
    if not contents.backward:
        summary += "\nIt computes no gradients."
    text = render_template(
        "export/one_file.py.j2",
        {
            "version": __version__,
            "title": title,
            "summary": summary,
            "command": _wrapped(command),
            "oldest_torch": OLDEST_TORCH,
            "oldest_nvcc": compilers.oldest_nvcc,
            "compilers": " and ".join(needed[backend] for backend in backends),
            "precision_note": _NOTES[contents.precision],
            "face": "layer.py.j2" if problem is None else "model.py.j2",
            "future": problem.future if problem else (),
            "problem": {"name": problem.name, "text": _PROBLEM} if problem else None,
            "class_name": problem.class_name if problem else "",
            "left": problem.left if problem else (),
            "left_names": sorted(problem.left_names) if problem else (),
            "pads": contents.precision == "match"
            or (problem is not None and problem.padding_modes),
            "padding_modes": (
                problem.padding_modes if problem else not spec.transposed  # which has none
            ),
            "spec": spec,
            "specs": contents.specs,
            "ops": sorted({each.op for each in contents.specs}),
            "fixed": (spec.in_channels is not None, spec.out_channels is not None),
            "dtypes": [DTYPES[name] for name in contents.dtypes],
            "backends": backends,
            "quoted": _quoted,
            "backward": contents.backward,
            "precision": contents.precision,
            "tensor_core_width": tensor_cores.WIDTH,
            "kinds": {
                dtype: tuple(
                    kind
                    for mode in modes
                    for kind in ((mode,) if mode == dtype else (mode, mode + implicit_gemm.SUFFIX))
                )
                for dtype, modes in contents.modes.items()
            },
            "cpp_flags": compilers.cpp_flags,
            "nvcc_flags": compilers.nvcc_flags,
            "sources": sources,
        },
    )
    text = text.replace(_PROBLEM, problem.text.strip("\n") if problem else "")
    text = text.replace(_NAMESPACE, hashlib.sha256(text.encode()).hexdigest()[:12])
    first, digest, rest = text.partition(f"{_DIGEST}\n")
    return first + digest.replace(_DIGEST, hashlib.sha256(rest.encode()).hexdigest()) + rest


def render_sources(contents: Contents) -> dict[str, str]:
    """The kernels: ``{<backend>/<header>, or <backend>/<layer>/<unit>: text}``."""
    found: dict[str, str] = {}
    own: dict[str, str] = {}
    kinds = {mode for modes in contents.modes.values() for mode in modes}
    for spec in contents.specs:
        forward = "dgrad" if spec.transposed else "fprop"
        contractions = CONTRACTIONS if contents.backward else (forward,)
        for backend in contents.backends:
            schedules = contents.schedules.get((spec.name, backend), {})
            for unit in units(backend, spec.geometry, contents.dtypes):
                problem = unit.problem
                if problem.contraction not in contractions or problem.kind not in kinds:
                    continue
                schedule = schedules.get(unit.key)
                plan = unit.with_schedule(schedule) if schedule else unit.default()
                path = f"{backend}/{spec.name}/{unit.name}{SOURCE_SUFFIX[backend]}"
                own[path] = render_unit(spec, unit, plan)
                found |= {path[len("src/") :]: text for path, text in headers(unit).items()}
    halves = any(DTYPES[dtype].size_bytes == 2 for dtype in contents.dtypes)
    sources = {path: _plain(text, halves) for path, text in {**found, **own}.items()}
    assert not any('"""' in text for text in sources.values()), "no string of Python can hold it"
    return sources


def written_digests(text: str) -> tuple[str, str] | None:
    """The digest that a file states of itself, and the one that it has; None of others' files."""
    match = _FIRST_LINES.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    return match["digest"], hashlib.sha256(rest.encode(errors="surrogateescape")).hexdigest()


def _plain(source: str, halves: bool) -> str:
    """A source as a file holds it.

    ``pass`` is a statement to who looks for Python's. What converts to half is left out where no
    kernel does so: it is an overload for tensors of 16 bits.
    """
    lines = []
    for line in source.splitlines():
        if not halves and re.match(r"__device__ .* narrow\(half& to, float x\)", line):
            continue
        code, slashes, comment = line.partition("//")
        lines.append(re.sub(r"\bpass\b", "pass_", code) + slashes + comment)
    return "\n".join(lines) + "\n"


def _quoted(words: tuple[str, ...]) -> str:
    """A tuple of strings as a formatter of Python has it."""
    return repr(words).replace("'", '"')


def _wrapped(command: str) -> list[str]:
    """A command in lines that fit, broken before an option."""
    lines = [""]
    for word in re.split(r" (?=-)", command):
        if lines[-1] and len(lines[-1]) + len(word) > 84:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
