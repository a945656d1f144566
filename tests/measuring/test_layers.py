"""Layers and suites: shapes, counts of operations and bytes, and what is refused."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import convgen
from convgen.measuring.layers import Layer, SuiteError, for_cpu, read_suite, select, suites
from convgen.spec import ConvSpec

LAYER = {"name": "a", "op": "conv1d", "kernel_size": 3, "input": [2, 4, 9], "out_channels": 4}


def run(layer: Layer, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    spec = layer.spec
    arguments: dict[str, Any] = {
        name: getattr(spec, name) for name in ("stride", "padding", "dilation", "groups")
    }
    if spec.transposed:
        arguments["output_padding"] = spec.output_padding
    result: torch.Tensor = getattr(F, spec.op)(input, weight, **arguments)
    return result


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    ndim = draw(st.integers(1, 3))
    op = draw(st.sampled_from(["conv", "conv_transpose"])) + f"{ndim}d"

    def ints(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    groups = draw(st.integers(1, 2))
    spec = ConvSpec(op, ints(1, 4), ints(1, 4), ints(0, 2), 0, ints(1, 2), groups)
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    extents = tuple(e + 7 for e in ints(0, 3))  # a kernel spans 7 at most
    return Layer("drawn", spec, (2, channels[0], *extents), channels[1], bias=False)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_multiplications_are_those_of_a_layer_of_ones(layer: Layer) -> None:
    ones = [
        torch.ones(shape, dtype=torch.float64) for shape in (layer.input_shape, layer.weight_shape)
    ]
    output = run(layer, *ones)
    assert output.shape == layer.output_shape
    assert layer.multiplications == output.sum().item()
    assert layer.flops("forward") == 2 * layer.multiplications
    assert layer.flops("backward") == 4 * layer.multiplications


def test_traffic_counts_every_operand_and_result_once() -> None:
    layer = Layer("a", ConvSpec("conv2d", 3, padding=1), (2, 4, 8, 8), 6, bias=True)
    activations, outputs, weight, bias = 2 * 4 * 64, 2 * 6 * 64, 6 * 4 * 9, 6
    assert layer.traffic_bytes("forward", 4) == 4 * (activations + outputs + weight + bias)
    assert layer.traffic_bytes("backward", 4) == 4 * (2 * activations + outputs + 2 * weight + bias)


def test_traffic_leaves_out_rows_that_a_stride_skips() -> None:
    spec = ConvSpec("conv2d", 1, stride=2)
    layer = Layer("a", spec, (1, 4, 8, 8), 4, bias=False)
    # Every second row is read, but all of its sectors.
    assert layer.traffic_bytes("forward", 4) == 4 * (4 * 4 * 8 + 4 * 4 * 4 + 16)


@pytest.mark.parametrize("name", suites())
def test_suites_of_the_package_have_the_shapes_that_torch_gives(name: str) -> None:
    for layer in read_suite(name):
        input, weight = (
            torch.empty(shape, device="meta") for shape in (layer.input_shape, layer.weight_shape)
        )
        assert run(layer, input, weight).shape == layer.output_shape, layer.name


@pytest.mark.parametrize("name", ["models", "networks"])
def test_layers_for_a_cpu_take_seconds_there(name: str) -> None:
    layers = read_suite(name)
    marked = for_cpu(layers)
    assert 30 <= len(marked) < len(layers)
    for layer in marked:
        assert layer.flops("forward") <= 4e9, layer.name  # two cores do 1e11 to 1e12 a second
        assert layer.traffic_bytes("forward", 4) <= 1 << 28, layer.name
        assert layer.input_shape == layer.cpu_shape


def test_layers_that_are_named_run_on_a_cpu_though_they_are_not_for_it() -> None:
    layers = select(read_suite("networks"), ["nnunet-dec1", "nnunet-enc1"])
    assert [layer.name for layer in for_cpu(layers)] == ["nnunet-enc1"]
    assert for_cpu(layers, named=["nnunet-*"]) == for_cpu(layers)
    assert for_cpu(layers, named=["nnunet-dec1"]) == [layers[0], layers[1].on_cpu()]
    assert for_cpu(layers[:1]) == layers[:1]
    everything = read_suite("kernelbench3d")
    assert for_cpu(everything) == everything


def test_every_layer_of_networks_has_one_source() -> None:
    suite = json.loads((Path(convgen.__file__).parent / "suites/networks.json").read_text())
    for layer in suite["layers"]:
        of = [pattern for pattern in suite["sources"] if fnmatchcase(layer["name"], pattern)]
        assert len(of) == 1, layer["name"]
    assert all(source.startswith("https://") for source in suite["sources"].values())


def test_kernelbench_holds_all_its_convolutions() -> None:
    problems = {layer.name.partition("-")[0] for layer in read_suite("kernelbench")}
    assert problems == {str(number) for number in range(54, 88)}
    three = read_suite("kernelbench3d")
    assert {layer.spec.ndim for layer in three} == {3}
    everything = read_suite("kernelbench")
    assert {layer.name for layer in three} == {e.name for e in everything if e.spec.ndim == 3}


def test_problem_61_has_261_gigaflops() -> None:
    (layer,) = select(read_suite("kernelbench3d"), ["61"])
    assert layer.flops("forward") == 2 * 8 * 48 * 48 * 27 * 64**3


def test_layers_are_selected_in_the_order_of_the_patterns() -> None:
    found = [layer.name for layer in select(read_suite("kernelbench3d"), ["77", "5?", "77", "58"])]
    assert found[0] == "77"
    assert len(set(found)) == len(found) > 2
    names = [layer.name for layer in select(read_suite("models"), ["dcgan-?", "hifigan-1"])]
    assert names == ["dcgan-1", "dcgan-2", "dcgan-3", "dcgan-4", "hifigan-1"]
    with pytest.raises(SuiteError, match="no layer 'x'"):
        select(read_suite("models"), ["x"])


def test_a_file_may_pick_layers_of_a_suite_and_add_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"of": "kernelbench", "layers": ["61", LAYER]}))
    first, second = read_suite(str(path))
    assert first == select(read_suite("kernelbench"), ["61"])[0]
    assert (second.name, second.output_shape, second.bias) == ("a", (2, 4, 7), False)


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"layers": []}, "is no suite"),
        ([], "is no suite"),
        ({"layers": ["61"]}, "no layer '61'"),
        ({"layers": [3]}, "an object or a name"),
        ({"layers": [LAYER, LAYER]}, "several layers named a"),
        ({"layers": [{**LAYER, "stride": 0}]}, "layer a: stride=0"),
        ({"layers": [{**LAYER, "groups": 3}]}, "not divisible by groups=3"),
        ({"layers": [{**LAYER, "input": [4, 9]}]}, "batched input of 3 dimensions"),
        ({"layers": [{**LAYER, "input": [2, 4, 2]}]}, "gives no output"),
        ({"layers": [{**LAYER, "cpu": [2, 5, 9]}]}, "layer a: cpu=.* has not 4 channels"),
        ({"layers": [{**LAYER, "cpu": [2, 4, 2]}]}, "layer a: an input of .* gives no output"),
        ({"layers": [{**LAYER, "kernel": 3}]}, "unknown fields in a specification: kernel"),
        ({"layers": [{**LAYER, "in_channels": 4}]}, "follows from the input"),
        ({"layers": [{k: v for k, v in LAYER.items() if k != "input"}]}, "it lacks input"),
        ({"layers": [{**LAYER, "activation": "relu"}]}, "without activation and residual"),
        ({"layers": [{**LAYER, "residual": True}]}, "without activation and residual"),
        ({"layers": [{**LAYER, "bias": 1}]}, "layer a: bias must be true or false"),
        ({"layers": [{**LAYER, "name": 3}]}, r"layers\[0\]: name must be a printable string"),
        ({"layers": [{**LAYER, "input": [2.0, 4, 9]}]}, r"input\[0\] must be an int"),
        ({"layers": [{**LAYER, "input": [2, True, 9]}]}, r"input\[1\] must be an int"),
        ({"layers": [{**LAYER, "input": "abc"}]}, "input must be a list"),
        ({"layers": [{**LAYER, "input": [10**9] * 3}]}, "beyond all memory|must not exceed"),
        ({"layers": [{**LAYER, "input": [1, 4, 10**400]}]}, r"input\[2\] must be an int, not inf"),
        ({"layers": [{**LAYER, "out_channels": float("nan")}]}, "out_channels must be an int"),
        ({"layers": [{**LAYER, "kernel_size": {"a": 1}}]}, "kernel_size='a' must be an int"),
        ({"layers": [{**LAYER, "kernel_size": [[[3]]]}]}, "must be an int"),
        ({"layers": [{**LAYER, "kernel_size": [1] * 100_000}]}, "give one int"),
        ({"layers": [{**LAYER, "stride": float("inf")}]}, "stride=inf must be an int"),
        ({"of": 3, "layers": [LAYER]}, '"of" is the name of a suite'),
        ({"of": ["kernelbench"], "layers": [LAYER]}, '"of" is the name of a suite'),
    ],
)
def test_a_wrong_suite_is_refused_with_the_reason(
    suite: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(suite))
    with pytest.raises(SuiteError, match=message) as raised:
        read_suite(str(path))
    assert len(str(raised.value)) < 500
    assert str(raised.value).isprintable()


def test_suites_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text('{"of": "b.json", "layers": [1]}')
    Path("b.json").write_text('{"of": "a.json", "layers": [1]}')
    with pytest.raises(SuiteError, match=r'a\.json names itself, or a suite "of" it'):
        read_suite("a.json")


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "deep", "NaN of a field"])
def test_what_is_no_document_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "suite.json"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("[" * 100_000 if kind == "deep" else '{"layers": NaN}')
    with pytest.raises(SuiteError, match=r"cannot be read|is no suite"):
        read_suite(str(path))


def test_an_unknown_suite_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="choose kernelbench, kernelbench3d, models"):
        read_suite("resnet")
    with pytest.raises(SuiteError, match="cannot be read"):
        read_suite(str(tmp_path / "missing.json"))
