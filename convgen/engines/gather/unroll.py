"""How fprop and dgrad are unrolled: passes, columns and weight slots of a gather.

Both contractions read an input around each output position. A *pass* is what one staged tile
serves; a *column* is one run of register rows loaded from it; a *slot* is the place of a tap's
weights in the packed array. All of it is plain data that a template renders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from convgen.engines.gather.axes import AXES, Axis, runs_along_batch
from convgen.engines.gather.schedule import GatherSchedule
from convgen.engines.problem import Problem
from convgen.spec.geometry import Triple
from convgen.spec.taps import Tap

RUN_TIME = Tap(-1, 0)
"""Stands for the one tap along an axis that a pass chooses at run time."""


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

    @property
    def loaded(self) -> int:
        """How many of the rows are read."""
        return self.used.bit_count()


@dataclass(frozen=True)
class PairStep:
    """A pair of neighbouring columns that is loaded (of the rows ``load``, a bit mask; 0 for none),
    then a column that taps read: this pair, or what lies ``between`` it and the one before."""

    pair: int
    load: int
    column: Column | None
    between: bool


@dataclass(frozen=True)
class PairedLine:
    """The columns of one line of a tile, in the order in which few pairs are held at once."""

    y: int
    count: int
    pairs: int
    steps: tuple[PairStep, ...]


@dataclass(frozen=True)
class Pass:
    """The unrolled arithmetic of one pass; ``name`` suffixes its function."""

    name: str
    label: str
    columns: tuple[Column, ...]


def _by_offset(x: Axis) -> dict[int, list[tuple[int, int]]]:
    """The taps of all phases of X by offset: ``{offset: [(phase, tap index)]}``, rising."""
    found: dict[int, list[tuple[int, int]]] = {}
    for variant, phase in enumerate(x.phases):
        for tap in phase.taps:
            found.setdefault(tap.offset, []).append((variant, tap.index))
    return dict(sorted(found.items()))


def window_words(x: Axis) -> tuple[int, ...]:
    """The words of two neighbouring inputs that the taps of an axis of one phase read.

    Counted from the word of the first one, which may be either half of it.
    """
    relative = [tap.offset - x.first_offset for tap in x.phases[0].taps]
    return tuple(sorted({(offset + odd) // 2 for offset in relative for odd in (0, 1)}))


def _loads(x: Axis, words: bool) -> list[tuple[int, list[tuple[int, int]]]]:
    """What lanes load of a line: columns and ``[(phase, tap index)]`` that each of them feeds.

    Of words of two inputs each has a slot of its own, whose taps follow from where lines begin.
    """
    if words:
        return [(word, [(0, word)]) for word in window_words(x)]
    first = x.first_offset
    return [(offset - first, members) for offset, members in _by_offset(x).items()]


def unroll(
    r: Axis,
    y: Axis,
    x: Axis,
    taps_r: tuple[Tap, ...],
    taps_y: tuple[Tap, ...],
    rows: int,
    row_step: int,
    words: bool = False,
) -> tuple[Column, ...]:
    """Taps ``taps_r x taps_y x`` (all of X) as columns of a tile that holds their whole window.

    Taps that share a (y, x) share a column, so that each input value is loaded once for all of
    them. Slots count taps in the order in which :func:`slot_order` lists them. With ``words``
    columns are :func:`window_words`.
    """
    if not taps_r:
        return ()  # these outputs are bias alone
    first_r = taps_r[0].offset
    first_y = taps_y[0].offset if taps_y else 0
    first_x = x.first_offset
    step_x = 1 if words else x.step
    columns = []
    slot = 0
    for tap_y, (relative, members) in product(taps_y, _loads(x, words)):
        used, uses = 0, []
        for tap_r in taps_r:
            first = tap_r.offset - first_r
            for m in range(rows):
                used |= 1 << (first + m * row_step)
            for variant, index_x in members:
                at = {r.name: str(tap_r.index), y.name: str(tap_y.index), x.name: str(index_x)}
                if words:
                    at[x.name] = f"word {index_x}"
                named = (name if at[name] == str(RUN_TIME.index) else at[name] for name in AXES)
                label = f"tap ({', '.join(named)})"
                uses.append(Use(variant, first, slot, label))
                slot += 1
        place = f"word {relative}" if words else f"{relative + first_x:+d}"
        columns.append(
            Column(
                y=tap_y.offset - first_y,
                residue=relative % step_x,
                column=relative // step_x,
                count=used.bit_length(),
                used=used,
                uses=tuple(uses),
                label=f"{y.name} {tap_y.offset:+d}, {x.name} {place}",
            )
        )
    return tuple(columns)


def paired_lines(columns: Sequence[Column], odd: int) -> tuple[PairedLine, ...]:
    """The columns of a unit by line, for lanes that load two neighbouring ones at a time.

    Column ``c`` is ``c + odd`` from where pairs begin: an even one is a pair, an odd one lies
    between two. Columns of one residue only (an input without stride).
    """
    lines = []
    by_line: dict[int, dict[int, Column]] = {}
    for column in columns:
        assert column.residue == 0
        by_line.setdefault(column.y, {})[column.column + odd] = column
    for y, found in by_line.items():
        steps = []
        most = max(at // 2 + at % 2 for at in found)
        used = [0] * (most + 1)
        for at, column in found.items():
            for pair in (at // 2, at // 2 + at % 2):
                used[pair] |= column.used
        for pair in range(most + 1):
            here, before = found.get(2 * pair), found.get(2 * pair - 1)
            if used[pair]:
                steps.append(PairStep(pair, used[pair], here, between=False))
            if before:
                steps.append(PairStep(pair, 0, before, between=True))
        (count,) = {column.count for column in found.values()}
        lines.append(PairedLine(y, count, most + 1, tuple(steps)))
    return tuple(lines)


@dataclass(frozen=True)
class Slot:
    """Whose weights a slot of packed weights has.

    ``tap`` is the flat kernel element, -1 for none. Of a word (:func:`window_words`) it is the
    line's first, ``word`` says which, and ``odd_r`` and ``odd_y`` whether the line lies at an odd
    offset along these axes.
    """

    tap: int
    word: int = 0
    odd_r: bool = False
    odd_y: bool = False


def slot_order(
    r: Axis,
    y: Axis,
    x: Axis,
    taps_r: tuple[Tap, ...],
    taps_y: tuple[Tap, ...],
    number: TapIndex,
    words: bool = False,
) -> list[Slot]:
    """The slots of :func:`unroll`."""
    slots = []
    for tap_y, (_, members) in product(taps_y, _loads(x, words)):
        for tap_r, (_, index) in product(taps_r, members):
            at = {r.name: tap_r.index, y.name: tap_y.index, x.name: 0 if words else index}
            if words:
                odd_r, odd_y = tap_r.offset % 2 == 1, tap_y.offset % 2 == 1
                slots.append(Slot(number(at), index, odd_r, odd_y))
            else:
                slots.append(Slot(number(at)))
    return slots


TapIndex = Callable[[dict[str, int]], int]


def tap_numbering(kernel: Triple) -> TapIndex:
    """Numbers kernel elements as the weight tensor lays them out (D, H, W)."""
    _, kh, kw = kernel

    def number(at: dict[str, int]) -> int:
        d, h, w = (at[name] for name in AXES)
        return (d * kh + h) * kw + w

    return number


def _word_taps(x: Axis) -> list[int]:
    """The tap along X of each input that words cover, from one before the first tap's on."""
    index = {tap.offset - x.first_offset: tap.index for tap in x.phases[0].taps}
    return [index.get(at, -1) for at in range(-1, 2 * window_words(x)[-1] + 2)]


