"""``convgen show``: what a module was made from."""

from __future__ import annotations

from pathlib import Path

import click

from convgen.commands import options


@click.command("show", short_help="Show what a module was made from, and its files.")
@click.argument("module")
@options.modules_folder
@options.as_json
def command(module: str, folder: Path, as_json: bool) -> None:
    """Show the specification, phases, schedules and files of a MODULE (name or path)."""
    from convgen.commands import catalog, report

    (found,) = catalog.find([module], folder)
    report.notices([found])
    if as_json:
        report.json(catalog.details(found))
    else:
        report.details(found)
