"""The generated Python package around the kernels: what a user imports.

It needs torch alone. Its Python is rendered from ``templates/module`` with the constants of the
specification, so that it holds nothing that its operator does not use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from convgen import __version__
from convgen.codegen.render import command_line, python_call, render_template
from convgen.engines import tensor_cores
from convgen.engines.implicit_gemm import common as implicit_gemm
from convgen.engines.registry import AnyPlan
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES, MODES

_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}

PYTHON = (
    *("__init__.py", "_operators.py", "_dispatch.py", "_integration.py"),
    *("_kernels.py", "_layouts.py", "_supplement.py", "_runtime.py", "_library.py"),
)
"""The modules of a package, each with a template of its own."""

EPILOGUE = "_epilogue.py"
"""A further one, of packages with an epilogue."""

_DIGEST = "@DIGEST@"
"""Stands for the digest of a package until all of its files are known."""


def render_package(
    spec: ConvSpec, plans: Mapping[str, Sequence[AnyPlan]], kernels: Mapping[str, str]
) -> dict[str, str]:
    """The Python side of a package: ``{path in the package: text}``.

    ``plans`` gives the kernels of each backend and ``kernels`` the text of their files, as
    :func:`convgen.codegen.render.render_kernels` returns them. The files are :data:`PYTHON`,
    :data:`EPILOGUE` where there is one, ``py.typed`` and ``spec.json``, a function of the arguments
    and of convgen's version alone.
    """
    description = describe(spec, plans)
    text = json.dumps(description, indent=2) + "\n"
    context = {
        "version": __version__,
        "spec": spec,
        "command": _lines(command_line(spec)),
        "call": _lines(python_call(spec)),
        "namespace": f"convgen_{spec.name}_{_DIGEST}",
        "backends": {name: kernels["dtypes"] for name, kernels in description["backends"].items()},
        "dtypes": DTYPES,
        "math_modes": description["backends"].get("cuda", {}).get("math_modes", []),
        "tensor_core_width": tensor_cores.WIDTH,
        "implicit_gemms": sorted(
            f"{plan.contraction}_{plan.kind}"
            for plan in plans.get("cuda", ())
            if plan.family.name == implicit_gemm.NAME
        ),
        # Whether the gradients of a layer both read what one of them packs.
        "shares_packed": spec.transposed
        and any(
            plan.contraction == "wgrad" and plan.problem.compaction
            for plan in plans.get("cuda", ())
        ),
        "axes": _AXES[spec.ndim],
        "class_name": spec.class_name,
        # Whether derivatives need what goes into the activation.
        "keeps_preactivation": spec.epilogue is not None and not spec.epilogue.saves_output,
        "uses_functional": spec.epilogue is not None and "F." in spec.epilogue.forward(""),
    }
    context |= _output_padding(spec) if spec.transposed else _padding(spec)
    modules = (*PYTHON, EPILOGUE) if spec.has_epilogue else PYTHON
    files = {name: render_template(f"module/{name}.j2", context) for name in modules}
    files |= {"py.typed": "", "spec.json": text}
    # Names of torch operators are global to a process: two packages may share them only if they
    # are the same.
    everything = json.dumps({**kernels, **files}, sort_keys=True)
    digest = hashlib.sha256(everything.encode()).hexdigest()[:8]
    return {path: text.replace(_DIGEST, digest) for path, text in files.items()}


def describe(spec: ConvSpec, plans: Mapping[str, Sequence[AnyPlan]]) -> dict[str, Any]:
    """What ``spec.json`` holds: version, command, specification, and the kernels per backend."""
    return {
        "convgen": __version__,
        "name": spec.name,
        "command": command_line(spec),
        "spec": spec.to_dict(),
        "backends": {
            backend: {
                "dtypes": list(dict.fromkeys(plan.kind for plan in kernels if plan.kind in DTYPES)),
                "math_modes": list(
                    dict.fromkeys(plan.kind for plan in kernels if plan.kind in MODES)
                ),
                "kernels": [
                    {
                        "contraction": plan.contraction,
                        "dtype": plan.kind,
                        "engine": plan.family.name,
                        "schedule": dataclasses.asdict(plan.schedule),
                    }
                    for plan in kernels
                ],
            }
            for backend, kernels in plans.items()
        },
    }


def _lines(command: str) -> list[str]:
    """A command, broken where it is too long for a line of the package."""
    return [command] if len(command) <= 94 else textwrap.wrap(command, 88, break_on_hyphens=False)


def _extents(spec: ConvSpec) -> list[str]:
    """A Python expression per axis for the output's extent, over the names of ``_AXES``.

    Without the output padding, for transposed convolutions.
    """
    expressions = []
    terms = zip(_AXES[spec.ndim], spec.stride, spec.extent_constants, strict=True)
    for name, stride, constant in terms:
        if spec.transposed:
            expressions.append(_plus(name if stride == 1 else f"{name} * {stride}", constant))
        elif stride == 1:
            expressions.append(_plus(name, constant + 1))
        elif constant == 0:
            expressions.append(f"{name} // {stride} + 1")
        else:
            expressions.append(f"({_plus(name, constant)}) // {stride} + 1")
    return expressions


def _plus(expression: str, constant: int) -> str:
    if constant == 0:
        return expression
    return f"{expression} {'+' if constant > 0 else '-'} {abs(constant)}"


def _output_padding(spec: ConvSpec) -> dict[str, Any]:
    """Context of transposed convolutions: what bounds output_padding, exclusively, and extents."""
    smallest = _extents(spec)
    return {
        "limits": tuple(map(max, zip(spec.stride, spec.dilation, strict=True))),
        "paddings": [spec.padding],
        "smallest": smallest,
        "extents": [f"{extent} + output_padding[{axis}]" for axis, extent in enumerate(smallest)],
    }


def _paddings(spec: ConvSpec) -> list[str]:
    """Python expressions of what ``padding`` may be for a convolution: its own, then its equals."""
    begin, end = spec.padding_begin, spec.padding_end
    own = '"same"' if isinstance(spec.padding, str) else str(spec.padding)
    equal = {own}
    if begin == end:
        equal.add(str(begin))
    if not any(begin + end):
        equal.add('"valid"')
    if all(s == 1 for s in spec.stride):
        same = dataclasses.replace(spec, padding="same")
        if (same.padding_begin, same.padding_end) == (begin, end):
            equal.add('"same"')
    return sorted(equal, key=lambda padding: (padding != own, padding))


def _padding(spec: ConvSpec) -> dict[str, Any]:
    """Context of convolutions: reach of the kernel and paddings, and how padding modes use them.

    A mode other than zeros pads the input itself, by ``b`` in front, though the kernels pad by
    ``b`` zeros once more. With ``m * stride - b`` further zeros in front, ``m = ceil(b / stride)``,
    output ``j + m`` is the wanted output ``j``.
    """
    shift = [-(-b // s) for b, s in zip(spec.padding_begin, spec.stride, strict=True)]
    prepended = [m * s - b for m, s, b in zip(shift, spec.stride, spec.padding_begin, strict=True)]
    return {
        "extents": _extents(spec),
        "span": tuple(
            d * (k - 1) + 1 for k, d in zip(spec.kernel_size, spec.dilation, strict=True)
        ),
        "paddings": _paddings(spec),
        # As torch keeps them in its layer for torch.nn.functional.pad.
        "repeated": tuple(
            value
            for pair in reversed(list(zip(spec.padding_begin, spec.padding_end, strict=True)))
            for value in pair
        ),
        "pads": tuple(map(sum, zip(spec.padding_begin, spec.padding_end, strict=True))),
        # torch.nn.functional.pad takes (before, after) from the last dimension to the first.
        "prepended": [value for zeros in reversed(prepended) for value in (zeros, 0)],
        "shift": shift,
    }
