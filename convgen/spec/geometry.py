"""The trilinear form of a layer, from which all kernels are generated."""

from __future__ import annotations

from dataclasses import dataclass

Triple = tuple[int, int, int]

CONTRACTIONS = ("fprop", "dgrad", "wgrad")
"""The three derivatives of the trilinear form; wgrad's unit also holds the bias gradient."""


@dataclass(frozen=True)
class Geometry:
    """The trilinear form of a specification, always in three spatial dimensions (D, H, W).

    ``fine[n, b, o]`` meets ``coarse[n, a, i]`` through ``weight[a, b / groups, t]`` where
    ``o = i * stride - padding + t * dilation`` in each dimension; missing leading dimensions are
    1 x stride 1 x padding 0 x dilation 1.
    """

    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int
    coarse_channels: int | None
    fine_channels: int | None

    @property
    def taps(self) -> int:
        """Number of kernel elements, ``KD * KH * KW``."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @property
    def coarse_channels_per_group(self) -> int | None:
        return None if self.coarse_channels is None else self.coarse_channels // self.groups

    @property
    def fine_channels_per_group(self) -> int | None:
        return None if self.fine_channels is None else self.fine_channels // self.groups

    @property
    def channels_per_group(self) -> tuple[int | None, int | None]:
        """Coarse and fine channels of a group, None where not known."""
        return self.coarse_channels_per_group, self.fine_channels_per_group
