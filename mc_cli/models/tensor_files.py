"""A checkpoint's tensors as they lie in safetensors files: listed from the headers, read one by one.

Tensors of quantized checkpoints (mc_cli/sources/) appear as the tensor that they stand for and become values when read.
transformers' own FP8 dequantizer is not used: it divides the columns by the number of scales instead of using the
format's block size, which is wrong wherever a block is cut at the edge, such as the 576 rows of DeepSeek-V3's
kv_a_proj_with_mqa in blocks of 128.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mc_cli.artifacts.places import file_inside
from mc_cli.errors import CheckpointError, few, listed
from mc_cli.models.model_folder import read_model_json
from mc_cli.sources import layouts_of
from mc_cli.sources.folding import Folding, fold
from mc_cli.sources.layout import CODES, DecodedSlice, Header

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"
# Entries of quantization_config that say how weights are stored, as far as one line of a message can hold them.
_SETTINGS = ("quant_method", "weight_block_size", "expert_dtype", "format", "quant_algo")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFiles:
    """The tensors of a folder of safetensors files, by key.

    quantization  config.json's entry quantization_config as a dictionary, None for plain checkpoints
    named         config.json's entry transformers_weights: the file that holds the weights
    said          the files that are read, in words
    not_read      weight files that lie beside those that are read
    Raises CheckpointError where files or tensors are missing or damaged, or the format is not one that can be read.
    """

    def __init__(self, folder: Path, quantization: dict[str, Any] | None, *, named: object = None) -> None:
        self.folder = folder
        self.on_open: Callable[[str], None] = lambda name: None  # told the name of each file that is opened for reading
        layouts = layouts_of(folder, quantization)
        files = weight_files(folder, named)
        self.not_read = files.beside
        self.said = files.names[0] if files.placed is None else f"the {len(files.names)} files of the index"
        headers = _headers(folder, files)
        with ExitStack() as stack:
            found = fold(headers, layouts, _small_reader(folder, headers, stack))
        _check_whole(folder, found, quantization)
        self.tensors = found.tensors

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def ways(self) -> dict[str, int]:
        """How tensors are stored that are not plain -> how many are, the most frequent first."""
        counts = Counter(tensor.layout.name for tensor in self.tensors.values() if tensor.layout is not None)
        return dict(counts.most_common())

    @contextmanager
    def reading(self, keys: Iterable[str], dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[dict[str, Any]]:
        """Opens the files of `keys`: key -> an object whose `[...]` reads the tensor. Valid inside the context.

        dtypes   of stacks of matrices that are stored in codes, float32 where none is given; single ones are decoded to
                 float32, and plain tensors come as they are stored
        """
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            slices: dict[str, Any] = {}
            for key in keys:
                tensor = self.tensors[key]
                pieces = {}
                for name, part in tensor.parts.items():
                    if part.file not in handles:
                        self.on_open(part.file)
                        handles[part.file] = stack.enter_context(_open(self.folder / part.file))
                    pieces[name] = handles[part.file].get_slice(part.key)
                wanted = (dtypes or {}).get(key, torch.float32)
                slices[key] = pieces[CODES] if tensor.layout is None else DecodedSlice(tensor, pieces, wanted)
            yield slices


def _check_whole(folder: Path, found: Folding, quantization: dict[str, Any] | None) -> None:
    """Raises CheckpointError for codes without scales, scales without codes, and parts that do not fit each other."""
    settings = {name: value for name, value in (quantization or {}).items() if name in _SETTINGS}
    for wrong, what in (
        (found.misfits, "quantized tensors are not whole, or do not fit quantization_config"),
        (found.alone, "quantized tensors without scales of a format that is known"),
        (found.widowed, "scales belong to no quantized tensor"),
        (found.strange, "tensors beside quantized ones are of a kind that is not known"),
    ):
        if wrong:
            raise CheckpointError(
                f"{folder}: {len(wrong)} {what}:\n{listed(wrong)}\nquantization_config in config.json "
                f"{f'has {settings}' if quantization else 'is not there'}. Download the checkpoint again, or give the "
                "original 16-bit model."
            )


def _small_reader(folder: Path, headers: dict[str, Header], stack: ExitStack) -> Callable[[str], torch.Tensor]:
    """Key -> the whole tensor; files stay open until the stack is left, since there may be many to ask for."""
    handles: dict[str, Any] = {}

    def read(key: str) -> torch.Tensor:
        name = headers[key].file
        if name not in handles:
            handles[name] = stack.enter_context(_open(folder / name))
        tensor: torch.Tensor = handles[name].get_tensor(key)
        return tensor

    return read


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a folder that hold its model, as transformers chooses among them.

    names   the files, relative to the folder
    placed  tensor -> file of the index, where there is one
    beside  weight files that are not read
    """

    names: tuple[str, ...]
    placed: dict[str, str] | None
    beside: tuple[str, ...]


