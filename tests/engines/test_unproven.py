"""Ways of computing that no GPU has timed: packages have those that are asked for alone."""

from __future__ import annotations

import ast

import pytest

from convgen.codegen.package import render_package
from convgen.codegen.render import render_kernels
from convgen.engines.implicit_gemm.common import UNPROVEN
from convgen.spec import ConvSpec

POINT, STRIDED = ConvSpec("conv2d", 1), ConvSpec("conv3d", 3, 2, 1)
CONV = ConvSpec("conv3d", 3, 1, 1)
UP = ConvSpec("conv_transpose3d", 2, 2)
QUARTERS = {"wgrad_tf32", "wgrad_tf32x3"}
UNITS = {
    POINT: {"wgrad_tf32", "wgrad_bf16tc"},
    CONV: QUARTERS,
    STRIDED: {"dgrad_tf32", "dgrad_bf16tc", "wgrad_bf16tc", *QUARTERS},
    UP: {"dgrad_tf32", "dgrad_bf16tc", "wgrad_bf16tc", *QUARTERS},
}
"""That packages for float32 and bfloat16 have of what is unproven."""


def package(spec: ConvSpec) -> dict[str, str]:
    kernels, plans = render_kernels(spec, "cuda", ("f32", "bf16"))
    return kernels | render_package(spec, {"cuda": plans}, kernels)


def implicit_gemms(files: dict[str, str]) -> set[str]:
    suffix = "_implicit_gemm.cu"
    return {path.split("/")[-1].removesuffix(suffix) for path in files if path.endswith(suffix)}


@pytest.mark.parametrize("spec", UNITS, ids=lambda spec: spec.name)
def test_a_package_has_what_is_unproven_where_it_is_asked_for(
    spec: ConvSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONVGEN_UNPROVEN", raising=False)
    files = package(spec)
    proven = implicit_gemms(files)
    assert not proven & UNITS[spec]
    assert not any("READS_CHANNELS = true" in text for text in files.values())
    monkeypatch.setenv("CONVGEN_UNPROVEN", ",".join(UNPROVEN))
    files = package(spec)
    assert implicit_gemms(files) == proven | UNITS[spec]
    runtime = files["_runtime.py"]
    ast.parse(runtime)
    assert ("pays = True" if spec is POINT else "pays = products >= (864 if mode in (") in runtime
    if spec is CONV:
        return
    channels = files[f"src/cuda/{'dgrad' if spec.transposed else 'fprop'}_bf16tc_implicit_gemm.cu"]
    assert "READS_CHANNELS = true" in channels


def test_one_way_alone_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVGEN_UNPROVEN", "phases")
    assert implicit_gemms(package(UP)) >= {"dgrad_tf32", "dgrad_bf16tc"}
    assert not implicit_gemms(package(UP)) & {"wgrad_bf16tc", *QUARTERS}
    monkeypatch.setenv("CONVGEN_UNPROVEN", "wgrad_tf32")
    assert implicit_gemms(package(UP)) >= QUARTERS
    assert not implicit_gemms(package(UP)) & {"wgrad_bf16tc", "dgrad_tf32"}
