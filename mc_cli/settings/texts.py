"""Words that flags of several stages share: the texts that are read, and seeds."""

from __future__ import annotations

from typing import Any

from mc_cli.errors import InputError

DATA = (
    "Text, or for a model that sees rows with images: a .txt, .jsonl, .json or .parquet file, a folder of them, a "
    "`datasets` name (NAME or NAME:CONFIG), or bundled:"
)
SPLIT = "Split of a `datasets` name; files have none."
TEXT_FIELD = (
    "Field of a .jsonl object, a .parquet row or a `datasets` row that holds the text. Rows without `text` are chats "
    "(messages, conversations, or prompt and completion), else their first field with a text is taken."
)
CHAT_TEMPLATE = "Template that makes texts of chats: the name of one of the tokenizer's, or a file."
NO_CHAT_TEMPLATE = "Take the turns of chats as plain text, one under the other."
SEED = "Seed of everything random in this stage."
LENGTH_DEFAULT = "2048, or the model's whole context where that is shorter"  # of a length of 0
LENGTHS = "at least 8 tokens, or 0 for 2048 (or the model's whole context where shorter)."


def is_length(tokens: Any) -> bool:
    """Whether sequences of so many tokens can be read; 0 stands for the model's own length."""
    return bool(tokens == 0 or tokens >= 8)


def two_templates(template: str | None, none: bool) -> list[InputError]:
    """The complaint where a template is named and refused at once."""
    if template is None or not none:
        return []
    return [InputError(f"--chat-template {template} and --no-chat-template exclude each other. Give one.")]
