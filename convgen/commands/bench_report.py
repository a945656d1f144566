"""What ``convgen bench`` prints: its tables, the machine above them, notes and means below."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from convgen.commands.report import number, print_table, times
from convgen.measuring.layers import contender_name

if TYPE_CHECKING:
    from convgen.measuring.bench import Report, Row
    from convgen.measuring.overhead import HostReport
    from convgen.measuring.timing import Spread

_OVER = ("default", "same", "any")

_WIDEST = 100
"""Columns of a table that does not go to a terminal."""

_GAP = 3
"""Between two columns on a terminal; elsewhere less."""

_DISPENSABLE = (
    *("any by", ">torch ms", ">x torch", ">floor ms", ">any ms", ">error", ">of peak"),
    *(">reached", ">x any"),
)
"""Columns of the benchmark's table, in the order in which a narrow terminal goes without them."""


def benchmark(result: Report) -> None:
    """The header and the table of ``convgen bench``, notes and geometric means below."""
    click.echo(_machine(result.machine, result.settings))
    ceilings = result.ceilings
    click.echo(
        f"ceilings: {1e-9 * ceilings.flops_per_s:,.0f} GFLOP/s in {ceilings.mode}, "
        f"{1e-9 * ceilings.bytes_per_s:,.0f} GB/s copied"
    )
    for when, clocks in zip(("before", "after"), result.clocks, strict=False):
        if clocks:
            click.echo(f"under load {when}: {_clocks(clocks)}")
    click.echo()
    width = shutil.get_terminal_size((_WIDEST, 24)).columns
    hidden: set[str] = set()
    for layout in result.layouts:
        rows = [row for row in result.rows if row.layout == layout]
        wrong = [index for index, row in enumerate(rows) if row.ours is None]
        columns, table, left_out = _fitting([_cells(row) for row in rows], width)
        hidden |= left_out
        click.echo(f"{layout}:")
        print_table(columns, table, wrong)
        means = [
            (which, *(number(result.geometric_mean(layout, of, over), ".2f") for over in _OVER))
            for which, of in (("forward", "forward"), ("backward", "backward"), ("both", None))
        ]
        print_table(("geometric mean", *(f">x {over}" for over in ("torch", *_OVER[1:]))), means)
    if result.rows:
        click.echo("same: torch's best in the layout; any: its best in any layout")
    if gradients := {"input", "weight"} & {result.settings.get("gradients")}:
        click.echo(f"backward: the gradient of the {gradients.pop()} alone")
    if hidden:
        click.echo(f"in --json alone: {', '.join(sorted(hidden))}")
    # A note about both directions, or about many layers, is said once.
    notes: dict[str, dict[str, None]] = {}
    for row in result.rows:
        for note in (*row.notes, *row.suspicions):
            notes.setdefault(note, {})[row.layer] = None
    for note, layers in notes.items():
        click.echo(f"{', '.join(layers)}: {note}")
    _failures(result.failures)


def _cells(row: Row) -> dict[str, str]:
    """A row of the benchmark's table, by columns."""
    return {
        "layer": row.layer if row.direction == "forward" else "",
        "": row.direction,
        ">convgen ms": _percent(row.ours) if row.ours else "WRONG",
        ">torch ms": _percent(row.default),
        ">same ms": _percent(row.best_same),
        ">any ms": _percent(row.best_any),
        ">x torch": number(row.over("default"), ".2f"),
        ">x same": number(row.over("same"), ".2f"),
        ">x any": number(row.over("any"), ".2f"),
        ">floor ms": _short(row.floor_ms),
        ">reached": number(row.reached, ".0%"),
        ">of peak": number(row.of_peak, ".0%"),
        ">error": f"{row.error:.1e}",
        "any by": row.any_by or "",
    }


