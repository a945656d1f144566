"""Engines: each turns a contraction of a geometry into the sources of one translation unit.

An engine is one Python file here (its schedule, the legal space with reasons, and what its
templates are given) and one folder of templates. :func:`units` is the only registry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from convgen.spec import Geometry

if TYPE_CHECKING:
    from convgen.engines.cost import Gpu, Prediction, Problem

CONTRACTIONS = ("fprop", "dgrad", "wgrad")
"""The three derivatives of the trilinear form; wgrad's unit also holds the bias gradient."""

BACKENDS = ("cpu", "cuda")


@dataclass(frozen=True)
class KernelPlan:
    """One translation unit, decided: what it computes, for which dtype, on which schedule.

    ``schedule`` is the engine's own frozen dataclass; it is recorded in ``spec.json`` and in the
    header of the rendered source.
    """

    geometry: Geometry
    contraction: str
    dtype: str
    engine: str
    schedule: Any


@dataclass(frozen=True)
class Candidate:
    """A schedule that an engine considered, and why it cannot have it: empty if it can."""

    schedule: Any
    refusal: str


class Engine(Protocol):
    """What the pipeline asks of an engine."""

    name: str
    backend: str
    headers: Mapping[str, str]
    """Plain headers: path in the package below ``src/<backend>/`` -> template folder path."""

    def plan(self, geometry: Geometry, contraction: str, dtype: str) -> KernelPlan:
        """The default schedule for a contraction and a dtype or math mode (``spec.dtypes``)."""

    def template(self, contraction: str) -> str:
        """Template of a contraction, relative to ``convgen/templates``."""

    def context(self, plan: KernelPlan) -> dict[str, Any]:
        """What the template is given beyond the common context (see ``convgen.codegen.render``)."""

    def space(self, geometry: Geometry, contraction: str, dtype: str) -> list[Candidate]:
        """All schedules that ``convgen tune`` may consider, legal ones and refused ones."""

    def refusal(self, plan: KernelPlan, architectures: Iterable[str] = ()) -> str:
        """Why a plan's schedule is not legal; empty if it is. Any schedule may be asked for.

        ``architectures``, as ``90a``, are those that it must suit beside the one that it was
        measured on.
        """

    def combine(self, choices: Sequence[tuple[KernelPlan, Problem]]) -> Any | None:
        """A schedule of several plans of one kernel, which serves each one's problem as it does.

        None where there is no such schedule.
        """

    def predict(self, plan: KernelPlan, problem: Problem, gpu: Gpu) -> Prediction:
        """What a call is expected to take; ``gpu`` means nothing to engines of the CPU."""

    def read_schedule(self, contraction: str, fields: Mapping[str, Any]) -> Any:
        """A schedule from its fields, as JSON has them.

        Raises:
            TypeError: if they are not the fields of a schedule of this contraction.
        """


def schedule_from(kind: type, fields: Mapping[str, Any]) -> Any:
    """A schedule (a dataclass) from its fields, as JSON has them: lists are tuples.

    Raises:
        TypeError: if they are not its fields.
    """

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    names = {field.name for field in dataclasses.fields(kind)}
    needed = {
        field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING
    }
    if not needed <= set(fields) <= names:
        raise TypeError(f"{kind.__name__} has the fields {sorted(names)}, not {sorted(fields)}")
    return kind(**{name: tuples(value) for name, value in fields.items()})


SOURCE_SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}
"""Suffix of the translation units of each backend."""

TENSOR_CORE_MODES = {"f32": ("tf32", "tf32x3"), "f16": ("f16tc",), "bf16": ("bf16tc",)}
"""Math modes (keys of ``spec.dtypes.MODES``) that CUDA libraries have beside a dtype's unit."""

TENSOR_CORE_WIDTH = 8
"""Channels that a tensor core's product takes at once, of either tensor."""


def suits_tensor_cores(coarse_per_group: int, fine_per_group: int) -> bool:
    """Whether a group's channels fill an eighth of the tensor cores' products.

    With fewer (depthwise layers, say) the simt engine does the same work in less time.
    """
    padded = 1
    for channels in (coarse_per_group, fine_per_group):
        padded *= -(-channels // TENSOR_CORE_WIDTH) * TENSOR_CORE_WIDTH
    return 8 * coarse_per_group * fine_per_group >= padded


def units(backend: str, geometry: Geometry, dtypes: Iterable[str]) -> list[tuple[Engine, str]]:
    """The engines that serve dtypes on a backend, each with its dtype or math mode.

    Tensor-core units are left out where the channels are known to be too few for them.
    """
    if backend == "cpu":
        from convgen.engines import cpu

        return [(cpu.ENGINE, dtype) for dtype in dtypes]
    if backend != "cuda":
        raise ValueError(f"backend {backend!r} is not known: choose from {', '.join(BACKENDS)}")
    from convgen.engines import mma, simt

    # A count that is not known may be any: then so may the tensor cores suit.
    coarse = geometry.coarse_channels_per_group or TENSOR_CORE_WIDTH
    fine = geometry.fine_channels_per_group or TENSOR_CORE_WIDTH
    found: list[tuple[Engine, str]] = []
    for dtype in dtypes:
        found.append((simt.ENGINE, dtype))
        if suits_tensor_cores(coarse, fine):
            found += [(mma.ENGINE, mode) for mode in TENSOR_CORE_MODES.get(dtype, ())]
    return found
