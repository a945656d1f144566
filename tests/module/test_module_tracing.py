"""What torch's tools see of generated modules: tracers, ONNX exporters, counters of operations."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, Package
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from convgen.spec import ConvSpec


class Network(nn.Module):
    """An up- and a down-sampling layer, of torch's own or generated."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up = up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).flatten(2))


@pytest.fixture
def networks(package: Package) -> tuple[Network, Network]:
    """Generated layers, and torch's with the same parameters."""
    up = package("conv_transpose3d", kernel_size=3, stride=2)
    down = package("conv1d", kernel_size=5, stride=3, padding=2)
    ours = Network(up.ConvTranspose3d(2, 3), down.Conv1d(3, 2)).eval()
    theirs = Network(nn.ConvTranspose3d(2, 3, 3, 2), nn.Conv1d(3, 2, 5, 3, 2)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs() -> tuple[Tensor, Tensor]:
    """Two that differ in batch and extents."""
    return torch.randn(2, 2, 3, 4, 5), torch.randn(3, 2, 4, 2, 3)


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.trace")  # deprecated, and in use


@pytest.mark.parametrize("op", LAYERS)
class TestEveryOperator:
    def layer(self, package: Package, op: str) -> tuple[Any, Any, Tensor]:
        constants = LAYERS[op]
        module = package(op, **constants)
        ours = getattr(module, ConvSpec(op, 3).class_name)(4, 6)
        theirs = getattr(nn, ConvSpec(op, 3).class_name)(4, 6, **constants)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs, torch.randn(2, 4, *(7, 6, 8)[: theirs.weight.dim() - 2])

    def test_jit_traces_torchs_own_operator(self, package: Package, op: str) -> None:
        ours, theirs, x = self.layer(package, op)
        traced = torch.jit.trace(ours, x)
        other = torch.randn(3, *(extent + 1 for extent in x.shape[1:])).narrow(1, 0, 4)
        torch.testing.assert_close(traced(other), theirs(other))
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert any(kind.startswith("aten::_convolution") for kind in kinds)
        assert not any("convgen" in kind for kind in kinds)

    def test_fx_keeps_the_call_in_its_graph(self, package: Package, op: str) -> None:
        ours, theirs, x = self.layer(package, op)
        traced = torch.fx.symbolic_trace(nn.Sequential(ours, nn.ReLU()))
        names = [getattr(node.target, "__name__", "") for node in traced.graph.nodes]
        assert names.count(op) == 1
        torch.testing.assert_close(traced(x[0]), theirs(x[0]).relu())

    def test_flops_are_those_of_torch(self, package: Package, op: str) -> None:
        ours, theirs, x = self.layer(package, op)
        with FlopCounterMode(display=False) as of_ours:
            y = ours(x)
        with FlopCounterMode(display=False) as of_theirs:
            theirs(x)
        forward = of_theirs.get_total_flops()
        assert of_ours.get_total_flops() == forward > 0
        with FlopCounterMode(display=False) as of_gradients:
            y.sum().backward()
        assert of_gradients.get_total_flops() == forward  # x needs no gradient
        x.requires_grad_()
        with FlopCounterMode(display=False) as of_gradients:
            ours(x).sum().backward()
        assert of_gradients.get_total_flops() == 3 * forward

    def test_onnx_decomposition_is_the_operator(self, package: Package, op: str) -> None:
        ours, theirs, x = self.layer(package, op)
        free = torch.export.Dim.AUTO
        exported = torch.export.export(ours.eval(), (x,), dynamic_shapes=[{0: free, 2: free}])
        (ours_op,) = [n.target for n in exported.graph.nodes if "convgen" in str(n.target)]
        table = torch.export.default_decompositions()
        table[ours_op] = torch._decomp.decomposition_table[ours_op]
        decomposed = exported.run_decompositions(table)
        targets = [str(node.target) for node in decomposed.graph.nodes]
        assert "aten.convolution.default" in targets
        assert not any("convgen" in target for target in targets)
        other = torch.randn(3, 4, x.shape[2] + 3, *x.shape[3:])
        torch.testing.assert_close(decomposed.module()(other), theirs(other))


def test_jit_trace_serves_other_shapes(networks: tuple[Network, Network]) -> None:
    ours, theirs = networks
    first, other = inputs()
    traced = torch.jit.trace(ours, first)
    torch.testing.assert_close(traced(other), theirs(other))


def test_fx_graphs_train(networks: tuple[Network, Network]) -> None:
    ours, theirs = networks
    x, _ = inputs()
    traced = torch.fx.symbolic_trace(ours)
    for network in (traced, theirs):
        network(x).square().sum().backward()
    torch.testing.assert_close(ours.up.weight.grad, theirs.up.weight.grad)


def test_function_modes_see_the_function(networks: tuple[Network, Network]) -> None:
    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    ours, theirs = networks
    x, _ = inputs()
    with Seeing():
        y = ours(x)
    assert {"conv_transpose3d", "conv1d"} <= set(seen)
    torch.testing.assert_close(y, theirs(x))


class TestCounters:
    def test_profiler_counts_conv2d_as_torchs(self, package: Package) -> None:
        def flops(layer: Callable[[Tensor], Tensor]) -> int:
            with torch.profiler.profile(with_flops=True) as profile:
                layer(torch.ones(2, 4, 7, 8))
            return sum(event.flops for event in profile.key_averages() if event.flops)

        # Torch's own profiler counts no convolution but conv2d, and that without padding="same".
        module = package("conv2d", kernel_size=3, stride=2, padding=1)
        theirs = flops(nn.Conv2d(4, 6, 3, 2, 1))
        assert flops(module.Conv2d(4, 6)) == theirs > 0

    def test_counters_by_class_and_by_operator_count_a_layer_as_torchs(
        self, package: Package, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = package("conv_transpose3d", kernel_size=3, stride=2)
        aten: dict[Any, Any] = {torch.ops.aten.convolution: lambda inputs, outputs: len(inputs)}
        by_class: dict[Any, Any] = {nn.ConvTranspose3d: "a hook"}
        for name, table, counters in (
            ("ptflops.pytorch_ops", "MODULES_MAPPING", by_class),
            ("thop.profile", "register_hooks", dict(by_class)),
            ("ptflops.aten_ops", "ATEN_OPS_MAPPING", aten),
        ):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{table: counters}))
        module.ConvTranspose3d(2, 3)
        assert by_class[module.ConvTranspose3d] == "a hook"
        assert sys.modules["thop.profile"].register_hooks[module.ConvTranspose3d] == "a hook"
        (ours,) = aten.keys() - {torch.ops.aten.convolution}
        assert aten[ours](["x", "weight", "bias", "size"], []) == 9  # arguments of aten.convolution


