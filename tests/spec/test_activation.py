"""Activations as a specification writes them."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from convgen.codegen.render import TEMPLATES, command_line, python_call
from convgen.spec import ConvSpec, SpecError
from convgen.spec.activation import ACTIVATIONS, Activation

TEXTS = [
    *("relu", "leaky_relu:0.01", "silu", "gelu", "gelu:tanh", "sigmoid", "tanh", "hardswish"),
    *("clamp:-1,1", "clamp:-inf,2.5", "hardtanh:0,6"),
]


def evaluated(expression: str, **values: object) -> torch.Tensor:
    result: torch.Tensor = eval(expression, {"torch": torch, "F": F, **values})
    return result


class TestText:
    @pytest.mark.parametrize(
        ("given", "canonical", "identifier"),
        [
            ("relu", "relu", "relu"),
            ("leaky_relu", "leaky_relu:0.01", "leaky_relu_0p01"),
            ("leaky_relu:1e-5", "leaky_relu:1e-05", "leaky_relu_1em05"),
            ("leaky_relu:-0.0", "leaky_relu:0", "leaky_relu_0"),
            ("gelu:none", "gelu", "gelu"),
            ("gelu:tanh", "gelu:tanh", "gelu_tanh"),
            ("relu6", "hardtanh:0,6", "hardtanh_0_6"),
            ("hardtanh", "hardtanh:-1,1", "hardtanh_m1_1"),
            ("clamp:-inf,2.50", "clamp:-inf,2.5", "clamp_minf_2p5"),
        ],
    )
    def test_is_canonical_in_specifications_and_names(
        self, given: str, canonical: str, identifier: str
    ) -> None:
        spec = ConvSpec.make("conv2d", kernel_size=3, activation=given)
        assert spec.activation == canonical
        assert spec.name == f"conv2d_k3_{identifier}"
        assert spec.name.isidentifier()
        assert spec == ConvSpec.from_json(spec.to_json())
        assert command_line(spec).endswith(f" --activation {canonical}")
        assert f"activation='{canonical}'" in python_call(spec)

    @pytest.mark.parametrize(
        "given",
        [
            *(
                "swish",
                "relu:1",
                "leaky_relu:",
                "leaky_relu:a",
                "leaky_relu:1,2",
                "clamp",
                "clamp:1",
            ),
            *("clamp:1,-1", "clamp:nan,1", "leaky_relu:inf", "hardtanh:1,1", "gelu:fast", 3, ""),
        ],
    )
    def test_what_is_none_is_refused_with_what_there_is(self, given: object) -> None:
        with pytest.raises(SpecError, match="activation=") as caught:
            ConvSpec.make("conv2d", kernel_size=3, activation=given)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    def test_without_one_a_specification_is_what_it_was(self) -> None:
        plain = ConvSpec.make("conv2d", kernel_size=3)
        assert not plain.has_epilogue
        assert not plain.to_dict().keys() & {"activation", "residual"}
        full = ConvSpec.make("conv2d", kernel_size=3, activation="relu", residual=True)
        assert full.name == "conv2d_k3_relu_residual"
        assert full.linear == plain
        with pytest.raises(SpecError, match="residual=1 must be True or False"):
            ConvSpec.make("conv2d", kernel_size=3, residual=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", TEXTS)
class TestDerivative:
    def test_from_what_is_saved_is_torch_s(self, text: str) -> None:
        activation = Activation.parse(text)
        bounds = [value for value in activation.arguments if math.isfinite(value)]
        x = torch.cat([torch.linspace(-8, 8, 101), torch.tensor([0.0, -0.0, math.nan, *bounds])])
        x.requires_grad_()
        y = evaluated(activation.forward("x"), x=x)
        (expected,) = torch.autograd.grad(y.sum(), x)
        saved = (y if activation.saves_output else x).detach()
        ones = torch.ones_like(x)
        found = evaluated(activation.backward("g", "s"), g=ones, s=saved)
        torch.testing.assert_close(found, expected, equal_nan=True)

    def test_has_derivatives(self, text: str) -> None:
        activation = Activation.parse(text)
        expression = activation.composite("g", "s") or activation.backward("g", "s")
        g, s = (torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert gradcheck(lambda g, s: evaluated(expression, g=g, s=s), (g, s))
        plain = evaluated(activation.backward("g", "s"), g=g.detach(), s=s.detach())
        torch.testing.assert_close(evaluated(expression, g=g, s=s).detach(), plain)


def test_every_activation_is_among_the_tested() -> None:
    assert {Activation.parse(text).name for text in TEXTS} == ACTIVATIONS.keys()


@pytest.mark.parametrize("real", ["float", "double"])
def test_the_cpu_s_functions_are_torch_s(real: str, tmp_path: Path) -> None:
    lines = [
        f'extern "C" void f{n}({real}* v, long n) {{ using Real = {real}; for (long i = 0; i < n; '
        f"++i) {{ const Real x = v[i]; v[i] = {Activation.parse(text).cpp('x')}; }} }}"
        for n, text in enumerate(TEXTS)
    ]
    source, library = tmp_path / "f.cpp", tmp_path / "f.so"
    source.write_text("\n".join(['#include "elementwise.h"', *lines]))
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    folders = [f"-I{TEMPLATES / name}" for name in ("cpu", "common")]
    command = ["g++", *flags, *folders, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    functions = ctypes.CDLL(str(library))
    dtype = torch.float32 if real == "float" else torch.float64
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30, -1e-30, 1e30, -1e30]
    x = torch.cat([torch.linspace(-120, 120, 9999), torch.linspace(-7, 7, 9999)]).to(dtype)
    x = torch.cat([x, torch.tensor(special, dtype=dtype)])
    limit = 2e-6 if real == "float" else 1e-14
    for n, text in enumerate(TEXTS):
        found = x.clone()
        functions[f"f{n}"](ctypes.c_void_p(found.data_ptr()), ctypes.c_long(found.numel()))
        expected = evaluated(Activation.parse(text).forward("x"), x=x)
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit, equal_nan=True)
