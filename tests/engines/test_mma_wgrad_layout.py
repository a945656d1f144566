"""wgrad on the tensor cores: the blocks of taps that are chosen, and how rows are staged."""

from __future__ import annotations

from math import gcd

import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convgen.engines.mma.wgrad import WgradSchedule, wgrad_schedule
from convgen.engines.mma.wgrad_layout import elements_of, layout_of, wavefronts_of
from convgen.spec import Geometry
from convgen.spec.dtypes import MODES

AXIS = st.tuples(st.integers(1, 45), st.integers(1, 60), st.integers(0, 70), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(
    axes=st.tuples(AXIS, AXIS, AXIS),
    channels=st.tuples(*[st.none() | st.integers(4, 200)] * 2),
    mode=st.sampled_from(sorted(MODES)),
)
def test_windows_hold_what_taps_read(
    axes: tuple[tuple[int, ...], ...], channels: tuple[int | None, int | None], mode: str
) -> None:
    kernel, stride, padding, dilation = zip(*axes, strict=True)
    geometry = Geometry(kernel, stride, padding, dilation, 1, *channels)
    schedule = wgrad_schedule(plans.wgrad(geometry, mode))
    assert 1 <= schedule.taps_h <= kernel[1]
    assert 1 <= schedule.taps_w <= kernel[2]
    assert schedule.tiles
    elements = elements_of(mode)
    layout = layout_of(geometry, elements, schedule.taps_w)
    columns = layout.window_vectors * layout.vector * elements
    for position in range(4):
        for tap in range(schedule.taps_w):
            column = layout.shift + position * layout.position_columns + tap * layout.tap_columns
            assert column < columns
            # The column that is staged there is the one that the tap reads.
            staged = (column - layout.shift) // layout.position_columns * stride[2]
            staged += (column - layout.shift) % layout.position_columns * layout.column_step
            assert staged == position * stride[2] + tap * dilation[2]
    # Tiles start at positions that are multiples of four, blocks of taps anywhere.
    start = -padding[2] - layout.shift
    assert start % layout.column_align == 0 or layout.column_align == 1
    if kernel[2] > schedule.taps_w:
        assert schedule.taps_w * dilation[2] % layout.column_align == 0


@pytest.mark.parametrize("mode", ["tf32", "f16tc"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 7, 8, 16])
def test_loads_of_a_warp_have_no_bank_conflicts(mode: str, stride: int) -> None:
    """Where lanes may read rows of different channels: any stride, at the pitches chosen."""
    geometry = Geometry((1, 1, 17), (1, 1, stride), (0, 0, 0), (1, 1, 1), 1, None, None)
    elements = elements_of(mode)
    layout = layout_of(geometry, elements, 17)
    assert layout.position_columns == stride
    words = 4 // elements
    assert wavefronts_of(words, words, 992 + layout.coarse_residue) == words
    least = layout.vector
    assert wavefronts_of(layout.vector, layout.quad_pitch, 992 + layout.fine_residue) == least


def test_columns_that_no_tap_reads_are_not_staged() -> None:
    def layout(kernel: int, stride: int, dilation: int) -> tuple[int, int, int]:
        geometry = Geometry((1, 1, kernel), (1, 1, stride), (0,) * 3, (1, 1, dilation), 1, 8, 8)
        found = layout_of(geometry, 1, kernel)
        return found.position_columns, found.column_step, found.tap_columns

    assert layout(1, 2, 1) == (1, 2, 1)
    assert layout(3, 2, 2) == (1, 2, 1)
    assert layout(3, 4, 6) == (2, gcd(4, 6), 3)
    assert layout(2, 9, 1) == (2, 1, 1)


def test_groups_of_unknown_channels_are_taken_to_be_small() -> None:
    def schedule(groups: int) -> WgradSchedule:
        geometry = Geometry((3, 5, 7), (2, 2, 2), (1, 2, 3), (1, 1, 1), groups, None, None)
        return wgrad_schedule(plans.wgrad(geometry, "tf32"))

    assert (1, 1) in schedule(4).tiles
    assert (1, 1) not in schedule(1).tiles
    assert schedule(4).taps_h > schedule(1).taps_h
