"""What became of a network's convolutions: rows of kinds of layers, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Pair = tuple[float, float]

UNMEASURED = "not measured yet"
"""The reason of what a rule decides until there are times."""

_NAMES = 3
"""Names of layers that a table shows of a row."""


@dataclass(frozen=True)
class LayerRow:
    """Layers of one kind: of one specification, that the network calls in the same ways.

    Times are medians in ms for one run of the network, all calls of all these layers together, as
    (forward, backward); None where there are none.
    """

    names: tuple[str, ...]
    """Of every layer, in the network's order; further names of one layer are not among them."""
    also: tuple[str, ...]
    """Further names of these layers."""
    spec: str
    """Canonical name; a class's where there is no specification."""
    shape: tuple[int, ...]
    """Of the input, (N, C_in, extents...) of the call with the most work; empty if not known."""
    channels: Pair | tuple[int, int]
    """Input's and output's."""
    dtype: str
    """Of the products."""
    calls: int
    """In one run of the network; 0 if that is not known."""
    choice: str
    """``convgen`` or ``torch``."""
    reason: str
    torch_ms: Pair | None
    convgen_ms: Pair | None
    predicted: bool
    """Whether convgen's times are the model's, not measured."""
    flops: int
    """Operations of one run of the network, forward and backward."""
    build_s: float | None
    """What its package took to generate and compile; None where it was not built just now."""

    @property
    def swapped(self) -> bool:
        return self.choice == "convgen"

    @property
    def where(self) -> str:
        """Its names, for a table."""
        shown = ", ".join(_short(name) for name in self.names[:_NAMES])
        more = len(self.names) - _NAMES
        return f"{shown}, and {more} more" if more > 0 else shown

    @property
    def speedup(self) -> float | None:
        """How many times as fast as torch convgen is."""
        if self.torch_ms is None or self.convgen_ms is None or not sum(self.convgen_ms):
            return None
        return sum(self.torch_ms) / sum(self.convgen_ms)


@dataclass(frozen=True)
class FusedRow:
    """Neighbours in a container that one kernel computes, or why it does not."""

    names: tuple[str, ...]
    """Of the modules, the convolution first."""
    activation: str
    """As a specification writes it; empty for a BatchNorm alone."""
    reason: str
    """Why they are computed one by one now; empty where they are not."""

    def __str__(self) -> str:
        return f"{' + '.join(self.names)}: {self.reason or 'one kernel'}"


@dataclass(frozen=True)
class SwapReport:
    """What :func:`convgen.swap` did with every convolution of a network."""

    rows: tuple[LayerRow, ...]
    device: str
    """Name of the GPU or processor."""
    fused: tuple[FusedRow, ...] = field(default=(), kw_only=True)
    """What ``fuse=True`` found."""

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the layers that convgen computes now."""
        return tuple(name for row in self.rows if row.swapped for name in row.names)

    @property
    def left(self) -> dict[str, str]:
        """Names of the layers that are torch's, each with the reason."""
        return {name: row.reason for row in self.rows if not row.swapped for name in row.names}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        fused = {"fused": [asdict(row) for row in self.fused]} if self.fused else {}
        return {"device": self.device, "layers": [asdict(row) for row in self.rows]} | fused

    def __str__(self) -> str:
        return "\n".join(
            [*text_table(*swap_table(self.rows)), "", *map(str, self.fused), summary(self)]
        )


