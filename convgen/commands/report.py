"""What the command line prints: progress, tables and JSON.

Tables are the product of a command and go to stdout, with colours on a terminal and as plain
text elsewhere; progress goes to stderr.
"""

from __future__ import annotations

import contextlib
import json as json_format
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convgen.building import disk
from convgen.building.progress import Bar
from convgen.commands import catalog
from convgen.commands.catalog import Generated
from convgen.spec.documents import plain

if TYPE_CHECKING:
    from convgen.building.doctor import Finding
    from convgen.checking.verify import Row
    from convgen.exporting.one_file import Exported
    from convgen.measuring.timing import Spread
    from convgen.tuning.jobs import Candidate, Outcome

Progress = Bar
"""Of commands: lines where stderr is no terminal."""

_SHOWN_PHASES, _SHOWN_TAPS = 8, 16
"""Per dimension and phase; beyond it, their number is printed."""


def json(value: object) -> None:
    """Prints a value as JSON."""
    click.echo(json_format.dumps(value, indent=2))


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON into a file, whole or not at all; a pipe or device gets the text."""
    disk.write_anywhere(path, json_format.dumps(value, indent=2) + "\n")


def written(module: Generated, compiled: bool, seconds: float) -> None:
    """Says on stderr what ``generate`` wrote."""
    how = f"compiled in {seconds:.1f} s" if compiled else "found in the cache"
    click.echo(f"{module.path}: {_dtypes(module.dtypes, module.built)}, {how}", err=True)


def exported(result: Exported) -> None:
    """Says on stderr what ``export`` wrote, and what of a model is left to torch."""
    size = result.path.stat().st_size if result.path.is_file() else 0
    names = ", ".join(spec.name for spec in result.layers)
    click.echo(f"{result.path}: {size / 1e3:.0f} kB, {names}", err=True)
    for line in result.left:
        click.echo(f"Left to torch: {line}", err=True)


def modules(found: Iterable[Generated]) -> None:
    """The table of ``convgen list``."""
    rows = [(module.name, _dtypes(module.dtypes, module.built), module.command) for module in found]
    print_table(("module", "built for", "command"), rows)


def notices(found: Iterable[Generated], refused: Iterable[str] = ()) -> None:
    """Says on stderr which modules are of another version of convgen, and which cannot be read."""
    for notice in (*filter(None, (module.foreign for module in found)), *refused):
        click.echo(f"Note: {notice}", err=True)


def details(module: Generated) -> None:
    """What ``convgen show`` prints."""
    spec = module.spec
    click.echo(f"{module.path}\n")
    channels = (spec.in_channels or "any", spec.out_channels or "any")
    print_table(
        ("specification", ""),
        [
            ("operator", spec.op),
            ("kernel", _ints(spec.kernel_size)),
            ("stride", _ints(spec.stride)),
            ("padding", spec.padding if isinstance(spec.padding, str) else _ints(spec.padding)),
            *([("output padding", _ints(spec.output_padding))] if spec.transposed else []),
            ("dilation", _ints(spec.dilation)),
            ("groups", str(spec.groups)),
            ("channels", f"{channels[0]} -> {channels[1]}"),
            ("built for", _dtypes(module.dtypes, module.built)),
            ("import", catalog.import_line(module)),
            ("written by", f"convgen {module.version}"),
            ("regenerate", module.command),
        ],
    )
    print_table(
        ("phases of dgrad", "fine position", "is the sum over the coarse grid of"),
        [
            (f"{len(axis_phases)} of {axis}" if index == 0 else "", outputs, taps)
            for axis, axis_phases in catalog.phases(spec).items()
            for index, (outputs, taps) in enumerate(_phases(axis_phases))
        ],
    )
    print_table(
        ("backend", "contraction", "dtype", "engine", "schedule"),
        [
            (backend, kernel["contraction"], kernel["dtype"], kernel["engine"], _schedule(kernel))
            for backend, kernels in module.kernels.items()
            for kernel in kernels
        ],
    )
    print_table(("file", ">bytes"), [(path, f"{size:,}") for path, size in module.files.items()])


def findings(found: Iterable[Finding]) -> None:
    """The table of ``convgen doctor``."""
    rows = [(finding.what, finding.found or "missing", finding.advice) for finding in found]
    bad = [index for index, row in enumerate(rows) if row[2]]
    if bad:
        print_table(("what", "found", "what to do"), rows, bad)
    else:
        print_table(("what", "found"), [row[:2] for row in rows])


def verification(module: Generated, rows: Sequence[Row], show_all: bool) -> None:
    """The table of ``convgen verify``: every case, or the worst of each quantity and dtype."""
    kinds: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.device, row.dtype, row.quantity), []).append(row)
    if show_all:
        shown = [(row, row.shapes) for row in rows]
    else:
        shown = [(max(of_kind, key=_excess), str(len(of_kind))) for of_kind in kinds.values()]
    table = [
        (
            f"{row.device} {row.dtype}",
            row.quantity,
            case,
            f"{row.error:.1e}",
            f"{row.worst:.1e}",
            f"{row.limit:.0e}",
            "ok" if row.ok else "FAILED",
        )
        for row, case in shown
    ]
    failed = [index for index, (row, _) in enumerate(shown) if not row.ok]
    cases = "shapes" if show_all else ">cases"
    columns = ("", "quantity", cases, ">error", ">worst element", ">limit", "")
    click.echo(f"{module.name}: {len(rows)} comparisons with float64")
    print_table(columns, table, failed)
    if any(row.beside_torch for row, _ in shown):
        click.echo(
            "Limits above the usual are twice the error of torch's own convolution and activation, "
            "one after the other, in the same case.\n"
        )


def candidates(outcomes: Sequence[Outcome]) -> None:
    """What ``convgen tune`` would compile, with the model's times."""
    table = [
        (
            outcome.job.name if index == 0 else "",
            number(candidate.predicted.ms, ".3f"),
            candidate.predicted.bound,
            "default" if candidate.is_default else "",
            _fields(outcome, candidate),
        )
        for outcome in outcomes
        for index, candidate in enumerate(outcome.candidates)
    ]
    print_table(("", ">predicted ms", "bound by", "", "schedule"), table)
    for outcome in outcomes:
        click.echo(f"{outcome.job.name}: {outcome.considered} legal schedules")


