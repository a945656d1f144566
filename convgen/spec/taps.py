"""Which kernel elements (taps) meet which positions, per spatial dimension.

Everything here is the arithmetic of one relation (see DESIGN in docs/design.md)::

    o = i * stride - padding + t * dilation

between a position ``i`` of the coarse grid, a position ``o`` of the fine grid and a tap ``t``.
Dimensions are independent, so a kernel's taps are the product of three one-dimensional lists.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tap:
    """One kernel element ``index`` and the constant ``offset`` at which it reads."""

    index: int
    offset: int


@dataclass(frozen=True)
class Phase:
    """The outputs ``o = q * stride + residue`` of dgrad, and the taps that reach them.

    A tap reads the coarse position ``i = q + offset``. ``taps`` may be empty (k < stride, or
    gcd(dilation, stride) > 1): those outputs are bias alone.
    """

    residue: int
    taps: tuple[Tap, ...]


def gather_taps(kernel: int, padding: int, dilation: int) -> tuple[Tap, ...]:
    """Taps of fprop and wgrad: coarse position ``i`` meets fine ``i * stride + offset``.

    ``offset = t * dilation - padding``, in rising order of ``t``.
    """
    return tuple(Tap(t, t * dilation - padding) for t in range(kernel))


def dgrad_phases(kernel: int, stride: int, padding: int, dilation: int) -> tuple[Phase, ...]:
    """The ``stride`` phases of dgrad, by residue; every tap belongs to at most one phase.

    Output ``o = q * stride + r`` is reached by tap ``t`` from ``i = (o + padding - t * dilation) /
    stride`` where that is whole, that is ``q + (r + padding - t * dilation) / stride``. Within a
    phase offsets fall as ``t`` rises; taps are listed by rising offset, so that a kernel reads
    its window from left to right.
    """
    by_residue: list[list[Tap]] = [[] for _ in range(stride)]
    for t in reversed(range(kernel)):
        quotient, residue = divmod(t * dilation - padding, stride)
        by_residue[residue].append(Tap(t, -quotient))
    return tuple(Phase(residue, tuple(taps)) for residue, taps in enumerate(by_residue))


def offset_range(taps: tuple[Tap, ...]) -> tuple[int, int]:
    """Smallest and largest offset of ``taps``; ``(0, 0)`` if there are none."""
    offsets = [tap.offset for tap in taps] or [0]
    return min(offsets), max(offsets)
