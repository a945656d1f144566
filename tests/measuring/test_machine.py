"""Clocks, ceilings and what is said of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convgen.checking.memory import poison
from convgen.measuring import machine, peak
from convgen.measuring.timing import Spread, clock_for, spread

CPU = torch.device("cpu")


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert spread([1.0, 2.0]).iqr_ms == 0.5


def test_settings_are_restored() -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark
    for tf32 in (True, False):
        with machine.settings(tf32, benchmark=True):
            assert (cudnn.allow_tf32, cudnn.benchmark) == (tf32, True)
        assert (
            cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            cudnn.benchmark,
        ) == before


def test_the_ceiling_of_a_cpu_is_what_its_vector_units_do(session_cache: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVGEN_CACHE_DIR", str(session_cache))
        patch.setattr(peak, "_SECONDS", 0.05)
        found = machine.ceilings(CPU, "f32", tf32=False)
        halves = machine.ceilings(CPU, "f16", tf32=False)
    assert (found.mode, halves.mode) == ("f32 FMA", "f32 FMA, for f16")
    # Beyond 16 lanes, two units and 10 GHz there is nothing.
    assert 1e8 < found.flops_per_s < torch.get_num_threads() * 6.4e11
    assert found.peak_ms(10**9) == pytest.approx(1e12 / found.flops_per_s)


def test_a_cpu_is_described_with_what_its_figures_depend_on() -> None:
    facts = machine.describe(CPU)
    assert facts["threads"] == torch.get_num_threads()
    assert not facts["onednn"] or facts["onednn"] in torch.__config__.show()
    assert set(facts["instructions"]) <= set(Path("/proc/cpuinfo").read_text().split())


@pytest.mark.gpu
def test_a_time_on_a_gpu_is_that_of_the_device() -> None:
    device = torch.device("cuda")
    clock = clock_for(device)
    a = torch.randn(4096, 4096, device=device)
    clock.time(lambda: a @ a)
    _, interval = clock.time(lambda: a @ a, cover_ms=0.05)
    clock.wait()
    # 137 GFLOP: more than any GPU does in 0.1 ms; the host returns long before.
    assert interval.ms > 0.1
    assert interval.host_ms < interval.ms


@pytest.mark.gpu
def test_poison_is_what_the_next_allocation_finds() -> None:
    device = torch.device("cuda")
    poison([(1 << 20,)], torch.float32, device)
    assert torch.empty(1 << 20, device=device).isnan().all()
