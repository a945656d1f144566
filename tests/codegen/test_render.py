"""Rendering kernels: how long it takes, and that it is reported."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest

from convgen.codegen.render import LONG, render_kernels
from convgen.commands import report
from convgen.measuring.layers import Layer
from convgen.spec import ConvSpec
from convgen.tuning import choice, jobs

# convgen.specialize is the function; this is the file.
pipeline = importlib.import_module("convgen.specialize")

EXTREME = [
    ConvSpec.make("conv1d", kernel_size=1 << 13),
    ConvSpec.make("conv_transpose1d", kernel_size=1 << 13, stride=3, in_channels=1 << 20),
    ConvSpec.make("conv_transpose2d", kernel_size=(1 << 13, 2), stride=(1 << 13, 1), groups=4),
    # Phases without taps, and depthwise kernels.
    ConvSpec.make("conv_transpose1d", kernel_size=2, stride=1 << 14, dilation=1 << 14, groups=2),
    # Units of taps by units of channels.
    ConvSpec.make("conv1d", kernel_size=1 << 13, in_channels=1 << 20, out_channels=1 << 20),
]


@pytest.mark.parametrize("spec", EXTREME, ids=lambda spec: spec.name)
def test_time_and_text_grow_with_taps_and_phases_not_with_their_products(spec: ConvSpec) -> None:
    start = time.process_time()
    files = {}
    for backend in ("cpu", "cuda"):
        files |= render_kernels(spec, backend, ["f32"])[0]
    assert time.process_time() - start < 8  # a quadratic part takes minutes
    assert max(map(len, files.values())) < 64 * (1 << 14)


def test_candidates_of_long_kernels_and_long_lines_are_found_in_seconds() -> None:
    spec = ConvSpec.make("conv1d", kernel_size=1 << 13)
    layer = Layer(spec.name, spec, (1, 32, 1 << 17), 32, False)
    start = time.process_time()
    outcomes = choice.all_candidates(
        jobs.jobs([layer], "cuda", "f32", tf32=True), choice.gpu_of(["90a"]), 8, ["90a"]
    )
    assert time.process_time() - start < 8
    assert all(len(outcome.candidates) > 1 for outcome in outcomes)


@pytest.mark.parametrize("size", [LONG, 5])
def test_long_kernels_alone_are_reported_unit_by_unit_while_they_are_rendered(
    size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(name: str, *_: Any, **__: Any) -> Path:
        return Path(name)

    monkeypatch.setattr(pipeline, "build", build)
    with report.Progress() as progress:
        pipeline.generate(
            ConvSpec.make("conv1d", kernel_size=size),
            dtypes=["f32"],
            backends="cpu",
            progress=progress,
        )
    assert progress.total == 0  # nothing is being compiled yet
    units = [f"render src/cpu/{unit}_f32.cpp" for unit in ("fprop", "dgrad", "wgrad")]
    assert capsys.readouterr().err.splitlines() == (units if size == LONG else [])
