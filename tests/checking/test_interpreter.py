"""The interpreter itself: it computes what a GPU computes, and finds what a GPU hides."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreted import INOUT, OUTPUT, Fault, Library, compile_sources

from convgen.building.errors import BuildError
from convgen.checking.interpret import MODES
from convgen.codegen.render import TEMPLATES

FOLDER = Path(__file__).parent / "interpreter"
IN_PROCESS = ("plain", pytest.param("debug", marks=pytest.mark.long), "checked")
"""``address`` needs a program of its own: see test_interpreter_engines.py."""


pytestmark = pytest.mark.usefixtures("shared_cache")


@cache
def library(source: str, mode: str) -> Library:
    return Library(compile_sources(mode, {source: (FOLDER / source).read_text()}))


def compile_edited(source: str, old: str, new: str, mode: str = "checked") -> Library:
    """A library of a source with a bug put in."""
    text = (FOLDER / source).read_text()
    assert text.count(old) == 1
    return Library(compile_sources(mode, {source: text.replace(old, new)}))


def nans(count: int, dtype: str = "f4") -> np.ndarray:
    return np.full(count, np.nan, dtype)


# ---- What it computes -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_shared_tile(mode: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x, w, y = rng.random(n + 2, "f4"), rng.random(3, "f4"), nans(n)
    library("tile.cu", mode)("tile", x, w, y, n, a2=OUTPUT)
    np.testing.assert_allclose(y, np.convolve(x, w[::-1], "valid"), rtol=1e-5)


@pytest.mark.long
def test_a_compiler_that_looks_for_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some distributions' define _FORTIFY_SOURCE. It ends the process."""
    compiler = os.environ["CONVGEN_TEST_CXX"]
    monkeypatch.setenv("CXX", f"{compiler} -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3")
    fortified = Library(compile_sources("plain", {"tile.cu": (FOLDER / "tile.cu").read_text()}))
    x, w, y = np.ones(66, "f4"), np.ones(3, "f4"), nans(64)
    fortified("tile", x, w, y, 64, a2=OUTPUT)
    assert (y == 3).all()


@pytest.mark.parametrize("mode", IN_PROCESS)
def test_shuffles_add_up_a_block(mode: str) -> None:
    x, sums = np.random.default_rng(0).random((5, 1000)), nans(5, "f8")
    library("warps.cu", mode)("reduce", x, sums, 1000, 5, a1=OUTPUT)
    np.testing.assert_allclose(sums, x.sum(1), rtol=1e-14)


@pytest.mark.parametrize("mode", IN_PROCESS)
def test_every_lane_gets_what_cuda_specifies(mode: str) -> None:
    out = np.full((64, 8), -1, "i4")
    library("warps.cu", mode)("lanes", out, a0=OUTPUT)
    lane = np.arange(64) % 32
    first = lane // 8 * 8
    expected = np.stack(
        [
            first + (lane + 1) % 8,
            np.where(lane - 3 < first, lane, lane - 3),
            np.where(lane + 3 >= first + 8, lane, lane + 3),
            lane ^ 5,
            np.full(64, sum(1 << i for i in range(32) if i % 3 == 0)),
            np.ones(64),
            np.zeros(64),
            np.where(lane < 16, 15, 16),
        ],
        axis=1,
    ).astype("i8")
    np.testing.assert_array_equal(out, expected.astype("u4").view("i4"))


@pytest.mark.parametrize("mode", IN_PROCESS)
def test_syncwarp_orders_a_warp(mode: str) -> None:
    out = np.full(64, -1, "i4")
    library("warps.cu", mode)("exchange", out, a0=OUTPUT)
    np.testing.assert_array_equal(out, (np.arange(64) ^ 1) + 2)


