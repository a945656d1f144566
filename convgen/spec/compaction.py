"""What windows meet of the fine tensor, where strides and dilations have common divisors.

Taps meet the fine positions ``o = i * stride - padding + t * dilation``. Where both the stride and
the dilation of an axis are multiples of ``step``, these are ``offset, offset + step, ...`` alone,
with ``offset = -padding mod step``. Packed side by side, ``o = step * o' + offset``, they are the
fine tensor of another layer: of stride ``stride / step``, dilation ``dilation / step`` and padding
``(padding + offset) / step``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from convgen.spec.geometry import Geometry, Triple


@dataclass(frozen=True)
class Compaction:
    """The positions ``offset + step * n`` of each axis, and the layer that meets all of them."""

    step: Triple
    offset: Triple
    geometry: Geometry


def compaction_of(geometry: Geometry) -> Compaction | None:
    """The compaction that a geometry's taps meet, for kernels that pack it first; None without one.

    Planes and lines that no tap meets are passed over anyway: it takes a common divisor along W.
    """
    axes = list(zip(geometry.stride, geometry.dilation, geometry.padding, strict=True))
    step = [gcd(stride, dilation) for stride, dilation, _ in axes]
    if step[2] == 1:
        return None
    offset = [-padding % n for (_, _, padding), n in zip(axes, step, strict=True)]

    def divided(values: list[int]) -> Triple:
        d, h, w = (value // n for value, n in zip(values, step, strict=True))
        return d, h, w

    paddings = [padding + o for (_, _, padding), o in zip(axes, offset, strict=True)]
    return Compaction(
        (step[0], step[1], step[2]),
        (offset[0], offset[1], offset[2]),
        replace(
            geometry,
            stride=divided([stride for stride, _, _ in axes]),
            dilation=divided([dilation for _, dilation, _ in axes]),
            padding=divided(paddings),
        ),
    )
