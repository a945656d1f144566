"""Engines: each turns a contraction of a geometry into the sources of one translation unit.

An engine is one Python file here (its schedule, the legal space with reasons, and what its
templates are given) and one folder of templates. :func:`engine_for` is the only registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from convgen.spec import Geometry

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


class Engine(Protocol):
    """What the pipeline asks of an engine."""

    name: str
    backend: str
    source_suffix: str
    """``.cpp`` or ``.cu``."""
    headers: Mapping[str, str]
    """Plain headers: path in the package below ``src/<backend>/`` -> template folder path."""

    def plan(self, geometry: Geometry, contraction: str, dtype: str) -> KernelPlan:
        """The default schedule for a contraction and dtype (a key of ``convgen.dtypes.DTYPES``)."""

    def template(self, contraction: str) -> str:
        """Template of a contraction, relative to ``convgen/templates``."""

    def context(self, plan: KernelPlan) -> dict[str, Any]:
        """What the template is given beyond the common context (see ``convgen.render``)."""


def engine_for(backend: str) -> Engine:
    """The engine that serves a backend."""
    if backend == "cpu":
        from convgen.engines import cpu

        return cpu.ENGINE
    if backend == "cuda":
        from convgen.engines import simt

        return simt.ENGINE
    raise ValueError(f"backend {backend!r} is not known: choose from {', '.join(BACKENDS)}")
