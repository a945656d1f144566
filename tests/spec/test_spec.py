"""ConvSpec: PyTorch's argument forms and limits, names, extents and the JSON round trip."""

from __future__ import annotations

import dataclasses
import keyword

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convgen.spec import OPERATORS, ConvSpec, SpecError

NDIM = {op: int(op[-2]) for op in OPERATORS}


@st.composite
def specs(draw: st.DrawFn) -> ConvSpec:
    """Valid specifications of all operators, small enough to run through torch."""
    op = draw(st.sampled_from(OPERATORS))
    transposed = op.startswith("conv_transpose")

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(NDIM[op]))

    stride, dilation = per_dim(1, 3), per_dim(1, 3)
    padding: tuple[int, ...] | str = per_dim(0, 4)
    if not transposed and draw(st.booleans()):
        stride, padding = (1,) * NDIM[op], "same"
    output_padding = (0,) * NDIM[op]
    if transposed:
        limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        output_padding = tuple(draw(st.integers(0, limit)) for limit in limits)
    groups = draw(st.integers(1, 3))
    channels = st.none() | st.integers(1, 3).map(lambda n: n * groups)
    return ConvSpec(
        op=op,
        kernel_size=per_dim(1, 4),
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        in_channels=draw(channels),
        out_channels=draw(channels),
    )


def torch_output(spec: ConvSpec, extents: tuple[int, ...]) -> torch.Tensor:
    """What torch computes on zeros for a specification; the shape is what matters."""
    in_channels = spec.in_channels or spec.groups
    out_channels = spec.out_channels or spec.groups
    lead, per_group = (
        (in_channels, out_channels) if spec.transposed else (out_channels, in_channels)
    )
    x = torch.zeros(1, in_channels, *extents)
    weight = torch.zeros(lead, per_group // spec.groups, *spec.kernel_size)
    arguments = {
        "stride": spec.stride,
        "padding": spec.padding,
        "dilation": spec.dilation,
        "groups": spec.groups,
    }
    if spec.transposed:
        arguments["output_padding"] = spec.output_padding
    return getattr(F, spec.op)(x, weight, **arguments)


@given(specs())
def test_json_round_trip(spec: ConvSpec) -> None:
    assert ConvSpec.from_json(spec.to_json()) == spec
    assert ConvSpec.from_dict(spec.to_dict()) == spec
    assert hash(ConvSpec.from_dict(spec.to_dict())) == hash(spec)


@given(specs(), specs())
def test_names_are_identifiers_and_tell_specifications_apart(a: ConvSpec, b: ConvSpec) -> None:
    assert a.name.isidentifier()
    assert not keyword.iskeyword(a.name)
    assert (a.name == b.name) == (a == b)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=150)
@given(specs(), st.integers(1, 9))
def test_output_extents_are_those_of_torch(spec: ConvSpec, extent: int) -> None:
    extents = tuple(extent + axis for axis in range(spec.ndim))
    expected = spec.output_extents(extents)
    if all(e >= 1 for e in expected):
        assert tuple(torch_output(spec, extents).shape[2:]) == expected
    else:
        # torch allows an empty output of transposed convolutions in some builds, but never
        # one with positive extents everywhere.
        try:
            shape = torch_output(spec, extents).shape
        except RuntimeError:
            return
        assert min(shape) == 0


def test_ints_and_sequences_mean_the_same() -> None:
    spec = ConvSpec("conv3d", 3, 2, 1, dilation=[2], groups=1)
    assert spec == ConvSpec.make(
        "conv3d", kernel_size=(3, 3, 3), stride=[2, 2, 2], padding=(1,) * 3, dilation=(2, 2, 2)
    )
    assert spec.kernel_size == (3, 3, 3)
    assert spec.dilation == (2, 2, 2)


def test_the_default_operator_is_conv_transpose3d() -> None:
    assert ConvSpec.make(kernel_size=3).op == "conv_transpose3d"


@pytest.mark.parametrize(
    "three", [np.int64(3), np.array(3), torch.tensor(3), np.array([3, 3, 3]), iter([3, 3, 3])]
)
def test_everything_with_an_index_is_an_int(three: object) -> None:
    spec = ConvSpec("conv3d", three)  # type: ignore[arg-type]
    assert spec.kernel_size == (3, 3, 3)
    assert all(type(value) is int for value in spec.kernel_size)


def test_valid_padding_is_zero() -> None:
    assert ConvSpec("conv2d", 3, padding="valid") == ConvSpec("conv2d", 3, padding=0)


def test_same_padding_puts_the_odd_zero_at_the_end() -> None:
    spec = ConvSpec("conv2d", (4, 3), padding="same", dilation=(1, 2))
    assert spec.padding_begin == (1, 2)
    assert spec.padding_end == (2, 2)
    assert spec.output_extents((7, 9)) == (7, 9)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"kernel_size": 3, "stride": 2}, "conv_transpose3d_k3_s2"),
        ({"kernel_size": (3, 5, 7)}, "conv_transpose3d_k3x5x7"),
        (
            {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 64},
            "conv_transpose3d_k3_s2_p1_op1_g64",
        ),
        ({"op": "conv1d", "kernel_size": 5, "padding": "same"}, "conv1d_k5_psame"),
        ({"op": "conv2d", "kernel_size": 3, "dilation": (1, 2)}, "conv2d_k3_d1x2"),
        ({"kernel_size": 2, "in_channels": 48, "out_channels": 64}, "conv_transpose3d_k2_c48x64"),
        ({"kernel_size": 2, "in_channels": 48}, "conv_transpose3d_k2_cin48"),
        ({"kernel_size": 2, "out_channels": 48}, "conv_transpose3d_k2_cout48"),
    ],
)
def test_names_list_only_what_differs_from_the_defaults(
    arguments: dict[str, object], name: str
) -> None:
    assert ConvSpec.make(**arguments).name == name  # type: ignore[arg-type]


