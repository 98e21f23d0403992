"""Help pages as plain text, flags under headings; drawing them with rich would cost a tenth of a second more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_PLAIN = "Options"
EXACTLY_ONE = "(exactly one)"  # how the heading of such a group ends


def by_panel(entries: Iterable[Any], default: str) -> dict[str, list[Any]]:
    """Parameters or commands by the heading they belong under, in the order in which headings first appear."""
    panels: dict[str, list[Any]] = {}
    for entry in entries:
        panels.setdefault(getattr(entry, "rich_help_panel", None) or default, []).append(entry)
    return panels


class GroupedCommand(TyperCommand):
    """A command whose help lists arguments and flags under their headings, and that names all missing ones at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The rest of `args`. Ends with exit status 2 where flags are missing or cannot be read."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if type(error).__name__ != "MissingParameter":
                raise
            found, _, _ = self.make_parser(ctx).parse_args(args=given)
            ctx.fail(f"Missing: {', '.join(_missing(self.get_params(ctx), found))}.")
            raise

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


def _missing(parameters: list[Any], found: dict[str, Any]) -> list[str]:
    """Names of required parameters that were not given, and of a group of which exactly one is to be."""

    def given(one: Any) -> bool:
        return found.get(one.name) not in (None, ())

    def shown(one: Any) -> str:
        return max(one.opts, key=len) if one.param_type_name == "option" else one.metavar or str(one.name).upper()

    names = [shown(one) for one in parameters if one.required and not given(one)]
    for heading, group in by_panel(parameters, _PLAIN).items():
        if heading.endswith(EXACTLY_ONE) and not any(map(given, group)):
            names.append(f"one of {', '.join(map(shown, group))}")
    return names


def _write(formatter: Any, heading: str, rows: list[tuple[str, str]]) -> None:
    if rows:
        with formatter.section(typer.style(heading, bold=True)):
            formatter.write_dl(rows, col_max=34)
