"""Plans of one family for one contraction, whether or not a package would hold its unit."""

from __future__ import annotations

from convgen.engines.mma.wgrad import WgradSchedule, wgrad_schedule, with_warpgroups
from convgen.engines.problem import Problem
from convgen.engines.registry import AnyPlan, Unit, families, unit_of
from convgen.spec import ConvSpec, Geometry


def unit(layer: ConvSpec | Geometry, contraction: str, kind: str, backend: str = "cuda") -> Unit:
    """The unit of the first family that computes a kind: ``simt`` in dtypes, ``mma`` in modes."""
    geometry = layer.geometry if isinstance(layer, ConvSpec) else layer
    hosts = [each for each in families(backend, contraction, kind) if not each.host]
    return unit_of(hosts[0], geometry, contraction, kind)


def plan(layer: ConvSpec | Geometry, contraction: str, kind: str, backend: str = "cuda") -> AnyPlan:
    """The default of :func:`unit`."""
    return unit(layer, contraction, kind, backend).default()


def wgrad(layer: ConvSpec | Geometry, kind: str) -> Problem:
    """The problem of wgrad on the whole fine tensor, whatever its compaction."""
    return Problem(layer.geometry if isinstance(layer, ConvSpec) else layer, "wgrad", kind)


def warpgroup_wgrad(spec: ConvSpec, mode: str) -> WgradSchedule:
    """The default of ``mma``, with warpgroups wherever channels suit them."""
    problem = wgrad(spec, mode)
    return with_warpgroups(wgrad_schedule(problem), problem)
