"""All commands by name, in the order in which help shows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from mc_cli import __version__
from mc_cli.cli.estimating import estimate, estimate_parameters
from mc_cli.cli.finished import bench, bench_parameters, generate, generate_parameters, serve, serve_parameters
from mc_cli.cli.looking import compare, curve, report
from mc_cli.cli.options import made_option, parameter, run_parameters, stage_parameters
from mc_cli.cli.running import families, list_formats, run_all, run_stage, status, verify
from mc_cli.failures import INTERRUPTED, interrupted_message
from mc_cli.flags import STAGES
from mc_cli.help import GroupedCommand, GroupedCommands

SUMMARIES = {
    "calibrate": "Run text through the model and measure what its routers do.",
    "score": "Measure what each expert matters and what each candidate width would cost.",
    "allocate": "Choose a width for every expert within a budget.",
    "quantize": "Round and pack the weights as the plan says, layer by layer.",
    "prune-eval": "Measure the original and the packed model on held-out text.",
    "export": "Write the packed model as a directory that loads elsewhere, and read it back.",
}
_RUN_HELP = "Do all stages in turn, from a recipe, from flags, or both; skips what is done."
_ESTIMATE_HELP = "Say what compressing a model takes and gives, from headers alone: sizes, memory, disk, time, speed."
_STAGES, _REST = "Stages, in the order of a run", "Whole runs and results"

app = typer.Typer(
    name="mc-cli",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=GroupedCommands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def main() -> None:
    """Runs the command line and exits with its status."""
    try:
        app()
    except KeyboardInterrupt:  # before typer was reached, or after it ended
        _tell_interrupted()
    except SystemExit as end:  # while flags were read: typer exits without a word
        if not isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            raise
        _tell_interrupted()


def _tell_interrupted() -> NoReturn:
    typer.echo(interrupted_message(None), err=True)
    raise SystemExit(INTERRUPTED) from None


def _add_command(
    name: str, body: Callable[[Mapping[str, Any]], None], parameters: list[inspect.Parameter], help: str
) -> None:
    """Registers a command that hands all its flags to `body` as one mapping."""

    def command(**given: Any) -> None:
        body(given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    panel = _STAGES if name in STAGES else _REST
    app.command(name, cls=GroupedCommand, help=help, rich_help_panel=panel)(command)


_LIST = made_option(
    "--list",
    help="Print the formats, the engines that load each and what it keeps of a plan, and exit.",
    panel="Output",
    is_eager=True,
    callback=list_formats,
)
_MORE_OF = {"export": [parameter("list", bool, _LIST, False)]}

for _stage in STAGES:
    _parameters = [*stage_parameters(_stage), *_MORE_OF.get(_stage, ())]
    _add_command(_stage, partial(run_stage, _stage), _parameters, SUMMARIES[_stage])
_add_command("run", run_all, run_parameters(), _RUN_HELP)
_add_command("estimate", estimate, estimate_parameters(), _ESTIMATE_HELP)
app.command("status", cls=GroupedCommand, rich_help_panel=_REST)(status)
app.command("verify", cls=GroupedCommand, rich_help_panel=_REST)(verify)
app.command("families", cls=GroupedCommand, rich_help_panel=_REST)(families)
app.command("curve", cls=GroupedCommand, rich_help_panel=_REST)(curve)
app.command("compare", cls=GroupedCommand, rich_help_panel=_REST)(compare)
app.command("report", cls=GroupedCommand, rich_help_panel=_REST)(report)
_add_command("generate", generate, generate_parameters(), "Continue a text with an exported model.")
_add_command("bench", bench, bench_parameters(), "Measure a model's speed and memory on this machine's processor.")
_add_command(
    "serve", serve, serve_parameters(), "Serve a model with OpenAI's interface, by the engine that is installed."
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mc-cli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compress Mixture-of-Experts language models: measure, allocate bits, quantize, pack, evaluate, export.

    Stages meet in a work directory (-w): each can be stopped at any time and goes on where it was.
    """
