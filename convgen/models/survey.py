"""Which of a network's convolutions convgen should compute: what swap and scan have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from convgen.building.build import Progress
from convgen.building.processor import processor_name
from convgen.measuring.timing import Clock, clock_for
from convgen.measuring.trial import first_line
from convgen.models import beside, capture, choices, layers, packages, predict
from convgen.models.beside import Times
from convgen.models.capture import Case
from convgen.models.errors import NetworkError
from convgen.models.layers import Found, Only
from convgen.models.packages import Built, Wanted
from convgen.models.report import UNMEASURED, LayerRow, Pair
from convgen.spec import ConvSpec, SpecError
from convgen.spec.dtypes import DTYPES, parse_dtype


@dataclass
class Kind:
    """Layers that share specification, device and kinds of calls: one decision."""

    layers: list[Found]
    spec: ConvSpec
    """What kernels are generated for."""
    channels: tuple[int, int]
    device: torch.device
    dtype: str
    """Of the parameters."""
    cases: Mapping[Case, int]
    """Kinds of calls, and how often each layer gets them; none without example inputs."""
    wanted: Wanted
    chosen: bool = False
    reason: str = ""
    times: dict[Case, Times] = field(default_factory=dict)
    predicted: bool = False

    def decide(self, how: str = "") -> None:
        """Chooses by the times of all cases together."""
        if self.chosen or self.reason or not self.cases or len(self.times) < len(self.cases):
            return
        theirs, ours = self.total("torch_ms"), self.total("convgen_ms")
        if not all(times.agrees for times in self.times.values()):
            self.reason = "its results differ from torch's"
        elif beside.GAIN * sum(ours) <= sum(theirs):
            self.chosen, self.reason = True, how or "faster"
        else:
            self.reason = "no faster"

    def total(self, which: str) -> Pair:
        """Times of one run of the network, in ms."""
        forward = backward = 0.0
        for case, times in self.times.items():
            count = self.cases[case] * len(self.layers)
            each: Pair = getattr(times, which)
            forward, backward = forward + count * each[0], backward + count * each[1]
        return forward, backward

    def flops(self) -> int:
        """Operations of one run of the network."""
        total = 0
        for case, count in self.cases.items():
            layer = predict.layer_of(case)
            if layer is not None:
                directions = ("forward", "backward") if case.backward else ("forward",)
                total += len(self.layers) * count * sum(map(layer.flops, directions))
        return total


@dataclass
class Survey:
    """All convolutions of a network."""

    kinds: list[Kind]
    left: dict[str, list[Found]]
    """Layers that cannot be swapped, by the reason."""
    order: list[Found]
    built: dict[Wanted, Built]

    @property
    def device_name(self) -> str:
        if not self.kinds:
            return processor_name()
        return name_of(self.kinds[0].device)

    def rows(self) -> tuple[LayerRow, ...]:
        """A row for each kind of layers, in the network's order."""
        rows = [(kind.layers[0], self._row(kind)) for kind in self.kinds]
        rows += [
            (found[0], _left(reason, found))
            for reasons, group in self.left.items()
            for reason, found in [(reasons.partition("\n")[0], group)]
        ]
        position = {each.name: index for index, each in enumerate(self.order)}
        return tuple(row for first, row in sorted(rows, key=lambda row: position[row[0].name]))

    def _row(self, kind: Kind) -> LayerRow:
        busiest = max(kind.cases, key=_work, default=None)
        built = self.built.get(kind.wanted)
        timed = len(kind.times) == len(kind.cases) > 0
        return LayerRow(
            tuple(each.name for each in kind.layers),
            tuple(name for each in kind.layers for name in each.names[1:]),
            kind.spec.name,
            busiest.input.shape if busiest else (),
            kind.channels,
            (layers.dtype_name(busiest.dtype) or kind.dtype) if busiest else kind.dtype,
            len(kind.layers) * sum(kind.cases.values()),
            "convgen" if kind.chosen else "torch",
            kind.reason,
            kind.total("torch_ms") if timed else None,
            kind.total("convgen_ms")
            if timed and any(map(_has_ours, kind.times.values()))
            else None,
            kind.predicted,
            kind.flops(),
            built.seconds if built and built.compiled else None,
        )


def survey(
    model: nn.Module,
    example_inputs: Any,
    *,
    only: Only | None,
    dtypes: Iterable[object] | None,
    fixed_channels: bool,
    measure: bool | None,
    progress: Progress,
    build: bool = True,
) -> Survey:
    """Decides for every convolution; with ``build``, what is chosen is built, too.

    Without, layers are timed by torch alone, and convgen's times are the model's.

    Arguments and errors are those of :func:`convgen.models.swap.swap`.
    """
    if measure and example_inputs is None:
        raise NetworkError("measure=True needs example_inputs to measure with")
    found = layers.find(model, only)
    able = [each for each in found if not each.refusal]
    captured = None
    if example_inputs is not None:
        captured = capture.run(model, able, example_inputs)
    result = Survey([], {}, found, {})
    for each in found:
        why = each.refusal
        if not why and captured is not None and not captured.calls[each.name]:
            why = "is not called with these inputs"
        if why:
            kind_of = f"{type(each.layer).__name__} {each.spec.name if each.spec else ''}"
            result.left.setdefault(f"{why}\n{kind_of}", []).append(each)
    left = {each.name for group in result.left.values() for each in group}
    able = [each for each in able if each.name not in left]
    calls = captured.calls if captured else {}
    result.kinds = _kinds(able, calls, _names(dtypes or ()), fixed_channels)
    known = choices.read() if measure is None else {}
    for kind in result.kinds:
        if not kind.cases or measure is False:
            kind.chosen, kind.reason = choices.rule(kind.spec, kind.channels, kind.device)
            continue
        for case in kind.cases:
            if (held := known.get(_choice_key(case, kind))) is not None:
                kind.times[case] = held
        kind.decide("faster, as measured before")
    open_kinds = [kind for kind in result.kinds if not kind.reason]
    if build:
        wanted = [kind.wanted for kind in result.kinds if kind.chosen or not kind.reason]
        result.built = packages.build(wanted, progress)
    _measure(open_kinds, result.built, progress)
    return result


