"""Which layers are swapped: what is captured of a run, what was measured, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, Package
from torch import Tensor, nn
from whole_networks import Volumes, Waves, made

import convgen
from convgen.measuring.timing import HostClock
from convgen.models import beside, capture, choices, layers, survey
from convgen.models.beside import Times
from convgen.models.capture import Case, Like
from convgen.models.classes import Swapped
from convgen.models.errors import NetworkError
from convgen.spec import ConvSpec

pytestmark = pytest.mark.usefixtures("shared_cache")


def captured(model: nn.Module, inputs: Any) -> dict[str, dict[Case, int]]:
    found = [each for each in layers.find(model) if not each.refusal]
    return capture.run(model, found, inputs).calls


def look(model: nn.Module, inputs: Any = None, **options: Any) -> survey.Survey:
    """Decisions without building anything."""
    plain: dict[str, Any] = {"only": None, "dtypes": None, "fixed_channels": False}
    plain |= {"measure": None, "progress": lambda *_: None, "build": False}
    return survey.survey(model, inputs, **plain | options)


class TestCapture:
    def test_sees_what_reaches_torchs_convolution(self) -> None:
        model, x = made(Volumes)
        calls = captured(model, x)
        assert calls.keys() == {"encoder.conv", "causal", "up", "head"}
        ((case, count),) = calls["causal"].items()
        assert count == 1
        # Behind the padding by which the subclass begins, and without what torch took it for.
        assert case.input.shape == (2, 4, 5, 4, 6)
        assert case.spec.padding == (0, 1, 1)
        assert case.output_shape == (2, 4, 5, 4, 7)
        assert case.dtype == torch.float64
        assert case.backward
        ((first, _),) = calls["encoder.conv"].items()
        assert (first.input.requires_grad, case.input.requires_grad) == (False, True)

    def test_leaves_the_network_as_it_was(self) -> None:
        model, x = made(Volumes)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        kinds = [type(module) for module in model.modules()]
        state = torch.get_rng_state()
        captured(model, (x,))
        assert [type(module) for module in model.modules()] == kinds
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert not any("_convgen_calls" in vars(module) for module in model.modules())

    def test_counts_calls_by_shape_layout_and_context(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.conv(self.conv(x))
                with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                    self.conv(x.to(memory_format=torch.channels_last))
                    self.conv(x[0])
                return y

        calls = captured(Twice(), {"x": torch.randn(2, 4, 5, 6)})["conv"]
        assert sorted(calls.values()) == [1, 1, 1, 1]
        assert {case.input.shape for case in calls} == {(2, 4, 7, 8), (1, 4, 7, 8)}
        inner = [case for case in calls if case.autocast]
        assert [case.dtype for case in inner] == [torch.bfloat16] * 2
        assert not any(case.backward for case in inner)

    @pytest.mark.parametrize("inputs", [torch.randn(1, 5, 9), (1, 2), {"y": torch.randn(1, 3, 9)}])
    def test_inputs_that_do_not_fit_are_one_line(self, inputs: Any) -> None:
        model, _ = made(Waves)
        with pytest.raises(NetworkError, match="the network does not take the inputs") as error:
            convgen.swap(model, inputs)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last_3d])
def test_tensors_are_made_as_they_lay(format_: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5, 6).to(memory_format=format_)
    like = Like.of(x)
    assert like.tensor(x.device).stride() == x.stride()
    assert like.layout == ("channels_last" if x.stride(1) == 1 else "contiguous")
    part = Like.of(x[:, :, 1:3, ::2])
    assert part.tensor(x.device).stride() == part.stride
    repeated = Like.of(torch.randn(2, 1, 4).expand(2, 3, 4))
    assert repeated.tensor(x.device).is_contiguous()


class TestMeasured:
    @pytest.fixture
    def table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("CONVGEN_TUNED", str(tmp_path / "new" / "tuned.json"))
        return tmp_path / "new" / "choices.json"

    @pytest.fixture
    def timed(self, package: Package, monkeypatch: pytest.MonkeyPatch) -> list[Case]:
        """Cases that were timed; transposed layers win."""
        for op in ("conv_transpose1d", "conv1d"):
            package(op, **LAYERS[op])
        seen: list[Case] = []

        def measure(case: Case, *_: Any) -> Times:
            seen.append(case)
            return Times((2.0, 3.0), (1.0, 1.5) if case.spec.transposed else (4.0, 1.0), True)

        monkeypatch.setattr("convgen.models.beside.measure", measure)
        return seen

    @pytest.mark.long
    def test_what_is_faster_is_swapped_and_remembered(self, table: Path, timed: list[Case]) -> None:
        model, x = made(Waves)
        report = convgen.swap(model, x, dtypes=("f32", "f64"))
        assert report.swapped == ("ups.0", "ups.1")
        assert report.left == {"down": "no faster", "last": "no faster"}
        assert isinstance(model.ups[0], Swapped)
        assert len(timed) == 4
        assert len(json.loads(table.read_text())["choices"]) == 4
        again = convgen.swap(model, x, dtypes=("f32", "f64"))
        assert again.swapped == report.swapped
        assert "faster, as measured before" in {row.reason for row in again.rows}
        assert len(timed) == 4
        with torch.no_grad():  # without gradients it is another question
            convgen.swap(model, x, dtypes=("f32", "f64"))
        assert len(timed) == 8
        convgen.swap(model, x, dtypes=("f32", "f64"), measure=True)
        assert len(timed) == 12

    def test_a_damaged_file_is_warned_of_and_replaced(self, table: Path, timed: list[Case]) -> None:
        table.parent.mkdir()
        table.write_text('{"version": 1, "choices": [{}]}')
        model, x = made(Waves)
        with pytest.warns(choices.ChoiceWarning, match="it lacks agrees"):
            convgen.swap(model, x, dtypes=("f32", "f64"))
        assert len(choices.read()) == 4

    @pytest.mark.usefixtures("table")
    def test_results_that_differ_are_never_swapped(
        self, timed: list[Case], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "convgen.models.beside.measure", lambda *_: Times((2.0, 2.0), (1.0, 1.0), False)
        )
        model, x = made(Waves)
        report = convgen.swap(model, x, dtypes=("f32", "f64"))
        assert set(report.left.values()) == {"its results differ from torch's"}

    def test_times_of_both_are_measured_in_the_case_s_context(self, package: Package) -> None:
        up = package("conv_transpose1d", **LAYERS["conv_transpose1d"])
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                model, x = made(Waves)
                (case,) = captured(model, x)["ups.0"]
            times = beside.measure(case, up.conv_transpose1d, HostClock(), 0.01)
            assert times.agrees
            assert min(times.torch_ms[0], times.convgen_ms[0]) > 0
            assert (times.torch_ms[1] > 0) == grad
            wrong = beside.measure(
                case, lambda *a, **k: up.conv_transpose1d(*a, **k) * 1.001, HostClock(), 0.01
            )
            assert not wrong.agrees

    @pytest.mark.parametrize("off", ["output", "grad_weight"])
    def test_where_torch_is_off_convgen_may_differ(
        self, off: str, package: Package, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As cuDNN's gradients of weights are, of millions of positions."""
        up = package("conv_transpose1d", **LAYERS["conv_transpose1d"])
        model, x = made(Waves)
        (case,) = captured(model, x)["ups.0"]

        def inexact(x: torch.Tensor, w: torch.Tensor, *rest: Any, **constants: Any) -> Any:
            if off == "output":
                return up.conv_transpose1d(x, w, *rest, **constants) * 1.001
            # The gradient alone: the value stays.
            w = w + (1.001 * w - (1.001 * w).detach()) - (w - w.detach())
            return up.conv_transpose1d(x, w, *rest, **constants)

        exact = up.conv_transpose1d
        monkeypatch.setattr(beside, "torch_function", lambda case: inexact)
        assert beside.measure(case, exact, HostClock(), 0.01).agrees
        monkeypatch.setattr(beside, "torch_function", lambda case: exact)
        assert not beside.measure(case, inexact, HostClock(), 0.01).agrees


