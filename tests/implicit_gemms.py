"""Implicit GEMMs in the interpreter: rendering them, calls, bugs put into them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

import pytest
import torch
from interpreted import (
    INPUT,
    OPERANDS,
    OUTPUT,
    RESULT,
    Library,
    Problem,
    compile_interpreted,
)
from torch import Tensor

from convgen.codegen.render import headers, render_unit
from convgen.engines import abi
from convgen.engines.implicit_gemm.common import by_taps
from convgen.engines.implicit_gemm.gather import GATHER
from convgen.engines.implicit_gemm.wgrad import WGRAD
from convgen.engines.implicit_gemm.wgrad_quarters import PARTS, WGRAD_QUARTERS
from convgen.engines.implicit_gemm.wgrad_taps import WGRAD_TAPS
from convgen.engines.problem import Problem as Contraction
from convgen.engines.registry import AnyFamily, unit_of
from convgen.spec import ConvSpec

LAST = tuple(abi.CHANNELS_LAST)
LAYOUTS = ((), LAST, ("fine",), ("coarse", "weight"))
"""Tensors whose channels lie side by side."""

Bug = tuple[str, str, str, str]
"""File, what it says, what it says instead, what is reported. PLANTED is whether it is tried."""


def use_two_multiprocessors(patch: pytest.MonkeyPatch) -> None:
    """Two persistent thread blocks, with several tiles each."""
    patch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "2")


def compile_with_bugs(
    name: str,
    files: dict[str, str],
    unit: str,
    bugs: Iterable[Bug],
    architecture: str = "90a",
) -> Library:
    """A library with all bugs in it, and ``plant(n)`` to try the n-th; 0 for none."""
    for number, (file, old, new, _) in enumerate(bugs, 1):
        header = f"implicit_gemm/{file}.cuh"
        assert files[header].count(old) == 1, old
        files[header] = files[header].replace(old, new.replace("PLANTED", f"(planted == {number})"))
    files[unit] = "inline int planted = 0;\n" + files[unit]
    files[unit] += "CONVGEN_EXPORT int plant(int n) { return planted = n, 0; }\n"
    return Library(compile_interpreted(name, files, "checked", architecture=architecture))


def spec(op: str, kernel: int | tuple[int, ...], *rest: object, **more: object) -> ConvSpec:
    return ConvSpec(op, kernel, *rest, **more)  # type: ignore[arg-type]


def family_of(spec: ConvSpec, contraction: str, mode: str) -> AnyFamily:
    if contraction != "wgrad":
        return GATHER
    has_quarters = mode in PARTS and spec.geometry.taps > 1
    if has_quarters and not WGRAD_QUARTERS.accepts(Contraction(spec.geometry, contraction, mode)):
        return WGRAD_QUARTERS
    return WGRAD_TAPS if by_taps(spec.geometry) else WGRAD


def sources(spec: ConvSpec, contraction: str, mode: str, schedule: object = None) -> dict[str, str]:
    """By their paths below ``src/cuda``."""
    unit = unit_of(family_of(spec, contraction, mode), spec.geometry, contraction, mode)
    family = unit.family
    assert not family.accepts(unit.problem)
    files = {
        path.removeprefix("src/cuda/"): text
        for path, text in headers(unit, spec.has_epilogue).items()
    }
    plan = unit.with_schedule(schedule) if schedule else unit.default()
    return files | {f"{contraction}_{mode}.cu": render_unit(spec, unit, plan)}


MULTISTAGE_HOST = "implicit_gemm/multistage_host.cuh"
MULTISTAGE_TILES = ("2, 2, 4, 8, 2", "4, 1, 4, 8, 2", "4, 1, 4, 4, 2", "2, 2, 2, 4, 4")
"""All that are compiled: warps, tiles of each, CTAs (BlockTile)."""


def multistage_sources(spec: ConvSpec, contraction: str, mode: str, tile: str) -> dict[str, str]:
    """:func:`sources` of a gather with one tile for GPUs since sm_80, and no kernel of Hopper's."""
    files, unit = sources(spec, contraction, mode), f"{contraction}_{mode}.cu"
    files[unit], units = re.subn(r"ByDevice<Hopper, (.*)>;", r"\1;", files[unit])
    assert units == 1
    host = files[MULTISTAGE_HOST]
    assert all(f"BlockTile<{each}>" in host for each in MULTISTAGE_TILES)
    every = r"MultistageGemm<T, Conv, COARSE_INPUT, WidestTile[^;]*;"
    one = f"MultistageGemm<T, Conv, COARSE_INPUT, BlockTile<{tile}>>;"
    files[MULTISTAGE_HOST], aliases = re.subn(every, one, host)
    assert aliases == 1
    return files


@cache
def library(spec: ConvSpec, contraction: str, mode: str, schedule: object = None) -> Library:
    files = sources(spec, contraction, mode, schedule)
    return Library(compile_interpreted(spec.name, files, "checked", architecture="90a"))


def laid(tensor: Tensor, last: bool) -> Tensor:
    return tensor.movedim(1, -1).contiguous() if last else tensor.contiguous()


def solve(
    loaded: Library, given: Problem, layout: tuple[str, ...], family: str = "_implicit_gemm"
) -> dict[str, Tensor]:
    """Calls the contraction with some tensors' channels side by side, and returns those."""
    symbol, result = given.symbol + family, RESULT[given.contraction]
    stored = {name: laid(tensor, name in layout) for name, tensor in given.operands.items()}
    stored[result] = torch.full_like(stored[result], torch.nan)
    flags = sum(abi.CHANNELS_LAST[name] for name in layout)
    numbers = abi.NUMBERS.pack(0, *given.numbers, flags)
    size = loaded.workspace_bytes(symbol, bytes(abi.POINTERS.size) + numbers)
    scratch = torch.full((size + 255,), 0xFF, dtype=torch.uint8)
    workspace = (scratch.data_ptr() + 255) & -256 if size else 0
    for name, tensor in stored.items():
        contents = OUTPUT if name == result else INPUT
        loaded.register(tensor.data_ptr(), tensor.nbytes, name, contents)
    if size:
        loaded.register(workspace, size, "workspace", OUTPUT)
    addresses = [stored[name].data_ptr() if name in stored else 0 for name in OPERANDS]
    try:
        loaded.call(symbol, abi.POINTERS.pack(*addresses, workspace, 0) + numbers)
    finally:
        loaded.forget()
    out = stored[result]
    given.result.copy_(out.movedim(-1, 1) if result in layout else out)
    return stored