@pytest.mark.long
class TestOnnx:
    """What is exported says Conv and ConvTranspose, and reads the batch from the input."""

    @pytest.fixture(autouse=True)
    def _onnx(self) -> None:
        pytest.importorskip("onnxscript")

    def test_from_torchscript(self, networks: tuple[Network, Network]) -> None:
        onnx = pytest.importorskip("onnx")
        file = io.BytesIO()
        torch.onnx.export(networks[0], (inputs()[0],), file, dynamo=False)
        graph = onnx.load_from_string(file.getvalue()).graph
        self.check(node.op_type for node in graph.node)

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("exported", [False, True])
    def test_from_export(
        self, networks: tuple[Network, Network], dynamic: bool, exported: bool
    ) -> None:
        x, _ = inputs()
        free = torch.export.Dim.AUTO
        shapes = [{0: free, 2: free, 3: free, 4: free}] if dynamic else None
        model: Any = networks[0]
        if exported:
            model = torch.export.export(model, (x,), dynamic_shapes=shapes)
            program = torch.onnx.export(model, dynamo=True)
        else:
            program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes)
        assert program is not None
        self.check(node.op_type for node in program.model.graph)

    def check(self, kinds: Any) -> None:
        found = list(kinds)
        assert found.count("ConvTranspose") == found.count("Conv") == 1


def test_subclasses_with_a_torch_function_keep_their_type(package: Package) -> None:
    class Marked(torch.Tensor):
        pass

    module = package("conv_transpose3d", kernel_size=3, stride=2)
    layer = module.ConvTranspose3d(2, 3)
    x = torch.randn(2, 2, 3, 4, 5)
    y = layer(x.as_subclass(Marked))
    assert type(y) is Marked
    torch.testing.assert_close(y.as_subclass(Tensor), F.conv_transpose3d(x, *layer.parameters(), 2))
