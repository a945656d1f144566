"""Layers with an activation and a residual: values, derivatives, and torch's tools."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Package
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import convgen
from convgen.spec.activation import ACTIVATIONS, Activation

ALL = [
    *("relu", "leaky_relu:0.01", "leaky_relu:-0.5", "silu", "gelu", "gelu:tanh", "sigmoid", "tanh"),
    *("hardswish", "clamp:-0.5,0.75", "hardtanh:-0.5,0.75"),
]


def by_torch(activation: str | None, x: Tensor) -> Tensor:
    """The activation of a text, by torch.nn.functional."""
    if activation is None:
        return x
    kind = Activation.parse(activation)
    functions: dict[str, Any] = {
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu:tanh": lambda x: F.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "hardswish": F.hardswish,
        "clamp": torch.clamp,
        "hardtanh": F.hardtanh,
    }
    assert functions.keys() == ACTIVATIONS.keys()
    result: Tensor = functions[kind.name](x, *kind.arguments)
    return result


def operands(op: str) -> dict[str, Tensor]:
    transposed = op.startswith("conv_transpose")
    shapes = {
        "input": (2, 3, 4, 5),
        "weight": (3, 4, 3, 3) if transposed else (4, 3, 3, 3),
        "bias": (4,),
        "residual": (2, 4, 9, 11) if transposed else (2, 4, 4, 5),
    }
    return {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


def reference(op: str, activation: str | None, **given: Any) -> Tensor:
    options: dict[str, Any] = {"stride": 2} if "transpose" in op else {"padding": 1}
    residual = given.pop("residual", None)
    sums: Tensor = getattr(F, op)(**given, **options)
    return by_torch(activation, sums if residual is None else sums + residual)


def layer(package: Package, op: str, activation: str | None, residual: bool = True) -> ModuleType:
    options = {"stride": 2} if "transpose" in op else {"padding": 1}
    given = {"activation": activation, "residual": residual, "dtypes": ("f64",)}
    return package(op, kernel_size=3, **given, **options)


@pytest.fixture(scope="module")
def kept_output(package: Package) -> ModuleType:
    """Of a convolution; its derivative is had from the output."""
    return layer(package, "conv2d", "leaky_relu:0.01")


@pytest.fixture(scope="module")
def kept_sums(package: Package) -> ModuleType:
    """Of a transposed convolution; its derivative needs what goes into the activation."""
    return layer(package, "conv_transpose2d", "silu")


@pytest.fixture(params=["kept_output", "kept_sums"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.getfixturevalue(request.param)
    return module


def compare(module: ModuleType, given: dict[str, Tensor], limit: float = 1e-12) -> None:
    """Values, gradients and gradients of gradients beside torch's."""
    op, activation = module.SPEC["op"], module.SPEC.get("activation")
    y, expected = getattr(module, op)(**given), reference(op, activation, **given)
    torch.testing.assert_close(y, expected, rtol=limit, atol=limit)
    assert y.stride() == expected.stride()
    grad = torch.randn_like(expected).requires_grad_()
    leaves = [*given.values(), grad]
    both = [
        torch.autograd.grad(out, [*given.values()], grad, create_graph=True)
        for out in (y, expected)
    ]
    torch.testing.assert_close(both[0], both[1], rtol=10 * limit, atol=10 * limit)
    again = [
        torch.autograd.grad(sum(each.pow(2).sum() for each in first), leaves) for first in both
    ]
    torch.testing.assert_close(again[0], again[1], rtol=100 * limit, atol=100 * limit)


