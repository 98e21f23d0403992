"""Changes that may give another result without being an error, and why. All others that do are failing trials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Justified:
    """Changes of these fields (shell patterns) in these files, in trials of these groups, may change the result."""

    groups: tuple[str, ...]
    files: tuple[str, ...]
    fields: tuple[str, ...]
    reason: str


_ANY = ("*",)
JUSTIFIED = (
    Justified(
        ("input",),
        ("model/config.json", "model/generation_config.json", "model/tokenizer.json", "model/tokenizer_config.json"),
        _ANY,
        "the user's own statement of what the model is: read for the first time, there is nothing to compare it with",
    ),
    Justified(
        ("input",),
        ("model/model.safetensors",),
        ("data.*", "floats.*", "header.__metadata__", "header.more", "(no field)"),
        "other finite weights are another model, the same 16 bits as another float, too; names and shapes are checked",
    ),
    Justified(
        ("input", "held-out text"),
        ("cal.*", "held.jsonl", "recipe.yaml"),
        _ANY,
        "other text, read for the first time; its digest goes into the manifest",
    ),
    Justified(("plan",), ("plan.yaml",), _ANY, "a plan of the user's own, with --plan: made to be edited by hand"),
    Justified(("recipe",), ("recipe.yaml",), _ANY, "the user's own recipe: other settings are another run"),
    Justified(
        ("export",),
        ("o/model.safetensors", "d/model.safetensors"),
        ("data.*", "floats.*weight", "header.__metadata__", "(no field)"),
        "loading hashes no weights, as with any checkpoint (`status --verify` does); names, shapes, dtypes are checked",
    ),
    Justified(
        ("export",),
        ("o/model.gguf",),
        ("(bytes)",),
        "a GGUF file is llama.cpp's to load, which hashes no weights either; `status --verify` reports it",
    ),
    Justified(
        ("export",),
        ("d/model.safetensors",),
        ("data.*", "gone.*"),
        "a dense export is transformers' to load, which warns of tensors that are gone; `status --verify` reports it",
    ),
    Justified(
        ("export",),
        ("o/config.json",),
        ("[!q]*", "(no field)"),  # all but quantization_config
        "what the model is: users change it; what does not fit the tensors is found, `status --verify` reports it all",
    ),
    Justified(
        ("export",),
        ("[od]/generation_config.json", "[od]/tokenizer.json", "[od]/tokenizer_config.json", "d/config.json"),
        _ANY,
        "how transformers is told to load and to generate: users change these; `status --verify` reports it",
    ),
)


def justification(group: str, name: str, fields: Iterable[str]) -> str:
    """The reason why another result is in order after these fields of a file were changed, or nothing."""
    for entry in JUSTIFIED:
        if group in entry.groups and _matches(name, entry.files) and all(_matches(one, entry.fields) for one in fields):
            return entry.reason
    return ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
