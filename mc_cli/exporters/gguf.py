"""GGUF, the one file that llama.cpp and what is built on it load: blocks as they were packed, names theirs.

A tensor there has one type: the experts of a layer share a width per projection, as `--for llama.cpp` plans them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.export_record import RECORD_KEY
from mc_cli.artifacts.files import write_bytes_with, write_json, write_text
from mc_cli.artifacts.packed import KEPT
from mc_cli.artifacts.places import file_inside
from mc_cli.data.batches import Batch
from mc_cli.encodings import Encoding, encoding_from_key
from mc_cli.encodings.gguf import GgufEncoding
from mc_cli.errors import ArtifactError, listed
from mc_cli.exporters import ExportJob
from mc_cli.exporters.decoded import decoding
from mc_cli.exporters.gguf_architectures import architecture_of, differences, gguf_package, write_metadata
from mc_cli.exporters.gguf_names import ROWS, TURNED, Names
from mc_cli.exporters.gguf_tokenizer import write_tokenizer
from mc_cli.exporters.model_card import model_card
from mc_cli.exporters.packed_checkpoint import check_layout
from mc_cli.measuring.logit_source import LogitSource, Reading
from mc_cli.models.inventory import tied_tensors
from mc_cli.models.model_folder import read_config
from mc_cli.models.skeleton import build_skeleton, put_tensor, rebuild_buffers
from mc_cli.packed.packed_files import PackedFiles, open_packed

NAME = "gguf"
CARRIES_POLICY = False
DESCRIPTION = "one file for llama.cpp and what is built on it; plan and quantize with --for llama.cpp"
FILE = "model.gguf"
ENGINES = ("llama.cpp",)
KEEPS = "one type for each layer and projection; no dropped, cut or shared experts"

_OPENING = (
    "A Mixture-of-Experts language model in GGUF, rounded by mc-cli: block types of llama.cpp, chosen layer by layer, "
    "with codes found under error feedback."
)
_LOADING = f"""\
```sh
llama-cli -m {FILE}
```"""


def check(config: Any) -> None:
    """Raises FamilyError for a model that llama.cpp does not run so, MissingDependencyError without the package."""
    gguf_package()
    architecture_of(config)


def export(job: ExportJob) -> None:
    """Writes `model.gguf`, config.json for transformers' readers of GGUF, and a card.

    Raises FamilyError for a model that llama.cpp does not run, InputError, naming all of them, for experts and matrices
    that GGUF cannot hold, and for a tokenizer that has no counterpart there.
    """
    files = open_packed(job.packed_folder)
    config = read_config(job.config_folder)
    check(config)
    check_layout(files.layout, _holds, name="GGUF", engine="llama.cpp", stacked=True)
    for sentence in differences(config):
        job.warn(sentence)
    write_json(job.target / "config.json", job.original_config())
    title = job.card.base_model or job.card.model_type
    write_bytes_with(
        job.target / FILE,
        lambda path: write_gguf(
            path, config, job.config_folder, _tensors(files), title=title, record_bytes=job.record_bytes
        ),
    )
    for part in job.parts:
        job.advance("outside the layers" if part < 0 else f"layer {part}")
    card = model_card(job.card, title=f"{title}, in GGUF by mc-cli", opening=_OPENING, loading=_LOADING)
    write_text(job.target / "README.md", card)


def write_gguf(
    path: Path,
    config: Any,
    folder: Path,
    tensors: Iterable[tuple[str, Tensor, GgufEncoding | None]],
    *,
    title: str,
    record_bytes: int = 0,
) -> None:
    """Writes a whole model with metadata and vocabulary.

    folder         of the tokenizer
    tensors        (name in the module tree, bytes of blocks or numbers, type of the blocks or None)
    record_bytes   left for the record of the export, among the first entries of the metadata
    """
    gguf = gguf_package()
    architecture = architecture_of(config)
    names = Names(config, architecture)
    writer = gguf.GGUFWriter(path, architecture.name)
    if record_bytes:
        writer.add_string(RECORD_KEY, " " * record_bytes)
    writer.add_name(title)
    write_metadata(writer, config, architecture)
    write_tokenizer(writer, folder, vocabulary=config.vocab_size, config=config)
    for name, tensor, kind in tensors:
        place = names.place(name)
        for written, part, form in zip(place.names, place.split(tensor), place.forms, strict=True):
            if form == ROWS:
                _add(gguf, writer, written, part, kind)
            else:
                numbers = _numbers(part, kind)
                _add(gguf, writer, written, numbers.transpose(-1, -2) if form == TURNED else numbers, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _holds(encoding: Encoding) -> bool:
    return isinstance(encoding, GgufEncoding)


def _encoding(key: str) -> object:
    return None if key == KEPT else encoding_from_key(key)


def _tensors(files: PackedFiles) -> Iterator[tuple[str, Tensor, GgufEncoding | None]]:
    """(name in the module tree, tensor, its type): bytes of blocks [..., rows, bytes]; without a type numbers."""
    packed: dict[str, tuple[str, GgufEncoding | None]] = {}
    for path, key in files.layout.linears.items():
        packed[f"{path}.codes"] = (f"{path}.weight", _type(key))
    for block in files.layout.experts:
        for projection in block.projections:
            (stack,) = block.stacks(projection)
            part = "weight" if stack.key == KEPT else "codes"
            packed[f"{block.path}.{stack.name(part)}"] = (f"{block.path}.{projection}", _type(stack.key))
    for name, tensor in files.read(files.tensors):
        tree_name, kind = packed.get(name, (name, None))
        yield tree_name, tensor, kind


def _type(key: str) -> GgufEncoding | None:
    found = _encoding(key)
    return found if isinstance(found, GgufEncoding) else None


def _numbers(rows: Tensor, kind: GgufEncoding | None) -> Tensor:
    """Rows as numbers: float32 where they are blocks."""
    if kind is None:
        return rows
    return kind.dequantize({"codes": rows}, rows.shape[-1] // kind.kind.size_bytes * kind.kind.block)


def _add(gguf: Any, writer: Any, name: str, tensor: Tensor, kind: GgufEncoding | None) -> None:
    tensor = tensor.contiguous()
    if kind is not None:
        writer.add_tensor(name, tensor.numpy(), raw_dtype=gguf.GGMLQuantizationType(kind.kind.number))
    elif tensor.ndim < 2 or name.endswith(("ffn_gate_inp.weight", ".bias")) or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.bfloat16:
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def open(directory: Path, reading: Reading) -> LogitSource:
    """The file as the `gguf` package decodes it, computed by transformers."""
    with decoding(directory / FILE):
        return _Reader(directory, reading)


class _Reader:
    """A model of transformers with the numbers that `gguf.dequantize` gives."""

    method = "weights as the gguf package decodes them"

    def __init__(self, directory: Path, reading: Reading) -> None:
        gguf = gguf_package()
        config = read_config(directory)
        names = Names(config, architecture_of(config))
        self._stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file_inside(directory, FILE)).tensors}
        model: Any = build_skeleton(config, dtype=reading.dtype)
        tied = tied_tensors(model)
        places = {name: names.place(name) for name in model.state_dict() if name not in tied}
        missing = [written for place in places.values() for written in place.names if written not in self._stored]
        if missing:
            raise ArtifactError(
                f"{directory / FILE} lacks {len(missing)} tensors:\n{listed(missing)}\nExport it again."
            )
        for name, place in places.items():
            parts = [self._numbers(gguf, written) for written in place.names]
            whole = place.joined(
                [
                    part.transpose(-1, -2) if form == TURNED else part
                    for part, form in zip(parts, place.forms, strict=True)
                ]
            )
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if getattr(module, "is_transposed", False) and whole.ndim > 2:
                whole = whole.transpose(-1, -2)
            shape, dtype = getattr(module, leaf).shape, getattr(module, leaf).dtype
            put_tensor(model, name, whole.reshape(shape).to(reading.device, dtype).contiguous())
        model.tie_weights()
        rebuild_buffers(model, reading.device)
        self.model = model.eval()

    def _numbers(self, gguf: Any, name: str) -> Tensor:
        """float32, rows second to last."""
        stored = self._stored[name]
        decoded = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        return decoded.reshape(*reversed([int(size) for size in stored.shape]))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """[rows, length, vocabulary] float32 on the CPU."""
        logits: Tensor = self.model(**batch.to(self.model.device), use_cache=False).logits.float().cpu()
        return logits

    def close(self) -> None:
        self.model = None
