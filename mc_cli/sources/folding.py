"""The stored tensors of a quantized checkpoint, put together to the tensors that a plain one would have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mc_cli.errors import ShapeError
from mc_cli.sources.layout import CODES, E8M0, FP8, SCALES, Header, Layout, Read, StoredTensor

# Endings of scales that no model has as a parameter of its own: one without codes is what is left of a lost tensor.
_SCALE_ENDINGS = ("_scale_inv", ".qscale_weight", "weight_scale", ".weight_scale_2", ".weight_global_scale")
_MODEL_ENDINGS = {".scale", "_scale"}  # parameters of models have these, too
_CODE_ENDING = ".weight_packed"  # likewise of codes
# Endings of what quantizes activations or the cache of keys and values, which a 16-bit model computes with as they are.
ACTIVATION_ENDINGS = (
    ".activation_scale",
    ".input_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".qscale_act",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)


@dataclass
class Folding:
    """The tensors of a checkpoint, and what is wrong with those that are not among them.

    alone     codes without scales
    widowed   scales without codes
    misfits   parts that do not fit each other, or fit two layouts
    strange   parts that no layout knows
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    widowed: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)


def plain_tensor(header: Header) -> StoredTensor:
    """A tensor that is stored as the model has it."""
    return StoredTensor(header.key, header.shape, header.dtype, {CODES: header})


def fold(headers: Mapping[str, Header], layouts: Sequence[Layout], read: Read) -> Folding:
    """Puts codes, scales and the like together by the layouts.

    read   the values of a small tensor, for shapes that headers do not tell
    """
    found = Folding()
    taken: set[str] = set()
    for key, header in headers.items() if layouts else ():
        candidates = _candidates(header, headers, layouts)
        taken |= {part.key for _, parts in candidates for part in parts.values()}
        fitting, misfits = [], []
        for layout, parts in candidates:
            try:
                fitting.append(StoredTensor(layout.name_of(key), layout.shape(parts, read), None, parts, layout))
            except ShapeError as error:
                misfits.append(f"{parts[SCALES].key}: {error}")
        if len(fitting) > 1 or len({parts[SCALES].key for _, parts in candidates}) > 1:
            ways = "; ".join(f"{layout.name}, {parts[SCALES].key}" for layout, parts in candidates)
            misfits = [f"{key}: may be stored in several ways ({ways})"]
        elif fitting and fitting[0].key != key and fitting[0].key in headers:
            misfits = [f"{key}: {fitting[0].key} is there, too"]
        elif fitting:
            found.tensors[fitting[0].key] = fitting[0]
            continue
        found.misfits += misfits
    _sort_rest(found, headers, taken, layouts)
    return found


def _candidates(
    header: Header, headers: Mapping[str, Header], layouts: Sequence[Layout]
) -> list[tuple[Layout, dict[str, Header]]]:
    """The layouts that a tensor's parts are there for, of those with the lowest rank."""
    fitting = [(layout, parts) for layout in layouts if (parts := layout.find(header, headers)) is not None]
    if len(fitting) < 2:
        return fitting
    ranks = [layout.rank(header.key.rpartition(".")[0]) for layout, _ in fitting]
    return [entry for entry, rank in zip(fitting, ranks, strict=True) if rank == min(ranks)]


def _sort_rest(found: Folding, headers: Mapping[str, Header], taken: set[str], layouts: Sequence[Layout]) -> None:
    scales = {each.scales for each in layouts} - _MODEL_ENDINGS
    endings = tuple({*_SCALE_ENDINGS, *scales, *(ending for each in layouts for ending in each.others.values())})
    known = {ending for each in layouts for ending in (each.codes, each.scales, *each.others.values())}
    coded = {stem for key in found.tensors if (stem := key.removesuffix(".weight")) != key}
    for key, header in headers.items():
        if key in taken:
            continue
        stem, _, leaf = key.rpartition(".")
        if header.dtype in FP8 or key.endswith(_CODE_ENDING) or any(_is_code(header, each) for each in layouts):
            found.alone.append(f"{key}: {_dtype(header.dtype)}")
        elif header.dtype is E8M0 or (layouts and key.endswith(endings)):
            found.widowed.append(f"{key}: {header.shape}")
        elif stem in coded and _is_strange(leaf, known):
            found.strange.append(f"{key}: {header.shape}")
        else:
            found.tensors[key] = plain_tensor(header)


def _is_code(header: Header, layout: Layout) -> bool:
    return header.dtype in layout.dtypes and header.key.endswith(layout.codes or ".weight")


def _is_strange(leaf: str, known: Iterable[str]) -> bool:
    """Whether the name of a tensor beside coded weights is that of a part which no layout decodes."""
    return f".{leaf}" not in (*known, *ACTIVATION_ENDINGS) and leaf.startswith(("weight", "pre_quant", "qscale"))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
