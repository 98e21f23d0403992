"""Rows of a chat: turns in any of the usual forms to messages, and messages to text by a chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import content_digest, read_text
from mc_cli.artifacts.strict_json import JsonError, has_half_character, parse_json
from mc_cli.data.pictures import PLACE, ImageSource, image_source
from mc_cli.data.rendering import LimitError, Limits, RefusedError, TemplateProcess
from mc_cli.errors import ArtifactError, InputError, shown

# kind -> the fields that a row of it has; in the order in which they are looked for
CHAT_FIELDS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
}
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "ipython": "ipython",
}
OWN_TEMPLATE = "the tokenizer's own"  # its name in the report
_IMAGE_TYPES = ("image", "image_url", "input_image")  # of a part
_IMAGE_KEYS = ("image", "image_url", "url", "path")  # where a part may hold its image
_REMEDY = "Correct the row, name a field of text with --text-field, or leave the row out."


@dataclass(frozen=True)
class Chat:
    """The turns of one row, as chat templates take them.

    kind    one of CHAT_FIELDS;  where    the row's place, for messages
    tools   JSON schemas of functions that may be called, where the row has them
    images  in the order in which they stand in the messages, whose content is then a list of parts
    """

    kind: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    where: str
    images: tuple[ImageSource, ...] = ()


def chat_of_row(
    where: str, row: Mapping[str, Any], *, images: Sequence[ImageSource] | None = None, folder: Path | None = None
) -> Chat | None:
    """The row's chat; None where it has none of CHAT_FIELDS. Raises InputError naming what is not a turn.

    images  those beside the messages, which take the places that are marked in them, or the beginning of the first turn
            of the user; None: parts that are no text are refused
    folder  what paths of images in the messages are relative to
    """
    kind = next((kind for kind, parts in CHAT_FIELDS.items() if all(part in row for part in parts)), None)
    if kind is None:
        return None
    if kind == "prompt/completion":
        turns: Sequence[Any] = [*_side(where, row, "prompt", "user"), *_side(where, row, "completion", "assistant")]
    else:
        turns = _turns(where, kind, row[kind])
    seen = images is not None
    messages = [_message(f"{where}, {kind}[{place}]", turn, seen=seen) for place, turn in enumerate(turns)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    if not messages:
        raise InputError(f"{where}: {kind} holds no turn. {_REMEDY}")
    found: tuple[ImageSource, ...] = ()
    if images is not None:
        found = _place_images(where, messages, turns, images, folder)
    return Chat(kind, messages, _tools(where, row.get("tools")), where, found)


def _place_images(
    where: str,
    messages: list[dict[str, Any]],
    turns: Sequence[Any],
    beside: Sequence[ImageSource],
    folder: Path | None,
) -> tuple[ImageSource, ...]:
    """Puts a part of type image where each image stands, and gives them in order. Raises InputError for too many."""
    found: list[ImageSource] = []
    waiting = list(beside)
    offset = len(messages) - len(turns)  # a system prompt that stands beside the turns
    for message, turn in zip(messages[offset:], turns, strict=True):
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        parts: list[dict[str, str]] = []
        for part in content if isinstance(content, list) else [message["content"]]:
            parts += _parts(where, part, waiting, found, folder)
        if any(part["type"] == "image" for part in parts):
            message["content"] = parts
    if waiting:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None or found:
            raise InputError(f"{where}: {len(waiting)} images have no place in the messages. {_REMEDY}")
        text = [{"type": "text", "text": first["content"]}] if first["content"] else []
        first["content"] = [*({"type": "image"} for _ in waiting), *text]
        found = waiting
    return tuple(found)


def _parts(
    where: str, part: object, waiting: list[ImageSource], found: list[ImageSource], folder: Path | None
) -> list[dict[str, str]]:
    """One part of a content as parts of text and images; a text may mark images with PLACE."""
    if isinstance(part, Mapping) and _is_image(part):
        value = next((part[name] for name in _IMAGE_KEYS if part.get(name) is not None), None)
        if value is None and not waiting:
            raise InputError(f"{where}: the messages have more places for images than the row has images. {_REMEDY}")
        found.append(waiting.pop(0) if value is None else image_source(where, value, folder))
        return [{"type": "image"}]
    text = str(part["text"] if isinstance(part, Mapping) else part)
    pieces = text.split(PLACE) if waiting else [text]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            if not waiting:
                raise InputError(f"{where}: the texts have more {PLACE} than the row has images. {_REMEDY}")
            found.append(waiting.pop(0))
            parts.append({"type": "image"})
        if piece.strip() or len(pieces) == 1:
            parts.append({"type": "text", "text": piece.strip("\n") if len(pieces) > 1 else piece})
    return parts


def _side(where: str, row: Mapping[str, Any], name: str, role: str) -> Sequence[Any]:
    value = row[name]
    return [{"role": role, "content": value}] if isinstance(value, str) else _turns(where, name, value)


def _turns(where: str, name: str, value: object) -> Sequence[Any]:
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        # Older datasets store a list of objects as an object of lists.
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise InputError(f"{where}: {name} is {shown(value)}, not a list of turns. {_REMEDY}")
    return value


def _message(where: str, turn: object, *, seen: bool) -> dict[str, Any]:
    """One turn with `role` and `content`, from role/content or from/value; empty entries left out.

    seen  whether parts that are images are allowed; they are left out of the text
    """
    if not isinstance(turn, Mapping):
        raise InputError(f"{where} is {shown(turn)}, not a turn with role and content. {_REMEDY}")
    shared = "role" not in turn and "from" in turn
    role, content = (turn.get("from"), turn.get("value")) if shared else (turn.get("role"), turn.get("content"))
    if not isinstance(role, str) or not role:
        raise InputError(f"{where} has the role {shown(role)}, not a text. {_REMEDY}")
    if shared:
        if role.lower() not in _ROLES:
            raise InputError(f"{where} is from {shown(role)}; known are {', '.join(_ROLES)}. {_REMEDY}")
        role = _ROLES[role.lower()]
    names = ("from", "value", "role", "content")
    rest = {name: _filled(value) for name, value in turn.items() if name not in names and value is not None}
    if not isinstance(rest.get("tool_calls", []), list):
        raise InputError(f"{where} has the tool_calls {shown(rest['tool_calls'])}, not a list. {_REMEDY}")
    if rest.get("tool_calls"):
        rest["tool_calls"] = [_call(where, call) for call in rest["tool_calls"]]
    return {"role": role, "content": _content(where, content, seen=seen), **rest}


def _content(where: str, content: object, *, seen: bool) -> str:
    """The turn's text; parts are joined, as templates for text alone would print a list as Python does."""
    if content is None:
        return ""
    if isinstance(content, list):
        if seen:
            content = [part for part in content if not _is_image(part)]
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        other = next((part for part, text in zip(content, parts, strict=True) if not isinstance(text, str)), None)
        if other is not None or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{where} holds the part {shown(other)}; only parts of text are read. {_REMEDY}")
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise InputError(f"{where} has the content {shown(content)}, not a text or a list of parts. {_REMEDY}")
    if has_half_character(content):
        raise InputError(f"{where} holds half of a character (a lone surrogate), which no tokenizer reads. {_REMEDY}")
    return content


