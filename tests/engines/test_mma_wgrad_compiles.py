"""wgrad on the tensor cores: that nvcc compiles it without spills."""

from __future__ import annotations

import subprocess
from pathlib import Path

import plans
import pytest
from interpreted import engine_sources

from convgen.building import toolchain
from convgen.spec import ConvSpec

UP, CONV = "conv_transpose3d", "conv3d"
COMPILED = [
    (ConvSpec(UP, 3, in_channels=48, out_channels=48), "tf32"),
    (ConvSpec(UP, (3, 5, 7), in_channels=32, out_channels=16), "f16tc"),
    (ConvSpec(UP, 2, 2, in_channels=64, out_channels=32), "bf16tc"),
    (ConvSpec(UP, 3, 2, 1, 1), "tf32x3"),
    (ConvSpec(CONV, 3, 1, 1), "tf32"),
    (ConvSpec(UP, (3, 5, 7), 2, (1, 2, 3), 1, 1, 4), "tf32"),
    (ConvSpec("conv_transpose1d", 16, 8, 4), "tf32"),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("spec", "mode", "architecture"),
    [(*unit, a) for unit in COMPILED for a in ("80", "90a")],
    ids=lambda x: getattr(x, "name", x),
)
def test_kernels_compile_without_spills(
    spec: ConvSpec, mode: str, architecture: str, tmp_path: Path
) -> None:
    compiler = toolchain.find_cuda()
    schedule = plans.warpgroup_wgrad(spec, mode)
    sources = engine_sources(spec, mode, ("wgrad",), {("wgrad", mode): schedule})
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    command = [compiler.path, "-ccbin", compiler.host, "-std=c++17", "-O3", "-Xptxas", "-v"]
    command += [f"-arch=sm_{architecture}", "-cubin", f"wgrad_{mode}.cu", "-o", "wgrad.cubin"]
    environment = toolchain.build_environment()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = toolchain.ptxas_resources(done.stdout + done.stderr)
    for name, tiles in (("wgrad_kernel", schedule.tiles), ("warpgroups", schedule.warpgroup_tiles)):
        assert len([kernel for kernel in kernels if name in kernel.kernel]) == len(tiles)
    # ptxas says so where it cannot overlap products of warpgroups.
    assert "wgmma.mma_async instructions are serialized" not in done.stdout + done.stderr
    for kernel in kernels:
        assert not kernel.spills, kernel
        assert kernel.registers <= 168
