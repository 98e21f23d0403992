"""The vocabulary of a model as GGUF holds it: BPE over bytes, by llama.cpp's name of its splitting, or SentencePiece's.

tokenizer.json alone is read. Its parts are compared with what llama.cpp computes; what differs is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import read_json
from mc_cli.errors import InputError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"  # how SentencePiece writes a space
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START, _SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT_4O = (
    f"{_START}*{_SMALL}+{_CONTRACTIONS}?|{_START}+{_SMALL}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# (patterns as tokenizer.json has them, whether words that are tokens are taken whole) -> llama.cpp's name
_SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_CONTRACTIONS + _WORDS.replace("{1,3}", ""),), False): "qwen2",
    ((_CONTRACTIONS + _WORDS,), True): "llama-bpe",
    ((_CONTRACTIONS + _WORDS,), False): "chatglm-bpe",
    ((_GPT_4O,), False): "gpt-4o",
    (_DEEPSEEK_3, False): "deepseek-v3",
}
_HERE = (
    "tokenizer.json cannot be written as GGUF: {}. Byte-level BPE with the pre-tokenizer of gpt-2, {}, and "
    "SentencePiece's BPE can. Choose another --format, or convert the dense export by llama.cpp's own script."
)


@dataclass(frozen=True)
class _Kind:
    """One kind of vocabulary, as it is written.

    name     of the model in llama.cpp;  pre   its name for the splitting of bytes
    tokens   text -> id;  scores   by id, where llama.cpp goes by them;  merges   where it goes by these
    prefix   whether a text begins with a space that is put there; None for bytes
    """

    name: str
    tokens: Mapping[str, int]
    pre: str = "default"
    scores: Mapping[int, float] | None = None
    merges: Sequence[str] | None = None
    prefix: bool | None = None
    unknown: int | None = None


def write_tokenizer(writer: Any, folder: Path, *, vocabulary: int, config: Any) -> None:
    """The tokenizer of `folder`. Raises InputError, saying what of it has no counterpart.

    vocabulary   rows of the embedding: ids that no token has are written as unused
    """
    content = read_json(folder / "tokenizer.json", foreign=True) if (folder / "tokenizer.json").is_file() else {}
    kind = _kind(content)
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [_UNUSED] * vocabulary
    for token, number in kind.tokens.items():
        is_byte = kind.prefix is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[number], kinds[number] = token, _BYTE if is_byte else _NORMAL
    for added in content.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if kind.unknown is not None:
        kinds[kind.unknown] = _UNKNOWN
    writer.add_tokenizer_model(kind.name)
    writer.add_tokenizer_pre(kind.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if kind.merges is not None:
        writer.add_token_merges(list(kind.merges))
    if kind.scores is not None:
        lowest = min(kind.scores.values(), default=0.0)
        writer.add_token_scores([kind.scores.get(number, lowest) for number in range(vocabulary)])
    if kind.prefix is not None:
        writer.add_add_space_prefix(kind.prefix)
        writer.add_remove_extra_whitespaces(False)
    if kind.unknown is not None:
        writer.add_unk_token_id(kind.unknown)
    _special(writer, folder, content, config)


def _kind(content: dict[str, Any]) -> _Kind:
    model = content.get("model") or {}
    if not content:
        raise _refusal("there is none")
    if model.get("type") != "BPE":
        raise _refusal(f"its model is {model.get('type')}")
    return _sentencepiece_bpe(content, model) if model.get("byte_fallback") else _byte_level(content, model)


def _refusal(reason: str) -> InputError:
    return InputError(_HERE.format(reason, ", ".join(sorted(_SPLITS.values()))))


# Bytes


def _byte_level(content: dict[str, Any], model: Mapping[str, Any]) -> _Kind:
    if content.get("normalizer"):
        raise _refusal("it has a normalizer")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    whole = bool(model.get("ignore_merges"))
    for taken_whole in (whole, not whole):
        pre = _pre_tokenizer(content, whole=taken_whole)
        if pre is not None and (taken_whole == whole or _merges_reach(model["vocab"], merges)):
            return _Kind("gpt2", model["vocab"], pre=pre, merges=merges)
    raise _refusal("its pre-tokenizer is not known")


def _pre_tokenizer(content: dict[str, Any], *, whole: bool) -> str | None:
    """The name that llama.cpp knows the splitting by, None for one that it does not know from here."""
    found = content.get("pre_tokenizer") or {}
    *splits, last = found.get("pretokenizers", [found])
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not splits:
        return "gpt-2" if last.get("use_regex") and not whole else None
    if last.get("use_regex") or not all(map(_keeps_all, splits)):
        return None
    patterns = tuple((step.get("pattern") or {}).get("Regex", "") for step in splits)
    return _SPLITS.get((patterns, whole))


def _keeps_all(step: Mapping[str, Any]) -> bool:
    """Whether a step splits text at matches and keeps every piece; "Removed", inverted, is what Isolated is here."""
    isolates = step.get("behavior") == "Isolated" and not step.get("invert")
    return step.get("type") == "Split" and (
        isolates or (step.get("behavior") == "Removed" and bool(step.get("invert")))
    )


def _merges_reach(vocabulary: Mapping[str, int], merges: Sequence[str]) -> bool:
    """Whether merging gives every token as one, so that taking words whole that are tokens changes nothing."""
    ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(merges)}
    return all(len(_merged(token, ranks)) == 1 for token in vocabulary)


def _merged(text: str, ranks: Mapping[tuple[str, ...], int]) -> list[str]:
    pieces = list(text)
    while len(pieces) > 1:
        best = min(range(len(pieces) - 1), key=lambda at: ranks.get((pieces[at], pieces[at + 1]), len(ranks)))
        if (pieces[best], pieces[best + 1]) not in ranks:
            break
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
    return pieces


# SentencePiece


def _sentencepiece_bpe(content: dict[str, Any], model: Mapping[str, Any]) -> _Kind:
    """BPE over characters with bytes for the rest: llama.cpp joins what gives the token of the highest score."""
    vocabulary: Mapping[str, int] = model["vocab"]
    prefix = _spaces(content)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    made: dict[str, int] = {}  # token -> rank of the first merge that gives it
    for rank, (left, right) in enumerate(merges):
        made.setdefault(left + right, rank)
    first = [made[left + right] for left, right in merges]
    known = set(merges)
    lacking = [
        token
        for token in vocabulary.keys() - {added["content"] for added in content.get("added_tokens", ())}
        if any(pair not in known and all(part in vocabulary for part in pair) for pair in _pairs(token))
    ]
    if lacking or first != sorted(first):
        raise _refusal(
            "its merges are not those of a SentencePiece model"
            + (f", which gives {min(lacking)!r} by any two tokens that it consists of" if lacking else "")
        )
    unknown = vocabulary.get(model.get("unk_token") or "")
    scores = {vocabulary[token]: -float(rank) for token, rank in made.items()}
    return _Kind("llama", vocabulary, scores=scores, prefix=prefix, unknown=unknown)


def _pairs(token: str) -> Iterator[tuple[str, str]]:
    return ((token[:at], token[at:]) for at in range(1, len(token)))


def _spaces(content: dict[str, Any]) -> bool:
    """Whether a space is put before every text, of a tokenizer whose spaces are SentencePiece's."""
    steps = [*_steps(content.get("normalizer"), "normalizers"), *_steps(content.get("pre_tokenizer"), "pretokenizers")]
    prefix, replaced = False, False
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == _SPACE and not replaced:
            prefix = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == _SPACE:
            replaced = True
        elif kind == "Metaspace" and step.get("prepend_scheme") == "never":
            replaced = step.get("replacement") == _SPACE
        elif kind == "Metaspace":
            raise _refusal("its Metaspace puts a space before a text unless it begins with one, llama.cpp always")
        else:
            raise _refusal(f"its step {kind} has no counterpart")
    if not replaced:
        raise _refusal("its spaces are not SentencePiece's")
    return prefix


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    return [] if not part else list(part.get(name, [part]))


def _special(writer: Any, folder: Path, content: dict[str, Any], config: Any) -> None:
    """Ids of special tokens, what a text begins and ends with, and the chat template."""
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
    writer.add_add_eos_token(len(single) > 1 and "SpecialToken" in single[-1])
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)