@dataclass(frozen=True)
class ScanReport(SwapReport):
    """What :func:`convgen.scan` found; ``choice`` is what swap would do."""

    network_ms: Pair
    """Medians of a run of the whole network, forward and backward; backward is 0 without."""

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"network_ms": self.network_ms, "after_ms": self.after_ms}

    @property
    def after_ms(self) -> float:
        """What a run should take once swap has done its work."""
        saved = (
            sum(row.torch_ms) - sum(row.convgen_ms)
            for row in self.rows
            if row.swapped and row.torch_ms and row.convgen_ms
        )
        return sum(self.network_ms) - sum(saved)

    def __str__(self) -> str:
        return "\n".join([*text_table(*scan_table(self)), "", summary(self)])


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Titles, which start with ``>`` where a column aligns to the right, and rows."""


def swap_table(rows: Sequence[LayerRow], narrow: bool = False) -> Table:
    """What was swapped, and what was not, with reasons; ``narrow`` has cells of several lines."""
    if narrow:
        return ("layers", ">torch ms", ">convgen ms", "computed by"), [
            (
                f"{row.where}\n{_spec(row)}",
                _ms(row.torch_ms, "\n"),
                _ms(row.convgen_ms, "\n", row.predicted),
                _choice(row),
            )
            for row in rows
        ]
    return ("layers", "specification", ">torch ms", ">convgen ms", "computed by"), [
        (
            row.where,
            _spec(row),
            _ms(row.torch_ms),
            _ms(row.convgen_ms, predicted=row.predicted),
            _choice(row),
        )
        for row in rows
    ]


def scan_table(report: ScanReport, narrow: bool = False) -> Table:
    """Kinds of layers by the time they take, with shares of the network's.

    ``narrow`` has cells of several lines, forward above backward.
    """
    rows = sorted(report.rows, key=lambda row: -sum(row.torch_ms or (0.0, 0.0)))
    flops = sum(row.flops for row in rows)
    whole = sum(report.network_ms)
    if narrow:
        return ("layers", ">flops\ntime", ">torch\nms", ">convgen\nms", "choice"), [
            (
                "\n".join(filter(None, (row.where, _spec(row), _input(row)))),
                f"{_percent(row.flops, flops)}\n{_time(row, whole)}",
                _ms(row.torch_ms, "\n"),
                _ms(row.convgen_ms, "\n", row.predicted),
                "\n".join(filter(None, (_choice(row), _built(row)))),
            )
            for row in rows
        ]
    titles = ("layers", "specification", "input", ">flops", ">time", ">torch ms", ">convgen ms")
    return (*titles, ">build s", "choice"), [
        (
            row.where,
            _spec(row),
            _input(row),
            _percent(row.flops, flops),
            _time(row, whole),
            _ms(row.torch_ms),
            _ms(row.convgen_ms, predicted=row.predicted),
            "" if row.build_s is None else f"{row.build_s:.1f}",
            _choice(row),
        )
        for row in rows
    ]


def summary(report: SwapReport) -> str:
    """One line: how many layers, and what that brings."""
    count = sum(len(row.names) for row in report.rows)
    swapped = len(report.swapped)
    timed = [row for row in report.rows if row.swapped and row.torch_ms and row.convgen_ms]
    if isinstance(report, ScanReport):
        before = f"{sum(report.network_ms):.3g} ms"
        if any(row.reason == UNMEASURED for row in report.rows):
            return f"a run takes {before} on {report.device}; --measure tells what convgen changes"
        about = "about " * any(row.predicted for row in timed)
        gain = f", {about}{report.after_ms:.3g} swapped" if timed else ""
        return f"{swapped} of {count} convolutions to swap: {before} on {report.device}{gain}"
    gain = ""
    if timed:
        theirs, ours = (
            sum(sum(pair) for row in timed if (pair := getattr(row, which)))
            for which in ("torch_ms", "convgen_ms")
        )
        gain = f": {ours:.3g} ms of a run instead of {theirs:.3g}"
    return f"{swapped} of {count} convolutions are convgen's on {report.device}{gain}"


def text_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain table."""
    right = [title.startswith(">") for title in titles]
    lines = [[title.removeprefix(">") for title in titles], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(n) if is_right else cell.ljust(n)
            for cell, n, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]


def _choice(row: LayerRow) -> str:
    """Who computes it and, where the times do not say why, the reason."""
    plain = row.swapped and row.convgen_ms is not None and not row.predicted
    return row.choice if plain else f"{row.choice}: {row.reason}"


def _spec(row: LayerRow) -> str:
    return f"{row.spec} {row.channels[0]}->{row.channels[1]} {row.dtype}".rstrip()


def _input(row: LayerRow) -> str:
    shape = "x".join(map(str, row.shape))
    return f"{row.calls} x [{shape}]" if row.calls > 1 else f"[{shape}]" if shape else ""


def _built(row: LayerRow) -> str:
    return "" if row.build_s is None else f"built in {row.build_s:.0f} s"


def _time(row: LayerRow, whole: float) -> str:
    return _percent(sum(row.torch_ms), whole) if row.torch_ms else ""


def _short(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= 32 else f"...{name[-29:]}"


def _ms(times: Pair | None, between: str = " / ", predicted: bool = False) -> str:
    if times is None:
        return ""
    mark = "~" if predicted else ""
    forward, backward = times
    return f"{mark}{forward:.3g}" + (f"{between}{mark}{backward:.3g}" if backward else "")


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else ""
