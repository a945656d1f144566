"""Torch's own arguments: taken where they say what was generated, refused by name elsewhere."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, Package
from torch import Tensor, nn

CONSTANTS = ("kernel_size", "stride", "padding", "dilation", "groups")

every_layer = pytest.mark.parametrize(("op", "constants"), LAYERS.items(), ids=list(LAYERS))


@pytest.fixture
def k3s2(package: Package) -> ModuleType:
    return package("conv_transpose3d", kernel_size=3, stride=2)


def class_of(module: ModuleType) -> str:
    return next(name for name in module.__all__ if name.startswith("Conv"))


def arguments_of(module: ModuleType) -> dict[str, Any]:
    """Every constant of torch's layer, as generated."""
    names = list(CONSTANTS)
    if "transpose" in module.SPEC["op"]:
        names.append("output_padding")
    return {name: module.SPEC[name] for name in names}


def example(op: str) -> Tensor:
    return torch.randn(2, 4, *(5, 6, 7)[-int(op[-2]) :])


def others(name: str, value: Any) -> list[Any]:
    """Values that are not the generated one, in the forms that torch takes and in no such form."""
    first = 3 if isinstance(value, str) else value if isinstance(value, int) else value[0]
    wrong = [first + 7, (first + 7,), False, True, None, 2.5, "reflect", (first,) * 5]
    if not isinstance(value, str | int):
        wrong += [(*value[:-1], value[-1] + 1), torch.Size([value[0] + 7] * len(value))]
    return wrong


