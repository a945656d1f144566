"""``convgen list``: the generated modules of a folder."""

from __future__ import annotations

from pathlib import Path

import click

from convgen.commands import options


@click.command("list")
@options.modules_folder
@options.as_json
def command(folder: Path, as_json: bool) -> None:
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