def gather_context(
    problem: Problem, schedule: GatherSchedule, words: bool = False
) -> dict[str, Any]:
    """What a gather's template is given: axes, units, slots, regions and tables.

    With ``words`` lanes load :func:`window_words` instead of single inputs.
    """
    r, y, x = problem.arranged
    number = tap_numbering(problem.geometry.kernel)
    variants, style = schedule.variants, schedule.unroll
    groups = [x.phases[i : i + variants] for i in range(0, len(x.phases), variants)]
    units: dict[str, Pass] = {}
    all_slots: list[Slot] = []
    region_first = [0]
    phase_region = []

    def add_region(slots: list[Slot]) -> None:
        all_slots.extend(slots)
        region_first.append(len(all_slots))

    def add_unit(name: str, label: str, taps_r: tuple[Tap, ...], taps_y: tuple[Tap, ...]) -> None:
        if name in units:  # Phases that differ in what is staged alone share a unit.
            return
        row_step = r.step if schedule.window_r else 1
        columns = unroll(r, y, x, taps_r, taps_y, schedule.rows, row_step, words)
        units[name] = Pass(name, label, columns)

    for (phase_r, rp), (phase_y, yp) in product(enumerate(r.phases), enumerate(y.phases)):
        if style == "taps":
            phase_region.append(len(region_first) - 1)
            single = len(r.phases) * len(y.phases) == 1
            name = "" if single else f"_{r.name}{phase_r}_{y.name}{phase_y}"
            label = "" if single else f"{r.name} phase {phase_r}, {y.name} phase {phase_y}"
            add_unit(name, label, rp.taps, yp.taps)
            add_region(slot_order(r, y, x, rp.taps, yp.taps, number, words))
        elif style == "slab":
            phase_region.append(len(region_first) - 1)
            single = len(r.phases) == 1
            name = "" if single else f"_{r.name}{phase_r}"
            label = "" if single else f"{r.name} phase {phase_r}"
            add_unit(name, label, rp.taps, (RUN_TIME,))
            for tap_y in yp.taps:
                add_region(slot_order(r, y, x, rp.taps, (tap_y,), number, words))
        elif style == "plane":
            phase_region.append(len(region_first) - 1)
            single = len(y.phases) == 1
            name = "" if single else f"_{y.name}{phase_y}"
            label = "" if single else f"{y.name} phase {phase_y}"
            add_unit(name, label, (RUN_TIME,), yp.taps)
            for tap_r in rp.taps:
                add_region(slot_order(r, y, x, (tap_r,), yp.taps, number, words))
        elif style == "line":
            phase_region.append(len(region_first) - 1)
            add_unit("", "", (RUN_TIME,), (RUN_TIME,))
            for tap_r, tap_y in product(rp.taps, yp.taps):
                add_region(slot_order(r, y, x, (tap_r,), (tap_y,), number, words))
        else:
            for group in groups:
                phase_region.append(len(region_first) - 1)
                passes_x = max(len(p.taps) for p in group)
                for tap_r, tap_y, jx in product(rp.taps, yp.taps, range(passes_x)):
                    at = {r.name: tap_r.index, y.name: tap_y.index}
                    slots = [
                        Slot(number(at | {x.name: p.taps[jx].index}) if jx < len(p.taps) else -1)
                        for p in group
                    ]
                    add_region(slots + [Slot(-1)] * (variants - len(group)))

    residues = Counter((offset - x.first_offset) % x.step for offset in _by_offset(x))
    group_firsts = [min((t.offset for p in g for t in p.taps[:1]), default=0) for g in groups]
    if style == "none":
        span_x = max(
            max((p.taps[0].offset for p in g if p.taps), default=first) - first
            for g, first in zip(groups, group_firsts, strict=True)
        )
    else:
        span_x = max(t.offset for p in x.phases for t in p.taps) - x.first_offset
    if words:
        span_x = 2 * window_words(x)[-1]  # what is read is staged, by whichever half it begins
    return {
        "r": r,
        "y": y,
        "x": x,
        "axis_index": {axis.name: AXES.index(axis.name) for axis in problem.axes},
        "scattered": schedule.row_axis == "scattered",
        "groups_x": len(groups),
        "units": list(units.values()),
        "slot_tap": [slot.tap for slot in all_slots],
        "slots": all_slots,
        "word_taps": _word_taps(x) if words else [],
        "region_first": region_first,
        "phase_region": phase_region,
        "passes_x": [max(len(p.taps) for p in group) for group in groups],
        "group_firsts": group_firsts,
        "span_r": max(r.spans) if schedule.window_r else 0,
        "span_y": max(y.spans) if schedule.window_y else 0,
        "span_x": span_x,
        "first_x": x.first_offset,
        "samples_along_y": runs_along_batch(y),
        "recurring_residues": sum(columns > 1 for columns in residues.values()),
        "taps_per_pass": max(after - before for before, after in pairwise(region_first)),
        "output_is_coarse": problem.output == "coarse",
        "input": problem.input,
        "output": problem.output,
        # What an unrolled unit covers, and what chooses among several.
        "unit_scope": {
            "taps": "Every tap",
            "slab": f"The taps along {r.name} and {x.name} of one along {y.name}",
            "plane": f"The taps of one along {r.name}",
            "line": f"The taps along {x.name} of one ({r.name}, {y.name})",
        }.get(style),
        "unit_phase": {"taps": "block.phase", "slab": "phase_r"}.get(style, "phase_y"),
    }