class TestValues:
    def test_torch_s_with_every_kind_of_operand(self, module: ModuleType) -> None:
        given = operands(module.SPEC["op"])
        compare(module, given)
        for without in ("residual", "bias"):
            compare(module, {name: each for name, each in given.items() if name != without})

    @pytest.mark.parametrize("channels", [3, 32], ids=["gather", "brgemm"])
    def test_channels_last(self, kept_output: ModuleType, channels: int) -> None:
        x, w, r = (
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((2, channels, 7, 9), (channels, channels, 3, 3), (2, channels, 7, 9))
        )
        last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        b = torch.randn(channels, dtype=torch.float64, requires_grad=True)
        for input in (x, last):
            compare(kept_output, {"input": input, "weight": w, "bias": b, "residual": r}, 1e-11)

    def test_an_unbatched_and_an_empty_input(self, kept_output: ModuleType) -> None:
        given = {name: each.detach() for name, each in operands("conv2d").items()}
        whole = kept_output.conv2d(**given)
        one = given | {"input": given["input"][0], "residual": given["residual"][0]}
        assert torch.equal(kept_output.conv2d(**one), whole[0])
        none = given | {"input": given["input"][:0], "residual": given["residual"][:0]}
        assert kept_output.conv2d(**none).shape == (0, 4, 4, 5)

    def test_nan_and_infinities_as_torch_has_them(self, module: ModuleType) -> None:
        op = module.SPEC["op"]
        given = {name: each.detach() for name, each in operands(op).items()}
        for value in (float("nan"), float("inf"), -float("inf")):
            given["residual"][0, 0, 0, 0] = value
            y = getattr(module, op)(**given)
            assert torch.equal(
                torch.isfinite(y), torch.isfinite(reference(op, module.SPEC["activation"], **given))
            )

    @pytest.mark.long
    @pytest.mark.usefixtures("shared_cache")
    @pytest.mark.filterwarnings("ignore:.*lacks bf16 kernels")
    def test_autocast_casts_the_residual(self, kept_output: ModuleType) -> None:
        """To a dtype that the package lacks, so that another one serves the call."""
        given = {name: each.detach().float() for name, each in operands("conv2d").items()}
        with torch.autocast("cpu", torch.bfloat16):
            y = kept_output.conv2d(**given)
            given["residual"] = given["residual"].bfloat16()  # torch's sum alone would be float32
            torch.testing.assert_close(y, reference("conv2d", "leaky_relu:0.01", **given))

    def test_a_residual_that_does_not_fit_is_refused(self, kept_output: ModuleType) -> None:
        given = operands("conv2d")
        with pytest.raises(RuntimeError, match=r"output's size \[2, 4, 4, 5\], but has \[2, 4, 1"):
            kept_output.conv2d(**given | {"residual": given["residual"][:, :, :1]})
        with pytest.raises(RuntimeError, match="residual type"):
            kept_output.conv2d(**given | {"residual": given["residual"].float()})


class TestDerivatives:
    def test_of_first_and_second_order_in_both_modes(self, module: ModuleType) -> None:
        function = getattr(module, module.SPEC["op"])
        given = operands(module.SPEC["op"])
        inputs = tuple(each[..., :3, :3] if each.dim() > 1 else each for each in given.values())
        x, w, b, _ = (each.detach().requires_grad_() for each in inputs)
        r = torch.randn_like(function(x, w, b), requires_grad=True)

        def call(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
            result: Tensor = function(x, w, b, residual=r)
            return result

        once = {"fast_mode": True, "check_batched_grad": False}
        assert gradcheck(call, (x, w, b, r), check_forward_ad=True, **once)
        assert gradgradcheck(call, (x, w, b, r), check_fwd_over_rev=True, **once)

    def test_third_order_equals_torch_s(self, module: ModuleType) -> None:
        op = module.SPEC["op"]
        given = operands(op)

        def third(y: Tensor) -> tuple[Tensor, ...]:
            x, w, r = given["input"], given["weight"], given["residual"]
            (first,) = torch.autograd.grad(y.pow(4).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.pow(3).sum(), w, create_graph=True)
            return torch.autograd.grad(second.pow(2).sum(), (x, w, r))

        found = third(getattr(module, op)(**given))
        torch.testing.assert_close(found, third(reference(op, module.SPEC["activation"], **given)))

    def test_tangents_of_single_operands(self, module: ModuleType) -> None:
        op = module.SPEC["op"]
        given = {name: each.detach() for name, each in operands(op).items()}
        for name, primal in given.items():
            with forward_ad.dual_level():
                dual = given | {name: forward_ad.make_dual(primal, torch.ones_like(primal))}
                found = forward_ad.unpack_dual(getattr(module, op)(**dual)).tangent
                expected = reference(op, module.SPEC["activation"], **dual)
                torch.testing.assert_close(found, forward_ad.unpack_dual(expected).tangent)

    def test_what_is_saved_is_what_the_derivative_needs(
        self, kept_output: ModuleType, kept_sums: ModuleType
    ) -> None:
        for module, others in ((kept_output, 0), (kept_sums, 1)):
            op = module.SPEC["op"]
            given = operands(op)
            saved: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, saved=saved: (saved.append(tensor), tensor)[1], lambda tensor: tensor
            ):
                y = getattr(module, op)(**given)
            known = {each.data_ptr() for each in (y, *given.values())}
            assert len([each for each in saved if each.data_ptr() not in known]) == others
            assert given["residual"].data_ptr() not in {each.data_ptr() for each in saved}