def name_of(device: torch.device) -> str:
    """Name of a GPU or of the processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return processor_name()


def _kinds(
    able: list[Found],
    calls: Mapping[str, Mapping[Case, int]],
    extra: tuple[str, ...],
    fixed_channels: bool,
) -> list[Kind]:
    """Layers in groups that share one decision, with the packages that they share in part."""
    specs: dict[str, ConvSpec] = {}
    tensors: dict[str, torch.Tensor] = {}
    for each in able:
        tensor = layers.tensor_of(each.layer)
        assert each.spec is not None
        assert tensor is not None
        layer: Any = each.layer
        fixed = {"in_channels": layer.in_channels, "out_channels": layer.out_channels}
        fields = each.spec.to_dict() | (fixed if fixed_channels else {})
        specs[each.name], tensors[each.name] = ConvSpec.from_dict(fields), tensor
    specs = packages.shared_output_padding(specs)
    needed: dict[tuple[ConvSpec, str], set[str]] = {}
    for name, tensor in tensors.items():
        names = needed.setdefault((specs[name], tensor.device.type), set())
        own = {layers.dtype_name(tensor.dtype), _ambient(tensor.device)}
        own |= {layers.dtype_name(case.dtype) for case in calls.get(name, ())}
        names.update(extra, filter(None, own))
    kinds: dict[Any, Kind] = {}
    for each in able:
        layer, tensor, spec = each.layer, tensors[each.name], specs[each.name]
        cases = calls.get(each.name, {})
        dtype = layers.dtype_name(tensor.dtype) or ""
        channels = (layer.in_channels, layer.out_channels)
        key = spec, channels, tensor.device, dtype, frozenset(cases.items())
        if key not in kinds:
            of_package = needed[spec, tensor.device.type]
            dtypes = tuple(name for name in DTYPES if name in of_package)
            wanted = Wanted(spec, dtypes, tensor.device.type)
            kinds[key] = Kind([], spec, channels, tensor.device, dtype, cases, wanted)
        kinds[key].layers.append(each)
    return list(kinds.values())


def _ambient(device: torch.device) -> str | None:
    """What autocast casts to where the caller is."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return layers.dtype_name(torch.get_autocast_dtype(device.type))


def _names(dtypes: Iterable[object]) -> tuple[str, ...]:
    given = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    try:
        return tuple(parse_dtype(str(dtype).removeprefix("torch.")) for dtype in given)
    except ValueError as error:
        raise SpecError(str(error)) from error


def _choice_key(case: Case, kind: Kind) -> tuple[object, ...]:
    nothing = Times((0.0, 0.0), (0.0, 0.0), True)
    return choices.choice_of(case, kind.spec, nothing).key


def _measure(kinds: list[Kind], built: Mapping[Wanted, Built], progress: Progress) -> None:
    """Times what nothing is known of, and decides."""
    work = [(kind, case) for kind in kinds for case in kind.cases if case not in kind.times]
    clocks: dict[torch.device, Clock] = {}
    measured: dict[tuple[object, ...], choices.Choice] = {}
    for index, (kind, case) in enumerate(work):
        progress(index, len(work), f"timing {kind.spec.name} {list(case.input.shape)}")
        key = _choice_key(case, kind)
        if key not in measured:
            clock = clocks.setdefault(case.device, clock_for(case.device))
            package = built[kind.wanted].package if built else None
            function = getattr(package, kind.spec.op) if package else None
            try:
                times = beside.measure(case, function, clock)
            except RuntimeError as error:
                kind.reason = f"could not be timed: {first_line(error)}"
                continue
            if function is None:
                expected = predict.predicted_ms(case) or (0.0, 0.0)
                times = replace(times, convgen_ms=expected)
            measured[key] = choices.choice_of(case, kind.spec, times)
        kind.times[case] = measured[key].times
    if built:
        choices.store(measured.values())
    for kind in kinds:
        kind.predicted = not built
        if built or all(map(_has_ours, kind.times.values())):
            kind.decide("" if built else "faster, as predicted")
        elif not kind.reason:
            kind.chosen, _ = choices.rule(kind.spec, kind.channels, kind.device)
            kind.reason = UNMEASURED


def _has_ours(times: Times) -> bool:
    return sum(times.convgen_ms) > 0


def _work(case: Case) -> int:
    layer = predict.layer_of(case)
    return layer.multiplications if layer else 0


def _left(reason: str, group: list[Found]) -> LayerRow:
    first: Any = group[0].layer
    spec = group[0].spec
    tensor = layers.tensor_of(first)
    return LayerRow(
        tuple(each.name for each in group),
        tuple(name for each in group for name in each.names[1:]),
        spec.name if spec else type(first).__name__,
        (),
        (first.in_channels, first.out_channels),
        (layers.dtype_name(tensor.dtype) or "") if tensor is not None else "",
        0,
        "torch",
        reason,
        None,
        None,
        False,
        0,
        None,
    )
