"""``convgen doctor``: what was found on this machine, and what is missing."""

from __future__ import annotations

import click

from convgen.commands import options


@click.command("doctor", short_help="Say what was found here, and what to install.")
@options.as_json
def command(as_json: bool) -> None:
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
