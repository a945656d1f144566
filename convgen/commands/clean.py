"""``convgen clean``: delete generated modules, or the cache."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from convgen.commands import options


@click.command("clean", short_help="Delete generated modules, or the cache.")
@click.argument("modules", nargs=-1)
@options.modules_folder
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
def command(
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
