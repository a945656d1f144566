"""Rendering kernels: how long it takes, and that it is reported."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest

from convgen.codegen import render
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


class TestCompiledTemplates:
    """What Jinja2 compiled is found in the cache by the next process."""

    SPEC = ConvSpec.make("conv2d", kernel_size=3)

    @pytest.fixture
    def compiled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The templates that Jinja2 compiles from now on; no process has used the cache."""
        names: list[str] = []
        compile_template = jinja2.Environment.compile

        def spy(self: jinja2.Environment, source: str, name: str, *rest: Any) -> Any:
            names.append(name)
            return compile_template(self, source, name, *rest)

        monkeypatch.setattr(jinja2.Environment, "compile", spy)
        monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path / "cache"))
        return names

    def render(self) -> dict[str, str]:
        render.environment.cache_clear()
        return pipeline.render(self.SPEC)

    def test_none_is_compiled_twice(self, compiled: list[str], tmp_path: Path) -> None:
        first = self.render()
        assert len(compiled) == len(set(compiled)) > 10
        assert len(list((tmp_path / "cache" / "templates").iterdir())) == len(compiled)
        compiled.clear()
        assert self.render() == first
        assert compiled == []

    @pytest.mark.parametrize("length", [0, 3, 20, 60, 200, -1])
    def test_damaged_ones_are_compiled_anew(
        self, compiled: list[str], tmp_path: Path, length: int
    ) -> None:
        first = self.render()
        for path in (tmp_path / "cache" / "templates").iterdir():
            path.write_bytes(path.read_bytes()[:length])
        count = len(compiled)
        assert self.render() == first
        assert len(compiled) == 2 * count

    def test_what_others_may_write_to_is_not_loaded(
        self, compiled: list[str], tmp_path: Path
    ) -> None:
        first = self.render()
        for path in (tmp_path / "cache" / "templates").iterdir():
            path.chmod(0o666)
        count = len(compiled)
        assert self.render() == first
        assert len(compiled) == 2 * count

    def test_a_cache_that_cannot_be_written_is_no_error(
        self, compiled: list[str], tmp_path: Path
    ) -> None:
        first = self.render()
        (tmp_path / "cache").rename(tmp_path / "folder")
        (tmp_path / "cache").write_text("mine")
        assert self.render() == first
        assert (tmp_path / "cache").read_text() == "mine"
