"""Help pages as plain text, flags under headings; drawing them with rich would cost a tenth of a second more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_PLAIN = "Options"


def by_panel(entries: Iterable[Any], default: str) -> dict[str, list[Any]]:
    """Parameters or commands by the heading they belong under, in the order in which headings first appear."""
    panels: dict[str, list[Any]] = {}
    for entry in entries:
        panels.setdefault(getattr(entry, "rich_help_panel", None) or default, []).append(entry)
    return panels


class GroupedCommand(TyperCommand):
    """A command whose help lists arguments and flags under their headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the headings and what is under them."""
        for heading, parameters in by_panel(self.get_params(ctx), _PLAIN).items():
            _write(formatter, heading, [record for one in parameters if (record := one.get_help_record(ctx))])


class GroupedCommands(TyperGroup):
    """The program's own help: its commands under their headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands, then the program's own flags."""
        for heading, commands in by_panel(self.commands.values(), "Commands").items():
            _write(formatter, heading, [(command.name or "", command.get_short_help_str(200)) for command in commands])
        _write(formatter, _PLAIN, [record for one in self.get_params(ctx) if (record := one.get_help_record(ctx))])


def _write(formatter: Any, heading: str, rows: list[tuple[str, str]]) -> None:
    if rows:
        with formatter.section(typer.style(heading, bold=True)):
            formatter.write_dl(rows, col_max=34)