@pytest.mark.parametrize("mode", IN_PROCESS)
def test_asynchronous_copies_in_two_buffers(mode: str) -> None:
    x, y = np.random.default_rng(0).random((4, 64), "f4"), nans(64)
    library("warps.cu", mode)("pipeline", x, y, 4, a1=OUTPUT)
    # Chunk 1 is copied as "not valid": zeros.
    np.testing.assert_allclose(y, np.full(64, x[[0, 2, 3]].sum()), rtol=1e-5)


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize("begin", [0, 2])
def test_vectors_are_copied_up_to_a_byte(mode: str, begin: int) -> None:
    x = np.random.default_rng(0).random(17 * 4 + 4, "f4")
    x = x[-(x.ctypes.data // 4) % 4 :][: 17 * 4]
    y = nans(17 * 4)
    library("warps.cu", mode)("vectors", x, y, begin, a1=OUTPUT)
    bytes_of_x = np.where(np.arange(16) < np.arange(17)[:, None], x.view("u1").reshape(17, 16), 0)
    np.testing.assert_array_equal(y.view("u1").reshape(17, 16), bytes_of_x)


def test_blocks_and_threads_have_three_dimensions() -> None:
    out = np.zeros(12 * 40, "u4")
    library("warps.cu", "plain")("where", out, a0=OUTPUT)
    np.testing.assert_array_equal(out, (np.arange(12)[:, None] * 1000 + np.arange(40)).ravel())


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("bfloat16", "bfloat16")])
def test_conversions_round_as_the_gpu_does(name: str, dtype: str) -> None:
    # Every value of the narrow type, the midpoints between neighbours, and a step to either side.
    kind = getattr(torch, dtype)
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = patterns.view(kind).float()
    values = values[values.isfinite()].sort().values.double()
    middles = ((values[1:] + values[:-1]) / 2).float().numpy()
    x = np.concatenate(
        [
            values.float().numpy(),
            middles,
            np.nextafter(middles, np.float32(np.inf)),
            np.nextafter(middles, np.float32(-np.inf)),
            np.array([65519.9, 65520.0, 3.4e38, -3.4e38, np.inf, -np.inf, 1e-45, -1e-45], "f4"),
        ]
    )
    narrowed, widened = np.zeros(len(x), "u2"), nans(len(x))
    library("warps.cu", "plain")(f"convert_{name}", x, narrowed, widened, len(x))
    expected = torch.from_numpy(x).to(kind)
    torch.testing.assert_close(torch.from_numpy(widened), expected.float(), rtol=0, atol=0)
    np.testing.assert_array_equal(narrowed.view("i2"), expected.view(torch.int16).numpy())


