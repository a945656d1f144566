"""The command line: parse, call, print. What the commands do lies in the modules they call.

``bench`` and ``tune`` are in ``measure.py``. Nothing heavier than click is imported at the top
of either: ``convgen --help`` must answer at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from convgen import __version__
from convgen.commands import measure, options
from convgen.engines.backends import BACKENDS
from convgen.spec import ConvSpec, SpecError
from convgen.spec.dtypes import DTYPES

FOLDER = "generated"
"""Where ``generate`` writes and the other commands look, unless ``--out`` says otherwise."""


class _Failure(click.ClickException):
    """One of convgen's own errors; its message may have several lines."""

    def __init__(self, message: str, command: str, status: int) -> None:
        super().__init__(message)
        self.command = command
        self.status = status


class _Commands(click.Group):
    """Lists commands as defined here; suggests the one that was meant, whatever click's version."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Turns convgen's own errors into click's, so that they name the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, RuntimeError) as error:
            status = _status(error)
            if status is None:
                raise
            command = f"{ctx.command_path} {ctx.invoked_subcommand}"
            raise _Failure(str(error), command, status) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            close = difflib.get_close_matches(name, self.commands, n=1)
            hint = (
                f"Did you mean {close[0]!r}?" if close else f"Commands: {', '.join(self.commands)}."
            )
            raise click.UsageError(f"No such command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)


_IN = click.option(
    "--in",
    "folder",
    default=FOLDER,
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the generated modules lie.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="convgen %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Kernels for (transposed) convolutions, specialized and handed back as PyTorch modules.

    \b
    Generate a module and use it:
      convgen generate --kernel 3 --stride 2
      python -c "from generated.conv_transpose3d_k3_s2 import ConvTranspose3d"

    Check it against float64 with `convgen verify`; see what this machine can compile with
    `convgen doctor`.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(short_help="Generate and compile a module.")
@options.specification(required=True)
@click.option(
    "--in-channels", type=int, metavar="N", help="Fix the input's channels; any number otherwise."
)
@click.option(
    "--out-channels", type=int, metavar="N", help="Fix the output's channels; any number otherwise."
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    callback=options.dtypes,
    metavar="|".join(DTYPES),
    help="Element type; repeat it or separate by commas.  [default: f32,f64 for cpu, f32 for cuda]",
)
@click.option(
    "--backend",
    type=click.Choice([*BACKENDS, "auto"]),
    default="auto",
    show_default=True,
    help="What to compile for; auto is cpu, and cuda where a GPU is present.",
)
@click.option(
    "--arch",
    "archs",
    multiple=True,
    callback=options.split,
    metavar="90a|sm_80|80+ptx",
    help="GPU architecture; repeat it or separate by commas.  [default: of the GPUs present, else "
    "80+ptx]",
)
@click.option(
    "--out",
    default=FOLDER,
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write the module into.",
)
@click.option("--name", metavar="NAME", help="Name of the module instead of the canonical one.")
def generate(
    op: str,
    kernel: tuple[int, ...],
    dtypes: tuple[str, ...] | None,
    backend: str,
    archs: tuple[str, ...],
    out: Path,
    name: str | None,
    **arguments: Any,
) -> None:
    """Generate and compile a module, and print the line that imports it.

    \b
    Examples:
      convgen generate --kernel 3 --stride 2
      convgen generate --kernel 3,5,5 --padding 1,2,2 --dtype f32,f16 --backend cuda --arch 90a
      convgen generate --op conv1d --kernel 7 --padding same --dilation 3 --groups 64
    """
    from convgen.commands import catalog, report
    from convgen.specialize import export
    from convgen.specialize import generate as build

    spec = ConvSpec.make(op, kernel_size=kernel, **arguments)
    if archs and backend == "cpu":
        raise click.UsageError("--arch is for --backend cuda or auto.")
    target = catalog.destination(out, name or spec.name)
    with report.plain_warnings(), report.Progress() as progress:
        package = build(
            spec,
            dtypes=dtypes,
            backends=None if backend == "auto" else (backend,),
            archs=archs or None,
            progress=progress,
        )
    module = catalog.load(export(package, out, target.name))
    report.written(module, compiled=progress.total > 0, seconds=progress.seconds)
    click.echo(catalog.import_line(module))


@cli.command(short_help="Compare modules with float64.")
@click.argument("modules", nargs=-1)
@_IN
@click.option(
    "--device", metavar="cpu|cuda", help="Where to run.  [default: a GPU if there is one, else cpu]"
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    callback=options.dtypes,
    metavar="|".join(DTYPES),
    help="Only these element types.  [default: all that a module has]",
)
@click.option("--quick", is_flag=True, help="Fewer shapes.")
@click.option(
    "--all", "show_all", is_flag=True, help="Print every case, not the worst of each kind."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the inputs.")
@click.option(
    "--interpret",
    is_flag=True,
    help="Run the CUDA kernels on the CPU, with every memory access checked; needs no GPU.",
)
def verify(
    modules: tuple[str, ...],
    folder: Path,
    device: str | None,
    dtypes: tuple[str, ...] | None,
    quick: bool,
    show_all: bool,
    seed: int,
    interpret: bool,
) -> None:
    """Compare MODULES (names or paths; all in ./generated) with float64.

    Runs forward, every gradient and second order on several shapes, ragged ones among them, and
    prints errors beside their limits. Exit status 1 if any is exceeded.

    \b
    Examples:
      convgen verify
      convgen verify conv_transpose3d_k3_s2 --dtype f32 --all
      convgen verify --interpret --quick
    """
    from convgen.commands import catalog, report

    if interpret and device not in (None, "cuda"):
        raise click.UsageError("--interpret runs CUDA kernels: it goes with no other --device.")
    refused: list[str] = []
    found = catalog.find(modules, folder, refused)
    report.notices(found, refused)
    if not found:
        raise click.UsageError(f"No modules in {folder}: run convgen generate first.")
    # These import torch, which takes a second or two.
    from convgen.checking.interpreted import load as load_interpreted
    from convgen.checking.verify import verify as check
    from convgen.specialize import load

    failed = []
    for module in found:
        try:
            if interpret:
                with report.Progress() as progress:
                    imported = load_interpreted(module.path, progress=progress)
            else:
                imported = load(module.path)
            with report.waiting(f"verifying {module.name}"):
                result = check(
                    imported,
                    device="cpu" if interpret else device,
                    dtypes=dtypes,
                    quick=quick,
                    seed=seed,
                )
        except Exception as error:
            # Nothing to run, a library that does not load, or what another version had otherwise.
            if not isinstance(error, RuntimeError) and module.foreign is None:
                raise
            click.echo(f"{module.name}: {error}", err=True)
            failed.append(module.name)
            continue
        report.verification(module, result.rows, show_all)
        if not result.ok:
            failed.append(module.name)
    if failed:
        raise click.ClickException(f"{', '.join(failed)} failed.")
    click.echo(f"All errors are within their limits: {', '.join(m.name for m in found)}.")


cli.add_command(measure.bench_)
cli.add_command(measure.tune_)


@cli.command("list")
@_IN
@_JSON
def list_(folder: Path, as_json: bool) -> None:
    """List the generated modules."""
    from convgen.commands import catalog, report

    refused: list[str] = []
    modules = catalog.scan(folder, refused)
    report.notices(modules, refused)
    if as_json:
        report.json([catalog.summary(module) for module in modules])
    elif modules:
        report.modules(modules)
    else:
        click.echo(f"No modules in {folder}: run convgen generate first.", err=True)


@cli.command(short_help="Show what a module was made from, and its files.")
@click.argument("module")
@_IN
@_JSON
def show(module: str, folder: Path, as_json: bool) -> None:
    """Show the specification, phases, schedules and files of a MODULE (name or path)."""
    from convgen.commands import catalog, report

    (found,) = catalog.find([module], folder)
    report.notices([found])
    if as_json:
        report.json(catalog.details(found))
    else:
        report.details(found)


@cli.command(short_help="Delete generated modules, or the cache.")
@click.argument("modules", nargs=-1)
@_IN
@click.option("--cache", "with_cache", is_flag=True, help="Empty the cache of built packages.")
@click.option("--generated", "with_generated", is_flag=True, help="Delete all generated modules.")
@click.option(
    "--unused-days",
    type=click.FloatRange(min=0),
    callback=options.finite,
    metavar="N",
    help="Delete packages of the cache that nobody uses and that were last used N days ago.",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def clean(
    modules: tuple[str, ...],
    folder: Path,
    with_cache: bool,
    with_generated: bool,
    unused_days: float | None,
    yes: bool,
) -> None:
    """Delete generated MODULES (names or paths), or all of them, or the cache.

    Touches nothing that convgen did not write.

    \b
    Examples:
      convgen clean conv_transpose3d_k3_s2
      convgen clean --cache --generated --yes
      convgen clean --unused-days 30
    """
    from convgen.building import cache, cleaning
    from convgen.commands import catalog

    if not (modules or with_cache or with_generated or unused_days is not None):
        raise click.UsageError(
            "Say what to delete: --cache, --generated, --unused-days N, or names of modules."
        )
    found = catalog.find(modules, folder) if modules or with_generated else []
    names = [str(module.path) for module in found]
    if unused_days is not None:
        with_cache = True
        names.append(f"what {cache.cache_path()} has had unused for {unused_days:g} days")
    elif with_cache:
        names.append(f"the cache {cache.cache_path()}")
    if not names:
        click.echo(f"Nothing to delete in {folder}.", err=True)
        return
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("Nobody to ask: add --yes to delete.")
        click.confirm("Delete " + ", ".join(names) + "?", abort=True, err=True)
    for module in found:
        catalog.remove(module)
        click.echo(f"Deleted {module.path}", err=True)
    if with_cache:
        count, size_bytes = cleaning.clean(unused_days=unused_days)
        packages = "1 package" if count == 1 else f"{count} packages"
        click.echo(f"Deleted {packages} of the cache, {size_bytes / 2**20:.1f} MiB", err=True)


@cli.command(short_help="Say what was found here, and what to install.")
@_JSON
def doctor(as_json: bool) -> None:
    """Say what was found on this machine, and what to install for what is missing.

    Exit status 1 if something is missing that convgen cannot do without.
    """
    from convgen.building import doctor as examination
    from convgen.commands import report

    findings = examination.examine()
    if as_json:
        report.json([finding.__dict__ for finding in findings])
    else:
        report.findings(findings)
    if any(finding.needed and not finding.ok for finding in findings):
        raise click.exceptions.Exit(1)


def main(args: Sequence[str] | None = None, prog_name: str = "convgen") -> int:
    """Runs the command line and returns its exit status.

    A user's mistake is one line on stderr and status 2, a failure of the machine (a compiler,
    the disk) its message and status 1; neither shows a traceback.
    """
    try:
        status = cli.main(args, prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # The reader (head, say) has seen enough. Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return 130
    except _Failure as error:
        click.echo(f"{error.command}: {error.message}", err=True)
        return error.status
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = prog_name if context is None else context.command_path
        # click breaks some messages into lines.
        click.echo(f"{command}: {' '.join(error.format_message().split())}", err=True)
        return error.exit_code


def _status(error: Exception) -> int | None:
    """Exit status of convgen's own errors; None for those of others, which are bugs."""
    from convgen.building.cache import BuildError
    from convgen.building.toolchain import ToolchainError
    from convgen.commands.catalog import CatalogError
    from convgen.engines.tuned import TunedError
    from convgen.measuring.layers import SuiteError
    from convgen.measuring.plots import PlotError

    if isinstance(error, SpecError | CatalogError | SuiteError):
        return 2
    ours = BuildError | ToolchainError | PlotError | TunedError
    return 1 if isinstance(error, ours) else None
