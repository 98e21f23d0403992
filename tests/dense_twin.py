"""An independent reader of packed folders: written from the format's description, with numpy and safetensors alone."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mc_cli import kernels
from mc_cli.numerics import trellis_code

# Mean change that products with packed bytes make to logits of about 1: 4e-5 in each product. A near tie between
# experts may then go the other way, so single logits say nothing.
PRODUCTS = 2e-4
TOKEN_IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class PackedMatrices:
    """Decodes what a packed folder holds.

    linears  module path -> [out_features, in_features] float32
    experts  experts path -> projection -> expert -> the same, None for a dropped expert
    kept     every other tensor by its module-tree name, as stored
    packed_bytes  experts path -> bytes of the stacked tensors, kept and packed
    """

    linears: dict[str, torch.Tensor]
    experts: dict[str, dict[str, list[torch.Tensor | None]]]
    kept: dict[str, torch.Tensor]
    expert_bytes: int


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """[3, 12, vocabulary] float32 of TOKEN_IDS: what twins are compared by."""
    return model.eval()(TOKEN_IDS, use_cache=False).logits.float()


@contextlib.contextmanager
def decoded_products() -> Iterator[None]:
    """Packed matrices are decoded, then multiplied in float32: for comparisons as close as rounding allows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "runs_packed", lambda rows, encoding: False)
        yield


