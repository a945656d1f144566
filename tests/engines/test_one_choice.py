"""What the model (``convgen/engines``) and the host's code of kernels decide alike.

Rates and constants stand in ``convgen/engines/cost.py`` alone; ``gpu_rates.cuh`` is rendered from
it. Of the compiled tiles of an ``mma`` gather both sides choose one: the rule's, unless a brief
form of the model, products and copies, promises more of another. Where tiles lie in shared memory
the host knows exactly and the model nearly: they may differ where two tiles are nearly alike.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import product

import numpy as np
import plans
import pytest
from interpreted import Library, compile_interpreted, engine_sources, mostly_long

from convgen.codegen.render import header_text
from convgen.engines import cost
from convgen.engines.mma.common import packed_call
from convgen.engines.mma.gather import _tile_of
from convgen.engines.problem import Call
from convgen.engines.simt.common import best_block
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache")

RATES = """
#include "convgen_abi.h"
#include "gpu_rates.cuh"
using namespace convgen;
CONVGEN_EXPORT int rates(int capability, double* found) {
  const GpuRates r = gpu_rates(capability);
  found[0] = r.clocks_per_ms, found[1] = r.product_clocks, found[2] = r.warpgroup_product_clocks;
  found[3] = r.fp64_warps, found[4] = r.level2_bytes, found[5] = r.bulk_bytes;
  found[6] = r.copy_bytes, found[7] = r.level2_capacity_bytes;
  return 0;
}
"""


def test_the_hosts_code_has_the_models_rates() -> None:
    sources = {"rates.cu": RATES, "gpu_rates.cuh": header_text("cuda/gpu_rates.cuh.j2")}
    sources["convgen_abi.h"] = header_text("common/convgen_abi.h")
    library = ctypes.CDLL(str(compile_interpreted("rates", sources, "plain")))
    for capability in (70, *cost.GPUS, 87, 103, 121):
        gpu = cost.gpu_of(capability)
        found = np.zeros(8)
        library.rates(ctypes.c_int(capability), ctypes.c_void_p(found.ctypes.data))
        assert found.tolist() == [
            gpu.clocks_per_ms,
            gpu.product_clocks,
            gpu.warpgroup_product_clocks,
            gpu.fp64_warps,
            gpu.level2_bytes,
            gpu.bulk_bytes,
            gpu.copy_bytes,
            gpu.level2_capacity_bytes,
        ]


CHOICE = """
CONVGEN_EXPORT int chosen_channels(const int64_t* sizes, int64_t* channels) {
  ConvgenCall call = {};
  call.batch = sizes[0], call.coarse_channels = sizes[1], call.fine_channels = sizes[2];
  for (int i = 0; i < 3; ++i) {
    call.coarse_extent[i] = sizes[3 + i], call.fine_extent[i] = sizes[6 + i];
  }
  const DeviceLimits limits = {132, 227 * 1024, 90};
  Choice choice;
  if (const int error = choose(call, limits, choice)) return error;
  *channels = choice.channels;
  return CONVGEN_OK;
}
"""
CHANNELS = [(8, 8), (16, 32), (32, 64), (64, 64), (48, 24), (96, 3), (128, 64)]
EXTENTS = {
    3: [(16, 16, 16), (33, 33, 33), (64, 64, 64), (20, 160, 128)],
    2: [(1, 7, 7), (1, 14, 14), (1, 56, 56), (1, 57, 57), (1, 224, 224)],
    1: [(1, 1, 100), (1, 1, 1000), (1, 1, 33333)],
}


def grid(spec: ConvSpec) -> Iterator[Call]:
    """Calls of a specification: their extents are of the coarse tensor."""
    g = spec.geometry
    for extent, (coarse, fine), batch in product(EXTENTS[spec.ndim], CHANNELS, (1, 8)):
        d, h, w = (
            (size - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding
            for size, stride, dilation, kernel, padding in zip(
                extent, g.stride, g.dilation, g.kernel, g.padding, strict=True
            )
        )
        yield Call(batch, coarse, fine, extent, (d, h, w))


@pytest.mark.parametrize(
    ("spec", "contraction", "mode", "same"),
    mostly_long(
        [
            (ConvSpec("conv3d", 3, 1, 1), "fprop", "tf32", 1),
            (ConvSpec("conv3d", 3, 1, 1), "dgrad", "bf16tc", 1),
            (ConvSpec("conv_transpose3d", 3, 2, 1), "fprop", "tf32", 1),
            (ConvSpec("conv_transpose3d", 3, 2, 1), "dgrad", "tf32", 1),
            (ConvSpec("conv_transpose3d", 3, 2, 1), "dgrad", "bf16tc", 1),
            (ConvSpec("conv_transpose3d", 2, 2), "dgrad", "tf32", 1),
            (ConvSpec("conv2d", 3, 1, 1), "fprop", "tf32", 0.9),
            (ConvSpec("conv2d", 1), "fprop", "bf16tc", 0.9),
            (ConvSpec("conv_transpose1d", 4, 2, 1), "dgrad", "tf32", 0.9),
        ],
        0,
    ),
)
def test_host_and_model_choose_the_same_tile_on_a_grid_of_calls(
    spec: ConvSpec, contraction: str, mode: str, same: float
) -> None:
    unit = plans.unit(spec, contraction, mode)
    schedule = unit.default().schedule
    assert len(schedule.tiles) > 1
    sources = engine_sources(spec, mode, (contraction,))
    sources[f"{contraction}_{mode}.cu"] += CHOICE
    library = Library(compile_interpreted("choice", sources, "plain", architecture="90a"))
    calls = list(grid(spec))
    differ = []
    for call in calls:
        sizes = [call.batch, call.coarse_channels, call.fine_channels]
        sizes += [*call.coarse_extent, *call.fine_extent]
        channels = np.zeros(1, np.int64)
        library("chosen_channels", np.array(sizes, np.int64), channels)
        met = packed_call(unit.problem, call)
        expected = _tile_of(unit.problem, schedule, met, cost.H200)
        if expected[1] != channels[0]:
            differ.append((call, expected, int(channels[0])))
    assert len(differ) <= (1 - same) * len(calls), differ


def test_plain_arithmetic_takes_the_fewest_channels_per_thread_that_hold_all() -> None:
    """``channels_per_thread`` of ``simt/gather.cu.j2`` and ``simt/wgrad.cu.j2``."""
    assert [best_block((8, 1), channels) for channels in (1, 2, 8, 12)] == [1, 8, 8, 8]
