"""Taps and phases against brute force over ``o = i * stride - padding + t * dilation``.

Each contraction is evaluated twice on small integers, exactly: once as a kernel does it, from the
lists that ``convgen.spec.taps`` gives, and once from the relation alone, over all (i, o, t).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from convgen.spec.taps import dgrad_phases, gather_taps, offset_range


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a problem."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    coarse: int
    fine: int


@st.composite
def problems(draw: st.DrawFn) -> tuple[Axis, ...]:
    """Problems in 1, 2 and 3 dimensions; the grids need not fit each other."""
    ndim = draw(st.integers(1, 3))
    extents = st.integers(1, 9 - 2 * ndim)
    axis = st.builds(
        Axis,
        kernel=st.integers(1, 6 - ndim),
        stride=st.integers(1, 4),
        padding=st.integers(0, 5),
        dilation=st.integers(1, 4),
        coarse=extents,
        fine=extents,
    )
    return tuple(draw(axis) for _ in range(ndim))


def integers(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Odd numbers: none is zero, so no missed or extra term goes unseen."""
    return 2 * np.random.default_rng(seed).integers(-9, 9, shape) + 1


def relation(axes: tuple[Axis, ...]) -> list[tuple[tuple[int, ...], ...]]:
    """All ``(i, o, t)`` inside the grids that meet, found without any modular arithmetic."""
    per_axis = [
        [
            (i, o, t)
            for i in range(a.coarse)
            for o in range(a.fine)
            for t in range(a.kernel)
            if o == i * a.stride - a.padding + t * a.dilation
        ]
        for a in axes
    ]
    return [tuple(zip(*meeting, strict=True)) for meeting in itertools.product(*per_axis)]


def tensors(axes: tuple[Axis, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        integers(1, tuple(a.coarse for a in axes)),
        integers(2, tuple(a.fine for a in axes)),
        integers(3, tuple(a.kernel for a in axes)),
    )


def inside(index: tuple[int, ...], array: np.ndarray) -> bool:
    return all(0 <= i < extent for i, extent in zip(index, array.shape, strict=True))


@settings(deadline=None)
@given(problems())
def test_fprop_gathers_what_the_relation_says(axes: tuple[Axis, ...]) -> None:
    coarse, fine, weight = tensors(axes)
    expected = np.zeros_like(coarse)
    for i, o, t in relation(axes):
        expected[i] += fine[o] * weight[t]

    taps = list(itertools.product(*(gather_taps(a.kernel, a.padding, a.dilation) for a in axes)))
    out = np.zeros_like(coarse)
    for i in np.ndindex(coarse.shape):
        for tap in taps:
            o = tuple(x * a.stride + t.offset for x, a, t in zip(i, axes, tap, strict=True))
            if inside(o, fine):
                out[i] += fine[o] * weight[tuple(t.index for t in tap)]
    np.testing.assert_array_equal(out, expected)


@settings(deadline=None)
@given(problems())
def test_dgrad_gathers_by_phase_what_the_relation_says(axes: tuple[Axis, ...]) -> None:
    coarse, fine, weight = tensors(axes)
    expected = np.zeros_like(fine)
    for i, o, t in relation(axes):
        expected[o] += coarse[i] * weight[t]

    out = np.zeros_like(fine)
    written = np.zeros_like(fine)
    phases = (dgrad_phases(a.kernel, a.stride, a.padding, a.dilation) for a in axes)
    for phase in itertools.product(*phases):
        taps = list(itertools.product(*(p.taps for p in phase)))
        counts = [math.ceil(a.fine / a.stride) for a in axes]
        for q in np.ndindex(*counts):
            o = tuple(x * a.stride + p.residue for x, a, p in zip(q, axes, phase, strict=True))
            if not inside(o, fine):
                continue
            written[o] += 1
            for tap in taps:
                i = tuple(x + t.offset for x, t in zip(q, tap, strict=True))
                if inside(i, coarse):
                    out[o] += coarse[i] * weight[tuple(t.index for t in tap)]
    np.testing.assert_array_equal(written, 1)
    np.testing.assert_array_equal(out, expected)


@settings(deadline=None)
@given(problems())
def test_wgrad_sums_what_the_relation_says(axes: tuple[Axis, ...]) -> None:
    coarse, fine, weight = tensors(axes)
    expected = np.zeros_like(weight)
    for i, o, t in relation(axes):
        expected[t] += coarse[i] * fine[o]

    out = np.zeros_like(weight)
    for tap in itertools.product(*(gather_taps(a.kernel, a.padding, a.dilation) for a in axes)):
        for i in np.ndindex(coarse.shape):
            o = tuple(x * a.stride + t.offset for x, a, t in zip(i, axes, tap, strict=True))
            if inside(o, fine):
                out[tuple(t.index for t in tap)] += coarse[i] * fine[o]
    np.testing.assert_array_equal(out, expected)


FACTS = {
    "kernel": st.integers(1, 12),
    "stride": st.integers(1, 12),
    "padding": st.integers(0, 20),
    "dilation": st.integers(1, 12),
}


@given(**FACTS)
def test_every_tap_belongs_to_one_phase(
    kernel: int, stride: int, padding: int, dilation: int
) -> None:
    phases = dgrad_phases(kernel, stride, padding, dilation)
    assert [phase.residue for phase in phases] == list(range(stride))
    assert sorted(tap.index for phase in phases for tap in phase.taps) == list(range(kernel))


@given(**FACTS)
def test_offsets_rise_within_a_phase_and_among_gather_taps(
    kernel: int, stride: int, padding: int, dilation: int
) -> None:
    lists = [phase.taps for phase in dgrad_phases(kernel, stride, padding, dilation)]
    for taps in [*lists, gather_taps(kernel, padding, dilation)]:
        offsets = [tap.offset for tap in taps]
        assert offsets == sorted(set(offsets))
        assert offset_range(taps) == ((offsets[0], offsets[-1]) if offsets else (0, 0))


@given(**FACTS)
def test_phases_that_no_tap_reaches_are_those_that_arithmetic_predicts(
    kernel: int, stride: int, padding: int, dilation: int
) -> None:
    reached = sum(1 for phase in dgrad_phases(kernel, stride, padding, dilation) if phase.taps)
    assert reached == min(kernel, stride // math.gcd(stride, dilation))


def test_kernel_equal_to_stride_has_one_tap_in_each_phase() -> None:
    phases = dgrad_phases(kernel=2, stride=2, padding=0, dilation=1)
    assert [[(tap.index, tap.offset) for tap in phase.taps] for phase in phases] == [
        [(0, 0)],
        [(1, 0)],
    ]
