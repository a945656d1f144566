"""Which layers suit tensor cores at all."""

from __future__ import annotations

WIDTH = 8
"""Channels that a tensor core's product takes at once, of either tensor."""


def suits(coarse_per_group: int, fine_per_group: int) -> bool:
    """Whether a group's channels fill an eighth of the tensor cores' products.

    With fewer (depthwise layers, say) plain arithmetic does the same work in less time.
    """
    padded = 1
    for channels in (coarse_per_group, fine_per_group):
        padded *= -(-channels // WIDTH) * WIDTH
    return 8 * coarse_per_group * fine_per_group >= padded
