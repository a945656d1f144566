"""What hangs or fails on a GPU by the way a kernel is launched: the interpreter says so."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from interpreted import INOUT, OUTPUT, Fault, Library, compile_sources

SOURCE = "launch_faults.cu"
FOLDER = Path(__file__).parent / "interpreter"

pytestmark = pytest.mark.usefixtures("shared_cache")


@cache
def library(mode: str) -> Library:
    return Library(compile_sources(mode, {SOURCE: (FOLDER / SOURCE).read_text()}, "90a"))


FAULTS = {
    "claim_of_more_than_there_is": r"deadlock: .*threads 352-383 at "
    r"warpgroup_reg_alloc<224> with 168 "
    r"registers for each, while 768 are free of the block's 168 a thread \(launch_faults",
    "release_behind_a_claim": r"__syncthreads .*threads 128-383 at warpgroup_reg_alloc<224>",
    "release_of_more_than_there_is": r"warpgroup_reg_dealloc<176> .* by a thread that has 168",
    "claim_of_less": r"warpgroup_reg_alloc<160> .* by a thread that has 168",
    "claim_by_three_warps": r"thread \(96, 0, 0\): warpgroup_reg_dealloc<152> by other warps",
    "groups_of_two_minds": r"thread \(64, 0, 0\): warpgroup_reg_dealloc<144> .* which is in "
    "warpgroup_reg_dealloc<152>",
    "claim_by_half_a_warp": r"warpgroup_reg_dealloc .* with lanes missing from its warp",
    "reads_before_it_waits": r"reads 4 bytes at offset 0 of a0 before await_earlier_kernel\(\): "
    "the launch before writes it",
    "waits_in_another_thread": r"thread \(2, 0, 0\): writes 4 bytes .* before await_earlier_kernel",
    "never_waits": r"the block ended without await_earlier_kernel\(\)",
    "arrays_beside_much_dynamic_memory": r"uses shared array small, which makes 4 bytes of static",
    "arrays_beside_little_dynamic_memory": r"44000 bytes of static .* more than the 48 KiB",
    "barrier_of_too_many": r"mbarrier_init .* for 1048576 arrivals",
    "barrier_beyond_the_last": r"named_barrier_sync\(16, 384\) .*barriers are 1 to 15",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_placed(name: str) -> None:
    out = np.zeros(768, "f4")
    with pytest.raises(Fault, match=FAULTS[name]) as caught:
        library("checked")(f"fault_{name}", out, a0=INOUT)
    assert re.match(
        rf"kernel {name}, block \(\d+, 0, 0\), thread \(\d+, 0, 0\): ", str(caught.value)
    )


def test_every_kernel_of_faults_is_tested() -> None:
    source = (FOLDER / SOURCE).read_text()
    assert set(re.findall(r"^FAULT\((\w+),", source, re.MULTILINE)) == set(FAULTS)


@pytest.mark.parametrize("mode", ["plain", "checked"])
def test_registers_are_traded_and_an_early_kernel_waits_once(mode: str) -> None:
    out = np.zeros(768, "f4")
    library(mode)("trade", np.ones(1, "f4"), out, a1=OUTPUT)
    assert (out == 2).all()


@pytest.mark.parametrize("grid", [(1, 65536, 1), (1, 1, 65536), (0, 1, 1)])
def test_a_grid_that_is_too_large_is_refused(grid: tuple[int, int, int]) -> None:
    library("plain")("grid", 70000, 1, 1)
    with pytest.raises(Fault, match="invalid configuration"):
        library("plain")("grid", *grid)


def test_more_shared_memory_than_there_is_is_refused() -> None:
    library("plain")("shared", 227 * 1024)
    with pytest.raises(Fault, match="invalid argument"):
        library("plain")("shared", 227 * 1024 + 16)
