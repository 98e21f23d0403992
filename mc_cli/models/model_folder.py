"""The configuration of a model folder and the files that are read with it, with errors that say what is wrong."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from mc_cli.artifacts.places import require_inside, require_ordinary
from mc_cli.errors import CheckpointError, FamilyError, InputError, first_line, listed, shown
from mc_cli.families import CONTRACT_TESTED, in_transformers

LEAST_TRANSFORMERS, BELOW_TRANSFORMERS = (5, 16, 1), (5, 24)  # as pyproject.toml has it
# Files of a model that are read, here or by transformers.
_READ = (".json", ".safetensors", ".model", ".tiktoken", ".txt", ".py", ".jinja", ".spm", ".bpe")
_LARGEST_JSON, _LARGEST_INDEX = 64 << 20, 256 << 20
_LARGEST_CONFIG = 8 << 20
_LIMITS = ((r"layers?$|^depth$|^num_labels$", 1 << 14), (r"experts?$|^experts_per_", 1 << 20))
_LARGEST_NUMBER = 1 << 62
_TOKENS_AT_MOST = 1 << 31
_MOST_ENTRIES = 1 << 15  # config classes copy all of them several times
_ENDLESS = re.compile(r"limit|clamp|clip|max|range")  # entries that may be infinite, such as a limit of time steps
SUPPORTED = f"Contract-tested families: {', '.join(CONTRACT_TESTED)}."


def check_transformers_version() -> None:
    """Raises InputError for a transformers release whose experts internals this version was not tested with.

    Stages want one release alone, which mc_cli/chain.py checks.
    """
    found = tuple(int(number) for number in re.findall(r"\d+", transformers.__version__)[:3])
    if not LEAST_TRANSFORMERS <= found < BELOW_TRANSFORMERS:
        least, below = (".".join(map(str, each)) for each in (LEAST_TRANSFORMERS, BELOW_TRANSFORMERS))
        raise InputError(
            f"transformers {transformers.__version__} is installed; models are read through internals of transformers, "
            f"of {least} and later ones before {below}. Run `pip install 'transformers>={least},<{below}'`."
        )


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration. Raises CheckpointError, InputError or FamilyError saying what is wrong with it.

    Code that comes with a model is run only where it is trusted and transformers has none for this model_type.
    """
    check_transformers_version()
    path = folder / "config.json"
    raw = _read_config_json(folder, path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} names no model_type: it is not the configuration of a transformers model.")
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise CheckpointError(
            f"{path}: architectures is {shown(named, 80)}, not a list of class names. Download it again."
        )
    known = in_transformers(raw)
    if known["model_type"] != model_type:
        return _read_as(known, folder, path)
    code = raw.get("auto_map") or {}
    if not isinstance(code, dict):
        raise CheckpointError(f"{path}: auto_map is {code!r:.80}, not an object of class names. Download it again.")
    if model_type not in CONFIG_MAPPING and "AutoConfig" not in code:
        told = f"{path}: transformers {transformers.__version__} knows no model_type {model_type!r:.80}"
        raise FamilyError(told + (_text_part(raw) or _near(model_type)) + SUPPORTED)
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise FamilyError(
            f"{path}: model_type {model_type!r:.80} comes with Python code of its own, which is run only with "
            f"--trust-remote-code. {SUPPORTED}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model_type not in CONFIG_MAPPING)
        text = config.get_text_config()
    except Exception as error:  # validation raises many types, custom code any
        raise CheckpointError(f"{path} (model_type {model_type!r}) cannot be used: {first_line(error)}") from error
    return _checked(config, text, path)


def _read_as(raw: dict[str, Any], folder: Path, path: Path) -> PretrainedConfig:
    """The configuration of a family that transformers has under another name."""
    kind = CONFIG_MAPPING[raw["model_type"]]
    try:
        config = kind.from_dict(kind._decode_special_floats(raw))
    except Exception as error:  # as above
        raise CheckpointError(f"{path} cannot be read as {raw['model_type']!r}: {first_line(error)}") from error
    config.name_or_path = str(folder)
    return _checked(config, config.get_text_config(), path)


def _checked(config: PretrainedConfig, text: object, path: Path) -> PretrainedConfig:
    if not isinstance(text, PretrainedConfig):
        raise CheckpointError(
            f"{path}: text_config is {text!r:.80}, not the configuration of a model. Download it again."
        )
    _check_dtype(path, text)
    return config


def _check_dtype(path: Path, config: Any) -> None:
    """Raises CheckpointError where the dtype that weights have by default is none that weights can have."""
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise CheckpointError(
            f"{path}: dtype is {str(dtype)!r:.80}, which is no type of weights such as bfloat16. Download it again."
        )


def _near(model_type: str) -> str:
    near = difflib.get_close_matches(model_type, CONFIG_MAPPING, n=1)
    return f"; did you mean {near[0]!r}? " if near else ". "


def _text_part(raw: Mapping[str, Any]) -> str:
    """The way to the text part of a model that transformers does not know as a whole, as DeepSeek-VL2; "" without."""
    for entry in ("language_config", "text_config", "llm_config"):
        text = raw.get(entry)
        kind = text.get("model_type") if isinstance(text, dict) else None
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            return (
                f", but {kind!r}, of which its {entry} is. With the model's own Python code in the folder (auto_map), "
                f"give --trust-remote-code; else make a folder of the text part alone: {entry} as its config.json, and "
                "the tensors of that part under the names that its class has. "
            )
    return ""


def _read_config_json(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist. Give the folder of a Hugging Face checkpoint.")
    if not path.exists():
        raise CheckpointError(f"{folder} has no {path.name}: it is not a Hugging Face checkpoint.")
    check_files(folder)
    raw = read_model_json(path)
    count = sum(1 for _ in _entries(raw))
    if count > _MOST_ENTRIES:
        raise CheckpointError(
            f"{path} holds {count:,} entries, more than the {_MOST_ENTRIES:,} that the configuration of a model has. "
            "Download it again."
        )
    wrong = list(_unusable_numbers(raw))
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} entries are numbers that no model has:\n{listed(wrong)}\nDownload it again."
        )
    return raw


