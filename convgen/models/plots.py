"""A chart of where a network's time goes, before and after swap, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from convgen.measuring.plots import PlotError, matplotlib_figure
from convgen.models.report import LayerRow, ScanReport

_MOST = 8
"""Kinds of layers with a colour of their own; the others share one."""


def plot(report: ScanReport, path: Path) -> None:
    """Draws two bars, each the time of a run of the network by kinds of layers.

    Raises:
        PlotError: without matplotlib, or for an unknown format.
    """
    figure = matplotlib_figure()(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    parts = segments(report)
    left = [0.0, 0.0]
    for index, (label, before, after) in enumerate(parts):
        rest = index == len(parts) - 1
        axes.barh(
            [0, 1],
            [before, after],
            0.6,
            left=left,
            label=label,
            color="#d0d0d0" if rest else f"C{index}",
        )
        left = [left[0] + before, left[1] + after]
    axes.bar_label(axes.containers[-1], [f"{each:.3g} ms" for each in left], padding=4)
    axes.set_yticks([0, 1], ["torch", "swapped"])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    expected = any(row.predicted and row.swapped for row in report.rows)
    axes.set(
        xlabel="ms for a run of the network" + (" (swapped: expected)" if expected else ""),
        title=report.device,
    )
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise PlotError(f"{path}: {error}") from error


def segments(report: ScanReport) -> list[tuple[str, float, float]]:
    """Labels with times in ms before and after: the slowest kinds, other ones, and the rest."""
    rows = sorted(
        (row for row in report.rows if row.torch_ms), key=lambda row: -sum(row.torch_ms or ())
    )
    parts = [(f"{row.where}: {row.spec}", _before(row), _after(row)) for row in rows[:_MOST]]
    if others := rows[_MOST:]:
        label = f"{sum(len(row.names) for row in others)} other convolutions"
        parts.append((label, sum(map(_before, others)), sum(map(_after, others))))
    # Layers by themselves may take longer than in the network, where caches are warm.
    rest = max(0.0, sum(report.network_ms) - sum(before for _, before, _ in parts))
    return [*parts, ("everything else", rest, rest)]


def _before(row: LayerRow) -> float:
    return sum(row.torch_ms or (0.0, 0.0))


def _after(row: LayerRow) -> float:
    return sum(row.convgen_ms) if row.swapped and row.convgen_ms else _before(row)
