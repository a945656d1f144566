"""The CPU engine's kernels, compiled and called through the C boundary, against float64 torch."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plans
import pytest
import torch
from cpu_kernels import (
    CXX,
    TORCH,
    Library,
    Problem,
    check,
    compile_library,
    compute,
    make_problem,
    make_tensors,
    problem,
)

from convgen.codegen.render import render_kernels
from convgen.engines.cpu import GatherSchedule, ReduceSchedule
from convgen.spec import ConvSpec

FAST = ("-O2", "-march=native")
ALL = ("f32", "f64", "f16", "bf16")
T1, T2, T3 = "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
C1, C2, C3 = "conv1d", "conv2d", "conv3d"

PROBLEMS = [
    # Optimized builds; several tiles, blocks of rows and planes, ragged ends.
    problem(T3, (9, 18), (2, 3, 5, 7), (1, 4, 9, 33), kernel_size=3, stride=2, padding=1,
            output_padding=1, flags=FAST),
    problem(T3, (9, 18), (2, 3, 5, 7), (1, 4, 9, 33), kernel_size=3, stride=2, padding=1,
            output_padding=1, dtypes=ALL[1:], flags=FAST, long=True),
    problem(C3, (10, 17), (2, 4, 5, 6), (1, 3, 1, 1), kernel_size=3, padding=1, flags=FAST,
            long=True),
    # The other types, in builds without optimization, as all that follow.
    problem(C2, (9, 18), (2, 5, 7), (1, 9, 33), kernel_size=3, stride=2, padding=1,
            dtypes=ALL[1:]),
    # k < stride and gcd(dilation, stride) > 1: phases without taps. Negative effective padding.
    problem(T3, (2, 3), (2, 2, 3, 4), kernel_size=2, stride=3),
    problem(T3, (3, 2), (1, 3, 4, 5), kernel_size=3, stride=2, dilation=2, padding=1,
            output_padding=1, long=True),
    problem(T3, (2, 5), (2, 4, 4, 3), kernel_size=2, stride=3, padding=3, output_padding=2,
            long=True),
    problem(C2, (3, 2), (2, 4, 5), kernel_size=1, padding=2, stride=(1, 2)),
    # Output padding beyond the stride; everything different in every dimension.
    problem(T2, (4, 3), (1, 5, 4), kernel_size=3, stride=2, dilation=3, output_padding=2,
            long=True),
    problem(T3, (3, 4), (2, 3, 5, 4), kernel_size=(1, 3, 4), stride=(3, 1, 2), padding=(0, 2, 1),
            dilation=(1, 3, 2), output_padding=(2, 0, 1)),
    problem(C3, (4, 3), (2, 7, 6, 9), kernel_size=(2, 1, 3), stride=(2, 3, 1), padding=(1, 0, 2),
            dilation=(3, 1, 2), long=True),
    # Groups: depthwise, odd channels, one input or output channel per group.
    problem(T3, (5, 5), (2, 3, 4, 7), kernel_size=3, stride=2, padding=1, groups=5),
    problem(C3, (6, 6), (1, 5, 6, 19), kernel_size=3, padding=1, groups=6, dtypes=("f64",),
            long=True),
    problem(T1, (9, 15), (2, 21), kernel_size=4, stride=2, padding=1, groups=3, long=True),
    problem(C2, (6, 3), (2, 7, 8), kernel_size=3, stride=2, padding=1, groups=3, long=True),
    problem(C2, (3, 6), (1, 6, 7), kernel_size=2, groups=3, long=True),
    problem(C2, (1, 1), (3, 4, 1), (1, 40, 70), kernel_size=(3, 1), padding=(1, 0), long=True),
    # Pointwise; many channels; more fine channels than one block of columns.
    problem(C2, (37, 20), (2, 5, 7), kernel_size=1, dtypes=("f32", "f64")),
    # Few coarse channels: in channels_last the fine ones are in the lanes.
    problem(C3, (50, 3), (2, 3, 5, 7), kernel_size=1, dtypes=("f32", "bf16")),
    problem(C2, (48, 6), (2, 9, 30), kernel_size=1, groups=2, dtypes=("f64", "f16"), long=True),
    problem(C2, (70, 20), (1, 4, 4), (2, 8, 8), kernel_size=3, padding=1),
    # Output channels in the lanes: phases with and without taps, ragged lanes, groups, chains of
    # parts of the channels, positions of several blocks.
    problem(C2, (24, 26), (2, 9, 7), kernel_size=3, stride=2, padding=1, dilation=2,
            dtypes=("f32", "bf16"), long=True),
    problem(T2, (16, 24), (2, 5, 6), kernel_size=2, stride=(3, 2), padding=1, long=True),
    # Lines and planes of positions that a tap meets no row from; whole taps that meet none.
    problem(C3, (64, 24), (2, 2, 3, 9), (1, 1, 7, 2), kernel_size=(3, 5, 3), padding=(1, 2, 1),
            dtypes=("f32",)),
    problem(T3, (64, 24), (1, 3, 4, 6), kernel_size=(3, 1, 5), padding=(2, 0, 3),
            dtypes=("f32", "f64"), long=True),
    problem(T3, (17, 15), (1, 3, 4, 5), kernel_size=3, stride=2, padding=1, long=True),
    problem(C2, (34, 46), (2, 6, 7), (1, 13, 40), kernel_size=3, padding=1, groups=2),
    problem(C1, (300, 40), (3, 90), kernel_size=5, padding=4, dilation=2, dtypes=("f32", "f64"),
            long=True),
    # Positions in the lanes, weights as they lie: patches; tiles of several images and lines.
    problem(C2, (4, 100), (3, 8, 13), kernel_size=4, stride=4, dtypes=("f32", "bf16")),
    problem(C2, (40, 36), (5, 3, 7), kernel_size=3, padding=1, dtypes=("f32", "f64")),
    problem(T2, (64, 32), (3, 5, 9), kernel_size=1, groups=2, dtypes=("f32", "f16"), long=True),
    problem(C1, (20, 200), (2, 33), kernel_size=3, padding=1, stride=2, long=True),
    # Too many taps to unroll: along w only, or not at all; longest unrolled kernel.
    problem(C3, (2, 3), (1, 7, 6, 8), kernel_size=5, padding=2, stride=2),
    problem(T2, (3, 2), (2, 3, 4), kernel_size=(9, 8), stride=(4, 3), padding=2, long=True),
    problem(C1, (2, 3), (2, 90), kernel_size=80, padding=20, stride=3, long=True),
    problem(T1, (2, 3), (2, 9), kernel_size=70, stride=20, padding=7),
    problem(T1, (5, 4), (2, 50), kernel_size=16, stride=8, padding=4, flags=FAST, long=True),
    problem(C1, (3, 4), (2, 60), kernel_size=64, padding="same", long=True),
    # Reach of the taps beyond the extents: separate strips; windows outside of the input.
    problem(C2, (17, 17), (1, 9, 6), kernel_size=3, dilation=8, padding=8),
    problem(C2, (4, 4), (1, 9, 50), kernel_size=3, dilation=20, padding=20, groups=4, long=True),
    problem(C1, (3, 2), (2, 4), kernel_size=2, dilation=9, padding=9, long=True),
    # Long rows: blocks along w, several ranges of wgrad, several pieces of bgrad.
    problem(C1, (8, 9), (3, 5003), kernel_size=7, padding=3),
    problem(C1, (8, 9), (3, 5003), kernel_size=7, padding=3, dtypes=("f32", "f64"), flags=FAST,
            long=True),
    problem(C1, (1, 1), (2, 70001), kernel_size=3, stride=2),
    # Channels fixed at generation time, with their own register tiles.
    problem(C2, (3, 6), (2, 6, 20), kernel_size=3, padding=1, fixed=True),
    problem(T2, (12, 2), (2, 6, 5), kernel_size=2, stride=2, fixed=True, long=True),
    problem(T2, (10, 1), (1, 6, 9), kernel_size=3, fixed=True, long=True),
]  # fmt: skip

# The widths of AVX-512 and NEON, with 32 registers, on any processor.
for size in (64, 16):
    wide = ("-O1", "-march=native", f"-DCONVGEN_VECTOR_BYTES={size}", "-Wno-psabi")
    PROBLEMS += [
        problem(C2, (34, 96), (2, 6, 7), (1, 13, 40), kernel_size=3, padding=1, groups=2,
                flags=wide, long=True),
        problem(T2, (33, 64), (2, 5, 6), kernel_size=2, stride=(3, 2), padding=1, flags=wide,
                long=True),
        problem(C1, (70, 20), (3, 90), kernel_size=5, padding=4, dilation=2,
                dtypes=("f64", "bf16"), flags=wide, long=True),
    ]  # fmt: skip

if platform.machine() in ("x86_64", "AMD64"):
    PROBLEMS += [
        problem(T3, (9, 18), (1, 4, 9, 17), kernel_size=3, stride=2, padding=1, output_padding=1,
                flags=("-O1", f"-march={arch}"), long=True)
        for arch in ("x86-64", "x86-64-v3")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Problem], Library]:
    """Libraries by problem, each compiled once."""
    built: dict[tuple[Any, ...], Library] = {}

    def get(case: Problem) -> Library:
        key = (case.spec, case.dtypes, case.flags)
        if key not in built:
            folder = tmp_path_factory.mktemp("library")
            path = compile_library(case.spec, case.dtypes, folder, case.flags)
            built[key] = Library(path, case.spec)
        return built[key]

    return get


@pytest.mark.parametrize("case", PROBLEMS)
def test_values_and_gradients_match_float64(
    case: Problem, library: Callable[[Problem], Library]
) -> None:
    for dtype in case.dtypes:
        for shape in case.shapes:
            tensors = make_tensors(case.spec, case.channels, shape, dtype)
            for last in ("", "xwy", "x"):
                check(compute(library(case), tensors, dtype, last=last), tensors, dtype)


MAIN = PROBLEMS[0].values[0]
LONG = next(p.values[0] for p in PROBLEMS if p.values[0].shapes[0] == (3, 5003))


@pytest.mark.parametrize("case", [MAIN, LONG], ids=["blocks", "ranges"])
def test_bits_do_not_depend_on_threads_or_on_the_run(
    case: Problem, library: Callable[[Problem], Library]
) -> None:
    tensors = make_tensors(case.spec, case.channels, case.shapes[-1], "f32")
    for last in ("", "xwy"):
        first = compute(library(case), tensors, "f32", threads=1, last=last)
        for threads in (1, 2, 3, 5):
            again = compute(library(case), tensors, "f32", threads=threads, last=last)
            for name, value in first.items():
                assert torch.equal(value, again[name]), f"{name} differs with {threads} threads"


def test_without_bias_empty_phases_are_zero(library: Callable[[Problem], Library]) -> None:
    case = next(p.values[0] for p in PROBLEMS if "conv_transpose3d_k2_s3 " in p.values[0].name)
    tensors = make_tensors(case.spec, case.channels, case.shapes[0], "f32")
    tensors.bias.zero_()
    y = compute(library(case), tensors, "f32", bias=False)["y"]
    assert float(y[..., 2::3].abs().max()) == 0
    assert float(y[..., 0::3, 0::3, 0::3].abs().min()) > 0


def test_empty_batch_writes_zero_weight_and_bias_gradients(
    library: Callable[[Problem], Library],
) -> None:
    tensors = make_tensors(MAIN.spec, MAIN.channels, (0, 3, 4, 5), "f32")
    results = compute(library(MAIN), tensors, "f32")
    assert results["y"].numel() == 0
    assert float(results["gw"].abs().max()) == 0
    assert float(results["gb"].abs().max()) == 0


def test_sums_of_millions_of_terms_stay_accurate(library: Callable[[Problem], Library]) -> None:
    case = next(p.values[0] for p in PROBLEMS if p.values[0].shapes[0] == (2, 70001))
    spec = case.spec
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((3, 1, 1_000_000), generator=generator) + 1
    fine = torch.rand((3, 1, 2_000_001), generator=generator) + 1
    gw, gb = torch.full((1, 1, 3), float("nan")), torch.full((1,), float("nan"))
    library(case).run("wgrad", "f32", coarse=coarse, fine=fine, weight=gw)
    library(case).run("bgrad", "f32", coarse=coarse, bias=gb)
    wide = fine.double().unfold(2, spec.kernel_size[0], spec.stride[0])
    expected = torch.einsum("nai,nbit->abt", coarse.double(), wide)
    assert float(((gw - expected) / expected).abs().max()) < 2e-6
    assert float((gb - coarse.double().sum()).abs() / coarse.double().sum()) < 1e-6


def test_wrong_channel_counts_are_refused(library: Callable[[Problem], Library]) -> None:
    case = next(p.values[0] for p in PROBLEMS if p.values[0].fixed)
    lib = library(case)
    tensors = make_tensors(case.spec, case.channels, case.shapes[0], "f32")
    grad, x, weight = tensors.grad, tensors.x, tensors.weight
    for channels in ((5, 3), (6, 4)):
        for contraction in ("fprop", "dgrad", "wgrad"):
            code = lib.call(
                contraction, "f32", coarse=grad, fine=x, weight=weight, channels=channels
            )
            assert code == -2
    describe = lib.functions["convgen_error_string"]
    describe.restype = ctypes.c_char_p
    assert b"channel" in describe(-2)


@pytest.mark.long
def test_half_conversions_are_exact(tmp_path: Path) -> None:
    """Every half and bfloat16 survives a 1x1x1 kernel of weight 1; results round to even."""
    case = make_problem(C1, (1, 1), ((1, 1),), {"kernel_size": 1, "dtypes": ("f16", "bf16")})
    lib = Library(compile_library(case.spec, case.dtypes, tmp_path, case.flags), case.spec)
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in case.dtypes:
        for scale in (1.0, 0.33, 1.7):
            x = bits.view(TORCH[dtype]).view(1, 1, -1)
            weight = torch.full((1, 1, 1), scale).to(TORCH[dtype])
            y = torch.zeros_like(x)
            lib.run("fprop", dtype, coarse=y, fine=x, weight=weight)
            expected = (x.float() * weight.float()).to(TORCH[dtype])
            same = (y == expected) | (y.isnan() & expected.isnan())
            assert bool(same.all()), f"{dtype} x {scale}: {x[~same][:5]} -> {y[~same][:5]}"


SANITIZED = [
    make_problem(T3, (3, 9), ((1, 3, 4, 5),), {"kernel_size": 3, "stride": 2, "padding": 1}),
    make_problem(C2, (5, 3), ((2, 6, 17),), {"kernel_size": 3, "stride": 2, "padding": 1}),
    make_problem(C2, (2, 2), ((1, 5, 6),), {"kernel_size": 3, "dilation": 4, "padding": 4,
                                            "groups": 2}),
    make_problem(C2, (33, 40), ((2, 5, 7),), {"kernel_size": 3, "padding": 1}),
    make_problem(C2, (24, 48), ((2, 5, 7),), {"kernel_size": 1}),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD of the sanitizer")
@pytest.mark.parametrize("case", SANITIZED, ids=lambda case: case.name)
def test_memory_accesses_and_arithmetic_are_clean_under_sanitizers(
    case: Problem, tmp_path: Path
) -> None:
    found = subprocess.run([*CXX, "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    flags = ("-O0", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = os.environ | {"LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    library = compile_library(case.spec, ("f32",), tmp_path, flags)
    (shape,) = case.shapes
    tensors = make_tensors(case.spec, case.channels, shape, "f32")
    coarse, fine = tensors.grad, tensors.x
    if case.spec.transposed:
        coarse, fine = fine, coarse
    sizes = [
        int(case.spec.transposed), *coarse.shape[:2], fine.shape[1], tensors.weight.numel(),
        *[1] * (5 - coarse.dim()), *coarse.shape[2:],
        *[1] * (5 - fine.dim()), *fine.shape[2:],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(library), *map(str, sizes)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all contractions ran" in done.stdout


DRIVER = '''
"""Calls every contraction with exact-size allocations. Run with the sanitizer preloaded."""
import ctypes
import sys

library, *sizes = sys.argv[1:]
transposed, batch, coarse_channels, fine_channels, weights, *extents = map(int, sizes)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p


class Call(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "coarse fine weight bias workspace stream".split()),
        *((n, ctypes.c_int64) for n in "device batch coarse_channels fine_channels".split()),
        ("coarse_extent", ctypes.c_int64 * 3), ("fine_extent", ctypes.c_int64 * 3),
        *((n, ctypes.c_int64) for n in "channels_last epilogue".split()),
        *((n, ctypes.c_void_p) for n in "residual preactivation".split()),
    ]


def buffer(count):
    address = libc.malloc(ctypes.c_size_t(4 * count))
    (ctypes.c_float * count).from_address(address)[:] = [0.5] * count
    return address


def volume(e):
    return e[0] * e[1] * e[2]


coarse = buffer(batch * coarse_channels * volume(extents[:3]))
fine = buffer(batch * fine_channels * volume(extents[3:]))
functions = ctypes.CDLL(library)
for contraction in ("fprop", "dgrad", "wgrad", "bgrad", "wbgrad"):
    of_fine = contraction == "dgrad" or contraction == "wbgrad" and transposed
    bias = buffer(fine_channels if of_fine else coarse_channels)
    call = Call(coarse, fine, buffer(weights), bias, None, None, 2, batch, coarse_channels,
                fine_channels, (ctypes.c_int64 * 3)(*extents[:3]),
                (ctypes.c_int64 * 3)(*extents[3:]))
    size = functions[f"convgen_{contraction}_f32_workspace"]
    size.restype = ctypes.c_int64
    workspace = ctypes.c_void_p()
    bytes_needed = ctypes.c_size_t(size(ctypes.byref(call)))
    assert libc.posix_memalign(ctypes.byref(workspace), ctypes.c_size_t(256), bytes_needed) == 0
    call.workspace = workspace
    assert functions[f"convgen_{contraction}_f32"](ctypes.byref(call)) == 0
print("all contractions ran")
'''


def test_schedule_states_how_far_taps_are_unrolled() -> None:
    def unroll(contraction: str, **arguments: Any) -> str:
        schedule = plans.plan(ConvSpec.make(**arguments), contraction, "f32", "cpu").schedule
        assert isinstance(schedule, GatherSchedule | ReduceSchedule)
        return schedule.unroll

    assert unroll("fprop", kernel_size=4) == "full"
    assert unroll("dgrad", kernel_size=4, stride=2) == "full"
    assert unroll("dgrad", kernel_size=3, stride=3) == "inner"
    assert unroll("fprop", kernel_size=5) == "inner"
    assert unroll("wgrad", kernel_size=5) == "none"
    assert unroll("fprop", op=C1, kernel_size=100) == "none"
    assert unroll("dgrad", op=T1, kernel_size=20, stride=20) == "none"


@pytest.mark.parametrize("case", PROBLEMS[:8])
def test_rendered_sources_are_tidy(case: Problem) -> None:
    files, _ = render_kernels(case.spec, "cpu", ("f32",))
    for path, text in files.items():
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{path}:{number}: {line}"
            assert line == line.rstrip(), where
            assert "\t" not in line, where
            assert len(line) <= 100, where
        assert text.endswith("\n"), path
        assert "\n\n\n" not in text, path


def test_every_unrolled_tap_is_labelled_once() -> None:
    spec = ConvSpec.make(kernel_size=(2, 3, 4), stride=2, padding=1)
    files, _ = render_kernels(spec, "cpu", ("f32",))
    for contraction in ("fprop", "dgrad"):
        text = files[f"src/cpu/{contraction}_f32.cpp"]
        labels = [
            line.split("// kernel ")[1].split(" at ")[0]
            for line in text.splitlines()
            if "// kernel " in line
        ]
        expected = {f"({d}, {h}, {w})" for d in range(2) for h in range(3) for w in range(4)}
        assert len(labels) == len(expected)
        assert set(labels) == expected
