"""How a command ends that does not end well: one paragraph on stderr, an exit status, a traceback only if asked for."""

from __future__ import annotations

import _thread
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType

import typer

from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import McError
from mc_cli.registry import BROUGHT

# torch tells of a file that it cannot open or map in a RuntimeError, by these words.
_NOT_MAPPED = re.compile(r"unable to (?:open|mmap|stat|seek)\b[^<]*<([^>]*)>.*\((\d+)\)", re.DOTALL)
ERROR, INTERRUPTED = 1, 130
_AGAIN_S = 0.05
# The longest path that a system takes has 4,096 characters, of which more than this tell nobody more.
_WORD_HEAD, _WORD_TAIL = 300, 100
_LONG_WORD = re.compile(r"\S{500,}")
_FULL = "No space left on device"  # safetensors reports a full disk in an error of its own, by these words
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


Listener = Callable[[int, str], None]  # (exit status, message) of a command that does not end well


@contextmanager
def telling_errors(*, debug: bool, work_dir: Path | None = None) -> Iterator[list[Listener]]:
    """Turns what goes wrong inside into a paragraph and an exit status; `debug` puts the traceback before it.

    The list that it gives may be added to: each entry is called with the status and the paragraph.
    """
    stopped = _Stopped()
    listeners: list[Listener] = []
    try:
        with stopped.noted():
            yield listeners
    except typer.Exit:
        raise
    except BrokenPipeError:  # `mc-cli status | head`: the reader has seen enough
        raise
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or stopped.came:
            status, words = stopped.status, interrupted_message(work_dir)
            _say(words, plain=True)
            _listen(listeners, status, words)
            # No typer.Exit, which typer raises itself for an interrupt that nobody has told of.
            raise SystemExit(status) from error
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        status, words = error.exit_status if isinstance(error, McError) else ERROR, error_message(error)
        _say(words)
        _listen(listeners, status, words)
        raise typer.Exit(status) from error


def _listen(listeners: list[Listener], status: int, words: str) -> None:
    for listener in listeners:
        with suppress(OSError):  # the disk that the log lies on may be what is full
            listener(status, words)


class _Stopped:
    """Whether Ctrl-C or SIGTERM came, which a library may turn into an error of its own, or swallow.

    Compiled code that calls Python, torch's for one, takes KeyboardInterrupt for any failure of that call and goes on,
    or raises another error. Where Python itself has nobody to hand it to, as in what runs when memory is given back, it
    is asked for again a moment later. SIGTERM, by which schedulers end what has had its time, is told as Ctrl-C is.
    """

    def __init__(self) -> None:
        self.came = False
        self.status = INTERRUPTED

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes both while inside; in the main thread, and each where nobody else handles it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        ours = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
        unraisable = sys.unraisablehook
        for number in ours:
            signal.signal(number, self._note)
        if ours:
            sys.unraisablehook = lambda told: self._again() if told.exc_type is KeyboardInterrupt else unraisable(told)
        try:
            yield
        finally:
            sys.unraisablehook = unraisable
            for number, handler in ours.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self.status = INTERRUPTED if number == signal.SIGINT else 128 + number
        raise KeyboardInterrupt

    def _again(self) -> None:
        later = threading.Timer(
            _AGAIN_S, _thread.interrupt_main, [signal.SIGINT if self.status == INTERRUPTED else signal.SIGTERM]
        )
        later.daemon = True
        later.start()


def interrupted_message(work_dir: Path | None) -> str:
    """The state of things after Ctrl-C or SIGTERM, in words."""
    if work_dir is None:
        return "Stopped."
    return f"Stopped. Finished layers are kept in {work_dir}; the same command continues after the last of them."


def error_message(error: Exception) -> str:
    """The paragraph for an error: what, where, and what to do. Words that nobody would read to their end are cut."""
    return _LONG_WORD.sub(lambda word: f"{word[0][:_WORD_HEAD]}...{word[0][-_WORD_TAIL:]}", _whole_message(error))


def _whole_message(error: Exception) -> str:
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
    found = f"{type(error).__name__}: {text or '(no message)'}"
    if (place := _place_in_extension(error)) is not None:
        return (
            f"{place} has a defect: {found}. Finished layers are kept. Run the same command with --debug for the "
            "traceback, and report it to those who made that package; docs/extending.md says what each kind defines."
        )
    return (
        f"mc-cli has a defect: {found}. This is not your mistake; finished "
        "layers are kept. Run the same command with --debug for the traceback, and report it with the command line."
    )


def _place_in_extension(error: Exception) -> str | None:
    """The last line that ran in an extension of another package, or what lacks an attribute there; else None."""
    places = [(frame.f_globals.get("__name__", ""), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, AttributeError) and error.obj is not None:
        lacking = error.obj if isinstance(error.obj, ModuleType) else type(error.obj)
        places.append((getattr(lacking, "__module__", None) or lacking.__name__, 0))
    for module, line in reversed(places):
        package = BROUGHT.get(module.partition(".")[0])
        if package is not None:
            return f"{module}{f', line {line},' if line else ''} of the package {package}"
    return None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _say(message: str, *, plain: bool = False) -> None:
    from mc_cli.console import say, say_error

    (say if plain else say_error)(message)
