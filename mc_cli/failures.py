"""How a command ends that does not end well: one paragraph on stderr, an exit status, a traceback only if asked for."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import McError

# torch tells of a file that it cannot open or map in a RuntimeError, by these words.
_NOT_MAPPED = re.compile(r"unable to (?:open|mmap|stat|seek)\b[^<]*<([^>]*)>.*\((\d+)\)", re.DOTALL)
ERROR, INTERRUPTED = 1, 130
_FULL = "No space left on device"  # safetensors reports a full disk in an error of its own, by these words
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def telling_errors(*, debug: bool, work_dir: Path | None = None) -> Iterator[None]:
    """Turns what goes wrong inside into a paragraph and an exit status; `debug` puts the traceback before it."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        _say(interrupted_message(work_dir), plain=True)
        raise SystemExit(INTERRUPTED) from error  # no typer.Exit, which typer raises for one that nobody has told of
    except BrokenPipeError:  # `mc-cli status | head`: the reader has seen enough
        raise
    except Exception as error:
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        _say(error_message(error))
        raise typer.Exit(error.exit_status if isinstance(error, McError) else ERROR) from error


def interrupted_message(work_dir: Path | None) -> str:
    """What is true after Ctrl-C."""
    if work_dir is None:
        return "Stopped."
    return f"Stopped. Finished layers are kept in {work_dir}; the same command continues after the last of them."


def error_message(error: Exception) -> str:
    """The paragraph for an error: what, where, and what to do."""
    if isinstance(error, McError):
        return str(error)
    text = str(error)
    if _FULL in text and not isinstance(error, OSError):
        return (
            f"The disk is full ({text}). What was finished before is kept: free some space and run the same command "
            "again."
        )
    if isinstance(error, OSError) and error.errno is not None:
        return refusal(error)
    mapped = _NOT_MAPPED.search(text)
    if mapped is not None:
        return refusal(OSError(int(mapped[2]), os.strerror(int(mapped[2]))), mapped[1], action="cannot be read")
    if isinstance(error, ValueError) and "embedded null" in text:
        return (
            f"A path or name that was given holds a NUL character ({text}), which no file can have. See to the flags "
            "and to the recipe."
        )
    if isinstance(error, UnicodeEncodeError):
        return (
            f"A path or text that was given holds a character that cannot be written ({error.reason}, at position "
            f"{error.start}). See to the flags, the recipe and the files that they name."
        )
    if type(error).__name__ == "SafetensorError":
        return (
            f"A safetensors file of the model is damaged or cut short ({text}). Compare the sizes of the files with "
            "those of their source, and copy, download or make it again."
        )
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return (
            f"There is not enough memory ({_first_line(text) or type(error).__name__}). Finished layers are kept: run "
            "the same command again with a smaller --batch-tokens, or on a machine with more memory."
        )
    return (
        f"mc-cli has a defect: {type(error).__name__}: {text or '(no message)'}. This is not your mistake; finished "
        "layers are kept. Run the same command with --debug for the traceback, and report it with the command line."
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _say(message: str, *, plain: bool = False) -> None:
    from mc_cli.console import say, say_error

    (say if plain else say_error)(message)