def _fitting(
    cells: Sequence[dict[str, str]], width: int
) -> tuple[list[str], list[list[str]], set[str]]:
    """Columns, rows and what is left out of a table, so that lines have ``width`` characters."""
    columns = list(cells[0])
    widths = {
        column: max(len(column.removeprefix(">")), *(len(row[column]) for row in cells))
        for column in columns
    }
    hidden = []
    for column in _DISPENSABLE:
        if sum(widths[name] + _GAP for name in columns) - _GAP <= width:
            break
        columns.remove(column)
        hidden.append(column.removeprefix(">"))
    return columns, [[row[column] for column in columns] for row in cells], set(hidden)


def step_memory(result: Report) -> None:
    """The table of ``convgen bench --memory``: of torch, as it comes in the layout."""
    table = []
    for row in result.rows:
        theirs = row.torch_bytes.get(contender_name(row.layout))
        if row.direction == "forward" and row.ours_bytes is not None and theirs:
            sizes = (f"{1e-6 * size:,.1f}" for size in (row.ours_bytes, theirs))
            table.append((row.layer, row.layout, *sizes, f"{row.ours_bytes / theirs:.2f}"))
    click.echo("\nallocated at most by a pass forward and backward, results included:")
    print_table(("layer", "layout", ">convgen MB", ">torch MB", ">of torch's"), table)


def progress_of(result: Report, layer: str) -> str:
    """One line about a layer that was just timed."""
    if layer in result.failures:
        return f"{layer}: {result.failures[layer].splitlines()[0]}"
    parts = [
        f"{row.layout + ' ' if len(result.settings['layouts']) > 1 else ''}"
        f"{row.direction} {times(row.ours) if row.ours else 'WRONG'} ms "
        f"({number(row.over('same'), '.2f')} x torch's best)"
        for row in result.rows
        if row.layer == layer
    ]
    return f"{layer}: {', '.join(parts)}"


def host_times(result: HostReport) -> None:
    """The table of ``convgen bench --overhead``."""
    click.echo(f"{_machine(result.machine, {})}\n")
    columns = ("layer", "input", ">convgen us", ">torch us", ">difference us")
    table = [
        (
            row.layer,
            "x".join(map(str, row.input_shape)),
            f"{1e3 * row.ours.median_ms:.2f} ± {5e2 * row.ours.iqr_ms:.2f}",
            f"{1e3 * row.torch.median_ms:.2f} ± {5e2 * row.torch.iqr_ms:.2f}",
            f"{row.extra_us:+.2f}",
        )
        for row in result.rows
    ]
    if table:
        print_table(columns, table)
    _failures(result.failures)


def _failures(failures: dict[str, str]) -> None:
    """The first line of each reason, and the last: of a compiler's, that is where its log lies."""
    for layer, reason in failures.items():
        first, *others = reason.splitlines()
        click.echo(f"{layer}: {'; '.join([first, *others[-1:]])}")


def _machine(machine: dict[str, Any], settings: dict[str, Any]) -> str:
    """A line on the device, and one on versions and the start."""
    device = [machine["name"]]
    if "threads" in machine:
        device += [*machine["instructions"], f"{machine['threads']} threads"]
    names = ("driver", "CUDA", "cuDNN", "oneDNN", "torch", "convgen")
    versions = [f"{name} {machine[name.lower()]}" for name in names if machine.get(name.lower())]
    started = [settings["started"]] if "started" in settings else []
    return "\n".join([", ".join(device), ", ".join([*versions, *started])])


def _clocks(clocks: dict[str, str]) -> str:
    return (
        f"SM {clocks['sm_mhz']} of {clocks['most_sm_mhz']} MHz, memory {clocks['memory_mhz']} MHz, "
        f"{clocks['power_w']} of {clocks['power_limit_w']} W, {clocks['temperature_c']} °C"
    )


def _percent(spread: Spread | None) -> str:
    """Median in ms, and half the distance between the quartiles as a part of it."""
    if spread is None:
        return ""
    return f"{_short(spread.median_ms)} ±{spread.iqr_ms / 2 / spread.median_ms:.0%}"


def _short(value: float) -> str:
    """Three digits or more, and no exponent."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}" if value >= 1 else f"{value:.3f}"
