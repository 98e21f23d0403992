"""A checkpoint's tensors as they lie in safetensors files: listed from the headers, read one by one.

Block formats appear as the tensor that they stand for and become values when read. transformers' own FP8 dequantizer is
not used: it divides the columns by the number of scales instead of using the format's block size, which is wrong
wherever a block is cut at the edge, such as the 576 rows of DeepSeek-V3's kv_a_proj_with_mqa in blocks of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mc_cli.artifacts.places import file_inside
from mc_cli.errors import CheckpointError, listed
from mc_cli.models.model_folder import read_model_json
from mc_cli.numerics.block_formats import dequantize_fp8_blocks, dequantize_mxfp4, scale_shape

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"
_SCALES = "_scale_inv"  # FP8: NAME.weight, NAME.weight_scale_inv
_BLOCKS, _EXPONENTS = "_blocks", "_scales"  # MXFP4: NAME_blocks, NAME_scales
_DEFAULT_BLOCK = (128, 128)
_LARGEST_BLOCK = 1 << 20
_MXFP4_BYTES = 16  # a block holds 32 codes
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
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, by what the model sees of it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: a block format
    places: tuple[tuple[str, str], ...]  # (key in the file, file): codes and scales of a block format

    @property
    def is_fp8(self) -> bool:
        """Whether it is of FP8 codes with scales, which are made values all at once."""
        return self.dtype is None and not self.places[0][0].endswith(_BLOCKS)


class _Fp8Slice:
    """An FP8 tensor that is dequantized when indexed, as transformers reads a safetensors slice."""

    def __init__(self, codes: Any, scales: Any, block: tuple[int, int]) -> None:
        self._codes, self._scales, self._block = codes, scales, block

    def __getitem__(self, index: Any) -> torch.Tensor:
        return dequantize_fp8_blocks(self._codes[...], self._scales[...], block=self._block)[index]


class _Mxfp4Slice:
    """Fused MXFP4 experts, dequantized when indexed: [experts, in_features, out_features] bfloat16, which is exact."""

    def __init__(self, blocks: Any, exponents: Any, shape: tuple[int, ...]) -> None:
        self._blocks, self._exponents, self._shape = blocks, exponents, shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, int):
            return dequantize_mxfp4(self._blocks[index], self._exponents[index]).T.to(torch.bfloat16)
        experts = torch.empty(self._shape, dtype=torch.bfloat16)
        for expert in range(self._shape[0]):  # one by one: all experts in float32 would be four times the result
            experts[expert] = dequantize_mxfp4(self._blocks[expert], self._exponents[expert]).T
        return experts[index]


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
        self._block = _fp8_block(folder, quantization or {})
        method = check_format(folder, quantization)
        files = weight_files(folder, named)
        self.not_read = files.beside
        self.said = files.names[0] if files.placed is None else f"the {len(files.names)} files of the index"
        plain = _plain_tensors(folder, files)
        if method == "fp8":
            plain = self._fold_fp8(plain)
        elif method == "mxfp4":
            plain = self._fold_mxfp4(plain)
        self.tensors = plain
        unreadable = [f"{tensor.key}: {tensor.dtype}" for tensor in plain.values() if tensor.dtype in _FP8]
        if unreadable:
            raise CheckpointError(
                f"{folder} holds {len(unreadable)} FP8 tensors without scales:\n{listed(unreadable)}\n"
                "Give the original 16-bit model, or an FP8 checkpoint with weight_scale_inv tensors."
            )

    def _fold_fp8(self, plain: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        folded, wrong = dict(plain), []
        for key, codes in plain.items():
            scales = plain.get(key + _SCALES)
            if codes.dtype not in _FP8 or scales is None:
                continue
            wanted = scale_shape(codes.shape, self._block) if len(codes.shape) > 1 else ()
            if scales.shape != wanted and scales.shape not in ((), (1,)):
                wrong.append(f"{scales.key}: {scales.shape}, blocks of {self._block} need {wanted}")
            del folded[scales.key]
            folded[key] = StoredTensor(key, codes.shape, None, codes.places + scales.places)
        if wrong:
            raise CheckpointError(
                f"{self.folder}: the scales of {len(wrong)} FP8 tensors do not fit weight_block_size in config.json:\n"
                f"{listed(wrong)}"
            )
        return folded

    def _fold_mxfp4(self, plain: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        folded, wrong = dict(plain), []
        for key, blocks in plain.items():
            name = key.removesuffix(_BLOCKS)
            exponents = plain.get(name + _EXPONENTS)
            if name == key:
                continue
            if exponents is None or len(blocks.shape) != 4 or blocks.shape != (*exponents.shape, _MXFP4_BYTES):
                wrong.append(f"{key}: {blocks.shape}, exponents {exponents.shape if exponents else 'missing'}")
                continue
            experts, rows, groups, pairs = blocks.shape
            del folded[key], folded[exponents.key]
            shape = (experts, groups * pairs * 2, rows)
            folded[name] = StoredTensor(name, shape, None, blocks.places + exponents.places)
        if wrong:
            raise CheckpointError(
                f"{self.folder}: {len(wrong)} MXFP4 tensors are not whole:\n{listed(wrong)}\n"
                "Download the checkpoint again."
            )
        return folded

    @contextmanager
    def reading(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Opens the files of `keys`: key -> an object whose `[...]` reads the tensor. Valid inside the context."""
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            slices: dict[str, Any] = {}
            for key in keys:
                tensor = self.tensors[key]
                pieces = []
                for stored_key, file in tensor.places:
                    if file not in handles:
                        self.on_open(file)
                        handles[file] = stack.enter_context(_open(self.folder / file))
                    pieces.append(handles[file].get_slice(stored_key))
                slices[key] = self._readable(tensor, pieces)
            yield slices

    def _readable(self, tensor: StoredTensor, pieces: list[Any]) -> Any:
        if len(pieces) == 1:
            return pieces[0]
        if tensor.places[0][0].endswith(_BLOCKS):
            return _Mxfp4Slice(pieces[0], pieces[1], tensor.shape)
        return _Fp8Slice(pieces[0], pieces[1], self._block)