REFUSED = [
    ({"op": "conv4d"}, "op='conv4d' is not known: choose one of conv_transpose3d"),
    ({"kernel_size": 0}, "kernel_size=0: every value must be at least 1"),
    ({"kernel_size": -3}, "kernel_size=-3: every value must be at least 1"),
    ({"kernel_size": 70000}, "no value may exceed 65536"),
    ({"kernel_size": 1000}, "is 1000000000, and must not exceed 65536"),
    ({"stride": 100}, "stride=100: the product over the dimensions is 1000000"),
    ({"kernel_size": 3.0}, "kernel_size=3.0 must be an int"),
    ({"kernel_size": True}, "kernel_size=True must be an int"),
    ({"kernel_size": "3"}, "kernel_size='3' must be an int"),
    ({"kernel_size": None}, "kernel_size=None must be an int"),
    ({"kernel_size": (3, 3)}, "kernel_size='3,3': give one int or 3"),
    ({"kernel_size": ()}, "give one int or 3"),
    ({"kernel_size": (3, 3, 1.5)}, "kernel_size=1.5 must be an int"),
    ({"stride": 0}, "stride=0: every value must be at least 1"),
    ({"stride": (1, 0, 1)}, "stride=1,0,1: every value must be at least 1"),
    ({"dilation": 0}, "dilation=0: every value must be at least 1"),
    ({"padding": -1}, "padding=-1: every value must be at least 0"),
    ({"padding": "same"}, "padding='same': conv_transpose3d takes an int or 3 ints"),
    ({"padding": "valid"}, "padding='valid': conv_transpose3d takes an int or 3 ints"),
    ({"op": "conv3d", "padding": "full"}, "give an int or 3 ints, 'same' or 'valid'"),
    ({"op": "conv1d", "padding": "full"}, "give an int, 'same' or 'valid'"),
    ({"op": "conv3d", "padding": "same", "stride": 2}, "padding='same' needs stride 1, not 2"),
    ({"output_padding": -1}, "output_padding=-1: every value must be at least 0"),
    ({"output_padding": 1}, "must be smaller than either stride 1 or dilation 1"),
    ({"output_padding": (0, 0, 2), "stride": 2}, "output_padding=0,0,2 must be smaller"),
    ({"op": "conv3d", "output_padding": 1, "stride": 2}, "conv3d has none"),
    ({"groups": 0}, "groups=0: must be at least 1"),
    ({"groups": 1.0}, "groups=1.0 must be an int"),
    ({"groups": True}, "groups=True must be an int"),
    ({"groups": 1 << 40}, "must not exceed"),
    ({"in_channels": 0}, "in_channels=0: must be at least 1"),
    ({"in_channels": 6, "groups": 4}, "in_channels=6 is not divisible by groups=4"),
    ({"out_channels": 6, "groups": 4}, "out_channels=6 is not divisible by groups=4"),
    ({"out_channels": "6"}, "out_channels='6' must be an int"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refusals_say_what_is_wrong_and_what_is_allowed(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        ConvSpec.make(**{"kernel_size": 3} | arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["conv_transpose2d", "conv2d"]),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(-1, 3), st.integers(-1, 3)),
    st.tuples(st.integers(-1, 3), st.integers(-1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(0, 2),
)
def test_torch_accepts_and_refuses_the_same(
    op: str,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    x, weight = torch.zeros(1, 2, 9, 9), torch.zeros(2, 2 // max(groups, 1), 2, 2)
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if op == "conv_transpose2d":
        arguments["output_padding"] = output_padding
    try:
        getattr(F, op)(x, weight, **arguments)
        accepted = True
    except RuntimeError:
        accepted = False
    try:
        ConvSpec(op, 2, **arguments)  # type: ignore[arg-type]
        assert accepted
    except SpecError:
        assert not accepted


def test_specifications_are_immutable() -> None:
    spec = ConvSpec("conv1d", 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.groups = 2  # type: ignore[misc]
    assert dataclasses.replace(spec, stride=2).stride == (2,)
    with pytest.raises(SpecError):
        dataclasses.replace(spec, stride=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON specification"),
        ("[]", "a specification is an object"),
        ("{}", "needs the fields kernel_size, op"),
        ('{"op": "conv1d", "kernel_size": 3, "strides": 2}', "unknown fields"),
        ('{"op": "conv1d", "kernel_size": "3"}', "kernel_size='3' must be an int"),
        ('{"op": ["conv1d"], "kernel_size": 3}', "is not known"),
        ('{"op": "conv1d", "kernel_size": 3, "groups": null}', "groups=None must be an int"),
    ],
)
def test_text_that_is_no_specification_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ConvSpec.from_json(text)


@given(specs())
def test_geometry_is_the_same_layer_in_three_dimensions(spec: ConvSpec) -> None:
    g = spec.geometry
    lead = 3 - spec.ndim
    assert g.kernel == (1,) * lead + spec.kernel_size
    assert g.stride == (1,) * lead + spec.stride
    assert g.padding == (0,) * lead + spec.padding_begin
    assert g.dilation == (1,) * lead + spec.dilation
    channels = (spec.in_channels, spec.out_channels)
    assert (g.coarse_channels, g.fine_channels) == (channels if spec.transposed else channels[::-1])
    if g.coarse_channels is not None:
        assert g.coarse_channels_per_group == g.coarse_channels // g.groups
