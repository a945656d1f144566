"""How fprop and dgrad are unrolled: passes, columns and weight slots of a gather.

Both contractions read an input around each output position. A *pass* is what one staged tile
serves; a *column* is one run of register rows loaded from it; a *slot* is the place of a tap's
weights in the packed array. All of it is plain data that a template renders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from math import gcd

from convgen.spec import Geometry
from convgen.taps import Phase, dgrad_phases, gather_taps, offset_range

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

    @property
    def first(self) -> tuple[int, ...]:
        """Smallest offset of each phase."""
        return tuple(offset_range(phase.taps)[0] for phase in self.phases)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of taps of each phase."""
        return tuple(len(phase.taps) for phase in self.phases)

    @property
    def spans(self) -> tuple[int, ...]:
        """Largest minus smallest offset of each phase."""
        ranges = (offset_range(phase.taps) for phase in self.phases)
        return tuple(high - low for low, high in ranges)


@dataclass(frozen=True)
class Use:
    """One tap's multiply-add: which accumulator, where in the column, which weight slot."""

    variant: int
    first: int
    slot: int
    label: str


@dataclass(frozen=True)
class Column:
    """A run of register rows at one (y, x) of the tile, and the taps that it feeds.

    ``residue`` and ``column`` place it in a line whose columns are laid out by residue.
    """

    y: int
    residue: int
    column: int
    count: int
    used: int
    uses: tuple[Use, ...]
    label: str


@dataclass(frozen=True)
class Unit:
    """The unrolled arithmetic of one phase along (R, Y); ``name`` suffixes its function."""

    name: str
    label: str
    columns: tuple[Column, ...]


def gather_axes(geometry: Geometry, contraction: str) -> tuple[Axis, Axis, Axis]:
    """The axes (D, H, W) of fprop or dgrad."""
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
    d, h, w = axes
    return d, h, w


def unroll(
    r: Axis, y: Axis, x: Axis, phase_r: int, phase_y: int, rows: int, tap_index: TapIndex
) -> tuple[tuple[Column, ...], list[int]]:
    """Every tap of one (R, Y) phase as columns of a tile that holds the phase's whole window.

    Returns the columns and, slot by slot, the kernel elements whose weights they read. Taps that
    share a (y, x) share a column, so that each input value is loaded once for all of them.
    """
    taps_r, taps_y = r.phases[phase_r].taps, y.phases[phase_y].taps
    if not taps_r:
        return (), []  # these outputs are bias alone
    first_r, first_y = r.first[phase_r], y.first[phase_y]
    first_x = min(offset_range(phase.taps)[0] for phase in x.phases if phase.taps)
    slots: list[int] = []
    columns = []
    by_x: dict[int, list[tuple[int, int]]] = {}
    for variant, phase in enumerate(x.phases):
        for tap in phase.taps:
            by_x.setdefault(tap.offset, []).append((variant, tap.index))
    for tap_y, offset_x in product(taps_y, sorted(by_x)):
        used, uses = 0, []
        for tap_r in taps_r:
            first = tap_r.offset - first_r
            for m in range(rows):
                used |= 1 << (first + m * r.step)
            for variant, index_x in by_x[offset_x]:
                index = tap_index({r.name: tap_r.index, y.name: tap_y.index, x.name: index_x})
                uses.append(Use(variant, first, len(slots), index.label))
                slots.append(index.flat)
        relative = offset_x - first_x
        columns.append(
            Column(
                y=tap_y.offset - first_y,
                residue=relative % x.step,
                column=relative // x.step,
                count=used.bit_length(),
                used=used,
                uses=tuple(uses),
                label=f"{y.name} {tap_y.offset:+d}, {x.name} {offset_x:+d}",
            )
        )
    return tuple(columns), slots


def unroll_line(x: Axis, rows: int) -> tuple[tuple[Column, ...], list[int]]:
    """The taps along X alone, for a tile that holds one (R, Y) tap: the slots give X indices."""
    first_x = min(offset_range(phase.taps)[0] for phase in x.phases if phase.taps)
    by_x: dict[int, list[tuple[int, int]]] = {}
    for variant, phase in enumerate(x.phases):
        for tap in phase.taps:
            by_x.setdefault(tap.offset, []).append((variant, tap.index))
    slots: list[int] = []
    columns = []
    for offset_x in sorted(by_x):
        uses = []
        for variant, index_x in by_x[offset_x]:
            uses.append(Use(variant, 0, len(slots), f"{x.name} {index_x}"))
            slots.append(index_x)
        relative = offset_x - first_x
        columns.append(
            Column(
                y=0,
                residue=relative % x.step,
                column=relative // x.step,
                count=rows,
                used=(1 << rows) - 1,
                uses=tuple(uses),
                label=f"{x.name} {offset_x:+d}",
            )
        )
    return tuple(columns), slots


@dataclass(frozen=True)
class TapNumber:
    """A kernel element: its flat index in the weight tensor, and a label for people."""

    flat: int
    label: str


TapIndex = Callable[[dict[str, int]], TapNumber]


def tap_numbering(kernel: Iterable[int]) -> TapIndex:
    """Numbers kernel elements as the weight tensor lays them out (D, H, W)."""
    _, kh, kw = kernel

    def number(at: dict[str, int]) -> TapNumber:
        d, h, w = (at[name] for name in AXES)
        return TapNumber((d * kh + h) * kw + w, f"({d}, {h}, {w})")

    return number
