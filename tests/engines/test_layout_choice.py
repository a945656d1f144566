"""channels_last calls: which ones implicit GEMMs take, and the transpositions of the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from implicit_gemms import library
from interpreted import Library, compile_interpreted, mostly_long

from convgen.codegen.render import TEMPLATES
from convgen.engines import abi
from convgen.spec import ConvSpec


@pytest.fixture(autouse=True, scope="module")
def environment(shared_cache: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", "132")
        yield


def layer(op: str, *rest: Any) -> ConvSpec:
    return ConvSpec(op, *rest)


# Specification, batch, channels in and out, extents; contractions, and whether they are taken, as
# an H200 has it.
ROWS = [
    (layer("conv3d", 1), 2, (32, 3), (128, 128, 128), {"fprop": False, "dgrad": False}),
    (layer("conv2d", 7, 2, 3), 32, (3, 64), (224, 224), {"fprop": False}),
    (layer("conv3d", 3, 2, 1), 4, (16, 32), (48, 48, 48), {"dgrad": False, "wgrad": False}),
    (layer("conv3d", 3), 1, (96, 3), (6, 482, 834), {"fprop": True, "dgrad": True, "wgrad": True}),
    (layer("conv3d", 3, 1, 1), 1, (16, 16), (224, 224, 144), {"fprop": True, "wgrad": True}),
    (layer("conv3d", 3, 1, 1), 2, (320, 320), (4, 4, 4), {"fprop": True, "dgrad": True}),
    (layer("conv2d", 1), 32, (24, 144), (56, 56), {"fprop": True, "dgrad": True, "wgrad": True}),
    (layer("conv2d", 1), 32, (320, 1280), (7, 7), {"fprop": True, "dgrad": True, "wgrad": True}),
]


def name_of(row: Any) -> str:
    return f"{row[0].name}-{row[2][0]}x{row[2][1]}"


@pytest.mark.parametrize("row", mostly_long([(row,) for row in ROWS], 1), ids=name_of)
def test_calls_of_few_channels_go_to_what_takes_them_sooner(row: Any) -> None:
    spec, batch, (given, made), extents, taken = row
    lead = (1,) * (3 - spec.ndim)
    fine, coarse = (*lead, *extents), (*lead, *spec.output_extents(extents))
    for contraction, expected in taken.items():
        loaded = library(spec, contraction, "bf16tc")
        symbol = f"convgen_{contraction}_bf16tc_implicit_gemm"
        for layout in (7, 3):
            numbers = abi.NUMBERS.pack(0, batch, made, given, *coarse, *fine, layout)
            call = bytes(abi.POINTERS.size) + numbers
            assert (loaded.expected_ms(symbol, call) > 0) == expected, (contraction, layout)


def transposing() -> Library:
    functions = "".join(
        f"CONVGEN_EXPORT int convgen_transpose_{name}(const ConvgenCall* call) {{\n"
        f"  return convgen::transpose<{kind}>(*call);\n}}\n"
        for name, kind in (("f64", "double"), ("f16", "convgen::half"))
    )
    files = {
        "transpose.cu": '#include "transpose.cuh"\n' + functions,
        "convgen_abi.h": (TEMPLATES / "common" / "convgen_abi.h").read_text(),
        "device.cuh": (TEMPLATES / "cuda" / "device.cuh").read_text(),
        "common.cuh": (TEMPLATES / "cuda" / "simt" / "common.cuh").read_text(),
        "transpose.cuh": (TEMPLATES / "cuda" / "simt" / "transpose.cuh").read_text(),
    }
    return Library(compile_interpreted("transpose", files, "checked"))


def test_matrices_are_transposed_narrow_ones_too() -> None:
    loaded = transposing()
    cases = (
        (2, 66, 130),
        (1, 34, 64),
        (2, 3, 2800),
        (2, 2800, 3),
        (1, 32, 300),
        (3, 33, 70),
        (2, 1, 5),
        (1, 5, 5),
        (1, 7, 1),
    )
    for kind, name in ((torch.float16, "f16"), (torch.float64, "f64")):
        for batch, rows, columns in cases:
            source = torch.randn(batch, rows, columns).to(kind)
            result = torch.full((batch, columns, rows), torch.nan, dtype=kind)
            for tensor, contents in ((source, 1), (result, 0)):
                loaded.register(tensor.data_ptr(), tensor.nbytes, "tensor", contents)
            pointers = abi.POINTERS.pack(source.data_ptr(), result.data_ptr(), 0, 0, 0, 0)
            numbers = abi.NUMBERS.pack(0, batch, rows, columns, 1, 1, 1, 1, 1, 1, 0)
            try:
                loaded.call(f"convgen_transpose_{name}", pointers + numbers)
            finally:
                loaded.forget()
            assert torch.equal(result, source.transpose(1, 2)), (batch, rows, columns)


REFUSED = [
    # Output padding of a kernel of one tap: its tensors have different extents.
    (layer("conv_transpose2d", 1, 1, 0, 1, 2), (7, 7), (8, 8)),
    # Windows beyond the tensor, which raw operators may ask for.
    (layer("conv2d", (9, 10), (9, 10)), (2, 3), (17, 34)),
]


@pytest.mark.parametrize("contraction", mostly_long(["fprop", "dgrad", "wgrad"], 0))
@pytest.mark.parametrize(("spec", "coarse", "fine"), REFUSED, ids=["output padding", "windows"])
def test_extents_that_do_not_fit_are_refused(
    spec: ConvSpec, coarse: tuple[int, int], fine: tuple[int, int], contraction: str
) -> None:
    loaded = library(spec, contraction, "bf16tc")
    symbol = f"convgen_{contraction}_bf16tc_implicit_gemm"
    numbers = abi.NUMBERS.pack(0, 2, 24, 40, 1, *coarse, 1, *fine, 7)
    assert loaded.expected_ms(symbol, bytes(abi.POINTERS.size) + numbers) < 0