def check_format(folder: Path, quantization: dict[str, Any] | None) -> str | None:
    """`fp8`, `mxfp4` or None for a plain checkpoint. Raises CheckpointError for any other quantized format."""
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    method = str(getattr(method, "value", method))
    if method not in ("fp8", "mxfp4"):
        raise CheckpointError(
            f"{folder} is already quantized with {method!r}, and quantizing it again would stack two errors. mc-cli "
            "starts from 16- or 32-bit, FP8 (block scales) or MXFP4 checkpoints: give the original model."
        )
    return method


def _fp8_block(folder: Path, quantization: dict[str, Any]) -> tuple[int, int]:
    block = quantization.get("weight_block_size")
    if block is None:
        return _DEFAULT_BLOCK
    sizes = block if isinstance(block, (list, tuple)) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _LARGEST_BLOCK for size in sizes):
        raise CheckpointError(
            f"{folder / 'config.json'}: weight_block_size is {block!r:.80}, but it has to be two whole numbers from 1 "
            f"to {_LARGEST_BLOCK:,}, such as [128, 128]: the rows and columns that share a scale. Download it again."
        )
    return sizes[0], sizes[1]


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
        + (f", only {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}.{held} " if others else ". ")
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


def _plain_tensors(folder: Path, files: WeightFiles) -> dict[str, StoredTensor]:
    """Every tensor in the files, as their headers describe it."""
    tensors: dict[str, StoredTensor] = {}
    unknown, twice = [], []
    for name in files.names:
        with _open(file_inside(folder, name)) as handle:
            for key in handle.keys():  # noqa: SIM118 a handle is no mapping
                stored = handle.get_slice(key)
                if (format := stored.get_dtype()) not in _DTYPES:
                    unknown.append(f"{key}: {format}")
                    continue
                if key in tensors:
                    twice.append(f"{key}: in {tensors[key].places[0][1]} and {name}")
                tensors[key] = StoredTensor(key, tuple(stored.get_shape()), _DTYPES[format], ((key, name),))
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} tensors have a data type that is not read here:\n{listed(unknown)}\n"
            "Give a 16- or 32-bit, FP8 or MXFP4 checkpoint."
        )
    if twice:
        raise CheckpointError(
            f"{folder}: {len(twice)} tensors are in two of the files that its index names, and may differ:\n"
            f"{listed(twice)}\nKeep the files of one checkpoint, with its index."
        )
    lost = [
        f"{key} in {file}"
        for key, file in sorted((files.placed or {}).items())
        if key not in tensors or tensors[key].places[0][1] != file
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