def weight_files(folder: Path, named: object = None) -> WeightFiles:
    """The files that transformers reads: the named one, else model.safetensors, else those of its index.

    named  config.json's entry transformers_weights
    Raises CheckpointError where there is none of them, InputError for one that lies outside the folder.
    """
    if named is not None and not (isinstance(named, str) and named.endswith((".safetensors", INDEX_SUFFIX))):
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers_weights is {named!r:.80}, which names neither a *.safetensors "
            "file nor a *.safetensors.index.json. Remove the entry, or name the file that holds the weights."
        )
    for name in (SINGLE, INDEX) if named is None else (named,):
        if not file_inside(folder, name).is_file():
            continue
        if not name.endswith(INDEX_SUFFIX):
            return WeightFiles((name,), None, _beside(folder, {name}))
        placed = _read_index(folder, name)
        names = set(placed.values())
        return WeightFiles(tuple(sorted(names)), placed, _beside(folder, {*names, name}))
    raise _no_weights(folder, named)


def _beside(folder: Path, read: set[str]) -> tuple[str, ...]:
    """Weight files and indexes of the folder that are not read, the publisher's own second copies left out."""
    found = {path.name for pattern in ("*.safetensors", f"*{INDEX_SUFFIX}") for path in folder.glob(pattern)}
    return tuple(sorted(name for name in found - read if not name.startswith(("consolidated", "adapter_"))))


def _no_weights(folder: Path, named: object) -> CheckpointError:
    if named is not None:
        return CheckpointError(
            f"{folder} has no {named}, which config.json names as its weights (transformers_weights). Download it, or "
            "remove the entry."
        )
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt")
    others = sorted(path.name for path in folder.glob("*") if path.suffix in kinds)
    pickled = any(not name.endswith((".safetensors", ".gguf")) for name in others)
    tensors = [name for name in others if name.endswith(".safetensors")]
    held = ""
    if tensors:
        keys = _keys_of(folder, tensors[0])
        held = f" {tensors[0]} holds {len(keys):,} tensors, {', '.join(keys[:3])} for example."
    return CheckpointError(
        f"{folder} has no {SINGLE} and no {INDEX}, the files that transformers reads weights from"
        + (f", only {few(others, 5)}.{held} " if others else ". ")
        + (
            "Pickled weights are never read: convert them to safetensors first."
            if pickled
            else "Download the index too, or give the file that holds the model this name."
            if tensors
            else "Download the weights."
        )
    )


def _keys_of(folder: Path, name: str) -> list[str]:
    with _open(file_inside(folder, name)) as handle:
        return sorted(handle.keys())


def _headers(folder: Path, files: WeightFiles) -> dict[str, Header]:
    """Every tensor in the files, as their headers describe it."""
    tensors: dict[str, Header] = {}
    unknown, twice = [], []
    for name in files.names:
        with _open(file_inside(folder, name)) as handle:
            for key in handle.keys():  # noqa: SIM118 a handle is no mapping
                stored = handle.get_slice(key)
                if (format := stored.get_dtype()) not in _DTYPES:
                    unknown.append(f"{key}: {format}")
                    continue
                if key in tensors:
                    twice.append(f"{key}: in {tensors[key].file} and {name}")
                tensors[key] = Header(key, tuple(stored.get_shape()), _DTYPES[format], name)
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} tensors have a data type that is not read here:\n{listed(unknown)}\n"
            "Give the original 16- or 32-bit model."
        )
    if twice:
        raise CheckpointError(
            f"{folder}: {len(twice)} tensors are in two of the files that its index names, and may differ:\n"
            f"{listed(twice)}\nKeep the files of one checkpoint, with its index."
        )
    lost = [
        f"{key} in {file}"
        for key, file in sorted((files.placed or {}).items())
        if key not in tensors or tensors[key].file != file
    ]
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} tensors are not in the files where the index places them:\n{listed(lost)}\n"
            f"These files hold {len(tensors):,} tensors, {', '.join(sorted(tensors)[:3])} for example. Index and files "
            "are of different checkpoints: download these files again, or the index."
        )
    return tensors


def _read_index(folder: Path, name: str) -> dict[str, str]:
    index = folder / name
    placed = read_model_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(
            f"{index} is damaged: its weight_map does not name a file for each tensor. Download it again."
        )
    missing = sorted(file for file in set(placed.values()) if not file_inside(folder, file).is_file())
    if missing:
        there = [name for name in _beside(folder, {name, *placed.values()}) if name.endswith(".safetensors")]
        raise CheckpointError(
            f"{folder}: {name} names {len(missing)} files that are not there:\n{listed(missing)}\n"
            + (f"There are {len(there)} others: {', '.join(there[:5])}. " if there else "")
            + "The download is incomplete, or the index is left from another checkpoint; fetch the files, or the index."
        )
    return placed


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a whole safetensors file: {error}. The download may be truncated; fetch "
            "the file again."
        ) from error