class TestTools:
    def test_vmap_and_per_sample_gradients(self, module: ModuleType) -> None:
        op, activation = module.SPEC["op"], module.SPEC["activation"]
        x, w, b, r = (each.detach() for each in operands(op).values())
        function = getattr(module, op)

        def ours(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
            result: Tensor = function(x, w, b, residual=r)
            return result

        def torch_s(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
            return reference(op, activation, input=x, weight=w, bias=b, residual=r)

        batch = torch.stack([x, x + 1]), torch.stack([w, w * 2]), torch.stack([r, r - 1])
        for dims in ((0, None, 0), (0, None, None), (None, 0, None), (0, 0, 0)):
            given = [each if dim == 0 else each[0] for each, dim in zip(batch, dims, strict=True)]
            torch.testing.assert_close(
                torch.vmap(ours, dims)(*given), torch.vmap(torch_s, dims)(*given)
            )
        per_sample = [
            torch.vmap(torch.func.grad(lambda w, x, f=f: f(x, w, r).pow(2).sum()), (None, 0))
            for f in (ours, torch_s)
        ]
        torch.testing.assert_close(*(each(w, batch[0]) for each in per_sample))

    def test_compile_and_export(self, kept_sums: ModuleType) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = kept_sums.ConvTranspose2d(3, 4, dtype=torch.float64)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.up(x)
                return self.up(x, residual=y)

        net = Net()
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        grads = [torch.autograd.grad(f(x).sum(), [x, *net.parameters()]) for f in (net, compiled)]
        torch.testing.assert_close(*grads)
        program = torch.export.export(net, (x,))
        torch.testing.assert_close(program.module()(x), net(x))

    @pytest.mark.filterwarnings("ignore:.torch.jit.trace")
    def test_layers(self, kept_output: ModuleType) -> None:
        layer = kept_output.Conv2d(3, 4).double()
        plain = nn.Conv2d(3, 4, 3, padding=1).double()
        plain.load_state_dict(layer.state_dict())
        x, r = torch.randn(2, 3, 6, 7).double(), torch.randn(2, 4, 6, 7).double()
        torch.testing.assert_close(layer(x, r), F.leaky_relu(plain(x) + r))
        assert "activation=leaky_relu:0.01" in repr(layer)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x, r), layer(x, r))
        traced = torch.jit.trace(layer, (x, r))
        torch.testing.assert_close(traced(x, r), layer(x, r))

    def test_padding_modes(self, kept_output: ModuleType) -> None:
        layer = kept_output.Conv2d(3, 4, padding_mode="reflect").double()
        plain = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect").double()
        plain.load_state_dict(layer.state_dict())
        x, r = torch.randn(2, 3, 6, 7).double(), torch.randn(2, 4, 6, 7).double()
        torch.testing.assert_close(layer(x, r), F.leaky_relu(plain(x) + r))
        torch.testing.assert_close(layer(x), F.leaky_relu(plain(x)))


@pytest.mark.usefixtures("shared_cache")
class TestWhatThereIs:
    @pytest.mark.long
    def test_depthwise_layers_in_channels_last(self) -> None:
        module = convgen.specialize(
            "conv2d", kernel_size=3, padding=1, groups=18, activation="silu", residual=True,
            backends="cpu", dtypes=("f64",),
        )  # fmt: skip
        x, r = (torch.randn(2, 18, 7, 9, dtype=torch.float64) for _ in range(2))
        w, b = torch.randn(18, 1, 3, 3, dtype=torch.float64), torch.randn(18, dtype=torch.float64)
        last = x.to(memory_format=torch.channels_last).requires_grad_()
        y = module.conv2d(last, w, b, residual=r)
        expected = F.silu(F.conv2d(last, w, b, padding=1, groups=18) + r)
        torch.testing.assert_close(y, expected)
        (found,) = torch.autograd.grad(y.square().sum(), last)
        torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), last)[0])

    @pytest.mark.long
    @pytest.mark.parametrize("activation", [*ALL, None])
    @pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
    def test_every_activation_is_verified(self, op: str, activation: str | None) -> None:
        options = {"stride": 2} if "transpose" in op else {"padding": 1}
        module = convgen.specialize(
            op, kernel_size=3, activation=activation, residual=True, backends="cpu",
            dtypes=("f32", "bf16"), **options,
        )  # fmt: skip
        report = convgen.verify(module)
        assert report.ok, [row for row in report.rows if not row.ok]