def tuning(outcomes: Sequence[Outcome]) -> None:
    """The winners of ``convgen tune`` beside the defaults, and what could not win."""
    columns = (
        *("", ">tried", ">default ms", ">best ms", ">gain", ">predicted ms", ">error"),
        "schedule",
    )
    table, failed = [], []
    for index, outcome in enumerate(outcomes):
        best = outcome.best
        if best is None:
            failed.append(index)
        table.append(
            (
                outcome.job.name,
                f"{len(outcome.candidates)} of {outcome.considered}",
                times(outcome.default.spread),
                "NONE" if best is None else times(best.spread),
                number(outcome.gain, ".2f"),
                "" if best is None else number(best.predicted.ms, ".3f"),
                "" if best is None else f"{best.error:.1e}",
                "" if best is None else "default" if best.is_default else _fields(outcome, best),
            )
        )
    print_table(columns, table, failed)
    for outcome in outcomes:
        for candidate in outcome.candidates:
            if candidate.note:
                what = "the default" if candidate.is_default else _fields(outcome, candidate)
                click.echo(f"{outcome.job.name}: {what}: {candidate.note}")


def progress_of_tuning(outcome: Outcome) -> str:
    """A line on what came of one job."""
    if outcome.best is None:
        return f"{outcome.job.name}: no schedule was right"
    gain = "" if outcome.gain is None else f", {outcome.gain:.2f} x the default"
    return f"{outcome.job.name}: {times(outcome.best.spread)} ms{gain}"


def _fields(outcome: Outcome, candidate: Candidate) -> str:
    """What of a schedule is not the default's, in a few words; of the default, all."""
    fields = outcome.changes(candidate)
    return ", ".join(f"{name} {_short(value)}" for name, value in fields.items())


def _short(value: object) -> str:
    if isinstance(value, tuple):
        joint = "/" if any(isinstance(part, tuple) for part in value) else "x"
        if len(value) == 1:
            return _short(value[0])
        return joint.join(map(_short, value))
    return str(value)


def times(spread: Spread | None) -> str:
    """Median, and half the distance between the quartiles, in ms."""
    return "" if spread is None else f"{spread.median_ms:.3f} ± {spread.iqr_ms / 2:.3f}"


def number(value: float | None, form: str) -> str:
    """A number in a format, or a dash."""
    return "-" if value is None else format(value, form)


def _excess(row: Row) -> tuple[bool, bool, float]:
    """Orders rows from the best to the worst; NaN is as bad as it gets.

    What is right where torch has no digit left, and anything small would be, comes first.
    """
    largest = max(row.error, row.worst)
    says_much = row.limit < 1
    return (
        not row.ok,
        says_much,
        math.inf if math.isnan(row.error + row.worst) else largest / row.limit,
    )


def _dtypes(dtypes: dict[str, tuple[str, ...]], built: Sequence[str]) -> str:
    return ", ".join(f"{b} ({' '.join(dtypes[b])})" for b in built) or "nothing (sources only)"


def _ints(values: Sequence[int]) -> str:
    return " x ".join(map(str, values))


def _phases(phases: list[dict[str, Any]]) -> list[tuple[str, str]]:
    stride = len(phases)
    lines = []
    for phase in phases[:_SHOWN_PHASES]:
        terms = [
            f"weight[{tap}] x[{_plus('q', offset)}]" for tap, offset in phase["taps"][:_SHOWN_TAPS]
        ]
        if (more := len(phase["taps"]) - _SHOWN_TAPS) > 0:
            terms.append(f"{more} more")
        position = _plus("q" if stride == 1 else f"{stride} q", phase["residue"])
        lines.append((position, " + ".join(terms) or "nothing: bias alone"))
    if stride > _SHOWN_PHASES:
        lines.append((f"... {stride - _SHOWN_PHASES} more", ""))
    return lines


def _plus(term: str, constant: int) -> str:
    sign = "-" if constant < 0 else "+"
    return f"{term} {sign} {abs(constant)}" if constant else term


def _schedule(kernel: dict[str, Any]) -> str:
    fields = kernel["schedule"].items()
    return ", ".join(f"{plain(name)} {plain(str(value))}" for name, value in fields)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], red: Sequence[int] = ()
) -> None:
    """A table, followed by an empty line; a title that starts with ``>`` aligns to the right."""
    titles = [title.removeprefix(">") for title in columns]
    right = [title.startswith(">") for title in columns]
    if not sys.stdout.isatty():
        lines = [titles, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = zip(line, widths, right, strict=True)
            padded = (text.rjust(n) if is_right else text.ljust(n) for text, n, is_right in cells)
            click.echo("  ".join(padded).rstrip())
        click.echo()
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for title, is_right in zip(titles, right, strict=True):
        table.add_column(title, justify="right" if is_right else "left", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*map(Text, row), style="red" if index in red else None)
    Console(highlight=False).print(table, "")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on stderr what takes a while: with a spinner on a terminal, as a line elsewhere."""
    if not sys.stderr.isatty():
        click.echo(f"{what} ...", err=True)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
