"""Templates to text: the only user of jinja2. Knows no compiler."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from convgen import __version__
from convgen.engines import cost
from convgen.engines.backends import SOURCE_SUFFIX
from convgen.engines.registry import AnyPlan, Unit, units
from convgen.spec import ConvSpec
from convgen.spec.dtypes import KINDS

TEMPLATES = Path(__file__).parents[1] / "templates"


@cache
def environment() -> jinja2.Environment:
    """The one Jinja2 environment: an undefined name is an error, blocks leave no blank lines."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    env.filters["pyrepr"] = repr
    return env


class CompiledTemplates(jinja2.BytecodeCache):
    """Templates that Jinja2 has compiled, which takes longer than all else of a warm ``generate``.

    Jinja2 itself tells those of another text, or of another version, from what it needs.

    Args:
        recall: ``recall(name)``, the bytes that were noted under a name, or None.
        note: ``note(name, content)``.
    """

    def __init__(
        self, recall: Callable[[str], bytes | None], note: Callable[[str, bytes], None]
    ) -> None:
        self._recall = recall
        self._note = note

    def load_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        if content := self._recall(bucket.key):
            try:
                bucket.bytecode_from_string(content)
            except Exception:  # Pickle names no bound of what damaged content may raise.
                bucket.reset()

    def dump_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        self._note(bucket.key, bucket.bytecode_to_string())


def render_template(name: str, context: dict[str, Any]) -> str:
    """Renders ``templates/<name>``, with runs of blank lines folded to one (in Python, to two)."""
    text = environment().get_template(name).render(context)
    if name.endswith(".py.j2"):
        return re.sub(r"\n{4,}", "\n\n\n", text)
    return re.sub(r"\n{3,}", "\n\n", text)


Schedules = Mapping[tuple[str, str], Any]
"""Schedules other than the families' defaults, by contraction and :attr:`Unit.kind`."""


LONG = 4096
"""Kernel elements, or phases, of which rendering a unit takes long enough to be reported."""


def render_kernels(
    spec: ConvSpec,
    backend: str,
    dtypes: Iterable[str],
    schedules: Schedules | None = None,
    on_unit: Callable[[str], None] | None = None,
) -> tuple[dict[str, str], list[AnyPlan]]:
    """The sources of one backend: ``{path in the package: text}``, and the plans behind them.

    Sources lie at ``src/<backend>/<contraction>_<dtype or math mode><suffix>``; each is one
    translation unit. ``on_unit`` is called with the path of each before it is rendered, if the
    kernel is :data:`LONG`.
    """
    files: dict[str, str] = {}
    plans = []
    is_long = max(math.prod(spec.kernel_size), math.prod(spec.stride)) >= LONG
    for unit in units(backend, spec.geometry, dtypes):
        path = f"src/{backend}/{unit.name}{SOURCE_SUFFIX[backend]}"
        if on_unit and is_long:
            on_unit(path)
        files |= headers(unit, spec.has_epilogue)
        plan = unit.default()
        if schedule := (schedules or {}).get(unit.key):
            plan = unit.with_schedule(schedule)
        plans.append(plan)
        files[path] = render_unit(spec, unit, plan)
    return files, plans


_OF_EPILOGUES = {
    "cpu": {},
    "cuda": {"epilogue.cuh": "cuda/epilogue.cuh", "activations.h": "common/activations.h"},
}
"""Headers that only units with an epilogue include."""


def headers(unit: Unit, has_epilogue: bool = False) -> dict[str, str]:
    """The plain headers that a unit includes, by their paths in a package."""
    found = dict(unit.family.headers)
    for guest, plan in unit.guests:
        if plan is not None:
            found |= guest.headers
    if has_epilogue:
        found |= _OF_EPILOGUES[unit.family.backend]
    return {
        f"src/{unit.family.backend}/{path}": header_text(source) for path, source in found.items()
    }


def header_text(source: str) -> str:
    """A header that no specification changes; those of ``.j2`` have the rates of the model."""
    if source.endswith(".j2"):
        return render_template(source, {"gpus": cost.GPUS, "cost": cost})
    return (TEMPLATES / source).read_text()


def render_unit(spec: ConvSpec, unit: Unit, plan: AnyPlan) -> str:
    """The source of one translation unit."""
    context = kernel_context(spec, unit, plan) | unit.family.context(plan)
    for guest, guest_plan in unit.guests:
        context[guest.name] = None if guest_plan is None else guest.context(guest_plan)
    return render_template(unit.family.template.format(contraction=plan.contraction), context)


def kernel_context(spec: ConvSpec, unit: Unit, plan: AnyPlan) -> dict[str, Any]:
    """What every kernel template is given."""
    return {
        "version": __version__,
        "spec": spec,
        "command": command_line(spec),
        "unit": unit.name,
        "g": plan.geometry,
        "compaction": plan.problem.compaction,
        "contraction": plan.contraction,
        # Whether this is the layer itself, whose sums its epilogue goes on with.
        "has_epilogue": spec.has_epilogue and plan.contraction == spec.forward,
        "dtype": KINDS[plan.kind],
        "schedule": plan.schedule,
        "schedule_text": json.dumps(dataclasses.asdict(plan.schedule), sort_keys=True),
    }


def command_line(spec: ConvSpec) -> str:
    """The ``convgen generate`` command that regenerates a specification."""
    words = ["convgen generate"]
    if spec.op != "conv_transpose3d":
        words.append(f"--op {spec.op}")

    def option(name: str, values: tuple[int, ...] | str, default: int | None) -> None:
        if isinstance(values, str):
            words.append(f"--{name} {values}")
        elif any(v != default for v in values):
            same = len(set(values)) == 1
            words.append(f"--{name} {values[0] if same else ','.join(map(str, values))}")

    option("kernel", spec.kernel_size, None)
    option("stride", spec.stride, 1)
    option("padding", spec.padding, 0)
    option("output-padding", spec.output_padding, 0)
    option("dilation", spec.dilation, 1)
    option("groups", (spec.groups,), 1)
    if spec.in_channels is not None:
        words.append(f"--in-channels {spec.in_channels}")
    if spec.out_channels is not None:
        words.append(f"--out-channels {spec.out_channels}")
    if spec.activation is not None:
        words.append(f"--activation {spec.activation}")
    if spec.residual:
        words.append("--residual")
    return " ".join(words)


def python_call(spec: ConvSpec) -> str:
    """The call of ``convgen.specialize`` for a specification, open for more arguments."""
    arguments = [repr(spec.op)]
    for field, default in (
        ("kernel_size", None),
        ("stride", 1),
        ("padding", 0),
        ("output_padding", 0),
        ("dilation", 1),
        ("groups", 1),
        ("in_channels", None),
        ("out_channels", None),
        ("activation", None),
        ("residual", False),
    ):
        value = getattr(spec, field)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value != default:
            arguments.append(f"{field}={value!r}")
    return f"convgen.specialize({', '.join(arguments)}"
