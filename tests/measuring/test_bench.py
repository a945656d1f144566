"""The benchmark: wrong results have no time, and figures reach tables, JSON and charts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from convgen import cli
from convgen.commands.bench_report import benchmark, step_memory
from convgen.measuring import bench, machine, trial
from convgen.measuring.bench import Report, Row
from convgen.measuring.layers import LAYOUTS, Layer
from convgen.measuring.machine import Ceilings
from convgen.measuring.overhead import overheads
from convgen.measuring.plots import plot
from convgen.measuring.timing import Spread
from convgen.spec import ConvSpec

CPU = torch.device("cpu")
HIGH = Ceilings(1e18, 1e18, "f32")
LAST = torch.channels_last
LAYER = Layer("small", ConvSpec("conv_transpose2d", 3, 2, 1), (2, 4, 7, 9), 6, bias=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few runs, and ceilings that are not measured."""
    monkeypatch.setattr(trial, "_TARGET_RUNS", 4)
    monkeypatch.setattr(trial, "_LEAST_RUNS", 3)
    monkeypatch.setattr(machine, "ceilings", lambda *_: dataclasses.replace(HIGH))


class Right(torch.nn.ConvTranspose2d):
    """Stands in for a generated class of LAYER: it takes the channels alone."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, 3, 2, 1, **options)


def module(base: type[torch.nn.Module]) -> ModuleType:
    return cast(
        ModuleType, SimpleNamespace(ConvTranspose2d=base, SPEC=LAYER.spec.to_dict(), __name__="m")
    )


def run(base: type[torch.nn.Module], **arguments: Any) -> Report:
    return bench.bench([LAYER], {LAYER.name: module(base)}, device=CPU, **arguments)


@pytest.mark.usefixtures("quick")
def test_times_both_directions_beside_every_configuration_of_torch() -> None:
    report = run(Right)
    assert report.ok
    assert [row.direction for row in report.rows] == ["forward", "backward"]
    for row in report.rows:
        assert row.ours is not None
        assert row.ours.runs >= 3
        assert 0 < row.ours.low_ms <= row.ours.median_ms <= row.ours.high_ms
        assert row.layout == "contiguous"
        assert set(row.torch) == {"default", "channels_last"}
        assert row.error < 1e-5
        assert not row.notes


@pytest.mark.usefixtures("quick")
def test_layouts_have_rows_of_their_own_with_inputs_and_weights_in_them() -> None:
    seen = []

    class Watched(Right):
        def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
            seen.append([t.is_contiguous(memory_format=LAST) for t in (input, self.weight)])
            return super().forward(input)

    report = run(Watched, layouts=("contiguous", "channels_last"))
    assert report.ok
    assert [(row.layout, row.direction) for row in report.rows] == [
        *(("contiguous", "forward"), ("contiguous", "backward")),
        *(("channels_last", "forward"), ("channels_last", "backward")),
    ]
    assert [False, False] in seen
    assert [True, True] in seen
    assert not any(row.notes for row in report.rows)
    means = report.to_dict()["geometric_means"]
    assert set(means) == {"contiguous", "channels_last"}
    assert set(means["channels_last"]["forward"]) == {"default", "same", "any"}


@pytest.mark.usefixtures("quick")
def test_results_that_do_not_lie_as_those_of_torch_are_noted() -> None:
    class Elsewhere(Right):
        def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
            return super().forward(input).contiguous()

    row, _ = run(Elsewhere, layouts=("channels_last",)).rows
    assert row.ours is not None
    assert "convgen channels_last: output not channels_last as torch's" in row.notes


@pytest.mark.usefixtures("quick")
def test_one_dimension_has_one_layout() -> None:
    layer = Layer("one", ConvSpec("conv1d", 3), (2, 4, 9), 6, bias=False)

    class One(torch.nn.Conv1d):
        def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
            super().__init__(in_channels, out_channels, 3, **options)

    source = cast(ModuleType, SimpleNamespace(Conv1d=One))
    for layouts in (("channels_last",), ("contiguous", "channels_last")):
        report = bench.bench([layer], {"one": source}, device=CPU, layouts=layouts)
        assert [row.layout for row in report.rows] == ["contiguous", "contiguous"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("gradients", ["input", "weight"])
def test_backward_may_be_of_some_gradients_alone(gradients: str) -> None:
    asked = set()

    class Watched(Right):
        def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
            tensors = {"input": input, "weight": self.weight, "bias": self.bias}
            asked.update(name for name, tensor in tensors.items() if tensor.requires_grad)
            return super().forward(input)

    _, backward = run(Watched, gradients=gradients).rows
    assert asked == ({"input"} if gradients == "input" else {"weight", "bias"})
    assert backward.ours is not None
    assert backward.flops == LAYER.flops("forward")
    assert backward.traffic_bytes == LAYER.traffic_bytes("backward", 4, gradients)


@pytest.mark.usefixtures("quick")
def test_a_wrong_output_has_no_time() -> None:
    class Wrong(Right):
        def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
            return super().forward(input) * 1.001

    forward, backward = run(Wrong).rows
    assert forward.ours is None
    assert forward.over("same") is None
    assert any("convgen is wrong" in note for note in forward.notes)
    assert backward.ours is None  # its gradients are off by as much


@pytest.mark.usefixtures("quick")
def test_a_wrong_gradient_has_no_time_but_the_output_has() -> None:
    class Hook(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 1.001

    class Wrong(Right):
        def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
            return cast(torch.Tensor, super().forward(Hook.apply(input)))

    forward, backward = run(Wrong).rows
    assert forward.ours is not None
    assert backward.ours is None


@pytest.mark.usefixtures("quick")
def test_an_element_that_is_not_written_has_no_time() -> None:
    class Forgets(Right):
        def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
            full = super().forward(input)
            hole = torch.empty_like(full)  # as a kernel's output is allocated
            mask = torch.ones_like(full, dtype=torch.bool)
            mask[-1, -1, -1, -1] = False
            return torch.where(mask, full, hole)

    report = run(Forgets)
    assert report.rows[0].ours is None
    assert report.rows[0].error == math.inf
    assert not report.ok
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"][0]["error"] is None


@pytest.mark.usefixtures("quick")
def test_a_result_that_differs_where_no_sample_lies_has_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Corner(Right):
        def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
            output = super().forward(input)
            scale = torch.ones_like(output)
            scale[1, 5, 10, 3] = 100.0
            return output * scale

    # As if no sample were near: only the comparison with torch's whole result is left.
    right = trial.Errors(0.0, 0.0, 0.0, 0.0)
    monkeypatch.setattr(trial.SampledReference, "errors", lambda *_: right)
    forward = run(Corner).rows[0]
    assert forward.ours is None
    assert any("differs from torch" in note for note in forward.notes)


@pytest.mark.usefixtures("quick")
def test_a_figure_below_the_floor_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ceilings", lambda *_: Ceilings(1.0, 1.0, "f32"))
    report = run(Right)
    for row in report.rows:
        assert row.reached is not None
        assert row.reached > 1
        ours, theirs = row.suspicions
        assert ours.startswith("convgen is below the floor")
        assert theirs.startswith("torch (")
        assert row.to_dict()["notes"] == [ours, theirs]


@pytest.mark.usefixtures("quick")
def test_a_ceiling_that_is_higher_at_the_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Ceilings(1.0, 2e18, "f32"), Ceilings(1e18, 1.0, "f32 FMA")]
    monkeypatch.setattr(machine, "ceilings", lambda *_: found.pop(0))
    report = run(Right)
    assert report.ceilings == Ceilings(1e18, 2e18, "f32 FMA")
    assert not any(row.suspicions for row in report.rows)
    assert report.rows[0].floor_ms == report.rows[0].to_dict()["floor_ms"] < 1e-6


@pytest.mark.usefixtures("quick")
def test_a_module_that_cannot_run_is_a_failure_and_the_next_layer_runs() -> None:
    class Broken(Right):
        def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
            raise RuntimeError("kernel refused\nmore")

    other = dataclasses.replace(LAYER, name="other")
    seen: list[tuple[str, int]] = []
    report = bench.bench(
        [LAYER, other],
        {"small": module(Broken), "other": module(Right)},
        device=CPU,
        on_layer=lambda so_far, name: seen.append((name, so_far.finished)),
    )
    assert report.failures == {"small": "kernel refused"}
    assert [row.layer for row in report.rows] == ["other", "other"]
    assert seen == [("small", 1), ("other", 2)]
    assert not report.ok


@pytest.mark.usefixtures("quick")
def test_layers_whose_turn_does_not_come_are_failures() -> None:
    report = run(Right, seconds=1e-9)
    assert report.failures == {"small": "not run: the seconds were used up"}
    assert not report.rows


def test_the_seconds_bound_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ceilings", lambda *_: dataclasses.replace(HIGH))
    monkeypatch.setattr(trial, "_TARGET_RUNS", 10**9)
    report = run(Right, seconds=1.0)
    assert report.rows[0].ours is not None
    assert 5 <= report.rows[0].ours.runs < 10**6


def row(**changes: Any) -> Row:
    times = {"default": Spread(8.0, 7.0, 9.0, 5), "benchmark": Spread(4.0, 4.0, 4.0, 5)}
    times |= {"channels_last": Spread(3.0, 3.0, 3.0, 5)}
    fields: dict[str, Any] = {
        "layer": "a",
        "operator": "conv1d_k3",
        "input_shape": (2, 4, 9),
        "out_channels": 4,
        "direction": "forward",
        "layout": "contiguous",
        "ours": Spread(2.0, 1.5, 2.5, 5),
        "torch": times,
        "error": 1e-6,
        "torch_errors": {"default": 1e-6, "benchmark": 1e-6},
        "limit": 1e-4,
        "flops": 10**9,
        "traffic_bytes": 10**6,
        "ceilings": Ceilings(2e12, 1e9, "f32"),
    }
    return Row(**fields | changes)


def report_of(*rows: Row) -> Report:
    facts = {"name": "CPU", "torch": "2", "convgen": "0", "device": "cpu"}
    settings = {"dtype": "f32", "gradients": "all", "layouts": ["contiguous"]}
    return Report(facts, [{}, {}], settings, Ceilings(1e12, 1e11, "f32"), list(rows))


def test_speedups_are_over_torch_as_it_comes_and_at_its_best() -> None:
    figures = row()
    assert (figures.same_by, figures.any_by) == ("benchmark", "channels_last")
    assert [figures.over(what) for what in bench.OVER] == [4.0, 2.0, 1.5]
    assert (figures.reached, figures.of_peak) == (0.5, 0.25)
    last = row(layout="channels_last")
    assert (last.same_by, last.any_by) == ("channels_last", "channels_last")
    assert [last.over(what) for what in bench.OVER] == [1.5, 1.5, 1.5]
    faster = row(direction="backward", ours=Spread(0.5, 0.5, 0.5, 1))
    report = report_of(figures, faster, last, row(layer="b", ours=None))
    assert report.geometric_mean("contiguous", "forward", "same") == pytest.approx(2.0)
    assert report.geometric_mean("contiguous", None, "same") == pytest.approx(4.0)
    assert report.geometric_mean("contiguous", None, "default") == pytest.approx(8.0)
    assert report.geometric_mean("channels_last", None, "any") == pytest.approx(1.5)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    name = "hunyuan-vae-up12345"
    wide = Spread(1234.5, 1200.0, 1240.0, 5)
    benchmark(report_of(*(row(layer=name, layout=to, ours=wide) for to in LAYOUTS)))
    printed = capsys.readouterr().out
    assert all(len(line) <= width for line in printed.splitlines())
    for needed in (name, "1234 ±2%", "x same", "geometric mean", "channels_last:"):
        assert needed in printed
    assert ("in --json alone" in printed) == (width < 200)
    assert ("any by" in printed.partition("in --json")[0]) == (width == 200)


def test_a_note_about_many_layers_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    same, own = "convgen is below the floor", "benchmark is wrong"
    both = [row(layer="a", notes=(same,)), row(layer="b", notes=(same, own))]
    benchmark(report_of(*both, row(layer="b", direction="backward", notes=(same,))))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if same in line or own in line] == [f"a, b: {same}", f"b: {own}"]


def test_memory_is_told_beside_that_of_torch_in_the_same_layout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"default": 2_000_000, "channels_last": 4_000_000}
    forward, backward = (
        row(direction=direction, layout="channels_last", ours_bytes=3_000_000, torch_bytes=sizes)
        for direction in trial.DIRECTIONS
    )
    step_memory(report_of(forward, backward))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("a "))
    assert line.split() == ["a", "channels_last", "3.0", "4.0", "0.75"]


def test_memory_of_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ["--kernel", "3", "--shape", "1,1,4,4,4", "--out-channels", "1"]
    assert cli.main(["bench", *layer, "--device", "cpu", "--memory"]) == 2
    assert "--memory is for GPUs" in capsys.readouterr().err


def test_a_right_torch_configuration_is_chosen_over_a_faster_wrong_one() -> None:
    errors = {"convgen": trial.Errors(0, 0, 0), "default": trial.Errors(0, 0, 0)}
    errors["benchmark"] = trial.Errors(1.0, 0, 0)
    times = {
        how: dict.fromkeys(trial.DIRECTIONS, Spread(ms, ms, ms, 5))
        for how, ms in (("convgen", 2.0), ("default", 4.0), ("benchmark", 1.0))
    }
    outcome = trial.Outcome(times, errors, {}, 1e-4, ())
    forward, backward = bench._rows(LAYER, "contiguous", outcome, report_of())
    assert (forward.same_by, backward.same_by) == ("default", "benchmark")
    assert forward.notes == ("benchmark is wrong: error 1.0e+00",)


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    plot(report_of(row(), row(direction="backward"), row(layer="b", ours=None)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_overheads_are_measured_on_small_inputs() -> None:
    report = overheads([LAYER], {LAYER.name: module(Right)}, device=CPU)
    (found,) = report.rows
    assert found.input_shape == (1, 1, 2, 2)
    assert found.ours.median_ms > 0
    assert found.extra_us == pytest.approx(1e3 * (found.ours.median_ms - found.torch.median_ms))
    assert report.ok


@pytest.mark.usefixtures("quick")
def test_one_generated_layer_end_to_end_on_the_command_line(
    session_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(session_cache))
    json_file, plot_file = tmp_path / "out.json", tmp_path / "out.png"
    layer = ["--op", "conv1d", "--kernel", "3", "--shape", "2,8,100", "--out-channels", "4"]
    files = ["--json", str(json_file), "--plot", str(plot_file)]
    both = ["--layout", "both"]
    assert cli.main(["bench", *layer, *both, "--bias", "--device", "cpu", *files]) == 0
    printed = capsys.readouterr().out
    assert "conv1d_k3" in printed
    assert "geometric mean" in printed
    data = json.loads(json_file.read_text())
    assert [entry["direction"] for entry in data["rows"]] == ["forward", "backward"]
    assert all(entry["error"] < 1e-5 and entry["ours"]["runs"] >= 3 for entry in data["rows"])
    assert data["machine"]["device"] == "cpu"
    assert plot_file.exists()
    assert cli.main(["bench", *layer, "--device", "cpu", "--overhead"]) == 0
    assert "difference us" in capsys.readouterr().out


def test_a_layer_that_does_not_compile_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec: ConvSpec, **_: Any) -> Path:
        raise bench.BuildError(f"{spec.name} did not compile")

    monkeypatch.setattr(bench, "generate", refuse)
    modules = bench.compile_layers([LAYER], CPU, "f32")
    assert modules == {"small": "conv_transpose2d_k3_s2_p1 did not compile"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --suite, or one layer"),
        (["--suite", "models", "--kernel", "3"], "Give --suite, or one layer"),
        (["--suite", "resnet"], "no suite 'resnet'"),
        (["--suite", "models", "--layers", "none"], "no layer 'none'"),
        (["--kernel", "3"], "One layer needs --shape and --out-channels"),
        (["--kernel", "3", "--shape", "1,2,3", "--out-channels", "2"], "of 5 dimensions"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.gpu
def test_contenders_on_a_gpu_have_threads_and_plans_of_their_own() -> None:
    layer = dataclasses.replace(LAYER, input_shape=(8, 32, 64, 64), out_channels=32)
    device = torch.device("cuda")
    report = bench.bench([layer], {layer.name: module(Right)}, device=device, seconds=20)
    for figures in report.rows:
        assert figures.ours is not None
        assert set(figures.torch) == {
            "default",
            "benchmark",
            "channels_last",
            "channels_last benchmark",
        }
        assert figures.ours_bytes is not None
        # Output and the gradient of the input are of this size each, at least.
        assert min(figures.ours_bytes, *figures.torch_bytes.values()) >= 4 * 8 * 32 * 64 * 64
    assert report.clocks[0].keys() == report.clocks[1].keys()
