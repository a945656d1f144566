"""What became of a network's convolutions: rows of kinds of layers, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Pair = tuple[float, float]

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
class SwapReport:
    """What :func:`convgen.swap` did with every convolution of a network."""

    rows: tuple[LayerRow, ...]
    device: str
    """Name of the GPU or processor."""

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
        return {"device": self.device, "layers": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        return "\n".join([*text_table(*swap_table(self.rows)), "", summary(self)])


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


def swap_table(rows: Sequence[LayerRow]) -> Table:
    """What was swapped, and what was not, with the reason."""
    return ("layers", "specification", ">torch ms", ">convgen ms", "computed by"), [
        (
            row.where,
            _spec(row),
            _ms(row.torch_ms),
            _ms(row.convgen_ms, row.predicted),
            row.choice if row.swapped and row.convgen_ms else f"{row.choice} ({row.reason})",
        )
        for row in rows
    ]


def scan_table(report: ScanReport) -> Table:
    """Kinds of layers by the time they take, with shares of the network's."""
    rows = sorted(report.rows, key=lambda row: -sum(row.torch_ms or (0.0, 0.0)))
    flops = sum(row.flops for row in rows)
    whole = sum(report.network_ms)
    titles = (
        "layers",
        "specification",
        "input",
        ">calls",
        ">flops",
        ">time",
        ">torch ms",
        ">convgen ms",
        ">build s",
        "choice",
    )
    return titles, [
        (
            row.where,
            _spec(row),
            "x".join(map(str, row.shape)),
            str(row.calls or ""),
            _percent(row.flops, flops),
            _percent(sum(row.torch_ms), whole) if row.torch_ms else "",
            _ms(row.torch_ms),
            _ms(row.convgen_ms, row.predicted),
            "" if row.build_s is None else f"{row.build_s:.1f}",
            row.choice if row.convgen_ms else f"{row.choice} ({row.reason})",
        )
        for row in rows
    ]


def summary(report: SwapReport) -> str:
    """One line: how many layers, and what that brings."""
    count = sum(len(row.names) for row in report.rows)
    swapped = len(report.swapped)
    if isinstance(report, ScanReport):
        before, after = sum(report.network_ms), report.after_ms
        timed = [row for row in report.rows if row.swapped and row.convgen_ms]
        how = "expected" if any(row.predicted for row in timed) else "by the layers' times"
        gain = f"; a run takes {before:.3g} ms, {after:.3g} ms swapped ({how})" if timed else ""
        shares = f", a run of the network {before:.3g} ms" if not timed else gain
        return f"{swapped} of {count} convolutions to swap on {report.device}{shares}"
    timed = [row for row in report.rows if row.swapped and row.torch_ms and row.convgen_ms]
    gain = ""
    if timed:
        before = sum(sum(row.torch_ms) for row in timed if row.torch_ms)
        after = sum(sum(row.convgen_ms) for row in timed if row.convgen_ms)
        gain = f": {after:.3g} ms instead of {before:.3g} for a run of the network"
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


def _spec(row: LayerRow) -> str:
    return f"{row.spec} {row.channels[0]}->{row.channels[1]} {row.dtype}".rstrip()


def _short(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= 32 else f"...{name[-29:]}"


def _ms(times: Pair | None, predicted: bool = False) -> str:
    if times is None:
        return ""
    mark = "~" if predicted else ""
    forward, backward = times
    return f"{mark}{forward:.3g}" + (f" / {backward:.3g}" if backward else "")


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else ""
