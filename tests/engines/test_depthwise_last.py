"""Depthwise layers in channels_last (``cuda/simt/depthwise_last*.cuh``), interpreted."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from implicit_gemms import LAST, solve
from interpreted import (
    Library,
    Problem,
    check_nonfinite,
    compile_interpreted,
    engine_sources,
    mostly_long,
    problem,
    without_bias,
)

from convgen.engines import abi
from convgen.spec import ConvSpec
from convgen.specialize import render

BOTH = ("coarse", "fine")


@pytest.fixture(autouse=True, scope="module")
def environment(shared_cache: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Blocks have several steps, and no more of them than that takes.
        patch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "1")
        yield


def layer(op: str, *rest: Any, groups: int, outputs: int = 1, **more: Any) -> ConvSpec:
    """A layer of so many channels, each of which has some outputs."""
    return ConvSpec(
        op, *rest, groups=groups, in_channels=groups, out_channels=groups * outputs, **more
    )


# Specification, dtype; batch, extents.
Case = tuple[ConvSpec, str, tuple[int, tuple[int, ...]]]
ALL = ("fprop", "dgrad", "wgrad")
CASES: list[Case] = [
    # Vectors of four channels, tasks that end beyond both extents, several tasks of a thread.
    (layer("conv2d", 3, 1, 1, groups=12), "bf16", (3, (13, 27))),
    # Phases; two outputs of a channel, whose kernels may lie side by side.
    (layer("conv_transpose2d", 3, 2, 1, 1, groups=10, outputs=2), "f32", (2, (4, 5))),
    # Eight phases, and one channel at a time.
    (layer("conv_transpose3d", 3, 2, 1, 1, groups=3), "f32", (2, (3, 4, 5))),
    # Two pieces of the channels, the second of which is not full; a stride.
    (layer("conv2d", (3, 2), 2, 1, groups=132), "f16", (1, (6, 9))),
    # Phases without taps, stride and dilation that differ.
    (
        layer("conv_transpose2d", (2, 3), (3, 2), (1, 0), dilation=(1, 3), groups=6),
        "f64",
        (2, (4, 9)),
    ),
    # wgrad's taps in parts; lines that no position reads; padding beyond the kernel's reach.
    (layer("conv2d", 7, 1, 9, dilation=2, groups=8), "f32", (1, (5, 18))),
    # Planes and lines that stay loops; more parts of taps than a block has.
    (layer("conv3d", (5, 3, 3), (1, 2, 1), (2, 1, 1), groups=16), "bf16", (2, (3, 6, 11))),
    (layer("conv2d", 3, 2, 1, groups=4, outputs=2), "f64", (2, (7, 8))),
    (layer("conv1d", 5, 1, 2, dilation=3, groups=8), "f16", (3, (41,))),
    (layer("conv3d", (3, 1, 1), 1, (1, 0, 0), groups=4), "f32", (2, (5, 3, 9))),
    # Weights of which shared memory holds few channels' at once; long lines of taps.
    (layer("conv2d", 31, 1, 15, groups=20), "f32", (1, (6, 20))),
]


def name_of(case: Case) -> str:
    return f"{case[0].name}-{case[1]}"


@cache
def library(spec: ConvSpec, dtype: str) -> Library:
    files = engine_sources(spec, dtype, ALL, small=True)
    return Library(compile_interpreted(f"depthwise_last_{spec.name}_{dtype}", files, "checked"))


def given_of(case: Case, contraction: str) -> Problem:
    spec, dtype, (batch, extents) = case
    channels = (spec.in_channels or 1, spec.out_channels or 1)
    return problem(spec, contraction, dtype, extents, batch=batch, channels=channels)


def serves(spec: ConvSpec, contraction: str) -> bool:
    """Whether the tensor that is read has one channel to a group."""
    coarse, fine = spec.geometry.channels_per_group
    return {"fprop": fine, "dgrad": coarse, "wgrad": 1}[contraction] == 1


@pytest.mark.parametrize("case", mostly_long([(case,) for case in CASES], 1), ids=name_of)
def test_tensors_are_read_and_written_as_they_lie(case: Case) -> None:
    spec, dtype, _ = case
    loaded = library(spec, dtype)
    for contraction in ALL:
        if not serves(spec, contraction):
            continue
        for layout in (LAST, BOTH) if spec.out_channels != spec.in_channels else (LAST,):
            given = given_of(case, contraction)
            solve(loaded, given, layout, "")
            given.check()


@pytest.mark.parametrize("case", mostly_long([(CASES[1],), (CASES[5],)], 0), ids=name_of)
def test_what_is_not_finite_comes_out_where_it_is_read(case: Case) -> None:
    spec, dtype, _ = case
    for contraction in ALL:
        if serves(spec, contraction):
            given = given_of(case, contraction)
            check_nonfinite(
                library(spec, dtype), spec, given, lambda to, each: solve(to, each, LAST, "")
            )


def test_terms_are_not_rounded_to_the_last_place_of_a_large_bias() -> None:
    case = CASES[1]
    spec, dtype, _ = case
    given = given_of(case, "dgrad")
    given.operands["coarse"].fill_(1)
    given.operands["weight"].fill_(3e-5)
    given.operands["bias"].fill_(1000)
    expected = without_bias(spec, "dgrad", given.operands) + 1000
    solve(library(spec, dtype), given, LAST, "")
    # Half a unit in the last place of the result.
    assert float((given.result.double() - expected).abs().max()) <= 2.0**-15


def test_the_library_says_which_calls_it_takes_so() -> None:
    case = CASES[1]
    loaded = library(case[0], case[1])
    for contraction in ("dgrad", "wgrad"):
        given = given_of(case, contraction)
        for layout in ((), LAST, BOTH, ("coarse",), ("fine", "weight")):
            flags = sum(abi.CHANNELS_LAST[name] for name in layout)
            call = bytes(abi.POINTERS.size) + abi.NUMBERS.pack(0, *given.numbers, flags)
            assert loaded.takes_layout(given.symbol, call) == (set(BOTH) <= set(layout))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*CONVGEN_INTERPRET")
def test_a_package_transposes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, memory formats and gradients, beside torch, also of tensors that begin anywhere."""
    monkeypatch.setenv("CONVGEN_INTERPRET", "checked")
    spec = ConvSpec.make("conv2d", kernel_size=3, padding=1, groups=8, activation="silu")
    package = tmp_path / "interpreted_depthwise"
    for path, text in render(spec, ["cuda"], ["f64"]).items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("interpreted_depthwise")
    layouts = importlib.import_module("interpreted_depthwise._kernels")

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a tensor is transposed")

    for name in ("as_first", "as_last"):
        monkeypatch.setattr(layouts, name, refuse)
    for outputs, shift in ((8, 0), (16, 0), (8, 1)):
        memory = torch.randn(2 * 5 * 6 * 8 + shift, dtype=torch.float64)[shift:]
        x = memory.view(2, 5, 6, 8).permute(0, 3, 1, 2).requires_grad_()
        w, b = (torch.randn(shape, dtype=x.dtype) for shape in ((outputs, 1, 3, 3), (outputs,)))
        leaves = [x, w.requires_grad_(), b.requires_grad_()]
        y, expected = module.conv2d(*leaves), F.silu(F.conv2d(*leaves, padding=1, groups=8))
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        needed = leaves if outputs == 8 else leaves[1:]
        found, wanted = (torch.autograd.grad(out.square().sum(), needed) for out in (y, expected))
        for each, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(each, other)
