"""Generated modules under torch.compile, torch.export, autocast and CUDA graphs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_DTYPES, Package
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(package: Package, device: str = "cpu") -> nn.Module:
    """An up- and a down-sampling layer with something to fuse between them."""
    up = package("conv_transpose3d", device, kernel_size=3, stride=2)
    down = package("conv1d", device, kernel_size=5, stride=3, padding=2)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = up.ConvTranspose3d(2, 3, device=device)
            self.down = down.Conv1d(3, 2, device=device)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x) * 2).flatten(2)).tanh()

    return Network()


def gradients(function: Any, parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


class TestCompile:
    @pytest.mark.long
    def test_inductor_equals_eager(self, package: Package, device: str) -> None:
        layers = network(package, device)
        parameters = list(layers.parameters())
        compiled = torch.compile(layers, fullgraph=True)
        x = torch.randn(2, 2, 3, 2, 4, device=device, requires_grad=True)
        for ours, expected in zip(
            gradients(compiled, parameters, x), gradients(layers, parameters, x), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

    def test_other_shapes_do_not_recompile(self, package: Package) -> None:
        layers = network(package)
        parameters = list(layers.parameters())
        counter = CompileCounter()
        compiled = torch.compile(layers, fullgraph=True, dynamic=True, backend=counter)
        # At first no two alike: extents that are equal by chance would be taken for one.
        for shape in ((3, 4, 5, 6), (3, 5, 3, 7), (5, 2, 6, 4), (4, 9, 2, 2)):
            batch, *extents = shape
            x = torch.randn(batch, 2, *extents, requires_grad=True)
            torch.testing.assert_close(compiled(x), layers(x))
            assert gradients(compiled, parameters, x)[1].shape == x.shape
        assert counter.frame_count == 1

    def test_backward_graph_serves_other_shapes(self, package: Package) -> None:
        layers = network(package)
        parameters = list(layers.parameters())
        compiled = torch.compile(layers, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, extent in ((3, 4), (5, 6), (7, 4)):
                x = torch.randn(batch, 2, extent, extent + 1, 6, requires_grad=True)
                for ours, expected in zip(
                    gradients(compiled, parameters, x),
                    gradients(layers, parameters, x),
                    strict=True,
                ):
                    torch.testing.assert_close(ours, expected)

    def test_one_graph_with_the_operator_in_it(self, package: Package) -> None:
        module = package("conv_transpose3d", kernel_size=3, stride=2)
        seen = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
            return graph

        function = torch.compile(module.conv_transpose3d, fullgraph=True, backend=backend)
        function(
            torch.randn(1, 2, 3, 3, 3), torch.randn(2, 2, 3, 3, 3), None, output_padding=(1, 0, 1)
        )
        function(torch.randn(2, 3, 3, 3), torch.randn(2, 2, 3, 3, 3))  # unbatched
        assert sum("dgrad" in str(target) for target in seen) == 2
        assert not any("convolution" in str(target) for target in seen)

    def test_errors_are_raised_while_compiling(self, package: Package) -> None:
        module = package("conv_transpose3d", kernel_size=3, stride=2)
        compiled = torch.compile(module.conv_transpose3d, backend="eager")
        with pytest.raises(RuntimeError, match="to have 4 channels"):
            compiled(torch.randn(1, 3, 3, 3, 3), torch.randn(4, 2, 3, 3, 3))

    @pytest.mark.long
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_backward_writes_the_incoming_gradient_once(
        self, package: Package, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One buffer serves the gradients of input, weight and bias, and is what these read."""
        monkeypatch.setenv("CI", "true")  # Inductor raises errors of its own there
        layer = package("conv2d", kernel_size=3, stride=2, padding=1).Conv2d(2, 3)
        x = torch.randn(2, 2, 21, 13, requires_grad=True)
        gradient = torch.randn(2, 3, 11, 7).to(memory_format=memory_format)

        def function(x: Tensor) -> Tensor:
            return layer(x).relu() * 2

        def backward() -> None:
            torch.compile(function, fullgraph=True)(x).backward(gradient)

        _, (_, code) = run_and_get_code(backward)
        written = re.findall(r"empty_strided_cpu\(\(2, 3, 11, 7\), \((.*?)\)", code)
        assert written == ["231, 77, 7, 1"]
        (expected,) = torch.autograd.grad(function(x), x, gradient)
        torch.testing.assert_close(x.grad, expected)

    def test_make_fx_traces_gradients(self, package: Package) -> None:
        module = package("conv1d", kernel_size=5, stride=3, padding=2)

        def gradient(x: Tensor, w: Tensor) -> Tensor:
            y = module.conv1d(x, w)
            (result,) = torch.autograd.grad(y.square().sum(), w)
            return result

        x, w = torch.randn(2, 2, 9), torch.randn(3, 2, 5, requires_grad=True)
        graph = make_fx(gradient, tracing_mode="symbolic")(x, w)
        other = torch.randn(3, 2, 14)
        torch.testing.assert_close(graph(other, w), gradient(other, w))
        assert "wgrad" in graph.code