def test_nan_converts_to_cudas_nan() -> None:
    for name in ("half", "bfloat16"):
        x, narrowed, widened = nans(1), np.zeros(1, "u2"), np.zeros(1, "f4")
        library("warps.cu", "plain")(f"convert_{name}", x, narrowed, widened, 1)
        assert narrowed[0] == 0x7FFF
        assert np.isnan(widened[0])


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize(("name", "depth"), [("tf32", 8), ("f16", 16), ("bf16", 16)])
def test_products_of_fragments(mode: str, name: str, depth: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = {"tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    # Small integers: exact in every type.
    a, b, c = (
        torch.randint(-8, 9, shape, generator=generator).to(kind)
        for shape, kind in (
            ((16, depth), kinds[name]),
            ((8, depth), kinds[name]),  # transposed, so that pairs of K are neighbours
            ((16, 8), torch.float32),
        )
    )
    words = [x.contiguous().view(torch.int32).numpy() for x in (a, b)]
    out = c.numpy().copy()
    symbol = f"product_{name}"
    library("tensor_core.cu", mode)(
        symbol, words[0], np.ascontiguousarray(words[1].T), out, a2=INOUT
    )
    expected = (c.double() + a.double() @ b.double().T).float().numpy()
    np.testing.assert_array_equal(out, expected)


def test_sums_in_tensor_cores_are_truncated() -> None:
    a, b = np.zeros((16, 8), "f4"), np.ones((8, 8), "f4")
    a[:, 0] = 1.5 * 2.0**-24  # three quarters of the last place of 1
    out = np.full((16, 8), 1.0, "f4")
    library("tensor_core.cu", "plain")("product_tf32", a, b, out, a2=INOUT)
    np.testing.assert_array_equal(out, np.ones((16, 8), "f4"))


def test_roundings_to_tf32() -> None:
    step = 2.0**-10
    x = np.array([1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, 1 + step / 4, np.inf], "f4")
    away, even = np.zeros(5, "u4"), np.zeros(5, "u4")
    library("tensor_core.cu", "plain")("rounded", x, away, even, 5, a1=OUTPUT, a2=OUTPUT)
    np.testing.assert_array_equal(
        away.view("f4"), np.array([1 + step, 1 + 2 * step, -1 - step, 1, np.inf], "f4")
    )
    np.testing.assert_array_equal(even.view("f4"), np.array([1, 1 + 2 * step, -1, 1, np.inf], "f4"))


def test_matrices_are_loaded_and_transposed() -> None:
    """Four of 8 x 8 16-bit values, whose rows lie 32 bytes apart."""
    x, out = np.arange(256, dtype="u2"), np.zeros((2, 4, 8, 8), "u2")
    library("tensor_core.cu", "checked")("matrices", x, out, 32, a1=OUTPUT)
    rows = x.reshape(4, 8, 8)
    np.testing.assert_array_equal(out, np.stack([rows, rows.swapaxes(1, 2)]))
    with pytest.raises(Fault, match=r"thread \(1, 0, 0\): load_matrices .* at a multiple of 16"):
        library("tensor_core.cu", "checked")("matrices", x, out, 24, a1=OUTPUT)


def test_a_product_needs_the_whole_warp() -> None:
    with pytest.raises(Fault, match=r"lonely_kernel, .*mma.sync .* lanes missing from its warp"):
        library("tensor_core.cu", "plain")("lonely", 32)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers at a multiple of 16 bytes."""
    numbers: np.ndarray = torch.rand(shape).numpy()
    assert numbers.ctypes.data % 16 == 0
    return numbers


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_a_ring_of_mbarriers_and_bulk_copies(mode: str, chunks: int) -> None:
    x, y = aligned((chunks, 64)), nans(64)
    library("pipeline.cu", mode)("ring", x, y, chunks, a1=OUTPUT)
    expected = x.sum(0)[(np.arange(64) + 1) % 64][np.arange(64) ^ 32]
    np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize("mode", IN_PROCESS)
def test_a_named_barrier_between_two_warps(mode: str) -> None:
    y = nans(32)
    library("pipeline.cu", mode)("handover", y, a0=OUTPUT)
    np.testing.assert_array_equal(y, np.arange(31, -1, -1))


def test_launches_that_cuda_refuses() -> None:
    call = library("warps.cu", "plain")
    with pytest.raises(Fault, match="invalid configuration"):
        call("oversized", 1025, 0)
    with pytest.raises(Fault, match="invalid argument"):
        call("oversized", 64, 228 * 1024)


def test_many_host_threads_agree_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = np.random.default_rng(0).random(10002, "f4"), np.ones(3, "f4")
    results = []
    for threads in ("1", "4"):
        monkeypatch.setenv("CONVGEN_INTERPRET_THREADS", threads)
        y = nans(10000)
        library("tile.cu", "plain")("tile", x, w, y, 10000)
        results.append(y)
    np.testing.assert_array_equal(*results)


# ---- What it finds --------------------------------------------------------------------------

FAULTS = {
    "ended_before_barrier": r"thread \(40, 0, 0\): divergent barrier: .*threads 0-39 wait",
    "two_barriers": r"divergent barrier: .*\(faults.cu:\d+\), but thread \(0, 0, 0\) waits at",
    "deadlocked": r"deadlock: .*threads 0-4, 6-31 at __syncwarp .*threads 5, 32-63 at __syncth",
    "diverged_warp": r"divergent warp collective: .*a warp shuffle .*a warp vote",
    "absent_lane": r"thread \(7, 0, 0\): a warp shuffle .*from lane 8, which takes no part",
    "unwritten_shared": r"nobody wrote: 4 bytes at offset 36 of shared array box \(256 bytes\)",
    "unwritten_dynamic": r"nobody wrote: 4 bytes at offset 2\d\d of dynamic shared memory",
    "past_dynamic": r"thread \(63, 0, 0\): writes out of bounds of dynamic shared memory",
    "unaligned_vector": r"thread \(7, 0, 0\): .*unaligned",
    "unaligned_copy": r"unaligned source of an asynchronous copy of 16 bytes",
    "vector_past_tensor": r"thread \(15, 0, 0\): reads out of bounds of a0: 3 bytes at offset 512",
    "no_barrier": r"reads shared memory that nobody wrote",
    "overwritten_too_early": r"race on shared memory: it .* without a barrier between",
    "warp_race": r"thread \(31, 0, 0\): (race|reads shared memory that nobody wrote)",
    "copy_not_waited_for": r"an asynchronous copy of thread \(\d+, 0, 0\) still fills",
    "copy_of_another_thread": r"reads shared memory that (nobody wrote|an asynchronous copy)",
    "copy_group_too_new": r"an asynchronous copy of thread \(\d+, 0, 0\) still fills",
    "past_tensor": r"block \(1, 0, 0\), thread \(63, 0, 0\): writes out of bounds of a0: .* of 512",
    "before_tensor": r"thread \(0, 0, 0\): reads out of bounds of a0: 4 bytes at offset -12",
    "two_blocks_write": r"block \(1, 0, 0\), .*race on global memory: .*of block \(0, 0, 0\) wrote",
    "overflows": r"thread \(11, 0, 0\): undefined behaviour: signed addition overflows",
    "past_registers": r"thread \(48, 0, 0\): undefined behaviour: array index out of bounds",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_placed(name: str) -> None:
    out = np.zeros(128, "f4")
    with pytest.raises(Fault, match=FAULTS[name]) as caught:
        library("faults.cu", "checked")(f"fault_{name}", out, a0=INOUT)
    message = str(caught.value)
    assert re.match(rf"kernel {name}, block \(\d+, 0, 0\), thread \(\d+, 0, 0\): ", message)
    # A place in the source, except where a thread ends.
    assert re.search(r"\(faults\.cu:\d+", message) or name == "ended_before_barrier"


def test_every_kernel_of_faults_is_tested() -> None:
    source = (FOLDER / "faults.cu").read_text()
    assert set(re.findall(r"^FAULT\((\w+)\)", source, re.MULTILINE)) == set(FAULTS)


@pytest.mark.parametrize(
    "name",
    ["ended_before_barrier", "two_barriers", "deadlocked", "diverged_warp", "absent_lane"],
)
def test_plain_builds_find_what_hangs(name: str) -> None:
    with pytest.raises(Fault, match=f"kernel {name}, "):
        library("faults.cu", "plain")(f"fault_{name}", np.zeros(128, "f4"), a0=INOUT)


def test_a_fault_does_not_disturb_the_next_launch() -> None:
    call = library("faults.cu", "checked")
    for _ in range(2):
        with pytest.raises(Fault, match="deadlock"):
            call("fault_deadlocked", np.zeros(128, "f4"), a0=INOUT)
        with pytest.raises(Fault, match="divergent barrier"):
            call("fault_two_barriers", np.zeros(128, "f4"), a0=INOUT)
    test_shared_tile("checked", 100)


def test_outputs_are_uninitialized_and_inputs_read_only() -> None:
    call = library("tile.cu", "checked")
    x, w, y = np.ones(66, "f4"), np.ones(3, "f4"), nans(64)
    with pytest.raises(Fault, match=r"reads global memory that nobody wrote: .* of a0"):
        call("tile", x, w, y, 64, a0=OUTPUT, a2=OUTPUT)
    with pytest.raises(Fault, match=r"writes an input: .* of a2"):
        call("tile", x, w, y, 64)


PLANTED = {
    "an off-by-one in a tap offset": (
        "tile[threadIdx.x + t] * w[t]",
        "tile[threadIdx.x + t + 1] * w[t]",
        "shared array tile|nobody wrote|out of bounds|undefined behaviour",
    ),
    "a missing barrier": ("  __syncthreads();\n", "", "nobody wrote|race on shared memory"),
    "an overrun of shared memory": (
        "i < TILE; i += blockDim.x",
        "i < TILE + 1; i += blockDim.x",
        "out of bounds",
    ),
    "a tensor read past its end": ("< n + TAPS - 1 ?", "< n + TAPS ?", "out of bounds of a0"),
    "a tensor written past its end": ("if (o >= n) return;", "", "out of bounds of a2"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug: str) -> None:
    old, new, message = PLANTED[bug]
    x, w, y = np.ones(102, "f4"), np.ones(3, "f4"), nans(100)
    with pytest.raises(Fault, match=message) as caught:
        compile_edited("tile.cu", old, new)("tile", x, w, y, 100, a2=OUTPUT)
    assert re.match(
        r"kernel tile_kernel, block \(\d, 0, 0\), thread \(\d+, 0, 0\)", str(caught.value)
    )


PLANTED_IN_PIPELINE = {
    "a wrong phase that has passed": (
        "mbarrier_wait(&full[stage], round % 2);",
        "mbarrier_wait(&full[stage], (round + 1) % 2);",
        r"thread \(0, 0, 0\): reads shared memory that "
        r"(nobody wrote|an asynchronous copy of thread \(64, 0, 0\) still fills)",
    ),
    "a wrong phase of the empty barrier": (
        "mbarrier_wait(&empty[stage], (round - 1) % 2);",
        "mbarrier_wait(&empty[stage], round % 2);",
        r"thread \(64, 0, 0\): (race on shared memory|.* beyond the 1 arrivals of phase 0)",
    ),
    "a phase that never comes": (
        "float sum = 0;\n  for (int chunk = 0; chunk < chunks;",
        "float sum = 0;\n  for (int chunk = 0; chunk <= chunks;",
        r"deadlock: .*threads 0-63 at mbarrier_wait for parity 1 of the mbarrier at offset 8 of "
        r"shared array full, in whose phase 1 1 arrivals and 0 bytes are missing",
    ),
    "a stage filled before it is empty": (
        "if (round > 0) mbarrier_wait(&empty[stage], (round - 1) % 2);",
        "",
        r"thread \(64, 0, 0\): (race on shared memory|.* beyond the 1 arrivals)",
    ),
    "an arrival that is missing": (
        "    mbarrier_arrive(&empty[stage]);",
        "    if (threadIdx.x != 3) mbarrier_arrive(&empty[stage]);",
        r"deadlock: .*phase 0 1 arrivals and 0 bytes are missing",
    ),
    "bytes that are not all expected": (
        "mbarrier_arrive_expect(&full[stage], CHUNK * sizeof(float));",
        "mbarrier_arrive_expect(&full[stage], CHUNK * sizeof(float) - 16);",
        r"deadlock: .*0 arrivals and -16 bytes are missing",
    ),
    "barriers used before all know of them": (
        "  __syncthreads();",
        "  if (threadIdx.x < CONSUMERS) named_barrier_sync(3, CONSUMERS);",
        r"thread \(64, 0, 0\): (uses the mbarrier|.*memory that is no mbarrier)",
    ),
    "a named barrier left out": (
        "  named_barrier_sync(1, CONSUMERS);",
        "",
        r"kernel ring_kernel, .*: (race on shared memory|reads shared memory that nobody wrote)",
    ),
    "a bulk copy out of bounds": (
        "x + chunk * CHUNK, CHUNK * sizeof(float)",
        "x + (chunk + 1) * CHUNK, CHUNK * sizeof(float)",
        r"reads out of bounds of a0: 256 bytes at offset 768 of 768 \(pipeline.cu:\d+\)",
    ),
}


@pytest.mark.parametrize("bug", PLANTED_IN_PIPELINE)
def test_a_bug_in_a_pipeline_is_caught(bug: str) -> None:
    old, new, message = PLANTED_IN_PIPELINE[bug]
    chunks = 3
    x, y = aligned((chunks, 64)), nans(64)
    with pytest.raises(Fault, match=message) as caught:
        compile_edited("pipeline.cu", old, new)("ring", x, y, chunks, a1=OUTPUT)
    assert str(caught.value).startswith("kernel ring_kernel, block (0, 0, 0), thread (")


# ---- What it compiles -----------------------------------------------------------------------


def test_what_is_missing_fails_to_compile_and_says_where_to_add_it() -> None:
    old = "y[o] = sum;"
    with pytest.raises(BuildError, match=r"not in the interpreter: add it to .*convgen_host"):
        compile_edited("tile.cu", old, "atomicAdd(y + o, sum);", "plain")


def test_device_header_is_replaced_whole() -> None:
    """Every name that device.cuh gives to kernels exists in the interpreter's prelude."""
    shipped = (TEMPLATES / "cuda" / "device.cuh").read_text()
    prelude = (TEMPLATES / "cuda" / "host" / "convgen_host.cuh").read_text()
    names = set(
        re.findall(
            r"^(?:inline |__device__|template|struct|class|constexpr|using|cuda\w+ ).*?"
            r"(\w+)(?= ?[({=]| = )",
            shipped,
            re.MULTILINE,
        )
    )
    assert {"widen", "narrow", "copy_async", "launch", "DeviceScope", "device_limits"} <= names
    assert "#define CONVGEN_DEVICE_CUH" in prelude
    missing = {name for name in names if not re.search(rf"\b{name}\b", prelude)}
    # Those are in half.h; only `launch`, which is replaced, calls this.
    assert missing <= {"bfloat16", "half", "can_await"}


def test_every_mode_says_what_it_is_for() -> None:
    assert set(MODES) == {"plain", "debug", "checked", "address"}
    assert all(mode.description for mode in MODES.values())


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("THREADS", "ABORT", "MULTIPROCESSORS", "SHARED_BYTES"):
        monkeypatch.delenv(f"CONVGEN_INTERPRET_{name}", raising=False)
