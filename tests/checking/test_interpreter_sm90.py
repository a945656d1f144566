"""The interpreter's TMA, stmatrix and wgmma: what they compute, and every way of getting it wrong.

``test_interpreter_gpu.py`` runs the same sources on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreted import INOUT, OUTPUT, Fault, Library, compile_sources

from convgen.codegen.render import TEMPLATES

FOLDER = Path(__file__).parent / "interpreter"
IN_PROCESS = ("plain", "checked")
BOXES = 8


pytestmark = pytest.mark.usefixtures("shared_cache")


@cache
def library(source: str, mode: str) -> Library:
    return Library(compile_sources(mode, {source: (FOLDER / source).read_text()}, "90a"))


# ---- Boxes ----------------------------------------------------------------------------------


@dataclass
class Box:
    """A case of sm90.cu: which element of the tensor lies where in the box, or none."""

    size: int
    """Of an element, in bytes."""
    shape: tuple[int, ...]
    """Of the tensor, outermost first."""
    places: np.ndarray
    """For each element of the box, as it lies in shared memory: its index in the tensor, or -1."""

    @classmethod
    def of(cls, which: int) -> Box:
        numbers = np.zeros(25, "i4")
        library("sm90.cu", "plain")("describe", numbers, which, a0=OUTPUT)
        (size, rank, swizzle, first_row, box_bytes), extent, box, step, at = numbers.reshape(5, 5)
        indices = np.arange(extent[:rank].prod()).reshape(extent[:rank][::-1])
        axes = [at[i] + np.arange(0, box[i], step[i] if i else 1) for i in reversed(range(rank))]
        grid = np.meshgrid(*axes, indexing="ij")
        inside = np.ones(grid[0].shape, bool)
        for coordinates, n in zip(grid, indices.shape, strict=True):
            inside &= (coordinates >= 0) & (coordinates < n)
        nearest = [np.clip(c, 0, n - 1) for c, n in zip(grid, indices.shape, strict=True)]
        found = np.where(inside, indices[tuple(nearest)], -1)
        assert found.size * size == box_bytes
        vectors = found.reshape(-1, 16 // size)
        # 16-byte vectors are permuted by the line of 128 bytes in which they lie.
        own = np.arange(len(vectors))
        if swizzle:
            own = own ^ ((own // 8 + first_row) % (swizzle // 16))
        return cls(int(size), indices.shape, vectors[own].ravel())


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize("which", range(BOXES))
def test_a_box_lands_swizzled_with_zeros_outside_of_the_tensor(mode: str, which: int) -> None:
    box = Box.of(which)
    x = torch.randint(1, 1 << 15, box.shape, dtype={2: torch.int16, 4: torch.int32}[box.size])
    out = np.zeros(len(box.places) * box.size // 4, "u4")
    library("sm90.cu", mode)("load", x.numpy(), out, which, a1=OUTPUT)
    expected = np.where(box.places < 0, 0, x.numpy().ravel()[box.places])
    np.testing.assert_array_equal(out.view(expected.dtype), expected)


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize("which", [0, 5, 7])
def test_a_box_is_stored_but_for_what_lies_outside_of_the_tensor(mode: str, which: int) -> None:
    box = Box.of(which)
    y = torch.full(box.shape, -1, dtype=torch.int16)
    library("sm90.cu", mode)("store", y.numpy(), which, a0=INOUT)
    expected = np.full(y.numel(), -1, "i2")
    inside = box.places >= 0
    expected[box.places[inside]] = np.arange(len(box.places))[inside]
    np.testing.assert_array_equal(y.numpy().ravel(), expected)


def test_every_case_of_boxes_is_tested() -> None:
    with pytest.raises(Fault, match=r"\(-1\)"):
        library("sm90.cu", "plain")("describe", np.zeros(25, "i4"), BOXES)


def test_maps_that_the_driver_refuses() -> None:
    x = torch.zeros(64, dtype=torch.int16).numpy()
    call = library("sm90.cu", "plain")
    call("refused", x, -1)
    for which in range(14):
        with pytest.raises(Fault, match="invalid argument"):
            call("refused", x, which)
    with pytest.raises(Fault, match=r"\(-1\)"):
        call("refused", x, 14)


def test_a_map_of_the_cache_is_that_of_its_view_and_address() -> None:
    """Views that differ in one field, and more of them than the cache holds; then all again."""
    x = torch.zeros(1 << 14, dtype=torch.int16).numpy()
    for _ in range(2):
        for first in (0, 64):
            for which in (*range(300), 7, 0):
                library("maps.cu", "plain")("same", x[first:], which, 2)
    with pytest.raises(Fault, match="invalid argument"):
        library("maps.cu", "plain")("same", x[1:], 0, 1)
    library("maps.cu", "plain")("same", x, 0, 1)


# ---- Matrices -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize("transposed", [0, 1])
def test_matrices_are_stored_row_by_row(mode: str, transposed: int) -> None:
    out = np.zeros((2, 8, 8), "u2")
    library("sm90.cu", mode)("matrices", out, transposed, a0=OUTPUT)
    upper = np.arange(64).reshape(8, 8)
    expected = np.stack([upper, upper + 0x100])
    np.testing.assert_array_equal(out, expected.swapaxes(1, 2) if transposed else expected)


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize(
    ("symbol", "kind", "first", "pitch"),
    [
        ("rows_half_32", torch.float16, 0, 8),
        ("rows_bfloat16_64", torch.bfloat16, 5, 10),
        ("rows_float_96", torch.float32, 13, 8),
        ("rows_half_128", torch.float16, 2, 7),
        ("rows_float_32", torch.float32, 1, 0),
    ],
)
def test_products_of_rows_at_any_place(
    mode: str, symbol: str, kind: torch.dtype, first: int, pitch: int
) -> None:
    columns = 2 * int(symbol.split("_")[-1])
    depth = 128 // kind.itemsize
    count = first + (columns // 8 - 1) * pitch + 8
    generator = torch.Generator().manual_seed(0)
    # Small integers: exact in every type. TF32 takes no notice of the lowest bits.
    a, b = (
        torch.randint(-8, 9, (rows, depth), generator=generator).to(kind) for rows in (64, count)
    )
    rows = [first + n // 8 * pitch + n % 8 for n in range(columns)]
    expected = a.double() @ b.double()[rows].T
    if kind == torch.float32:
        a, b = (torch.where(x == 0, x, x * (1 + 2.0**-12)) for x in (a, b))
    out = np.full((64, columns), np.nan, "f4")
    library("sm90.cu", mode)(
        symbol,
        a.view(torch.int16).numpy(),
        b.view(torch.int16).numpy(),
        out,
        count,
        first,
        pitch,
        a2=OUTPUT,
    )
    np.testing.assert_array_equal(out, expected.float().numpy())


@dataclass(frozen=True)
class RowsOfK:
    """A call of sm90.cu's products over rows of K."""

    symbol: str
    row_bytes: int
    pitch: int
    chunk_pitch: int

    @property
    def columns(self) -> int:
        return 2 * int(self.symbol.split("_")[-1])

    @property
    def of_k(self) -> tuple[bool, bool]:
        """Whether the rows of either operand are those of K."""
        return "other" not in self.symbol, "one" not in self.symbol

    @property
    def rows(self) -> tuple[int, int]:
        """Of either operand, as it lies."""
        chunk = self.row_bytes // 2
        a = 32 * (64 // chunk) if self.of_k[0] else 64
        if not self.of_k[1]:
            return a, (self.columns // 8 - 1) * self.pitch + 8
        return a, 3 * self.pitch + 8 + (self.columns // chunk - 1) * self.chunk_pitch

    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Small integers: exact."""
        generator = torch.Generator().manual_seed(0)
        widths = (self.row_bytes // 2 if rows else 64 for rows in self.of_k)
        a, b = (
            torch.randint(-8, 9, (rows, width), generator=generator).to(torch.bfloat16)
            for rows, width in zip(self.rows, widths, strict=True)
        )
        return a, b

    def expected(self) -> np.ndarray:
        a, b = (x.double().numpy() for x in self.operands())
        k, chunk = np.arange(32)[:, None], self.row_bytes // 2
        m, n = np.arange(64), np.arange(self.columns)
        x = a[k + m // chunk * 32, m % chunk] if self.of_k[0] else a[m, k]
        if self.of_k[1]:
            y = b[k // 8 * self.pitch + k % 8 + n // chunk * self.chunk_pitch, n % chunk]
        else:
            y = b[n // 8 * self.pitch + n % 8, k]
        product: np.ndarray = (x.T @ y).astype("f4")
        return product


ROWS_OF_K = [
    RowsOfK("rows_of_k_one_16", 128, 8, 0),
    RowsOfK("rows_of_k_one_16", 64, 9, 0),
    # Chunks of columns one and two rows apart, as taps of a convolution are.
    RowsOfK("rows_of_k_both_96", 128, 10, 1),
    RowsOfK("rows_of_k_both_48", 64, 12, 2),
    # And whole chunks of 64 rows of K, as a contiguous tensor's channels are.
    RowsOfK("rows_of_k_other_64", 128, 8, 64),
    RowsOfK("rows_of_k_both_96", 128, 8, 64),
]


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize("call", ROWS_OF_K, ids=str)
def test_products_of_rows_of_k(mode: str, call: RowsOfK) -> None:
    out = np.full((64, call.columns), np.nan, "f4")
    a, b = (x.view(torch.int16).numpy() for x in call.operands())
    library("sm90.cu", mode)(
        call.symbol, a, b, out, call.row_bytes, *call.rows, call.pitch, call.chunk_pitch, a2=OUTPUT
    )
    np.testing.assert_array_equal(out, call.expected())


VECTORS = [("vectors_96", 16, 64), ("vectors_32", 8, 48)]
"""Functions of sm90.cu, the row at which their columns begin, and rows from vector to vector."""


def vectors_of(symbol: str, first: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of 16 elements of K, in units of four: [unit][row], and rows that run on."""
    generator = torch.Generator().manual_seed(0)
    rows = first + 3 * step + 2 * int(symbol.split("_")[-1])
    a, b = (
        torch.randint(-8, 9, shape, generator=generator).float()
        for shape in ((4, 64, 4), (rows, 4))
    )
    return a, b


@pytest.mark.parametrize("mode", IN_PROCESS)
@pytest.mark.parametrize(("symbol", "first", "step"), VECTORS)
def test_products_of_vectors_without_a_swizzle(
    mode: str, symbol: str, first: int, step: int
) -> None:
    a, b = vectors_of(symbol, first, step)
    columns = 2 * int(symbol.split("_")[-1])
    expected = sum(
        a[unit] @ b[first + unit * step : first + unit * step + columns].T for unit in range(4)
    )
    out = np.full((64, columns), np.nan, "f4")
    library("sm90.cu", mode)(symbol, a.numpy(), b.numpy(), out, len(b), first, step, a2=OUTPUT)
    np.testing.assert_array_equal(out, torch.as_tensor(expected).numpy())


# ---- What it finds --------------------------------------------------------------------------

STILL_READ = "that products or a TMA store of thread .* still read"
FAULTS = {
    "unaligned_destination": r"thread \(0, 0, 0\): tma_load .* multiple of 128 bytes",
    "box_beyond_shared_memory": r"box of 1024 bytes at .*, beyond its end",
    "box_beyond_the_tensor": r"reads out of bounds of a0: 128 bytes at offset 1024 of 1024",
    "coordinates_of_another_rank": r"5 coordinates and the map of a tensor of 3 dimensions",
    "box_at_an_odd_element": r"at element 4 of the innermost dimension: that is no multiple of 16",
    "map_never_encoded": r"a tensor map that was never encoded",
    "box_larger_than_expected": r"deadlock: .* 0 arrivals and -128 bytes are missing",
    "bytes_inside_alone": r"deadlock: .* 0 arrivals and -512 bytes are missing",
    "more_bytes_than_a_phase_counts": r"1048576 bytes that the phase waits for: at most 1048575",
    "barrier_not_fenced": r"mbarrier_fence\(\) is missing",
    "box_not_waited_for": r"reads shared memory that an asynchronous copy of thread \(0, 0, 0\)",
    "ended_before_it_landed": r"thread \(0, 0, 0\): the block ended before its copy",
    "load_over_unfenced_writes": r"copies into .* wrote without bulk_fence\(\) behind",
    "store_not_fenced": r"thread \(0, 0, 0\): reads .*asynchronous proxy.* without bulk_fence\(\)",
    "fence_by_another_thread": r"that thread \(1, 0, 0\) wrote without bulk_fence\(\) behind",
    "fence_before_the_writes": r"that thread \(0, 0, 0\) wrote without bulk_fence\(\) behind",
    "store_without_a_barrier": r"thread \(127, 0, 0\): race on shared memory: it reads 16 bytes",
    "store_of_unwritten_memory": r"nobody wrote: 16 bytes at offset \d+ of dynamic shared memory",
    "source_overwritten_too_early": f"writes shared memory {STILL_READ}",
    "source_of_the_newest_group_overwritten": f"writes shared memory {STILL_READ}",
    "source_overwritten_without_a_barrier": r"thread \(32, 0, 0\): race on shared memory: it write",
    "store_not_waited_for": r"had read shared memory: tma_store_wait is missing",
    "store_not_committed": r"had read shared memory: tma_store_wait is missing",
    "store_with_steps": r"a map whose elements are apart",
    "store_before_the_tensor": r"tma_store .* begins at coordinate -1",
    "store_beyond_the_tensor": r"writes out of bounds of a0: 128 bytes at offset 1024 of 1024",
    "matrices_at_odd_places": r"thread \(1, 0, 0\): store_matrices .* at a multiple of 16",
    "matrices_not_fenced": r"that thread \(0, 0, 0\) wrote without bulk_fence\(\) behind",
    "operand_not_fenced": r"reads .*asynchronous proxy.* without bulk_fence\(\) behind",
    "pitch_beyond_what_is_written": r"reads shared memory that nobody wrote: 16 bytes at offset",
    "operand_beyond_shared_memory": r"an operand out of bounds of shared memory: .* at offset 1\d+",
    "pitch_beyond_a_descriptor": r"operand B whose groups of rows are 2048 rows apart",
    "unaligned_operand": r"unaligned operand A at offset",
    "operand_without_a_barrier": r"race on shared memory: it reads 16 bytes",
    "box_multiplied_before_it_landed": r"reads shared memory that an asynchronous copy of thread",
    "stage_released_too_early": f"copies into shared memory {STILL_READ}",
    "stage_refilled_without_a_barrier": r"which products of thread \(\d+, 0, 0\) read without",
    "products_never_waited_for": r"it ended before its products .*: wgmma_wait is missing",
    "products_of_three_warps": r"thread \(96, 0, 0\): a wgmma .* not by its own: the block ended",
    "products_of_different_operands": r"unlike the rest of its warpgroup",
    "products_before_wgmma_begin": r"before any wgmma_begin",
    "copied_by_memcpy": r"nobody wrote: 512 bytes at offset 0 of shared array box",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_placed(name: str) -> None:
    x = torch.ones(256).numpy()
    with pytest.raises(Fault, match=FAULTS[name]) as caught:
        library("sm90_faults.cu", "checked")(f"fault_{name}", x, a0=INOUT)
    message = str(caught.value)
    assert re.match(rf"kernel {name}, block \(\d+, 0, 0\), thread \(\d+, 0, 0\): ", message)
    assert re.search(r"\(sm90_faults\.cu:\d+", message)


def test_every_kernel_of_faults_is_tested() -> None:
    source = (FOLDER / "sm90_faults.cu").read_text()
    assert set(re.findall(r"^FAULT\((\w+)\)", source, re.MULTILINE)) == set(FAULTS)


def test_header_is_replaced_whole() -> None:
    """Every name that sm90.cuh gives to kernels exists in the interpreter's."""
    names = r"^(?:__device__|template|struct|constexpr|using|cudaError_t).*?(\w+)(?= ?[({=<;]| = )"
    shipped = (TEMPLATES / "cuda" / "implicit_gemm" / "sm90.cuh").read_text()
    shipped = re.sub(r"template <.*>\n", "", shipped)
    wanted = set(re.findall(names, shipped, re.MULTILINE)) - {"driver_function"}
    assert {"tma_load", "TensorView", "Operand", "is_half", "shared_address", "wgmma"} <= wanted
    own = (TEMPLATES / "cuda" / "host" / "sm90.h").read_text()
    assert {name for name in wanted if not re.search(rf"\b{name}\b", own)} == set()