class TestExport:
    def test_exports_with_free_batch_and_extents(self, package: Package, tmp_path: Any) -> None:
        layers = network(package)
        free = torch.export.Dim.AUTO
        x = torch.randn(2, 2, 3, 4, 5)
        exported = torch.export.export(
            layers, (x,), dynamic_shapes={"x": {0: free, 2: free, 3: free, 4: free}}
        )
        torch.export.save(exported, tmp_path / "exported.pt2")
        loaded = torch.export.load(tmp_path / "exported.pt2").module()
        for shape in ((2, 2, 3, 4, 5), (5, 2, 7, 3, 6)):
            other = torch.randn(shape)
            torch.testing.assert_close(loaded(other), layers(other))


class TestAutocast:
    """As torch's own convolutions: floats but float64 are cast, gradients come back as given."""

    @pytest.fixture
    def module(self, package: Package, device: str) -> Any:
        return package("conv_transpose3d", device, kernel_size=3, stride=2, dtypes=ALL_DTYPES)

    def operands(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(2, 2, 3, 4, 2, device=device, requires_grad=True)
        w = torch.randn(2, 3, 3, 3, 3, device=device, requires_grad=True)
        return x, w, torch.randn(3, device=device, requires_grad=True)

    def test_casts_to_the_lower_precision(self, module: Any, device: str) -> None:
        operands = self.operands(device)
        with torch.autocast(device, torch.bfloat16):
            ours = module.conv_transpose3d(*operands)
            theirs = F.conv_transpose3d(*operands, 2)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)
        for first, second in zip(
            torch.autograd.grad(ours.float().square().sum(), operands),
            torch.autograd.grad(theirs.float().square().sum(), operands),
            strict=True,
        ):
            assert first.dtype == torch.float32
            assert (first - second).norm() <= 3e-2 * second.norm()

    def test_leaves_float64_alone(self, module: Any, device: str) -> None:
        x, w, b = (tensor.double() for tensor in self.operands(device))
        with torch.autocast(device, torch.bfloat16):
            assert module.conv_transpose3d(x, w, b).dtype == torch.float64
            with pytest.raises(RuntimeError, match="should be the same"):
                module.conv_transpose3d(x, w.float(), b)

    def test_backward_inside_autocast_stays_in_float32(self, module: Any, device: str) -> None:
        x, w, b = self.operands(device)
        expected = torch.autograd.grad(module.conv_transpose3d(x, w, b).sum(), (x, w, b))
        y = module.conv_transpose3d(x, w, b)
        with torch.autocast(device, torch.bfloat16):
            inside = torch.autograd.grad(y.sum(), (x, w, b))
        for first, second in zip(inside, expected, strict=True):
            assert torch.equal(first, second)

    def test_compiles(self, module: Any, device: str) -> None:
        x, w, b = self.operands(device)
        compiled = torch.compile(module.conv_transpose3d, fullgraph=True, backend="aot_eager")
        with torch.autocast(device, torch.bfloat16):
            ours, expected = compiled(x, w, b), module.conv_transpose3d(x, w, b)
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, expected)


@pytest.mark.gpu
class TestStreams:
    """Work goes to the caller's stream and device, and needs no synchronization."""

    def test_cuda_graph_replays_training(self, package: Package) -> None:
        layers = network(package, "cuda")
        parameters = list(layers.parameters())
        x = torch.randn(2, 2, 3, 4, 5, device="cuda", requires_grad=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                gradients(layers, parameters, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(layers, parameters, x)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for ours, expected in zip(captured, gradients(layers, parameters, x), strict=True):
            assert torch.equal(ours, expected)

    def test_runs_on_the_current_stream(self, package: Package) -> None:
        module = package("conv_transpose3d", "cuda", kernel_size=3, stride=2)
        w = torch.randn(8, 8, 3, 3, 3, device="cuda")
        ones = torch.ones(2, 8, 16, 16, 16, device="cuda")
        expected = module.conv_transpose3d(ones, w)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = torch.zeros_like(ones)
            torch.cuda._sleep(50_000_000)
            x.add_(1)  # a kernel on another stream would see zeros
            y = module.conv_transpose3d(x, w)
        side.synchronize()
        assert torch.equal(y, expected)

    def test_runs_on_the_tensors_device(self, package: Package) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        module = package("conv_transpose3d", "cuda", kernel_size=3, stride=2)
        x, w = torch.randn(2, 2, 3, 4, 5), torch.randn(2, 3, 3, 3, 3)
        first = module.conv_transpose3d(x.to("cuda:0"), w.to("cuda:0"))
        with torch.cuda.device(0):
            second = module.conv_transpose3d(x.to("cuda:1"), w.to("cuda:1"))
            assert torch.cuda.current_device() == 0
        assert second.device == torch.device("cuda:1")
        assert torch.equal(first.cpu(), second.cpu())
        with pytest.raises(RuntimeError, match="same device"):
            module.conv_transpose3d(x.to("cuda:0"), w.to("cuda:1"))
