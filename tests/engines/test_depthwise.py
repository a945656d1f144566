"""Kernels of depthwise layers (``cuda/simt/depthwise.cuh``), interpreted; when they are taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import plans
import pytest
from interpreted import (
    Library,
    check_nonfinite,
    compile_interpreted,
    engine_sources,
    mostly_long,
    problem,
    solve,
    without_bias,
)

from convgen.codegen.render import TEMPLATES
from convgen.engines.depthwise.common import MOST_CHANNELS
from convgen.spec import ConvSpec


@pytest.fixture(autouse=True, scope="module")
def environment(shared_cache: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Blocks have several steps, and no more of them than that takes.
        patch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
        yield


def fixed(op: str, *rest: Any, groups: int, **more: Any) -> ConvSpec:
    """A layer of so many channels, for which no other sizes of kernels are compiled."""
    return ConvSpec(op, *rest, groups=groups, in_channels=groups, out_channels=groups, **more)


# Specification, dtype, contractions; batch, channels in and out, extents.
Case = tuple[ConvSpec, str, tuple[str, ...], tuple[int, tuple[int, int], tuple[int, ...]]]
GATHERS, ALL = ("fprop", "dgrad"), ("fprop", "dgrad", "wgrad")
CASES: list[Case] = [
    # Inside and borders, several warps of columns, samples that share one.
    (fixed("conv3d", 3, 1, 1, groups=2), "bf16", ALL, (2, (2, 2), (3, 10, 35))),
    # Eight phases, odd extents; two outputs of a group.
    (
        ConvSpec("conv_transpose3d", 3, 2, 1, 1, groups=2),
        "f32",
        ALL,
        (3, (2, 4), (3, 4, 5)),
    ),
    # Phases without taps, stride and dilation that differ.
    (
        fixed("conv_transpose2d", (2, 3), (3, 2), (1, 0), dilation=(1, 3), groups=3),
        "f64",
        ALL,
        (2, (3, 3), (4, 9)),
    ),
    # Taps of wgrad in two parts along H; windows longer than what lanes remember.
    (
        ConvSpec("conv2d", 9, 1, 4, groups=2),
        "f32",
        ALL,
        (1, (4, 2), (10, 41)),
    ),
    # Several warps of columns at once.
    (fixed("conv1d", 4, 1, 3, groups=3), "f32", ALL, (2, (3, 3), (150,))),
    # Rows along D alone.
    (fixed("conv3d", (5, 1, 1), 1, (2, 0, 0), groups=2), "f32", ALL, (2, (2, 2), (9, 3, 4))),
]


@pytest.mark.parametrize(
    "case",
    mostly_long([(case,) for case in CASES], 1),
    ids=lambda case: f"{case[0].name}-{case[1]}",
)
def test_depthwise_kernels_agree_with_float64(case: Case) -> None:
    spec, dtype, contractions, (batch, channels, extents) = case
    files = engine_sources(spec, dtype, contractions)
    for name, text in files.items():
        # No other kernel can take these calls.
        assert not name.endswith(".cu") or ": run_depthwise(*call, limits);" in text
    loaded = Library(compile_interpreted(f"depthwise_{spec.name}_{dtype}", files, "checked"))
    for contraction in contractions:
        read = channels[0] if spec.transposed == (contraction == "dgrad") else channels[1]
        if contraction != "wgrad" and read != spec.groups:
            continue
        given = problem(spec, contraction, dtype, extents, batch=batch, channels=channels)
        solve(loaded, given)
        given.check()


@pytest.mark.parametrize("case", CASES[1:3], ids=lambda case: f"{case[0].name}-{case[1]}")
def test_what_is_not_finite_comes_out_where_it_is_read(case: Case) -> None:
    spec, dtype, contractions, (batch, channels, extents) = case
    files = engine_sources(spec, dtype, contractions)
    loaded = Library(compile_interpreted(f"depthwise_{spec.name}_{dtype}", files, "checked"))
    for contraction in contractions:
        given = problem(spec, contraction, dtype, extents, batch=batch, channels=channels)
        check_nonfinite(loaded, spec, given)


def test_terms_are_not_rounded_to_the_last_place_of_a_large_bias() -> None:
    spec, dtype, contractions, (batch, channels, extents) = CASES[1]
    assert dtype == "f32"
    files = engine_sources(spec, dtype, contractions)
    loaded = Library(compile_interpreted(f"depthwise_{spec.name}_{dtype}", files, "checked"))
    given = problem(spec, "dgrad", dtype, extents, batch=batch, channels=channels)
    given.operands["coarse"].fill_(1)
    given.operands["weight"].fill_(3e-5)
    given.operands["bias"].fill_(1000)
    expected = without_bias(spec, "dgrad", given.operands) + 1000
    solve(loaded, given)
    # Half a unit in the last place of the result.
    assert float((given.result.double() - expected).abs().max()) <= 2.0**-15


def context(spec: ConvSpec, contraction: str, kind: str) -> dict[str, Any] | None:
    """What the template is given of the depthwise kernels, if a call may take them."""
    ((guest, plan),) = plans.unit(spec, contraction, kind).guests
    assert guest.name == "depthwise"
    return None if plan is None else guest.context(plan)


def test_they_are_rendered_where_a_call_may_be_depthwise() -> None:
    def rendered(spec: ConvSpec) -> list[bool]:
        return [context(spec, each, "f32") is not None for each in ALL]

    assert rendered(ConvSpec("conv3d", 3, groups=4)) == [True] * 3
    assert rendered(ConvSpec("conv3d", 3)) == [False] * 3
    assert rendered(ConvSpec("conv3d", 3, groups=4, in_channels=4, out_channels=8)) == [
        True,
        False,
        True,
    ]
    assert rendered(ConvSpec("conv3d", 3, groups=4, in_channels=8, out_channels=8)) == [False] * 3
    # More channels of the one tensor than are worth reading the other anew for.
    assert rendered(ConvSpec("conv3d", 3, groups=4, in_channels=4, out_channels=64)) == [False] * 3
    # Long windows without neighbours that share them are staged.
    assert rendered(ConvSpec("conv1d", 31, groups=4)) == [False] * 3
    # More taps than are unrolled.
    assert rendered(ConvSpec("conv3d", 13, groups=4)) == [False, False, True]


@pytest.mark.parametrize(("kind", "width"), [("f32", 1), ("f64", 2)])
def test_a_thread_keeps_no_more_sums_than_registers_allow(kind: str, width: int) -> None:
    for kernel in (1, 3, 5, 7, (1, 3, 3), (7, 1, 1), (1, 1, 8), 11):
        for stride in (1, 2, 3):
            spec = ConvSpec("conv3d", kernel, stride, groups=2)
            for contraction in GATHERS:
                found = context(spec, contraction, kind)
                assert found is not None
                outputs = math.prod(found["rows"])
                sums = outputs * math.prod(found["phases"]) * width
                assert sums <= 16 or outputs == 1
            found = context(spec, "wgrad", kind)
            assert found is not None
            assert math.prod(found["taps"]) * width <= 64
            parts = math.prod(
                -(-k // t) for k, t in zip(spec.geometry.kernel, found["taps"], strict=True)
            )
            assert parts == found["parts"]


def test_the_model_and_the_kernels_agree_on_the_channels() -> None:
    header = (TEMPLATES / "cuda" / "simt" / "depthwise.cuh").read_text()
    assert f"constexpr int DEPTHWISE_RATIO = {MOST_CHANNELS};" in header
