"""Files that travel with a model beside its weights, by their names, and the bytes that they take in an export.

Nothing here imports torch or transformers: allocate counts these bytes where a size of the whole is asked for.
The list names what is taken, not what is left: the folder of a fine-tuned model also holds its training data, logs
and optimizer, which nobody asked to publish.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

from mc_cli.artifacts.fields import read_as, reading
from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.names import POINTER
from mc_cli.parts import ModelInventory, Role
from mc_cli.settings.engines import ENGINES

# Patterns of names in the model's folder, and of paths below it.
MODEL_FILES = (
    "generation_config.json",
    "tokenizer*",
    "tokenization*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "tekken*.json",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "normalizer.json",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates/*.jinja",  # the only folder
    "*processor*.json",
    "processing*.py",
    "*_processing*.py",
    "*_parser*.py",
    "SYSTEM_PROMPT*",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
_NEVER = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.pkl", "*.partial")
_CONFIG = "config.json"
# At most: the model card and the record of the export (12 KB for the bundled model, of which the settings of all stages
# are most), the loader's few lines, and what config.json gets beside the layout.
_WRITTEN = 24 << 10
_LAYER, _MATRIX, _UNIT, _LINEAR = 200, 80, 16, 24  # bytes in the layout: of a layer, a projection, an expert, a linear
# Bytes in a GGUF file: of a text, its length, its kind, its score and the name that an unused id has; between tensors;
# of what is said of the model.
_TEXT, _GAP, _FACTS = 32, 32, 4 << 10
_SHARDED = 1 << 30  # bytes from which on an index names every tensor's file
_INDEXED, _PARTS = 64, 3  # bytes of such an entry beside the name; tensors that a packed matrix has at most


def companion_files(folder: Path, *, own_code: bool) -> list[Path]:
    """The files beside config.json and the weights that belong to the model in a folder; all of its code if asked."""
    patterns = (*MODEL_FILES, "*.py") if own_code else MODEL_FILES
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()})
    return [path for path in found if not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NEVER)]


def directory_bytes(folder: Path, inventory: ModelInventory, engine: str | None = None) -> int:
    """The bytes, at most, of everything that an export holds beside its weights: what travels, and what is written.

    folder   of the original model; code of its own is counted where config.json names some
    engine   in whose format it is written: GGUF files hold the tokenizer, too, others more of each matrix
    """
    config = folder / _CONFIG
    own_code = config.is_file() and b'"auto_map"' in config.read_bytes()
    travelling = sum(path.stat().st_size for path in companion_files(folder, own_code=own_code))
    native = 2 * config.stat().st_size if config.is_file() else 0  # written anew, with entries of transformers' own
    written = _layout_bytes(inventory) + _index_bytes(inventory) + _WRITTEN
    return travelling + native + written + _format_bytes(folder, inventory, engine)


def noted_folder(work_dir: Path) -> Path | None:
    """The folder of the model that calibrate noted; None where nothing was noted, or it is there no longer."""
    path = work_dir / POINTER
    if not path.exists():
        return None
    with reading(path, "a note of the model's place", "Run calibrate again with --model."):
        folder = Path(read_as(str, read_json(path).get("folder"), "folder"))
    return folder if (folder / _CONFIG).is_file() else None


def _format_bytes(folder: Path, inventory: ModelInventory, engine: str | None) -> int:
    """Counts the bytes of an engine's format beside what is packed: experts have at most 4 bits, the rest has 8."""
    if engine is None:
        return 0
    found = ENGINES[engine]
    total = _inside_gguf(folder, inventory) if found.format == "gguf" else 0
    for block in inventory.expert_blocks:
        for part in block.projections:
            pieces = 2 if part.name == "gate_up_proj" else 1  # gate and up by themselves
            total += block.num_experts * pieces * found.more_bytes(part.out_features // pieces, part.in_features, 4)
    for tensor in inventory.tensors:
        if tensor.packable and tensor.role not in (Role.EXPERT, *found.kept):
            total += found.more_bytes(tensor.shape[-2], tensor.shape[-1], 8)
    return total


def _inside_gguf(folder: Path, inventory: ModelInventory) -> int:
    """Counts the bytes of a GGUF file beside tensors: texts with their lengths, kinds of tokens, a template, gaps."""
    path = folder / "tokenizer.json"
    content = read_json(path, foreign=True) if path.is_file() else {}
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    texts = [*(model.get("vocab") or ()), *(added.get("content") for added in content.get("added_tokens") or ())]
    merges = ["".join(pair) if isinstance(pair, list) else pair for pair in model.get("merges") or ()]
    held = sum(len(str(text).encode()) for text in texts) + sum(len(str(pair).encode()) + 1 for pair in merges)
    vocabulary = max((part.shape[0] for part in inventory.tensors if part.role is Role.EMBEDDING), default=0)
    templates = (each for pattern in ("tokenizer_config.json", "*.jinja") for each in folder.glob(pattern))
    held += sum(each.stat().st_size for each in templates) + _GAP * len(inventory.tensors)
    return held + _TEXT * (max(vocabulary, len(texts)) + len(merges)) + _FACTS


def _layout_bytes(inventory: ModelInventory) -> int:
    """The layout in config.json, which says the width of every expert, projection and linear."""
    total = 0
    for block in inventory.expert_blocks:
        total += _LAYER + len(block.path)
        total += len(block.projections) * (_MATRIX + block.num_experts * _UNIT)
    return total + sum(len(part.name) + _LINEAR for part in inventory.tensors if part.packable)


def _index_bytes(inventory: ModelInventory) -> int:
    """The index of a model in several files; nothing for one that is written as one file."""
    if sum(inventory.bytes_by_role().values()) < _SHARDED:
        return 0
    return sum(_PARTS * (len(part.name) + _INDEXED) for part in inventory.tensors)
