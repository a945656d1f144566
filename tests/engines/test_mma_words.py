"""Gathers whose lanes load words of two 16-bit inputs as they lie in memory, interpreted.

Where strides are even (``WordOrder`` in ``cuda/mma/fragments.cuh``): which half of a word a
line begins in follows from the tensor's address and extents, and the weights are packed for it.
"""

from __future__ import annotations

from dataclasses import replace

import plans
import pytest
import torch
from interpreted import (
    Library,
    compile_interpreted,
    engine_sources,
    mostly_long,
    problem,
    shifted,
    solve,
)

from convgen.engines.gather.axes import gather_axes
from convgen.engines.gather.unroll import window_words
from convgen.engines.mma.fit import loads_words
from convgen.engines.problem import Problem
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache")


CONV, UP = "conv3d", "conv_transpose3d"
# Specification, dtype, style of unrolling; batch, channels in and out, extents (of a transposed
# convolution's gradient: out and in). Odd and even numbers of lines, planes, channels and samples,
# so that lines begin in either half; 32 channels or more, which lanes share out in eights.
Calls = tuple[tuple[int, tuple[int, int], tuple[int, ...]], ...]
CASES: list[tuple[ConvSpec, str, str, Calls]] = [
    (
        ConvSpec(CONV, 3, 2, 1),
        "bf16tc",
        "slab",
        ((2, (32, 9), (5, 7, 19)), (1, (64, 24), (4, 6, 8)), (2, (7, 3), (3, 5, 5))),
    ),
    (ConvSpec(CONV, 3, 2, 1), "f16tc", "taps", ((3, (33, 9), (3, 3, 35)), (1, (16, 8), (4, 3, 9)))),
    (ConvSpec(UP, 4, 2, 1), "bf16tc", "plane", ((2, (9, 32), (2, 3, 5)), (1, (3, 5), (1, 1, 1)))),
    (
        ConvSpec(CONV, (2, 3, 5), (2, 4, 4), (0, 1, 2), dilation=(1, 1, 3), groups=2),
        "f16tc",
        "line",
        ((2, (18, 6), (5, 7, 39)), (1, (66, 2), (2, 3, 15))),
    ),
    (
        ConvSpec(CONV, (1, 1, 6), 2, (0, 0, 2)),
        "bf16tc",
        "line",
        ((2, (35, 4), (3, 5, 17)), (1, (32, 8), (1, 1, 41))),
    ),
]


@pytest.mark.parametrize(
    ("case", "architecture"),
    mostly_long([(case, a) for case in CASES for a in ("80", "90a")], 2, 5),
    ids=lambda value: value if isinstance(value, str) else f"{value[0].name}-{value[2]}",
)
def test_words_of_neighbours_agree_with_float64(
    case: tuple[ConvSpec, str, str, Calls], architecture: str
) -> None:
    spec, kind, style, calls = case
    default = plans.plan(spec, "fprop", kind).schedule
    rows = 1 if default.row_axis == "scattered" else 2
    tiles = ((rows, 24), (1, 8)) if architecture == "90a" else ((rows, 8),)
    schedule = replace(default, unroll=style, tiles=tiles, granules=True)
    files = engine_sources(spec, kind, ("fprop",), {("fprop", kind): schedule})
    (unit,) = (name for name in files if name.startswith("fprop_"))
    assert "using Math = Neighbours<" in files[unit]
    name = f"words_{spec.name}_{kind}_{architecture}"
    loaded = Library(compile_interpreted(name, files, "checked", architecture=architecture))
    for seed, (batch, channels, extents) in enumerate(calls):
        given = problem(spec, "fprop", kind, extents, batch=batch, channels=channels, seed=seed)
        for elements in (0, 1, 6):
            given.operands["fine"] = shifted(given.operands["fine"], elements)
            solve(loaded, given)
            given.check()


@pytest.mark.long
def test_three_groups_beside_one_crew_agree_with_float64() -> None:
    """A crew alone tells of a buffer when the next one's copies are on their way."""
    spec, kind, style, calls = CASES[0]
    default = plans.plan(spec, "fprop", kind).schedule
    schedule = replace(default, unroll=style, tiles=((2, 24),), groups=3, granules=True)
    files = engine_sources(spec, kind, ("fprop",), {("fprop", kind): schedule})
    loaded = Library(compile_interpreted("words_three", files, "checked", architecture="90a"))
    for seed, (batch, channels, extents) in enumerate(calls):
        given = problem(spec, "fprop", kind, extents, batch=batch, channels=channels, seed=seed)
        solve(loaded, given)
        given.check()


@pytest.mark.parametrize("extents", [(5, 7, 19), (4, 6, 18)])
@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("at", [slice(0, 1), slice(-2, None)], ids=["first", "last"])
def test_nan_at_an_end_of_a_line_stays_in_its_line(
    at: slice, elements: int, extents: tuple[int, int, int]
) -> None:
    """A word may hold it beside an end of the next line, or of the next sample."""
    spec, kind = ConvSpec(CONV, 3, 2, 1), "bf16tc"
    default = plans.plan(spec, "fprop", kind).schedule
    schedule = replace(default, unroll="slab", tiles=((2, 8),), granules=True)
    files = engine_sources(spec, kind, ("fprop",), {("fprop", kind): schedule})
    loaded = Library(compile_interpreted("words_nan", files, "checked"))
    given = problem(spec, "fprop", kind, extents, batch=2, channels=(9, 4), seed=1)
    given.operands["fine"][0, ..., at] = torch.nan
    given.operands["fine"] = shifted(given.operands["fine"], elements)
    solve(loaded, given)
    # Position p reads columns 2p - 1 to 2p + 1; a word adds one on either side.
    columns = range(extents[2])[at]
    for p in range(given.result.shape[-1]):
        read = {2 * p - 1, 2 * p, 2 * p + 1} & set(columns)
        beside = {2 * p - 2, 2 * p + 2} & set(columns)
        if read:
            assert given.result[0, ..., p].isnan().all()
        elif not beside:
            assert given.result[0, ..., p].isfinite().all()
    assert given.result[1].isfinite().all()


def test_only_even_strides_load_words() -> None:
    """Elsewhere neighbouring positions begin in different halves."""
    assert loads_words(Problem(ConvSpec(CONV, 3, 2, 1).geometry, "fprop", "bf16tc"))
    assert loads_words(Problem(ConvSpec(UP, 3, (2, 4, 2), 1).geometry, "fprop", "f16tc"))
    assert not loads_words(Problem(ConvSpec(CONV, 3, 2, 1).geometry, "fprop", "tf32"))
    assert not loads_words(Problem(ConvSpec(CONV, 3, (1, 2, 2), 1).geometry, "fprop", "bf16tc"))
    assert not loads_words(Problem(ConvSpec("conv2d", 3, 2, 1).geometry, "fprop", "bf16tc"))
    assert not loads_words(Problem(ConvSpec(UP, 3, 2, 1).geometry, "dgrad", "bf16tc"))


@pytest.mark.parametrize(
    ("kernel", "dilation", "words"),
    [(1, 1, (0,)), (2, 1, (0, 1)), (3, 1, (0, 1)), (4, 1, (0, 1, 2)), (3, 4, (0, 2, 4))],
)
def test_window_words(kernel: int, dilation: int, words: tuple[int, ...]) -> None:
    """Both halves in which the first tap's input may lie are covered."""
    geometry = ConvSpec(CONV, (1, 1, kernel), 2, dilation=(1, 1, dilation)).geometry
    assert window_words(gather_axes(geometry, "fprop")[2]) == words
