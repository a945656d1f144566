"""What a kernel computes (:class:`Problem`), and what one call of it gives (:class:`Call`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from convgen.engines.gather.axes import Axis, arrange, gather_axes
from convgen.spec.compaction import Compaction, compaction_of
from convgen.spec.dtypes import KINDS
from convgen.spec.geometry import Geometry, Triple


@dataclass(frozen=True)
class Problem:
    """One contraction of a geometry in a dtype or math mode, as a kernel sees it.

    ``geometry`` is what the kernel's loops run over: the layer's own or, where the kernel packs
    what its taps meet of the fine tensor first, that of the ``compaction``.
    """

    geometry: Geometry
    contraction: str
    kind: str
    """A key of ``convgen.spec.dtypes.KINDS``."""
    compaction: Compaction | None = None

    @staticmethod
    def packed(geometry: Geometry, contraction: str, kind: str) -> Problem:
        """The problem of a kernel that compacts: dgrad, which writes, has none to pack."""
        compaction = None if contraction == "dgrad" else compaction_of(geometry)
        met = geometry if compaction is None else compaction.geometry
        return Problem(met, contraction, kind, compaction)

    @property
    def element_bytes(self) -> int:
        """Size of an element of the tensors."""
        return KINDS[self.kind].size_bytes

    @property
    def accumulator_registers(self) -> int:
        """32-bit registers of a sum."""
        return KINDS[KINDS[self.kind].accumulator].size_bytes // 4

    @cached_property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        """The axes (D, H, W) of fprop or dgrad."""
        return gather_axes(self.geometry, self.contraction)

    @cached_property
    def arranged(self) -> tuple[Axis, Axis, Axis]:
        """The axes (R, Y, X): register rows run along R, neighbouring lanes along X."""
        return arrange(self.axes)

    @property
    def output(self) -> str:
        """The tensor that fprop or dgrad writes: ``coarse`` or ``fine``."""
        return "coarse" if self.contraction == "fprop" else "fine"

    @property
    def input(self) -> str:
        """The tensor that fprop or dgrad gathers from."""
        return "fine" if self.contraction == "fprop" else "coarse"

    @property
    def output_channels(self) -> int | None:
        """Channels of a group that fprop or dgrad writes, None if not known."""
        if self.output == "coarse":
            return self.geometry.coarse_channels_per_group
        return self.geometry.fine_channels_per_group


@dataclass(frozen=True)
class Call:
    """The extents of one call: what a geometry leaves open. Channels are those of all groups."""

    batch: int
    coarse_channels: int
    fine_channels: int
    coarse_extent: Triple
    fine_extent: Triple

    def channels(self, tensor: str) -> int:
        """Channels of the ``coarse`` or the ``fine`` tensor."""
        return self.coarse_channels if tensor == "coarse" else self.fine_channels

    def extent(self, tensor: str) -> Triple:
        """Extents of the ``coarse`` or the ``fine`` tensor."""
        return self.coarse_extent if tensor == "coarse" else self.fine_extent
