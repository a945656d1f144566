"""Charts of a benchmark, by matplotlib: a roofline, and the speed-ups over torch."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convgen.measuring.bench import Report, Row

_MARKERS = {"forward": "o", "backward": "s"}
_OURS, _BEST, _DEFAULT = "#1f5fbf", "#d2691e", "#b8b8b8"


class PlotError(RuntimeError):
    """Nothing can be drawn; the message says what to install."""


def matplotlib_figure() -> Any:
    """The class matplotlib.figure.Figure.

    Raises:
        PlotError: if matplotlib is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: pip install matplotlib") from error


def check(path: Path) -> None:
    """Whether :func:`plot` can draw into such a file.

    Raises:
        PlotError: without matplotlib, or for a format that it lacks.
    """
    known = matplotlib_figure()().canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise PlotError(f"{path}: no format {path.suffix}; there are {', '.join(sorted(known))}")


def plot(report: Report, path: Path) -> None:
    """Draws a report into a file, whose ending chooses the format (png, svg, pdf).

    Raises:
        PlotError: without matplotlib, for an unknown format, or if nothing was timed.
    """
    make_figure = matplotlib_figure()
    rows = [row for row in report.rows if row.ours is not None]
    if not rows:
        raise PlotError("nothing to draw: no layer has a time")
    figure = make_figure(figsize=(13, 2.5 + max(4.0, 0.32 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _roofline(left, report, rows)
    _speedups(right, rows)
    machine = report.machine
    figure.suptitle(f"{machine['name']}, {report.ceilings.mode}, torch {machine['torch']}")
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise PlotError(f"{path}: {error}") from error


def _roofline(axes: Any, report: Report, rows: list[Row]) -> None:
    """Operations per second over operations per byte, convgen's and torch's best."""
    ceilings = report.ceilings
    ridge = ceilings.flops_per_s / ceilings.bytes_per_s
    intensities = [row.flops / row.traffic_bytes for row in rows]
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    axes.plot(
        [low, ridge, high],
        [1e-12 * min(ceilings.flops_per_s, at * ceilings.bytes_per_s) for at in (low, ridge, high)],
        color="black",
        label=f"ceilings: {1e-12 * ceilings.flops_per_s:.3g} TFLOP/s, "
        f"{1e-12 * ceilings.bytes_per_s:.3g} TB/s",
    )
    labels: set[str] = set()
    for row, intensity in zip(rows, intensities, strict=True):
        marker = _MARKERS[row.direction]
        for who, times, color in (
            ("convgen", row.ours, _OURS),
            ("torch's best", row.best_any, _BEST),
        ):
            if times is None:
                continue
            label = f"{who}, {row.direction}"
            rate = 1e-9 * row.flops / times.median_ms
            axes.plot(
                intensity,
                rate,
                marker,
                color=color,
                fillstyle="full" if who == "convgen" else "none",
                label=None if label in labels else label,
            )
            labels.add(label)
            if who == "convgen" and row.direction == "forward" and row.layout == rows[0].layout:
                axes.annotate(
                    row.layer,
                    (intensity, rate),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte of least traffic",
        ylabel="TFLOP/s",
        title="Roofline",
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)


def _speedups(axes: Any, rows: list[Row]) -> None:
    """Bars: times of torch's best and default over convgen's."""
    positions = range(len(rows))
    for offset, color, what, ratios in (
        (-0.2, _BEST, "over torch's best in the layout", [row.over("same") for row in rows]),
        (0.2, _DEFAULT, "over torch's default", [row.over("default") for row in rows]),
    ):
        lengths = [math.nan if ratio is None else ratio for ratio in ratios]
        bars = axes.barh([at + offset for at in positions], lengths, 0.4, color=color, label=what)
        texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        axes.bar_label(bars, texts, padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    labels = [
        f"{row.layer} {row.direction}" + ", channels_last" * (row.layout == "channels_last")
        for row in rows
    ]
    axes.set_yticks(positions, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="times as fast", title="Speed-up")
    axes.margins(x=0.15)
    axes.legend(fontsize=8)
