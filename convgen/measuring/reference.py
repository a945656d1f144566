"""Results of a convolution computed in float64 from the definition, at sampled positions.

Large layers take too long in float64 as a whole, and a check should not rest on the library that
is measured. So positions of the output and of the gradient of the input are drawn (half of them
near the borders) and summed over all taps and channels from gathered operands; of the gradient of
the weight, elements are drawn and summed over the whole batch and space. All of it is index
arithmetic and matrix products in float64, on the device of the operands.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from convgen.spec import ConvSpec, Geometry

_POSITIONS = 384
_GATHERED_ELEMENTS = 1 << 25
_TAPS = 12
_ELEMENTS_PER_SIDE = 8


@dataclass(frozen=True)
class Errors:
    """``||out - ref|| / ||ref||`` of each result over its samples; infinite where one is NaN.

    0 for results that were not asked for.
    """

    output: float = 0.0
    grad_input: float = 0.0
    grad_weight: float = 0.0
    grad_bias: float = 0.0

    def of(self, direction: str) -> float:
        """The worst of ``"forward"`` or ``"backward"``."""
        if direction == "forward":
            return self.output
        return max(self.grad_input, self.grad_weight, self.grad_bias)

    @property
    def worst(self) -> float:
        return max(self.output, self.of("backward"))

    def or_worse(self, other: Errors) -> Errors:
        """The larger errors of two."""
        return Errors(*map(max, astuple(self), astuple(other)))


class SampledReference:
    """Samples of the results of a layer for one set of operands.

    Args:
        spec: the layer.
        input, weight, bias, grad_output: the operands, as torch takes them, of any dtype and
            strides; ``bias`` may be None.
        seed: of the samples.
    """

    def __init__(
        self,
        spec: ConvSpec,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grad_output: Tensor,
        seed: int = 0,
    ) -> None:
        self._geometry = g = spec.geometry
        self._random = random.Random(seed)
        x, dy, w = _lifted(input), _lifted(grad_output), _lifted(weight)
        coarse, fine = (x, dy) if spec.transposed else (dy, x)
        # The forward is one of dgrad and fprop, the gradient of the input is the other.
        self._at_output = self._positions(dy)
        self._at_input = self._positions(x)
        if spec.transposed:
            self._output = _dgrad(g, coarse, w, self._at_output)
            self._grad_input = _fprop(g, fine, w, self._at_input)
        else:
            self._output = _fprop(g, fine, w, self._at_output)
            self._grad_input = _dgrad(g, coarse, w, self._at_input)
        if bias is not None:
            self._output += bias.double()
        self._at_weight = self._weight_elements(w)
        self._grad_weight = _wgrad(g, coarse, fine, *self._at_weight)
        self._grad_bias = None if bias is None else dy.sum((0, 2, 3, 4), dtype=torch.float64)

    def errors(self, results: Mapping[str, Tensor]) -> Errors:
        """Errors of results by the names of :class:`Errors`, shaped as torch's."""
        return Errors(**{name: self.error_of(name, result) for name, result in results.items()})

    def error_of(self, name: str, result: Tensor) -> float:
        """Error of one result, under its name in :class:`Errors`, shaped as torch's."""
        if name == "grad_bias":
            assert self._grad_bias is not None
            return _error(result, self._grad_bias)
        result = _lifted(result)
        if name == "grad_weight":
            error = _error(_weight_at(result, *self._at_weight), self._grad_weight)
        elif name == "output":
            error = _error(_at(result, self._at_output), self._output)
        else:
            error = _error(_at(result, self._at_input), self._grad_input)
        return max(error, _unwritten(result))

    def _positions(self, like: Tensor) -> Tensor:
        """(samples, 4): batch and three coordinates; half of the samples are near borders."""
        channels = like.shape[1]
        count = min(_POSITIONS, _GATHERED_ELEMENTS // (self._geometry.taps * channels) + 16)
        rows = []
        for index in range(count):
            row = [self._random.randrange(like.shape[0])]
            for extent in like.shape[2:]:
                at = self._random.randrange(extent)
                if index % 2 and self._random.random() < 0.6:
                    at = self._random.choice((0, 1, extent // 2, extent - 2, extent - 1))
                row.append(min(max(at, 0), extent - 1))
            rows.append(row)
        return torch.tensor(rows, device=like.device)

    def _weight_elements(self, weight: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Channels (groups' samples, samples per side) of both sides, and taps, all drawn."""
        g = self._geometry
        per_coarse, per_fine = weight.shape[0] // g.groups, weight.shape[1]
        groups = self._random.sample(range(g.groups), min(g.groups, _ELEMENTS_PER_SIDE))
        side = max(1, _ELEMENTS_PER_SIDE // len(groups))
        coarse = [[gr * per_coarse + c for c in self._draw(per_coarse, side)] for gr in groups]
        fine = [[gr * per_fine + c for c in self._draw(per_fine, side)] for gr in groups]
        taps = sorted({0, g.taps - 1, *self._draw(g.taps, _TAPS)})
        return (
            torch.tensor(coarse, device=weight.device),
            torch.tensor(fine, device=weight.device),
            taps,
        )

    def _draw(self, count: int, most: int) -> list[int]:
        return self._random.sample(range(count), min(count, most))


def agreement(results: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Errors:
    """Relative norm of the difference of whole results; infinite where one is NaN.

    Not a check against float64, but one that sees every element.
    """
    differences = {}
    for name, result in results.items():
        sums = torch.zeros(2, dtype=torch.float64, device=result.device)
        for a, b in zip(_pieces(result), _pieces(others[name]), strict=True):
            sums += torch.stack(
                [(a.double() - b.double()).square().sum(), b.double().square().sum()]
            )
        off, norm = sums.sqrt().tolist()
        differences[name] = _ratio(off, norm)
    return Errors(**differences)


def _lifted(tensor: Tensor) -> Tensor:
    """Three spatial dimensions, leading ones of extent 1; detached."""
    tensor = tensor.detach()
    while tensor.dim() < 5:
        tensor = tensor.unsqueeze(2)
    return tensor


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """(groups, coarse channels, fine channels, taps) of a weight (A, B / groups, KD, KH, KW)."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _at(tensor: Tensor, positions: Tensor) -> Tensor:
    """(samples, channels) of a tensor (N, C, D, H, W)."""
    n, d, h, w = positions.unbind(1)
    return tensor[n, :, d, h, w]


def _weight_at(weight: Tensor, coarse: Tensor, fine: Tensor, taps: list[int]) -> Tensor:
    """(groups' samples, coarse samples, fine samples, taps) of a weight."""
    rows = weight.flatten(2)[coarse[:, :, None], (fine % weight.shape[1])[:, None, :]]
    return rows[..., taps]


def _taps(g: Geometry, device: torch.device) -> Tensor:
    """(taps, 3): the coordinates of every kernel element, in the order of memory."""
    ranges = (range(k) for k in g.kernel)
    return torch.tensor(list(itertools.product(*ranges)), device=device)


def _fprop(g: Geometry, fine: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """(samples, coarse channels): the sum over taps and fine channels at coarse positions."""
    device = fine.device
    stride, padding, dilation = (
        torch.tensor(v, device=device) for v in (g.stride, g.padding, g.dilation)
    )
    o = (positions[:, None, 1:] * stride - padding) + _taps(g, device) * dilation
    gathered = _gather(g, fine, positions[:, 0], o, torch.ones_like(o, dtype=torch.bool))
    return torch.einsum("stgb,gabt->sga", gathered, _grouped(weight, g.groups).double()).flatten(1)


def _dgrad(g: Geometry, coarse: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """(samples, fine channels): the sum over taps and coarse channels at fine positions."""
    device = coarse.device
    stride, padding, dilation = (
        torch.tensor(v, device=device) for v in (g.stride, g.padding, g.dilation)
    )
    scaled = positions[:, None, 1:] + padding - _taps(g, device) * dilation
    whole = scaled % stride == 0
    i = scaled.div(stride, rounding_mode="floor")
    gathered = _gather(g, coarse, positions[:, 0], i, whole)
    return torch.einsum("stga,gabt->sgb", gathered, _grouped(weight, g.groups).double()).flatten(1)


def _gather(g: Geometry, tensor: Tensor, batch: Tensor, at: Tensor, valid: Tensor) -> Tensor:
    """(samples, taps, groups, channels) in float64; zero where ``at`` is outside or invalid."""
    extents = torch.tensor(tensor.shape[2:], device=tensor.device)
    inside = (valid & (at >= 0) & (at < extents)).all(2)
    d, h, w = at.clamp(torch.zeros_like(extents), extents - 1).unbind(2)
    values = tensor[batch[:, None].expand_as(d), :, d, h, w].double()
    values *= inside[:, :, None]
    return values.reshape(*d.shape, g.groups, -1)


def _wgrad(
    g: Geometry, coarse: Tensor, fine: Tensor, a: Tensor, b: Tensor, taps: list[int]
) -> Tensor:
    """(groups' samples, coarse samples, fine samples, taps): sums over batch and space."""
    (groups, side), other = a.shape, b.shape[1]
    coordinates = list(itertools.product(*(range(k) for k in g.kernel)))
    result = torch.zeros(
        (groups, side, other, len(taps)), dtype=torch.float64, device=coarse.device
    )
    for n in range(coarse.shape[0]):
        c, f = coarse[n, a.flatten()].double(), fine[n, b.flatten()].double()
        for index, tap in enumerate(taps):
            windows = [
                _window(*sizes)
                for sizes in zip(
                    coarse.shape[2:],
                    fine.shape[2:],
                    coordinates[tap],
                    g.stride,
                    g.padding,
                    g.dilation,
                    strict=True,
                )
            ]
            (cd, fd), (ch, fh), (cw, fw) = windows
            left = c[:, cd, ch, cw].reshape(groups, side, -1)
            right = f[:, fd, fh, fw].reshape(groups, other, -1)
            result[..., index] += left @ right.mT
    return result


def _window(ni: int, no: int, t: int, s: int, p: int, d: int) -> tuple[slice, slice]:
    """Coarse positions ``i`` that tap ``t`` joins to ``o = i * s - p + t * d``, and those."""
    first = max(0, -(-(p - t * d) // s))
    count = max(0, min(ni, (no - 1 + p - t * d) // s + 1) - first)
    start = first * s - p + t * d
    if not count:
        return slice(0, 0), slice(0, 0)
    return slice(first, first + count), slice(start, start + (count - 1) * s + 1, s)


def _error(result: Tensor, expected: Tensor) -> float:
    difference = (result.detach().double() - expected).norm().item()
    return _ratio(difference, expected.norm().item())


def _unwritten(tensor: Tensor) -> float:
    """0, or infinity if any element is NaN or infinite: poison that nobody wrote over."""
    return 0.0 if all(piece.isfinite().all().item() for piece in _pieces(tensor)) else math.inf


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Slices of the first dimension: float64 copies of large results may not fit as a whole."""
    rows = max(1, _GATHERED_ELEMENTS // max(1, tensor[:1].numel()))
    return tuple(tensor[at : at + rows] for at in range(0, tensor.shape[0], rows))


def _ratio(off: float, norm: float) -> float:
    if math.isnan(off) or math.isnan(norm):
        return math.inf
    if off == 0:
        return 0.0
    return off / norm if norm else math.inf
