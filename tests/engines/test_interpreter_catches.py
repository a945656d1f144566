"""Bugs put into the rendered CUDA sources: the interpreter says where each of them is."""

from __future__ import annotations

import re

import pytest
from interpreted import (
    LIMITS,
    Fault,
    Library,
    Problem,
    compile_interpreted,
    engine_sources,
    problem,
    solve,
)

from convgen.spec import ConvSpec

BUGGY = ConvSpec("conv_transpose3d", 3, 2)
DTYPE = "f32"
CALL = (2, (5, 6), (3, 5, 9))
"""Batch, channels in and out, input extents."""

pytestmark = pytest.mark.usefixtures("shared_cache")


def plant(contraction: str, file: str, pattern: str, replacement: str) -> Library:
    """The checked library with the first match of a pattern replaced in one file."""
    sources = engine_sources(BUGGY, DTYPE, (contraction,), small=True)
    text, count = re.subn(pattern, replacement, sources[file], count=1)
    assert count == 1
    path = compile_interpreted(f"buggy_{contraction}", {**sources, file: text}, "checked")
    return Library(path)


def call_of(contraction: str) -> Problem:
    batch, channels, extents = CALL
    return problem(BUGGY, contraction, DTYPE, extents, batch=batch, channels=channels)


@pytest.mark.parametrize("contraction", ["fprop", "dgrad"])
def test_an_off_by_one_in_a_tap_offset_is_caught(contraction: str) -> None:
    buggy = plant(
        contraction,
        f"{contraction}_f32.cu",
        r"const Acc\* column = tile \+ 1;",
        "const Acc* column = tile + 2;",
    )
    given = call_of(contraction)
    try:
        solve(buggy, given)
    except Fault as fault:
        assert re.match(rf"kernel {contraction}_kernel<\d+>, block .*, thread ", str(fault))  # noqa: PT017
    else:
        assert given.error() > 100 * LIMITS[DTYPE]


@pytest.mark.parametrize("contraction", ["fprop", "dgrad", "wgrad"])
def test_a_missing_barrier_is_caught(contraction: str) -> None:
    buggy = plant(contraction, f"{contraction}_f32.cu", r"__syncthreads\(\);", "")
    with pytest.raises(
        Fault,
        match=rf"^kernel {contraction}_kernel<\d+>, block \(\d+, 0, 0\), thread \(\d+, 0, 0\): "
        r"(race on shared memory|reads shared memory that).*\(\w+\.cuh?:\d+",
    ):
        solve(buggy, call_of(contraction))


@pytest.mark.parametrize("contraction", ["fprop", "dgrad", "wgrad"])
def test_an_overrun_of_shared_memory_is_caught(contraction: str) -> None:
    """The launch asks for less than the kernel uses."""
    buggy = plant(
        contraction,
        f"{contraction}_f32.cu",
        r"dim3\(s\.threads\), s\.shared_bytes, device",
        "dim3(s.threads), s.shared_bytes / 4, device",
    )
    with pytest.raises(
        Fault,
        match=rf"^kernel {contraction}_kernel<\d+>, block \(\d+, 0, 0\), thread \(\d+, 0, 0\): "
        r"writes (out of bounds|beyond the end) of dynamic shared memory",
    ):
        solve(buggy, call_of(contraction))


def test_a_wait_for_the_wrong_group_of_copies_is_caught() -> None:
    buggy = plant("dgrad", "dgrad_f32.cu", r"copy_wait<1>\(\)", "copy_wait<2>()")
    with pytest.raises(Fault, match=r"^kernel dgrad_kernel<\d+>, .* asynchronous copy of thread"):
        solve(buggy, call_of("dgrad"))