@every_layer
class TestConstructor:
    def test_has_the_signature_of_torchs(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        module = package(op, **constants)
        ours = inspect.signature(getattr(module, class_of(module)))
        assert list(ours.parameters) == list(
            inspect.signature(getattr(nn, class_of(module))).parameters
        )

    def test_takes_what_was_generated_by_position_and_by_name(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        module = package(op, **constants)
        name = class_of(module)
        layer, theirs = getattr(module, name), getattr(nn, name)
        values = {**arguments_of(module), "bias": False, "padding_mode": "zeros"}
        order = list(inspect.signature(theirs).parameters)[2:-2]
        positional = [values[parameter] for parameter in order]
        lists = {
            parameter: list(value) if isinstance(value, tuple) else value
            for parameter, value in values.items()
        }
        for ours in (
            layer(4, 6, *positional, "cpu", torch.float64),
            layer(4, 6, *positional[:1], bias=False, dtype=torch.float64),
            layer(in_channels=4, out_channels=6, **values, device=None, dtype=torch.float64),
            layer(4, 6, **lists, dtype=torch.float64),
        ):
            expected = theirs(4, 6, **values, dtype=torch.float64)
            assert repr(ours) == repr(expected)
            expected.load_state_dict(ours.state_dict())
            x = example(op).double()
            torch.testing.assert_close(ours(x), expected(x), rtol=1e-12, atol=1e-12)

    def test_names_the_constant_that_differs(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        module = package(op, **constants)
        layer = getattr(module, class_of(module))
        for name in CONSTANTS:
            for value in others(name, module.SPEC[name]):
                with pytest.raises(ValueError, match=f"^{name} must be .*, as generated, not "):
                    layer(4, 6, **{name: value})

    def test_changed_attributes_raise_at_the_next_call(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        module = package(op, **constants)
        x = example(op)
        layer = getattr(module, class_of(module))(4, 6)
        expected = layer(x)
        for name in CONSTANTS:
            before = getattr(layer, name)
            for value in others(name, module.SPEC[name]):
                setattr(layer, name, value)
                words = f"^{name} must be .*, as generated, not "
                for changed in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                    assert getattr(changed, name) == value
                    with pytest.raises(ValueError, match=words):
                        changed(x)
                setattr(layer, name, before)
                assert torch.equal(layer(x), expected)
        setattr(layer, "stride", list(layer.stride))  # noqa: B010
        assert torch.equal(layer(x), expected)


class TestLayer:
    def test_misreads_no_argument_of_torch(self, k3s2: ModuleType) -> None:
        assert k3s2.ConvTranspose3d(4, 8, 3).bias is not None
        with pytest.raises(ValueError, match=r"^kernel_size must be \(3, 3, 3\), .* not 5"):
            k3s2.ConvTranspose3d(16, 8, 5)
        with pytest.raises(ValueError, match=r"^kernel_size must be .* not False"):
            k3s2.ConvTranspose3d(16, 8, False)
        with pytest.raises(ValueError, match=r"^padding must be .* not 'same'"):
            k3s2.ConvTranspose3d(16, 8, 3, 2, "same")
        with pytest.raises(ValueError, match="padding mode"):
            k3s2.ConvTranspose3d(16, 8, padding_mode="reflect")

    def test_output_padding_is_free(self, k3s2: ModuleType) -> None:
        x = torch.randn(1, 3, 2, 3, 4)
        for output_padding in (1, (1, 0, 1), [0, 1, 1], (0, 0, 0)):
            ours = k3s2.ConvTranspose3d(3, 2, 3, 2, 0, output_padding)
            theirs = nn.ConvTranspose3d(3, 2, 3, 2, 0, output_padding)
            theirs.load_state_dict(ours.state_dict())
            assert repr(ours) == repr(theirs)
            torch.testing.assert_close(ours(x), theirs(x))
            ours.output_padding = theirs.output_padding = (0, 1, 0)
            torch.testing.assert_close(ours(x), theirs(x))
            size = (6, 7, 9)
            torch.testing.assert_close(ours(x, size), theirs(x, size))
        with pytest.raises(RuntimeError, match="output padding must be smaller"):
            k3s2.ConvTranspose3d(3, 2, output_padding=2)(x)

    def test_padding_has_several_names(self, package: Package) -> None:
        x = torch.randn(1, 2, 5, 6)
        for constants, equal, unequal in (
            ({"kernel_size": 3, "padding": 1}, [1, (1, 1), "same"], ["valid", 0]),
            ({"kernel_size": 1, "stride": 2}, [0, "valid"], ["same", 1]),
        ):
            module = package("conv2d", **constants, dtypes=("f32",))
            rest = {name: value for name, value in constants.items() if name != "padding"}
            for padding in equal:
                for mode in ("zeros", "reflect"):
                    ours = module.Conv2d(2, 3, **rest, padding=padding, padding_mode=mode)
                    theirs = nn.Conv2d(2, 3, **rest, padding=padding, padding_mode=mode)
                    theirs.load_state_dict(ours.state_dict())
                    assert repr(ours) == repr(theirs)
                    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(
                    module.conv2d(x, ours.weight, None, padding=padding),
                    F.conv2d(x, ours.weight, None, **rest_of(rest), padding=padding),
                    rtol=1e-5,
                    atol=1e-5,
                )
            for padding in unequal:
                with pytest.raises(ValueError, match=r"^padding must be"):
                    module.Conv2d(2, 3, padding=padding)

    def test_padding_mode_may_change_where_there_is_one(self, package: Package) -> None:
        module = package("conv2d", **LAYERS["conv2d"])
        ours, theirs = module.Conv2d(4, 6), nn.Conv2d(4, 6, **LAYERS["conv2d"])
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 4, 6, 7)
        for mode in ("circular", "replicate", "zeros"):
            ours.padding_mode = theirs.padding_mode = mode
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        ours.padding_mode = "circular"
        ours._reversed_padding_repeated_twice = [1, 1, 1, 1]
        with pytest.raises(ValueError, match=r"^_reversed_padding_repeated_twice must be"):
            ours(x)

    def test_padding_mode_of_a_transposed_layer_raises(self, k3s2: ModuleType) -> None:
        layer = k3s2.ConvTranspose3d(3, 2)
        layer.padding_mode = "circular"
        with pytest.raises(ValueError, match=r"^padding_mode must be 'zeros'"):
            layer(torch.randn(1, 3, 2, 2, 2))

    def test_stride_cannot_be_traded_for_dilation(self, package: Package) -> None:
        module = package("conv1d", **LAYERS["conv1d"])
        layer = nn.Sequential(module.Conv1d(4, 6))
        compiled = torch.compile(layer, backend="eager")
        x = torch.randn(1, 4, 9)
        assert torch.equal(compiled(x), layer(x))
        for each in layer.modules():
            if isinstance(each, nn.Conv1d):
                each.stride, each.dilation, each.padding = (1,), (3,), (6,)
        for call in (layer, compiled, torch.func.functional_call):
            with pytest.raises((ValueError, RuntimeError), match=r"stride must be \(3,\)"):
                call(x) if call is not torch.func.functional_call else call(layer, {}, (x,))

    def test_lists_changed_in_place_change_no_attribute(self, package: Package) -> None:
        layer = package("conv2d", **LAYERS["conv2d"]).Conv2d(4, 6)
        x = torch.randn(1, 4, 5, 6)
        for name in ("kernel_size", "stride", "dilation"):
            values = list(getattr(layer, name))
            setattr(layer, name, values)
            values[0] += 1
            assert getattr(layer, name) == (values[0] - 1, *values[1:])
            layer(x)

    def test_state_of_torchs_own_layer_is_looked_at(self, package: Package) -> None:
        module = package("conv1d", **LAYERS["conv1d"])
        x = torch.randn(1, 4, 9)
        for arguments, fits in ((LAYERS["conv1d"], True), ({"kernel_size": 5, "stride": 2}, False)):
            theirs = nn.Conv1d(4, 6, **arguments)
            ours = module.Conv1d.__new__(module.Conv1d)
            state = dict(theirs.__dict__)
            del state["padding_mode"]  # as layers had none once
            ours.__setstate__(state)
            if fits:
                torch.testing.assert_close(ours(x), theirs(x))
            else:
                with pytest.raises(ValueError, match=r"^stride must be \(3,\)"):
                    ours(x)

    def test_patched_forwards_stay(self, k3s2: ModuleType) -> None:
        layer = k3s2.ConvTranspose3d(3, 2)
        original = layer.forward
        layer.forward = lambda x: original(x) + 1
        layer.stride = (1, 1, 1)
        layer.stride = (2, 2, 2)
        x = torch.randn(1, 3, 2, 2, 2)
        assert torch.equal(layer(x), original(x) + 1)


def rest_of(constants: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name != "kernel_size"}


@every_layer
class TestFunction:
    def operands(self, module: ModuleType, op: str) -> tuple[Tensor, Tensor, Tensor]:
        groups, kernel = module.SPEC["groups"], module.SPEC["kernel_size"]
        channels = (4, 6 // groups) if "transpose" in op else (6, 4 // groups)
        return example(op), torch.randn(*channels, *kernel), torch.randn(6)

    def test_takes_torchs_arguments_in_torchs_order(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        module = package(op, **constants)
        operands = self.operands(module, op)
        ours: Callable[..., Tensor] = getattr(module, op)
        theirs: Callable[..., Tensor] = getattr(F, op)
        values = arguments_of(module)
        order = ["stride", "padding", "dilation", "groups"]
        if "transpose" in op:
            order = ["stride", "padding", "output_padding", "groups", "dilation"]
        assert list(inspect.signature(ours).parameters) == ["input", "weight", "bias", *order]
        positional = [values[name] for name in order]
        del values["kernel_size"]
        expected = theirs(*operands, *positional)
        for result in (
            ours(*operands),
            ours(*operands, *positional),
            ours(*operands, *positional[:2]),
            ours(*operands, **values),
            ours(*operands, *[list(v) if isinstance(v, tuple) else v for v in positional]),
        ):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)

    def test_names_the_constant_that_differs(
        self, package: Package, op: str, constants: dict[str, Any]
    ) -> None:
        module = package(op, **constants)
        operands = self.operands(module, op)
        for name in CONSTANTS[1:]:
            for value in others(name, module.SPEC[name]):
                with pytest.raises(ValueError, match=f"^{name} must be .*, as generated, not "):
                    getattr(module, op)(*operands, **{name: value})


def test_functions_take_the_fourth_argument_for_the_stride(k3s2: ModuleType) -> None:
    x, w, b = torch.randn(1, 3, 2, 2, 2), torch.randn(3, 2, 3, 3, 3), torch.randn(2)
    torch.testing.assert_close(k3s2.conv_transpose3d(x, w, b, 2), F.conv_transpose3d(x, w, b, 2))
    with pytest.raises(ValueError, match=r"^stride must be \(2, 2, 2\), as generated, not 1"):
        k3s2.conv_transpose3d(x, w, b, 1)


@pytest.mark.parametrize(
    "output_padding",
    [
        *(0.5, (0.5, 0, 0), (0, 1.0, 0), "1", None, (None,) * 3),
        *(True, (True, 0, 0), [False, 0, 0], b"\0\1\0", range(3), {0}),
    ],
)
def test_output_padding_is_of_ints(k3s2: ModuleType, output_padding: Any) -> None:
    x, w = torch.randn(1, 3, 2, 2, 2), torch.randn(3, 2, 3, 3, 3)
    with pytest.raises(TypeError):
        F.conv_transpose3d(x, w, None, 2, 0, output_padding)
    with pytest.raises(TypeError, match="output_padding must be"):
        k3s2.conv_transpose3d(x, w, None, 2, 0, output_padding)
