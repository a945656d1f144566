"""What the command line prints: progress, tables and JSON.

Tables are the product of a command and go to stdout, with colours on a terminal and as plain
text elsewhere; progress goes to stderr.
"""

from __future__ import annotations

import contextlib
import json as json_format
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convgen.building import disk
from convgen.commands import catalog
from convgen.commands.catalog import Generated
from convgen.spec.documents import plain

if TYPE_CHECKING:
    from convgen.building.doctor import Finding
    from convgen.checking.verify import Row
    from convgen.measuring.bench import Report
    from convgen.measuring.overhead import HostReport
    from convgen.measuring.timing import Spread
    from convgen.tuning.jobs import Candidate, Outcome

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


def modules(found: Iterable[Generated]) -> None:
    """The table of ``convgen list``."""
    rows = [(module.name, _dtypes(module.dtypes, module.built), module.command) for module in found]
    _print_table(("module", "built for", "command"), rows)


def notices(found: Iterable[Generated], refused: Iterable[str] = ()) -> None:
    """Says on stderr which modules are of another version of convgen, and which cannot be read."""
    for notice in (*filter(None, (module.foreign for module in found)), *refused):
        click.echo(f"Note: {notice}", err=True)


def details(module: Generated) -> None:
    """What ``convgen show`` prints."""
    spec = module.spec
    click.echo(f"{module.path}\n")
    channels = (spec.in_channels or "any", spec.out_channels or "any")
    _print_table(
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
    _print_table(
        ("phases of dgrad", "fine position", "is the sum over the coarse grid of"),
        [
            (f"{len(axis_phases)} of {axis}" if index == 0 else "", outputs, taps)
            for axis, axis_phases in catalog.phases(spec).items()
            for index, (outputs, taps) in enumerate(_phases(axis_phases))
        ],
    )
    _print_table(
        ("backend", "contraction", "dtype", "engine", "schedule"),
        [
            (backend, kernel["contraction"], kernel["dtype"], kernel["engine"], _schedule(kernel))
            for backend, kernels in module.kernels.items()
            for kernel in kernels
        ],
    )
    _print_table(("file", ">bytes"), [(path, f"{size:,}") for path, size in module.files.items()])


def findings(found: Iterable[Finding]) -> None:
    """The table of ``convgen doctor``."""
    rows = [(finding.what, finding.found or "missing", finding.advice) for finding in found]
    bad = [index for index, row in enumerate(rows) if row[2]]
    if bad:
        _print_table(("what", "found", "what to do"), rows, bad)
    else:
        _print_table(("what", "found"), [row[:2] for row in rows])


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
    _print_table(columns, table, failed)


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
    columns = [
        *("layer", "", ">convgen ms", ">torch ms", ">best ms", "of torch with"),
        *(">x torch", ">x best", ">floor ms", ">reached", ">error"),
    ]
    table = [
        (
            row.layer if row.direction == "forward" else "",
            row.direction,
            _times(row.ours) if row.ours else "WRONG",
            _times(row.default),
            _times(row.best),
            row.best_of_torch or "",
            _number(row.over_default, ".2f"),
            _number(row.over_best, ".2f"),
            f"{row.floor_ms:.3f}",
            _number(row.reached, ".0%"),
            f"{row.error:.1e}",
        )
        for row in result.rows
    ]
    if table:
        wrong = [index for index, row in enumerate(result.rows) if row.ours is None]
        _print_table(columns, table, wrong)
        for name, direction in (("forward", "forward"), ("backward", "backward"), ("both", None)):
            over = [result.geometric_mean(direction, what) for what in ("best", "default")]
            click.echo(
                f"geometric mean, {name}: {_number(over[0], '.2f')} x torch's best, "
                f"{_number(over[1], '.2f')} x its default"
            )
    # A note about both directions is said once.
    notes = dict.fromkeys((row.layer, note) for row in result.rows for note in row.notes)
    for layer, note in notes:
        click.echo(f"{layer}: {note}")
    _failures(result.failures)


def progress_of(result: Report, layer: str) -> str:
    """One line about a layer that was just timed."""
    if layer in result.failures:
        return f"{layer}: {result.failures[layer].splitlines()[0]}"
    parts = [
        f"{row.direction} {_times(row.ours) if row.ours else 'WRONG'} ms "
        f"({_number(row.over_best, '.2f')} x torch's best)"
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
        _print_table(columns, table)
    _failures(result.failures)


def candidates(outcomes: Sequence[Outcome]) -> None:
    """What ``convgen tune`` would compile, with the model's times."""
    table = [
        (
            outcome.job.name if index == 0 else "",
            _number(candidate.predicted.ms, ".3f"),
            candidate.predicted.bound,
            "default" if candidate.is_default else "",
            _fields(outcome, candidate),
        )
        for outcome in outcomes
        for index, candidate in enumerate(outcome.candidates)
    ]
    _print_table(("", ">predicted ms", "bound by", "", "schedule"), table)
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
                _times(outcome.default.spread),
                "NONE" if best is None else _times(best.spread),
                _number(outcome.gain, ".2f"),
                "" if best is None else _number(best.predicted.ms, ".3f"),
                "" if best is None else f"{best.error:.1e}",
                "" if best is None else "default" if best.is_default else _fields(outcome, best),
            )
        )
    _print_table(columns, table, failed)
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
    return f"{outcome.job.name}: {_times(outcome.best.spread)} ms{gain}"


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


def _failures(failures: dict[str, str]) -> None:
    """The first line of each reason, and the last: of a compiler's, that is where its log lies."""
    for layer, reason in failures.items():
        first, *others = reason.splitlines()
        click.echo(f"{layer}: {'; '.join([first, *others[-1:]])}")


def _machine(machine: dict[str, Any], settings: dict[str, Any]) -> str:
    names = ("driver", "CUDA", "cuDNN", "torch", "convgen")
    versions = [f"{name} {machine[name.lower()]}" for name in names if machine.get(name.lower())]
    started = [settings["started"]] if "started" in settings else []
    return ", ".join([machine["name"], *versions, *started])


def _clocks(clocks: dict[str, str]) -> str:
    return (
        f"SM {clocks['sm_mhz']} of {clocks['most_sm_mhz']} MHz, memory {clocks['memory_mhz']} MHz, "
        f"{clocks['power_w']} of {clocks['power_limit_w']} W, {clocks['temperature_c']} °C"
    )


def _times(times: Spread | None) -> str:
    """Median, and half the distance between the quartiles, in ms."""
    return "" if times is None else f"{times.median_ms:.3f} ± {times.iqr_ms / 2:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _excess(row: Row) -> tuple[bool, float]:
    """Orders rows from the best to the worst; NaN is as bad as it gets."""
    largest = max(row.error, row.worst)
    return not row.ok, math.inf if math.isnan(row.error + row.worst) else largest / row.limit


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


def _print_table(
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


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; nothing where nothing is compiled."""

    def __init__(self) -> None:
        self.total = 0
        """Steps in all; 0 until the first report."""
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        self.total = total
        if not sys.stderr.isatty():
            click.echo(f"[{done}/{total}] {what}" if total else what, err=True)
            return
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(what)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total or None, description=what)


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