def _is_image(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _IMAGE_TYPES


def _call(where: str, call: object) -> Any:
    """A tool call whose arguments, where they are JSON in a text, are the object that templates write out."""
    if not isinstance(call, Mapping):
        raise InputError(f"{where} has the tool call {shown(call)}, not an object. {_REMEDY}")
    inner = call.get("function")
    holder = inner if isinstance(inner, Mapping) else call
    arguments = holder.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = parse_json(arguments.encode(), finite=False)
        except (JsonError, UnicodeEncodeError):
            parsed = arguments
        holder = {**holder, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {**call, "function": holder} if isinstance(inner, Mapping) else holder


def _tools(where: str, tools: object) -> Sequence[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools.encode(), finite=False)
        except (JsonError, UnicodeEncodeError) as error:
            raise InputError(f"{where}: tools are a text that is not JSON ({error}). {_REMEDY}") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise InputError(f"{where}: tools are {shown(tools)}, not a list. {_REMEDY}")
    return [_filled(tool) for tool in tools]


def _filled(value: Any) -> Any:
    """The value without entries that are null: tables give every row all names that any row has."""
    if isinstance(value, Mapping):
        return {name: _filled(item) for name, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class ChatSettings:
    """How chats become text.

    template   the name of one of the tokenizer's templates, or a file that holds one; None = the tokenizer's default
    plain      no template: the turns' texts, one under the other
    """

    template: str | None = None
    plain: bool = False

    def digest(self) -> str | None:
        """The digest of the settings for a fingerprint; None for the default."""
        if self.plain:
            return "none"
        if self.template is None:
            return None
        path = Path(self.template).expanduser()
        return content_digest(_template_text(path)) if _is_file(path) else f"name {self.template}"


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def _template_text(path: Path) -> str:
    try:
        return read_text(path)
    except ArtifactError as error:
        raise InputError(f"--chat-template {error}") from error


@dataclass
class Renderer:
    """Chats to texts, by a tokenizer and the settings; it counts what its template refuses."""

    tokenizer: Any
    settings: ChatSettings = field(default_factory=ChatSettings)
    rendered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    example: str = ""  # where the first refused row is, and why
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._process = TemplateProcess(self.tokenizer, self.limits)

    def answers(self, chat: Chat, text: str) -> list[tuple[int, int]]:
        """(begin, end) in the chat's `text` of what the assistant's turns are, the mark that ends them included.

        A turn's answer is what the template adds behind its request for one. Empty where it writes turns otherwise
        when others follow, or without a template.
        """
        spans = []
        for place, message in enumerate(chat.messages):
            if self.settings.plain or message["role"] != "assistant" or place == 0:
                continue
            template = self.template(chat)
            try:
                before = self._process.text(chat.messages[:place], chat.tools, template, prompted=True)
                behind = self._process.text(chat.messages[: place + 1], chat.tools, template)
            except (RefusedError, LimitError):
                return []
            if not text.startswith(before) or not text.startswith(behind) or len(behind) <= len(before):
                return []
            spans.append((len(before), len(behind)))
        return spans

    def text(self, chat: Chat) -> str | None:
        """The chat's text with the special tokens that the template writes; None where the template refuses it.

        Raises InputError where there is no such template, or it takes more time or memory than any for chats.
        """
        if self.settings.plain:
            self.rendered += 1
            return "".join(map(_plain_turn, chat.messages))
        template = self.template(chat)
        try:
            found = self._process.text(chat.messages, chat.tools, template)
        except RefusedError as error:
            self.refused[str(error)] += 1
            self.example = self.example or f"{chat.where}: {error}"
            return None
        except LimitError as error:
            raise InputError(
                f"{chat.where}: {self._source()} {error}, which is more than one for chats does. Give another with "
                "--chat-template FILE, or take the turns' texts as they are with --no-chat-template."
            ) from error
        self.rendered += 1
        return found

    def template(self, chat: Chat) -> str:
        """The template's text. Raises InputError saying which there are."""
        own = getattr(self.tokenizer, "chat_template", None)
        named = own if isinstance(own, Mapping) else {}
        asked = self.settings.template
        if asked is not None and asked not in named:
            path = Path(asked).expanduser()
            if _is_file(path):
                return _template_text(path)
            known = f"the tokenizer has {', '.join(map(shown, named))}" if named else "the tokenizer names none"
            raise InputError(f"--chat-template {asked}: no such file, and no template of this name ({known}).")
        if own is None:
            raise InputError(
                f"{chat.where}: a row with {chat.kind} needs a chat template, and the model's tokenizer has none. Give "
                "one with --chat-template FILE, or take the turns' texts as they are with --no-chat-template."
            )
        if not named:
            return str(own)
        name = asked or ("tool_use" if chat.tools and "tool_use" in named else "default")
        if name not in named:
            raise InputError(
                f"The tokenizer has the chat templates {', '.join(map(shown, named))}, and none is the default. Name "
                "one with --chat-template."
            )
        return str(named[name])

    def name(self) -> str:
        """The template's name in the report."""
        return "none: the turns' texts" if self.settings.plain else self.settings.template or OWN_TEMPLATE

    def _source(self) -> str:
        """Where the template is, for messages."""
        if self.settings.template is not None:
            return f"--chat-template {self.settings.template}"
        folder = getattr(self.tokenizer, "name_or_path", "")
        return f"the chat template of {folder} (chat_template.jinja, or in tokenizer_config.json)"


def _plain_turn(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    lines = [message["content"], json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "".join(f"{line}\n" for line in lines if line)
