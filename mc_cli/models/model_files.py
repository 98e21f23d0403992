"""Files of a checkpoint beside its weights, which travel with every result: tokenizer, licence, config, ..."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from mc_cli.artifacts.files import copy_file, read_json, write_json
from mc_cli.artifacts.front_matter import CARD, front_matter
from mc_cli.artifacts.places import require_inside
from mc_cli.errors import FamilyError, InputError, listed
from mc_cli.families import in_transformers
from mc_cli.models.companions import MODEL_FILES, companion_files
from mc_cli.models.model_class import model_class

_TOLD_ON = ("license", "license_name", "license_link", "language")  # entries of it that hold for the result too
# A download from the hub takes all of that, the files that mc-cli itself reads, and the model's own code.
DOWNLOADED = (*MODEL_FILES, "*.json", "*.safetensors", "*.txt", "*.py", CARD)
_TEMPLATES = "additional_chat_templates"


def _other_folders(name: str) -> Iterator[str]:
    """fnmatch patterns of what lies in any folder but `name`; fnmatch has no "but", and its * runs over slashes."""
    for place, letter in enumerate(name):
        yield f"{name[:place]}[!{letter}]*/*"
        yield f"{name[: place + 1]}/*" if place + 1 < len(name) else f"{name}?*/*"


# Folders and `consolidated` files hold a second copy of the weights in the publisher's own layout.
NOT_DOWNLOADED = ("consolidated*", *_other_folders(_TEMPLATES))
# These entries of config.json describe the original's weights and the code that reads their files.
_OF_THE_ORIGINAL = ("quantization_config", "transformers_weights", "auto_map")
# Pickles of protocol 2 to 5, and the archives that torch.save makes of them.
_PICKLED = (*(b"\x80" + bytes([protocol]) for protocol in range(2, 6)), b"PK\x03\x04")
_PREDICTION = re.compile(r"(^|_)(nextn|mtp)(_|$)")  # layers of multi-token prediction, in the names of config entries
_OF_ALL = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")


def original_card(folder: Path | None) -> dict[str, Any]:
    """Reads licence and languages from the front matter of an original's README.md; empty where it has none."""
    known = {} if folder is None else front_matter(folder)
    return {name: known[name] for name in _TOLD_ON if isinstance(known.get(name), str | list)}


def copy_model_files(source_folder: Path, target_folder: Path) -> None:
    """Copies tokenizer, template, processor and licence files, and config.json as `plain_config` mends it.

    A model whose architecture is not part of transformers keeps its own code.
    Raises InputError for pickled files, links out of the folder, and what is no ordinary file.
    """
    target_folder.mkdir(parents=True, exist_ok=True)
    config = read_json(source_folder / "config.json", foreign=True)
    for path in model_files(source_folder, own_code=has_own_code(config)):
        target = target_folder / path.relative_to(source_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, target)
    write_json(target_folder / "config.json", plain_config(config))


def model_files(folder: Path, *, own_code: bool) -> list[Path]:
    """The files of a model's folder that belong to it beside config.json and its weights; all of its code if asked.

    Raises InputError for pickled files, links out of the folder, and what is no ordinary file.
    """
    taken = companion_files(folder, own_code=own_code)
    for path in taken:
        require_inside(folder, path)
    pickled = [str(path) for path in taken if _begins_like_a_pickle(path)]
    if pickled:
        raise InputError(
            f"{folder}: {len(pickled)} files that belong to the tokenizer are pickled, and running code hides in such "
            f"files:\n{listed(pickled)}\nSave the tokenizer again with `save_pretrained`, or remove them."
        )
    return taken


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Whether a model with this config.json is an architecture that transformers does not have."""
    return config.get("model_type") not in CONFIG_MAPPING


def _begins_like_a_pickle(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4).startswith(_PICKLED)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a result, from the original's: it names the class that has its tensors, and counts no others.

    Left out are entries that describe the original's weights, parts for images or sound where the causal language
    model is one part of such a model, and layers of multi-token prediction, which that class does not have.
    """
    config = in_transformers(config)
    if has_own_code(config):
        return _without_prediction(_without(config, _OF_THE_ORIGINAL[:-1]))
    plain = _of_the_class(_without(config, _OF_THE_ORIGINAL))
    kind = CONFIG_MAPPING[plain["model_type"]]
    by_default = {name: value for name, value in _from_json(kind, plain).to_dict().items() if _counts(name, value)}
    return _without_prediction({**plain, **dict.fromkeys(by_default, 0)})


def _of_the_class(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the architecture that it is loaded as, in that class's own kind of config."""
    read: Any = _from_json(CONFIG_MAPPING[config["model_type"]], config)
    try:
        found = model_class(read)
    except FamilyError:
        return config
    name = found.kind.__name__
    if found.whole:
        named = config.get("architectures") or ()
        return config if name in named else {**config, "architectures": [name]}
    plain = json.loads(read.get_text_config().to_json_string(use_diff=True))
    beside = {entry: config[entry] for entry in _OF_ALL if plain.get(entry) is None and config.get(entry) is not None}
    return {**plain, **beside, "architectures": [name]}


def _from_json(kind: Any, config: Mapping[str, Any]) -> Any:
    copied = json.loads(json.dumps(config))  # some config classes change what they are given
    return kind.from_dict(kind._decode_special_floats(copied))  # infinity, as transformers writes it


def _without_prediction(config: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {name: 0 if _counts(name, value) else value for name, value in config.items()}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = _without_prediction(plain["text_config"])
    return plain


def with_counts_of(plain: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """`plain` with the numbers of layers of multi-token prediction that the original's config.json has."""
    found = {**plain, **{name: value for name, value in original.items() if _counts(name, value)}}
    inner, outer = found.get("text_config"), original.get("text_config")
    if isinstance(inner, dict) and isinstance(outer, dict):
        found["text_config"] = with_counts_of(inner, outer)
    return found


def _counts(name: str, value: object) -> bool:
    """Whether a config entry is a number of layers of multi-token prediction."""
    return type(value) is int and value > 0 and _PREDICTION.search(name) is not None


def _without(config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in names}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = _without(kept["text_config"], names)
    return kept


def kinds_of(names: list[str]) -> Iterator[str]:
    """Tensor names by what they begin with, such as `model.layers.61` or `mtp`, each with its count."""
    counts: dict[str, int] = {}
    for name in names:
        pieces = name.split(".")
        depth = 3 if pieces[2:3] and pieces[2].isdigit() else 2 if pieces[0] == "model" else 1
        kind = ".".join(pieces[:depth])
        counts[kind] = counts.get(kind, 0) + 1
    for kind, count in counts.items():
        yield f"{kind}.* ({count})"