def read_packed(folder: Path) -> PackedMatrices:
    """Everything in a packed folder."""
    layout = json.loads((folder / "layout.json").read_text(encoding="utf-8"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    linears = {}
    for path, number in layout["linears"].items():
        linears[path] = _decode(layout["encodings"][number], lambda part, path=path: tensors.pop(f"{path}.{part}"))
    experts: dict[str, dict[str, list[torch.Tensor | None]]] = {}
    expert_bytes = 0
    for block in layout["experts"]:
        sizes = {int(expert): counts for expert, counts in block.get("channels", {}).items()}
        names = [name for name in tensors if name.startswith(block["path"] + ".") and not name.endswith("_bias")]
        mine = {name.removeprefix(block["path"] + "."): tensors.pop(name) for name in names}
        expert_bytes += sum(tensor.nbytes for tensor in mine.values())
        experts[block["path"]] = {
            projection: _expert_rows(projection, row, layout["encodings"], mine, sizes, block["projections"])
            for projection, row in block["encodings"].items()
        }
        for slot, expert in enumerate(block.get("slots", [])):
            for rows in experts[block["path"]].values():
                rows[slot] = rows[expert] if expert >= 0 else None
    return PackedMatrices(linears, experts, tensors, expert_bytes)


def _expert_rows(
    projection: str,
    row: list[int | list[int]],
    encodings: list[str],
    tensors: dict[str, torch.Tensor],
    sizes: dict[int, list[int]],
    shapes: dict[str, list[int]],
) -> list[torch.Tensor | None]:
    """Every expert's weight, blocks side by side with zeros behind the last; gates lie first, as in most families."""
    channels = shapes["down_proj"][1]
    taken: Counter[str] = Counter()
    found: list[torch.Tensor | None] = []
    for expert, entry in enumerate(row):
        if isinstance(entry, int) and entry < 0:
            found.append(None)
            continue
        whole, begin = torch.zeros(shapes[projection]), 0
        halves = whole.view(2, channels, -1)
        numbers, counts = ([entry], [channels]) if isinstance(entry, int) else (entry, sizes[expert])
        for number, count in zip(numbers, counts, strict=True):
            key = encodings[number]
            prefix = f"{projection}_{key}_" if count == channels else f"{projection}_c{count}_{key}_"
            stored = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            parts = {name.removeprefix(prefix): tensor[taken[prefix]] for name, tensor in stored.items()}
            taken[prefix] += 1
            weight = parts["weight"].float() if key == "kept" else _decode(key, parts.__getitem__)
            if projection == "down_proj":
                whole[:, begin : begin + count] = weight
            elif count == channels:
                whole = weight
            else:
                halves[:, begin : begin + count] = weight.view(2, count, -1)
            begin += count
        found.append(whole)
    return found


def _decode(key: str, part: Any) -> torch.Tensor:
    """The matrix that a key's stored parts stand for, worked out from the format's description alone."""
    return _decode_trellis(key, part) if key.startswith("trellis") else _decode_affine(key, part)


def _decode_trellis(key: str, part: Any) -> torch.Tensor:
    """Rings of bits; the 12 bits from floor(i * rate) on decide weight i; rows are rotated back in float64."""
    match = re.fullmatch(r"trellis_b([0-9p]+)_h(\d+)", key)
    assert match is not None, key
    rate, block = float(match[1].replace("p", ".")), int(match[2])
    stored, scales = part("codes").numpy(), part("scales").numpy().astype(np.float64)
    planes = stored.reshape(*stored.shape[:2], int(2 * rate), -1, 4)  # [sequences, groups, bytes of a lane, lanes, 4]
    codes = planes.transpose(0, 1, 4, 3, 2).reshape(len(stored), 4 * stored.shape[1], -1)
    bits = np.unpackbits(codes, axis=-1, bitorder="little").astype(np.int64)
    length = int(bits.shape[-1] / rate)
    places = (np.floor(np.arange(length) * rate).astype(int)[:, None] + np.arange(12)) % bits.shape[-1]
    window = (bits[..., places] << np.arange(12)).sum(-1)
    parts, levels = (np.frombuffer(bytes.fromhex(text), np.uint8) for text in trellis_code.CODES[Fraction(rate)])
    mixed = parts[window % 16] ^ parts[16 + window // 16 % 16] ^ parts[32 + window // 256]
    values = levels.view(np.int8)[mixed % 64] * np.where(mixed >= 128, -1.0, 1.0) * (3.0378 / 127)
    rows = values.transpose(0, 2, 1).reshape(-1, codes.shape[1])[: len(scales)] * scales[:, None]
    hadamard = np.array([[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]) / block**0.5
    turned = (rows.reshape(len(rows), -1, block) @ hadamard).reshape(rows.shape)
    signs = [1 - 2 * ((i * 0x9E3779B1 % 2**32).bit_count() % 2) for i in range(rows.shape[1])]
    return torch.from_numpy(turned * np.array(signs)).float()


def _decode_affine(key: str, part: Any) -> torch.Tensor:
    """Codes of `bits` bits each, lowest bit first, a row padded to bytes; value = scale * (code - zero point)."""
    match = re.fullmatch(r"affine_b(\d)_g(\d+)", key)
    assert match is not None, key
    bits, group_size = int(match[1]), int(match[2])
    codes, scales = part("codes").numpy(), part("scales").numpy().astype(np.float32)
    zero_points = part("zero_points").numpy().astype(np.float32) / 2 ** (8 - bits)
    width = scales.shape[1] * group_size
    stream = np.unpackbits(codes, axis=1, bitorder="little")[:, : width * bits].reshape(len(codes), width, bits)
    values = (stream * (1 << np.arange(bits))).sum(-1).astype(np.float32)
    grouped = values.reshape(len(codes), -1, group_size)
    return torch.from_numpy(((grouped - zero_points[..., None]) * scales[..., None]).reshape(len(codes), width))


@torch.no_grad()
def dense_twin(model_folder: Path, packed_folder: Path, *, transposed: bool) -> Any:
    """The original model in float32, read by transformers alone, with the packed matrices' values put in their places.

    transposed  the family holds its experts' weights as [in_features, out_features]
    Dropped experts are not there: their weights are cut out, their rows in the router as well.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    packed = read_packed(packed_folder)
    for path, weight in packed.linears.items():
        model.get_submodule(path).weight.copy_(weight)
    for path, projections in packed.experts.items():
        module = model.get_submodule(path)
        for projection, row in projections.items():
            for expert, weight in enumerate(row):
                target = getattr(module, projection)[expert]
                if weight is not None:
                    target.copy_(weight.T if transposed else weight)
            bias = packed.kept.get(f"{path}.{projection}_bias")
            if bias is not None:  # in the order of the packed rows, which need not be the checkpoint's
                getattr(module, f"{projection}_bias").copy_(bias)
        cut_experts_out(model, path, [expert for expert, weight in enumerate(row) if weight is None])
    return model


def cut_experts_out(model: Any, path: str, dropped: Sequence[int]) -> None:
    """Takes experts out of the module at `path` and of the router beside it, in place: what is left is renumbered.

    A router that chooses among groups needs the same number out of each.
    """
    parent = model.get_submodule(path.rpartition(".")[0])
    router = parent.gate if hasattr(parent, "gate") else parent.router
    count = model.get_submodule(path).num_experts
    kept = torch.tensor([expert for expert in range(count) if expert not in dropped])
    for top in (model.get_submodule(path), router):
        for module in top.modules():
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None and count in tensor.shape:
                        tensor.data = tensor.index_select(tensor.shape.index(count), kept)
            if hasattr(module, "num_experts"):
                module.num_experts = len(kept)