class TestPackages:
    def test_layers_that_differ_in_output_padding_share_one(self) -> None:
        kinds = look(made(Waves)[0]).kinds
        wanted = {kind.wanted for kind in kinds if kind.spec.transposed}
        assert [each.spec.output_padding for each in wanted] == [(2,)]

    def test_dtypes_are_the_networks_and_autocasts(self) -> None:
        model, x = made(Waves)
        assert {k.wanted.dtypes for k in look(model).kinds} == {("f64",)}
        assert {k.wanted.dtypes for k in look(model, dtypes=["f32"]).kinds} == {("f32", "f64")}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kinds = look(model.float(), x.float()).kinds
        assert {k.wanted.dtypes for k in kinds} == {("f32", "bf16")}

    def test_channels_are_fixed_on_request(self) -> None:
        kinds = look(made(Waves)[0], fixed_channels=True).kinds
        assert [kind.spec.in_channels for kind in kinds] == [3, 2, 4, 3]


class TestRule:
    CPU = torch.device("cpu")
    GPU = torch.device("cuda")

    def decide(self, device: torch.device, channels: int, op: str, **constants: Any) -> bool:
        spec = ConvSpec.make(op, **constants)
        return choices.rule(spec, (channels, channels), device)[0]

    def test_on_the_cpu(self) -> None:
        assert self.decide(self.CPU, 8, "conv_transpose3d", kernel_size=2, stride=2)
        assert self.decide(self.CPU, 8, "conv3d", kernel_size=3, groups=8)
        assert not self.decide(self.CPU, 8, "conv3d", kernel_size=3)

    def test_on_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        assert self.decide(self.GPU, 512, "conv_transpose3d", kernel_size=2, stride=2)
        assert self.decide(self.GPU, 64, "conv3d", kernel_size=3)
        assert self.decide(self.GPU, 8, "conv1d", kernel_size=3, groups=8)
        assert not self.decide(self.GPU, 512, "conv_transpose2d", kernel_size=4, stride=2)
        assert not self.decide(self.GPU, 64, "conv2d", kernel_size=1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        assert not self.decide(self.GPU, 64, "conv3d", kernel_size=3)
