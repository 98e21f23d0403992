"""The tensors of a packed model on disk: of stage quantize's folder, or of a directory exported for transformers.

Only headers are read until a tensor is asked for; tensors on the CPU stay memory-mapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.packed import CONFIG_FOLDER, LAYOUT, QUANT_METHODS, PackedLayout, naming, read_layout
from mc_cli.artifacts.places import file_inside, require_inside, require_ordinary
from mc_cli.errors import ArtifactError, InputError, listed, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PackedFiles:
    """The paths of a packed model's tensors, layout and config."""

    folder: Path
    config_folder: Path
    layout: PackedLayout
    tensors: Mapping[str, StoredTensor]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of each name, memory-mapped. Raises ArtifactError where a file has changed or gone."""
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}
            for name in names:
                path = self.tensors[name].path
                if path not in handles:
                    handles[path] = stack.enter_context(_open(path))
                yield name, handles[path].get_tensor(name)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def open_packed(folder: Path) -> PackedFiles:
    """The packed model in `folder`: stage quantize's, or an export for transformers.

    Raises InputError where there is none, ArtifactError where it is damaged.
    """
    if (folder / LAYOUT).is_file():
        paths = sorted(folder.glob("*.safetensors"))
        for path in (folder / LAYOUT, folder / CONFIG_FOLDER / "config.json", *paths):
            require_inside(folder, path)
        return PackedFiles(folder, folder / CONFIG_FOLDER, read_layout(folder), stored_tensors(paths))
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds no packed model: it has neither {LAYOUT} nor config.json. Run quantize first."
        )
    require_inside(folder, folder / "config.json")
    quantization = read_json(folder / "config.json", foreign=True).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in QUANT_METHODS:
        raise InputError(
            f"{folder} holds a model, but not one packed by mc-cli. Give a packed folder or an exported directory."
        )
    try:
        layout = PackedLayout.from_json(quantization)
    except ArtifactError as error:
        raise naming(folder / "config.json", error) from error
    return PackedFiles(folder, folder, layout, stored_tensors(weight_files(folder)))


def is_packed_folder(folder: Path) -> bool:
    """Whether config.json of `folder` says that it is an export of ours."""
    content = read_json(folder / "config.json", foreign=True).get("quantization_config")
    if isinstance(content, dict) and not isinstance(content.get("quant_method", ""), str):
        raise ArtifactError(
            f"{folder / 'config.json'}: quant_method is {shown(content['quant_method'])}, not a name. It is damaged; "
            "copy, download or make the directory again."
        )
    return isinstance(content, dict) and content.get("quant_method") in QUANT_METHODS


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an exported directory: the one that there is, or those of the index.

    Raises ArtifactError for a damaged index, InputError where it or a link names a file outside of the directory.
    """
    index = file_inside(folder, INDEX)
    if (folder / SINGLE).exists() or not index.is_file():
        return [file_inside(folder, SINGLE)]  # transformers prefers it, too, where there are both
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ArtifactError(f"{index} is damaged: it has no weight_map. Export again.")
    names = set(map(str, weight_map.values()))
    return [file_inside(folder, name) for name in sorted(names)]


def stored_tensors(paths: list[Path]) -> dict[str, StoredTensor]:
    """Name -> tensor as the headers of these files have it.

    Raises ArtifactError for a damaged file, a name in two of them, and a dtype that no packed model has.
    """
    tensors: dict[str, StoredTensor] = {}
    twice = []
    strange = []
    for path in paths:
        with _open(path) as handle:
            for name in handle.keys():  # noqa: SIM118 a handle is no mapping
                if name in tensors:
                    twice.append(f"{name}: in {tensors[name].path.name} and {path.name}")
                stored = handle.get_slice(name)
                if stored.get_dtype() not in DTYPES:
                    strange.append(f"{name}: {stored.get_dtype()} in {path.name}")
                    continue
                tensors[name] = StoredTensor(path, tuple(stored.get_shape()), DTYPES[stored.get_dtype()])
    if strange:
        raise ArtifactError(
            f"{paths[0].parent}: {len(strange)} tensors are of dtypes that no packed model has:\n{listed(strange)}\n"
            "Copy, download or make the packed model again."
        )
    if twice:
        raise ArtifactError(
            f"{paths[0].parent}: {len(twice)} tensors are stored twice:\n{listed(twice)}\nMake the packed model again."
        )
    return tensors


def _open(path: Path) -> Any:
    require_ordinary(path)
    try:
        return safe_open(path, "pt")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist: the packed model is not whole. Make it again.") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file: {error}. Make the packed model again.") from error
