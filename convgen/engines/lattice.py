"""Lattices: what windows meet of the fine tensor where strides and dilations have common divisors.

Taps meet the fine positions ``o = i * stride - padding + t * dilation``. Where both the stride and
the dilation of an axis are multiples of ``step``, these are ``offset, offset + step, ...`` alone,
with ``offset = -padding mod step``. Packed side by side, ``o = step * o' + offset``, they are the
fine tensor of another layer: of stride ``stride / step``, dilation ``dilation / step`` and padding
``(padding + offset) / step``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from convgen.engines.cost import Gpu, Prediction, Problem
from convgen.spec import Geometry, Triple

LINE_BYTES = 16
"""Packed lines are multiples of it: LATTICE_LINE_BYTES of the templates."""

LAUNCH_MS = 0.002
"""What one more kernel takes beside its bytes."""


@dataclass(frozen=True)
class Lattice:
    """The positions ``offset + step * n`` of each axis, and the layer that meets all of them."""

    step: Triple
    offset: Triple
    geometry: Geometry

    def problem(self, problem: Problem, element_bytes: int) -> Problem:
        """The extents of the layer on the lattice."""
        d, h, w = (
            max(1, -(-(extent - offset) // step))
            for extent, offset, step in zip(
                problem.fine_extent, self.offset, self.step, strict=True
            )
        )
        multiple = LINE_BYTES // element_bytes
        return replace(problem, fine_extent=(d, h, -(-w // multiple) * multiple))

    def prediction(
        self, dense: Prediction, problem: Problem, element_bytes: int, gpu: Gpu
    ) -> Prediction:
        """Of the whole, packing included: whole lines are read, what is met of them written."""
        d, h, w = self.problem(problem, element_bytes).fine_extent
        elements = problem.batch * problem.fine_channels * d * h * (problem.fine_extent[2] + w)
        packing_ms = 1e3 * elements * element_bytes / gpu.memory_bytes_per_s + LAUNCH_MS
        return Prediction(dense.ms + packing_ms, dense.bound)


def lattice_of(geometry: Geometry, contraction: str) -> Lattice | None:
    """The lattice that a contraction's kernel packs first; None if it reads the tensor itself.

    Planes and lines that no tap meets are passed over anyway: it takes a common divisor along W.
    """
    if contraction == "dgrad":  # writes the fine tensor
        return None
    axes = list(zip(geometry.stride, geometry.dilation, geometry.padding, strict=True))
    step = [gcd(stride, dilation) for stride, dilation, _ in axes]
    if step[2] == 1:
        return None
    offset = [-padding % n for (_, _, padding), n in zip(axes, step, strict=True)]

    def divided(values: list[int]) -> Triple:
        d, h, w = (value // n for value, n in zip(values, step, strict=True))
        return d, h, w

    paddings = [padding + o for (_, _, padding), o in zip(axes, offset, strict=True)]
    return Lattice(
        (step[0], step[1], step[2]),
        (offset[0], offset[1], offset[2]),
        replace(
            geometry,
            stride=divided([stride for stride, _, _ in axes]),
            dilation=divided([dilation for _, dilation, _ in axes]),
            padding=divided(paddings),
        ),
    )
