"""Swapped networks compute what they did, and stay the networks that they were."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, Package
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from whole_networks import INPUTS, UP3D, Causal, Volumes, Waves, made, results

import convgen
from convgen.models import classes, layers
from convgen.models.beside import Times
from convgen.models.classes import Swapped, SwapWarning

pytestmark = pytest.mark.usefixtures("shared_cache")

NETWORKS = pytest.mark.parametrize("network", INPUTS)


@pytest.fixture(autouse=True)
def _all(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without example inputs, every layer is chosen; packages are those of all other tests."""
    for op in ("conv_transpose3d", "conv3d", "conv_transpose1d", "conv1d"):
        package(op, **LAYERS[op])
    monkeypatch.setattr("convgen.models.choices.rule", lambda *_: (True, "for the test"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With example inputs, convgen is always the faster one."""
    times = Times((2.0, 2.0), (1.0, 1.0), True)
    monkeypatch.setattr("convgen.models.beside.measure", lambda *_: times)


def swap(model: nn.Module, **options: Any) -> convgen.SwapReport:
    return convgen.swap(model, dtypes=("f32", "f64"), **options)


def taken(model: nn.Module) -> set[str]:
    return {name for name, each in model.named_modules() if isinstance(each, Swapped)}


class TestValues:
    @NETWORKS
    @pytest.mark.parametrize("training", [True, False])
    def test_outputs_gradients_and_buffers_are_torchs(
        self, network: type[nn.Module], training: bool
    ) -> None:
        model, x = made(network)
        model.train(training)
        expected = results(made(network)[0].train(training), x)
        report = swap(model)
        assert taken(model) == set(report.swapped)
        found = results(model, x)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=name)

    def test_everything_but_a_forward_of_its_own_is_swapped(self) -> None:
        model, _ = made(Volumes)
        report = swap(model, only=["encoder*", "causal", "up", "head", "other"])
        assert taken(model) == {"encoder.conv", "causal", "up", "head"}
        assert report.left == {"other": "OwnForward.forward does not end in torch's"}
        model, _ = made(Waves)
        swap(model)
        assert taken(model) == {"ups.0", "ups.1", "down", "last"}

    def test_output_size_is_an_argument(self) -> None:
        torch.manual_seed(0)
        layer = nn.ConvTranspose3d(2, 3, **UP3D)
        x = torch.randn(1, 2, 3, 4, 2)
        size = torch.Size((8, 10, 6))
        expected = layer(x, output_size=size)
        swap(layer)
        torch.testing.assert_close(layer(x, output_size=size), expected)
        assert layer(x, size).shape[2:] == size

    @pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
    def test_modes_of_padding(self, mode: Any) -> None:
        torch.manual_seed(0)
        layer = nn.Conv3d(2, 3, (1, 3, 2), padding="same", padding_mode=mode)
        x = torch.randn(1, 2, 3, 4, 5)
        expected = layer(x)
        report = convgen.swap(layer)
        assert report.rows[0].spec == "conv3d_k1x3x2"
        torch.testing.assert_close(layer(x), expected)


class TestNothingElseChanges:
    @NETWORKS
    def test_unswap_restores_every_class(self, network: type[nn.Module]) -> None:
        model, _ = made(network)
        before = [(name, type(module)) for name, module in model.named_modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        swap(model)
        swap(model)
        assert model.state_dict().keys() == state.keys()
        made(network)[0].load_state_dict(model.state_dict())
        model.load_state_dict(state)
        convgen.unswap(model)
        assert [(name, type(module)) for name, module in model.named_modules()] == before
        assert not any("_convgen" in name for m in model.modules() for name in vars(m))

    def test_a_layer_under_two_names_is_one(self) -> None:
        model, x = made(Volumes)
        report = swap(model)
        assert model.encoder.conv is model.encoder.all_modules[0]
        (row,) = (row for row in report.rows if "encoder.conv" in row.names)
        assert row.also == ("encoder.all_modules.0",)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model.encoder.conv.weight.clone()
        model(x).sum().backward()
        optimizer.step()
        assert not torch.equal(model.encoder.conv.weight, before)

    def test_hooks_names_and_isinstance_stay(self) -> None:
        model, x = made(Volumes)
        seen: list[str] = []
        model.up.register_forward_hook(lambda *_: seen.append("forward"))
        model.up.register_full_backward_hook(lambda *_: seen.append("backward"))
        swap(model)
        model(x).sum().backward()
        assert seen == ["forward", "backward"]
        assert isinstance(model.up, nn.ConvTranspose3d)
        assert isinstance(model.causal, Causal)
        assert type(model.causal).__name__ == "Causal"
        assert repr(model) == repr(made(Volumes)[0])

    def test_parametrizations_come_and_go(self) -> None:
        model, x = made(Waves)
        expected = model(x)
        swap(model)
        parametrize.remove_parametrizations(model.ups[0], "weight")
        assert type(model.ups[0]).__mro__[2] is Swapped
        torch.testing.assert_close(model(x), expected)
        parametrizations.weight_norm(model.down)
        torch.testing.assert_close(model(x), expected)
        convgen.unswap(model)
        assert type(model.ups[0]) is nn.ConvTranspose1d
        torch.testing.assert_close(model(x), expected)
        parametrize.remove_parametrizations(model.down, "weight")
        assert type(model.down) is nn.Conv1d

    def test_a_copy_is_swapped_and_is_its_own(self) -> None:
        model, x = made(Volumes)
        expected = model.eval()(x)
        swap(model)
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        assert taken(average.module) == taken(model)
        convgen.unswap(model)
        assert len(taken(average.module)) == 4
        torch.testing.assert_close(average(x), expected)

    def test_attributes_that_change_give_the_layer_to_torch(self) -> None:
        layer = nn.ConvTranspose3d(2, 3, **UP3D)
        x = torch.randn(1, 2, 3, 4, 2)
        swap(layer)
        with pytest.warns(SwapWarning, match="its attributes were changed"):
            layer.dilation = (2, 2, 2)
        torch.testing.assert_close(
            layer(x), nn.functional.conv_transpose3d(x, layer.weight, layer.bias, 2, dilation=2)
        )
        layer.dilation = (1, 1, 1)
        assert not layer._convgen_refused
        with pytest.warns(SwapWarning, match=r"no kernels for torch\.complex64"):
            layer.to(torch.complex64)
        assert layer(x.to(torch.complex64)).dtype == torch.complex64

    def test_classes_construct_layers(self) -> None:
        layer = nn.ConvTranspose3d(2, 3, **UP3D)
        swap(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SwapWarning)
            again = type(layer)(2, 3, 3, stride=2)
        again.load_state_dict(layer.state_dict())
        x = torch.randn(1, 2, 3, 4, 2)
        assert torch.equal(again(x), layer(x))


class TestOthersTakeIt:
    @pytest.mark.parametrize("network", [Waves, pytest.param(Volumes, marks=pytest.mark.long)])
    def test_compile_and_export(self, network: type[nn.Module]) -> None:
        model, x = made(network)
        swap(model.eval())
        expected = results(model, x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for name, value in results(compiled, x).items():
            torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")])
        parametrized = [m for m in model.modules() if parametrize.is_parametrized(m)]
        for each in parametrized:
            parametrize.remove_parametrizations(each, "weight")
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected["output"])
        calls = [str(n.target) for n in program.graph.nodes if "convgen" in str(n.target)]
        assert len(calls) == len(taken(model))

    @pytest.mark.usefixtures("measured")
    def test_what_was_compiled_before_is_compiled_anew(self) -> None:
        calls: list[str] = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            calls.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        model, x = made(Waves)
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        compiled(x)
        assert not any("convgen" in call for call in calls)
        report = swap(compiled, example_inputs=x)
        assert "_orig_mod.ups.0" in report.swapped
        torch.testing.assert_close(compiled(x), expected)
        assert sum("convgen" in call for call in calls) == 4

    @pytest.mark.usefixtures("measured")
    def test_a_network_swapped_for_inference_can_be_trained(self) -> None:
        model, x = made(Volumes)
        with torch.inference_mode():
            swap(model, example_inputs=x)
        model(x).sum().backward()
        assert model.up.weight.grad is not None

    LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[3])
model = torch.load(sys.argv[1], weights_only=False)
x = torch.load(sys.argv[2])
assert torch.equal(model(x["x"]), x["y"])
print(type(model.causal).__name__, type(model.up).__module__)
import convgen
convgen.unswap(model)
print(type(model.up).__module__, type(model.causal).__module__)
"""

    def test_a_saved_network_loads_in_another_process(self, tmp_path: Path) -> None:
        model, x = made(Volumes)
        parametrize.remove_parametrizations(model.head, "weight")
        swap(model.eval())
        torch.save(model, tmp_path / "model.pt")
        torch.save({"x": x, "y": model(x)}, tmp_path / "x.pt")
        arguments = [tmp_path / "model.pt", tmp_path / "x.pt", Path(__file__).parents[1]]
        done = subprocess.run(
            [sys.executable, "-c", self.LOAD, *map(str, arguments)],
            env=os.environ | {"CONVGEN_NO_BUILD": "1"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == [
            "Causal",
            type(model.up).__module__,
            "torch.nn.modules.conv",
            "whole_networks",
        ], done.stderr

    def test_what_can_not_be_built_is_torchs_where_it_is_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = nn.ConvTranspose3d(2, 3, **UP3D)
        x = torch.randn(1, 2, 3, 4, 2)
        expected = layer(x)
        swap(layer)
        home = type(layer).__module__
        text = pickle.dumps(layer)
        monkeypatch.delitem(sys.modules, home)
        monkeypatch.delitem(classes._functions, home)
        monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("CONVGEN_NO_BUILD", "1")
        with pytest.warns(SwapWarning, match="is not in the cache"):
            loaded = pickle.loads(text)
        assert torch.equal(loaded(x), expected)
        assert isinstance(loaded, Swapped)


def _lazy() -> nn.Module:
    return nn.LazyConv3d(3, 3)


def _complex() -> nn.Module:
    return nn.Conv3d(2, 3, 3, dtype=torch.complex64)


def _meta() -> nn.Module:
    return nn.Conv3d(2, 3, 3, device="meta")


def _patched() -> nn.Module:
    layer = nn.ConvTranspose3d(2, 3, 3)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


class _Beside(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.conv3d(x, self.weight)


class _ByName(nn.ConvTranspose3d):
    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return nn.ConvTranspose3d.forward(self, x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (_lazy, "is lazy: run the network once before"),
        (_complex, "is complex64"),
        (_meta, "lies on meta"),
        (_patched, "has a forward of its own, set on the layer"),
        (lambda: _Beside(2, 3, 3), "_Beside.forward calls conv3d itself"),
        (lambda: _ByName(2, 3, 3), "_ByName.forward does not end in torch's"),
    ],
)
def test_what_is_left_is_named_with_the_reason(layer: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(layer())
    before = type(model[0])
    report = swap(model)
    assert report.left == {"0": reason}
    assert type(model[0]) is before
    assert reason in str(report)


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="matches no convolution"):
        swap(nn.Sequential(nn.Conv1d(1, 1, 3)), only="decoder.*")
    model, _ = made(Waves)
    swap(model, only=lambda name, layer: layers.torch_class_of(layer) is nn.Conv1d)
    assert taken(model) == {"down", "last"}
