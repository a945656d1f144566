"""What one thread or warp of a gather computes, and what of it is unrolled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from convgen.engines.gather.axes import AXES, Axis
from convgen.engines.problem import Problem
from convgen.spec.documents import Length, OneOf, Range

STYLES = ("taps", "slab", "plane", "line", "none")
"""Ways of unrolling: see :class:`GatherSchedule`."""

# Output phases along X that one thread or warp computes; more would leave no register rows.
MAX_VARIANTS = 8
# X taps unrolled in one line; longer kernels loop over their taps.
LINE_LIMIT = 32

SCATTERED = "scattered"

Style = Annotated[str, OneOf(STYLES)]
RowAxis = Annotated[str, OneOf((*AXES, SCATTERED))]
Variants = Annotated[int, Range(1, MAX_VARIANTS)]


@dataclass(frozen=True)
class GatherSchedule:
    """fprop and dgrad: what one thread computes and what the template unrolls.

    ``unroll`` says what one staged tile serves and what is unrolled: ``taps`` (every tap of a
    phase), ``slab`` (the taps along R and W of one kernel index along the third axis), ``plane``
    (the taps of one kernel index along R), ``line`` (the taps along W of one (d, h)) or ``none``
    (one tap of each phase of W; loops over all others). ``row_axis`` is the
    axis of a thread's ``rows`` register rows, or ``scattered`` where no kernel window runs along D
    or H: rows are then positions far apart. ``variants`` phases of W are computed by one thread.
    ``channels`` lists the compiled output-channel blocks.
    """

    unroll: Style
    row_axis: RowAxis
    rows: Annotated[int, Range(1, 8)]
    variants: Variants
    channels: Annotated[tuple[Annotated[int, Range(1, 64)], ...], Length(1, 8)]

    @property
    def window_r(self) -> bool:
        """Whether a tile holds the window of all taps along R."""
        return self.unroll in ("taps", "slab")

    @property
    def window_y(self) -> bool:
        """Whether a tile holds the window of all taps along Y."""
        return self.unroll in ("taps", "plane")

    def planes(self, r: Axis) -> int:
        """Staged planes along R that the register rows read."""
        if self.window_r:
            return (self.rows - 1) * r.step + max(r.spans) + 1
        return self.rows


def row_axis_of(problem: Problem) -> str:
    """Along which axis register rows lie."""
    r, _, _ = problem.arranged
    return SCATTERED if max(problem.geometry.kernel[:2]) == 1 else r.name


def variants_of(problem: Problem) -> int:
    """Phases along X that one thread or warp computes."""
    _, _, x = problem.arranged
    return min(len(x.phases), MAX_VARIANTS)


def loops_over_taps(x: Axis) -> bool:
    """Whether the taps along X cannot be unrolled: there are too many, or too many phases."""
    return len(x.phases) > MAX_VARIANTS or max(x.counts) > LINE_LIMIT


def gather_refusal(problem: Problem, schedule: GatherSchedule) -> str:
    """Why no family has a gather with such fields, but for sizes; empty if one may."""
    style = schedule.unroll
    _, _, x = problem.arranged
    if schedule.row_axis != row_axis_of(problem):
        return f"register rows lie along {row_axis_of(problem)!r}"
    if schedule.variants != variants_of(problem):
        return f"a thread computes {variants_of(problem)} phases along W"
    if style == "none":
        if not loops_over_taps(x):
            return "a loop over the taps along W is for those that cannot be unrolled"
    elif len(x.phases) > MAX_VARIANTS:
        return f"{len(x.phases)} phases along W leave no register rows"
    elif max(x.counts) > LINE_LIMIT:
        return f"{max(x.counts)} taps along W are too many to unroll"
    elif style != "line" and max(problem.geometry.kernel[:2]) == 1:
        return "no window runs along D or H: all taps lie on one line"
    return ""
