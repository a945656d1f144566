"""``convgen verify``: compare modules with float64."""

from __future__ import annotations

from pathlib import Path

import click

from convgen.commands import options
from convgen.spec.dtypes import DTYPES


@click.command("verify", short_help="Compare modules with float64.")
@click.argument("modules", nargs=-1)
@options.modules_folder
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
@options.seed
@click.option(
    "--interpret",
    is_flag=True,
    help="Run the CUDA kernels on the CPU, with every memory access checked; needs no GPU.",
)
def command(
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
