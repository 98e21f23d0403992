"""The vocabulary of a model as GGUF holds it: byte-level BPE, its pre-tokenizer by llama.cpp's name for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import read_json
from mc_cli.errors import InputError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Patterns as tokenizer.json has them; llama.cpp knows their families by these names.
_SPLITS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
_HERE = "tokenizer.json cannot be written as GGUF: {}. Byte-level BPE with the pre-tokenizer of {} can. Choose another "
_HERE += "--format, or convert the dense export by llama.cpp's own script."


def write_tokenizer(writer: Any, folder: Path, *, vocabulary: int, config: Any) -> None:
    """The tokenizer of `folder`. Raises InputError, saying what of it has no counterpart.

    vocabulary   rows of the embedding: ids that no token has are written as unused
    """
    content = read_json(folder / "tokenizer.json", foreign=True) if (folder / "tokenizer.json").is_file() else {}
    model = content.get("model") or {}
    pre = _pre_tokenizer(content)
    if model.get("type") != "BPE" or model.get("byte_fallback") or pre is None or content.get("normalizer"):
        raise InputError(_HERE.format(_reason(content), ", ".join(["gpt-2", *_SPLITS.values()])))
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [_UNUSED] * vocabulary
    for token, number in model["vocab"].items():
        tokens[number], kinds[number] = token, _NORMAL
    for added in content.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    _special(writer, folder, content, config)


def _pre_tokenizer(content: dict[str, Any]) -> str | None:
    """The name that llama.cpp knows the splitting by, None for one that it does not know from here."""
    found = content.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex") and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex"):
        return _SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""))
    return None


def _reason(content: dict[str, Any]) -> str:
    if not content:
        return "there is none"
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return f"its model is {model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}"
    return "it has a normalizer" if content.get("normalizer") else "its pre-tokenizer is not known"


def _special(writer: Any, folder: Path, content: dict[str, Any], config: Any) -> None:
    """Ids of special tokens, whether texts begin with one, and the chat template."""
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json", foreign=True)
    for name in ("bos", "eos", "pad"):
        number = getattr(config, f"{name}_token_id", None)
        number = number[0] if isinstance(number, list) else number
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    single = (content.get("post_processor") or {}).get("single") or []
    writer.add_add_bos_token(bool(single) and "SpecialToken" in single[0])
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)