def config_file(config: Any) -> str:
    """The config.json that a config was read from, for messages."""
    folder = getattr(config, "name_or_path", "")
    return str(Path(folder) / "config.json") if isinstance(folder, str) and folder else "config.json"


def check_files(folder: Path) -> None:
    """Raises InputError for files of a model that are links out of its folder, pipes or devices.

    Raises CheckpointError for those of its tokenizer that are no JSON objects, or hold what loading would fail on.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ and not path.is_dir():
            require_inside(folder, path)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json"):
        if (folder / name).exists():
            read_model_json(folder / name)
    _check_token_ids(folder / "generation_config.json")
    path = folder / "tokenizer_config.json"
    limit = read_model_json(path).get("model_max_length") if path.exists() else None
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
        raise CheckpointError(f"{path}: model_max_length is {limit!r:.80}, not a number of tokens. Download it again.")


def _check_token_ids(path: Path) -> None:
    """Raises CheckpointError where generation_config.json names tokens by what is no number of one."""
    content = read_model_json(path) if path.exists() else {}
    wrong = [
        f"{name} is {shown(content[name])}"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        if not all(_is_token(each) for each in _as_list(content.get(name)))
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: {', '.join(wrong)}, and tokens are whole numbers. Mend it, or copy or download it again."
        )


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _TOKENS_AT_MOST


def read_model_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises CheckpointError where it is none, InputError for a pipe."""
    require_ordinary(path)
    size = path.stat().st_size
    limit = (
        _LARGEST_INDEX
        if path.name.endswith(".index.json")
        else _LARGEST_CONFIG
        if path.name == "config.json"
        else _LARGEST_JSON
    )
    if size > limit:
        raise CheckpointError(
            f"{path} has {size:,} bytes, more than the {limit:,} that such a file of a model has. Download it again."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise CheckpointError(f"{path} nests its brackets too deeply to be read. Download it again.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not an object. Download it again.")
    return raw


def _unusable_numbers(config: dict[str, Any]) -> Iterator[str]:
    """A line for each number in a config.json that is no number, or counts more than any model has.

    Config classes make a list with one entry per layer or label of what they read, before anything could be compared
    with the weights.
    """
    for where, value in _entries(config):
        leaf = where.rpartition(".")[2]
        if isinstance(value, float) and math.isnan(value):
            yield f"{where}: NaN"
        elif isinstance(value, float) and math.isinf(value) and not _ENDLESS.search(leaf):
            yield f"{where}: {value}"
        elif isinstance(value, int) and not isinstance(value, bool):
            limit = next((limit for pattern, limit in _LIMITS if re.search(pattern, leaf)), _LARGEST_NUMBER)
            if abs(value) > limit:
                yield f"{where}: {f'{value:,}' if abs(value) < 1 << 80 else 'a longer number'}, at most {limit:,}"


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """(place, value) of everything in a config.json that is no object or list, and of empty ones."""
    waiting: list[tuple[str, object]] = [("", config)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{where}.{name}" if where else str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list) and value:
            waiting += [(f"{where}[{place}]", inner) for place, inner in enumerate(value)]
        else:
            yield where, value
