"""Chat templates in a process of their own: a template is a program, and may come with a model from anywhere.

Its sandbox (jinja's, in transformers) keeps it from files and attributes, and not from taking all memory or all time:
`{{ 'x' * 10 ** 10 }}`, loops in loops, a power of powers, which no signal interrupts. So a forked child renders, under
the system's limit of memory, and is killed where it takes too long. Elsewhere than on Linux, where no such limit is
kept and forking is not safe, templates run in this process without limits.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mc_cli.errors import InputError

_APART = sys.platform == "linux"
_TEXT, _REFUSED, _NO_MEMORY = b"t", b"r", b"m"


class RefusedError(Exception):
    """The template's own message about a row that it does not take, or the error in it."""


class LimitError(Exception):
    """The limit that a template does not keep, as the end of a sentence."""


@dataclass(frozen=True)
class Limits:
    """Limits on rendering one row; each grows with the row, which counts as JSON.

    seconds          of time, and one more for each MB of the row
    memory_bytes     beside what the process had before, and 64 for each byte of the row
    text_bytes       of the text, and 16 for each byte of the row
    together_bytes   of the texts of all rows, and 16 for each of their bytes: templates add little to a row
    """

    seconds: float = 20.0
    memory_bytes: int = 512 << 20
    text_bytes: int = 1 << 20
    together_bytes: int = 64 << 20


class TemplateProcess:
    """Renders rows by a tokenizer's `apply_chat_template`, in a child that is made with the first."""

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._connection: Connection | None = None
        self._rows_bytes = self._texts_bytes = 0

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        template: str,
        *,
        prompted: bool = False,
    ) -> str:
        """The row's text, with the request for an answer behind it if `prompted`.

        Raises RefusedError where the template refuses it or fails, LimitError above.
        """
        if not _APART:
            return _rendered(self._tokenizer, list(messages), tools, template, prompted)
        try:
            row = json.dumps([list(messages), tools, template, prompted], default=str).encode()
        except (ValueError, RecursionError) as error:
            raise RefusedError(_reason(error)) from error
        size = len(row) - len(template)
        answer = self._ask(row, self._limits.seconds + size / 1e6)
        kind, text = answer[:1], answer[1:]
        if kind == _REFUSED:
            raise RefusedError(text.decode())
        self._rows_bytes += size
        self._texts_bytes += len(text)
        if kind == _NO_MEMORY:
            raise LimitError(f"takes more than {self._limits.memory_bytes:,} bytes of memory")
        if len(text) > self._limits.text_bytes + 16 * size:
            raise LimitError(f"makes a text of {len(text):,} bytes")
        if self._texts_bytes > self._limits.together_bytes + 16 * self._rows_bytes:
            raise LimitError(f"makes texts of {self._texts_bytes:,} bytes of rows that have {self._rows_bytes:,}")
        return text.decode()

    def _ask(self, row: bytes, seconds: float) -> bytes:
        if self._connection is None:
            self._connection = self._start()
        try:
            self._connection.send_bytes(row)
            if not self._connection.poll(seconds):
                raise LimitError(f"takes more than {seconds:.0f} seconds")
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise LimitError("ends the process that renders it, which has taken too much memory or failed") from error

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        try:
            child = os.fork()
        except OSError as error:
            raise InputError(
                f"No process can be made to render chats ({error.strerror}). End other programs, or take the turns' "
                "texts as they are with --no-chat-template."
            ) from error
        if child == 0:
            with suppress(BaseException):  # nothing may go on as a second copy of the caller
                _serve(theirs, self._tokenizer, self._limits)
            os._exit(1)
        theirs.close()
        weakref.finalize(self, _end, os.getpid(), child, ours)
        return ours


def _end(owner: int, child: int, connection: Connection) -> None:
    if os.getpid() != owner:  # a fork of the owner, whose child it is not
        return
    connection.close()
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(connection: Connection, tokenizer: Any, limits: Limits) -> None:
    """Answers rows until the other end is closed. Locks and all else that the parent has open is not kept open."""
    import resource  # Windows has none

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kept = connection.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, 1 << 16)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    own_bytes = pages * resource.getpagesize()
    before, hard = (sys.maxsize if each < 0 else each for each in resource.getrlimit(resource.RLIMIT_AS))
    while True:
        row = connection.recv_bytes()
        most = min(before, own_bytes + limits.memory_bytes + 64 * len(row))
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            text = _rendered(tokenizer, *json.loads(row))
            answer = _TEXT + text.encode()
        except MemoryError:
            answer = _NO_MEMORY
        except RefusedError as error:
            answer = _REFUSED + str(error).encode("utf-8", "replace")
        connection.send_bytes(answer)


def _rendered(
    tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] | None, template: str, prompted: bool
) -> str:
    try:
        found = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompted
        )
        if not isinstance(found, str):
            raise ValueError("the template makes no text")
        found.encode()  # half of a character is no text either
    except MemoryError:
        raise
    except Exception as error:  # jinja's, the template's own raise_exception, or any of the values it meets
        raise RefusedError(_reason(error)) from error
    return found


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
