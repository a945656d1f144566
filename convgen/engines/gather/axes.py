"""The axes of fprop and dgrad, as one gather: where positions read, and what taps meet them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd

from convgen.spec.geometry import Geometry
from convgen.spec.taps import Phase, Tap, dgrad_phases, gather_taps, offset_range

AXES = "dhw"


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a gather.

    Position ``p`` reads inputs ``p * step + tap.offset`` and, in phase ``r``, writes output
    ``p * len(phases) + r``. Within a phase, offsets rise by ``delta`` from tap to tap.
    """

    name: str
    step: int
    phases: tuple[Phase, ...]
    delta: int

    @cached_property
    def first(self) -> tuple[int, ...]:
        """Smallest offset of each phase."""
        return tuple(offset_range(phase.taps)[0] for phase in self.phases)

    @cached_property
    def first_offset(self) -> int:
        """Smallest offset of all taps."""
        return min(tap.offset for phase in self.phases for tap in phase.taps)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of taps of each phase."""
        return tuple(len(phase.taps) for phase in self.phases)

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Largest minus smallest offset of each phase."""
        ranges = (offset_range(phase.taps) for phase in self.phases)
        return tuple(high - low for low, high in ranges)


@lru_cache(maxsize=16)
def gather_axes(geometry: Geometry, contraction: str) -> tuple[Axis, Axis, Axis]:
    """The axes (D, H, W) of fprop or dgrad.

    Kept, for all units of a layer share them: of a long kernel they are large.
    """
    axes = []
    for name, k, s, p, d in zip(
        AXES,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        strict=True,
    ):
        if contraction == "fprop":
            axes.append(Axis(name, s, (Phase(0, gather_taps(k, p, d)),), d))
        else:
            axes.append(Axis(name, 1, dgrad_phases(k, s, p, d), d // gcd(s, d)))
    axis_d, axis_h, axis_w = axes
    return axis_d, axis_h, axis_w


def arrange(axes: tuple[Axis, Axis, Axis]) -> tuple[Axis, Axis, Axis]:
    """(R, Y, X): register rows run along the longer of the kernel's D and H."""
    d, h, w = axes
    return (h, d, w) if sum(h.counts) > sum(d.counts) else (d, h, w)


def runs_along_batch(y: Axis) -> bool:
    """Whether samples of a batch may take the place of positions along Y, where it has but one.

    Nothing is gathered along it then, and each position is one input's, one output's.
    """
    return y.step == 1 and [phase.taps for phase in y.phases] == [(Tap(0, 0),)]
