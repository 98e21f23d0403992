"""Checkpoints in the formats that they are published in, with values by the formats' definitions, in float64.

An encoder takes a key and a shape and gives stored tensors and values: random codes and scales, value by value from the
definition. Values never come from the package's decoders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import tiny_models

Stored = dict[str, torch.Tensor]
Encoded = tuple[Stored, torch.Tensor]


def fp8_value(code: int) -> float:
    """E4M3: sign, 4 exponent bits with a bias of 7, 3 mantissa bits; no infinity, 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def fp4_value(code: int) -> float:
    """E2M1: sign, 2 exponent bits with a bias of 1, 1 mantissa bit."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


FP8_VALUES = torch.tensor([fp8_value(code) for code in range(256)], dtype=torch.float64)
FP4_VALUES = torch.tensor([fp4_value(code) for code in range(16)], dtype=torch.float64)


class Draw:
    """Random codes and scales, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def scales(self, *shape: int, mean: float) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator) + 0.5) * mean

    def fp8(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes up to 2 in magnitude, and their values."""
        codes = self.integers(0, 0x40, *shape) | self.integers(0, 2, *shape) << 7
        return codes.to(torch.uint8).view(torch.float8_e4m3fn), FP8_VALUES[codes]

    def fp4(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes of two codes, the even column in the low half, and the codes' values."""
        codes = self.integers(0, 16, rows, columns)
        return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8), FP4_VALUES[codes]

    def exponents(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes of E8M0, and the powers of two that they are."""
        codes = self.integers(121, 125, *shape)
        return codes.to(torch.uint8), 2.0 ** (codes.double() - 127)


def by_block(scales: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """The scale of each value, looked up one by one."""
    rows = torch.arange(shape[0])[:, None] // block[0]
    return scales.double()[rows, torch.arange(shape[1])[None] // block[1]]


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers along a row as one long number, lowest bits first, cut into words of 32 bits."""
    words = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        words.append([number >> 32 * word & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def _weight(key: str) -> str:
    return key.removesuffix("weight")


def fp8_blocks(scale: str, *, block: tuple[int, int] = (16, 16), e8m0: bool = False) -> Callable[..., Encoded]:
    """FP8 with a scale for each block under the ending `scale`."""

    def encode(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
        codes, values = draw.fp8(*shape)
        grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        scales: torch.Tensor = draw.scales(*grid, mean=0.05)
        factors = scales
        if e8m0:
            stored, factors = draw.exponents(*grid)
            scales = stored.view(torch.float8_e8m0fnu)
        return {key: codes, _weight(key) + scale: scales}, values * by_block(factors, shape, block)

    return encode


def fp8_rows(scale: str, *, whole: bool = False, beside: str = "") -> Callable[..., Encoded]:
    """FP8 with a scale for each row, or for the whole matrix, and one for activations."""

    def encode(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
        codes, values = draw.fp8(*shape)
        scales = draw.scales(*(() if whole else (shape[0], 1)), mean=0.05)
        stored = {key: codes, _weight(key) + scale: scales}
        if beside:
            stored[_weight(key) + beside] = draw.scales(mean=1.0)
        return stored, values * scales.double()

    return encode


def mxfp8(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
    """FP8 with a byte of E8M0 for 32 columns."""
    codes, values = draw.fp8(*shape)
    exponents, powers = draw.exponents(shape[0], shape[1] // 32)
    return {key: codes, f"{key}_scale": exponents}, values * by_block(powers, shape, (1, 32))


def fp4_experts(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
    """DeepSeek-V4: FP4 experts, and FP8 blocks for the rest, with E8M0 scales."""
    if ".experts." not in key:
        return fp8_blocks("scale", e8m0=True)(key, shape, draw)
    codes, values = draw.fp4(*shape)
    exponents, powers = draw.exponents(shape[0], shape[1] // 32)
    stored = {key: codes.view(torch.int8), _weight(key) + "scale": exponents.view(torch.float8_e8m0fnu)}
    return stored, values * by_block(powers, shape, (1, 32))


def integers(
    bits: int, *, group: int | None = 32, zeros: bool = False, ordered: bool = False
) -> Callable[..., Encoded]:
    """compressed-tensors' pack-quantized. group: columns of a scale, None for rows; ordered: by activation."""

    def encode(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
        rows, columns = shape
        half = 1 << bits - 1
        codes = draw.integers(0, 2 * half, rows, columns)
        groups = 1 if group is None else columns // group
        scales = draw.scales(rows, groups, mean=0.3 / half).to(torch.bfloat16)
        stem = _weight(key)
        stored = {
            f"{stem}weight_packed": packed(codes, bits),
            f"{stem}weight_scale": scales,
            f"{stem}weight_shape": torch.tensor(shape),
        }
        column_group = torch.arange(columns) * groups // columns
        if ordered:
            column_group = column_group[torch.randperm(columns, generator=draw.generator)]
            stored[f"{stem}weight_g_idx"] = column_group.to(torch.int32)
        points = torch.full((rows, groups), half)
        if zeros:
            points = draw.integers(0, 2 * half, rows, groups)
            stored[f"{stem}weight_zero_point"] = packed(points.T, bits).T
        return stored, (codes - points[:, column_group]).double() * scales.double()[:, column_group]

    return encode


def bytes8(*, zeros: bool) -> Callable[..., Encoded]:
    """compressed-tensors' int-quantized: 8-bit integers with a scale for each row."""

    def encode(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
        codes, scales = draw.integers(-128, 128, *shape), draw.scales(shape[0], 1, mean=0.002)
        stored = {key: codes.to(torch.int8), f"{key}_scale": scales}
        points = draw.integers(-20, 20, shape[0], 1) if zeros else torch.zeros(shape[0], 1)
        if zeros:
            stored[f"{key}_zero_point"] = points.to(torch.int8)
        return stored, (codes - points).double() * scales.double()

    return encode


def nvfp4(codes_ending: str, whole_ending: str, *, divides: bool) -> Callable[..., Encoded]:
    """FP4 with an E4M3 scale for 16 columns and a float32 one of the whole."""

    def encode(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
        codes, values = draw.fp4(*shape)
        bytes_ = draw.integers(0x30, 0x48, shape[0], shape[1] // 16)
        whole = draw.scales(mean=20.0 if divides else 0.05)
        stem = _weight(key)
        stored = {
            stem + codes_ending: codes,
            f"{stem}weight_scale": bytes_.to(torch.uint8).view(torch.float8_e4m3fn),
            stem + whole_ending: whole.reshape(1) if divides else whole,
            f"{stem}input_scale": draw.scales(mean=1.0),
        }
        values = values * by_block(FP8_VALUES[bytes_], shape, (1, 16))
        return stored, values / whole.double() if divides else values * whole.double()

    return encode


def mxfp4_packed(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
    """compressed-tensors' mxfp4-pack-quantized."""
    codes, values = draw.fp4(*shape)
    exponents, powers = draw.exponents(shape[0], shape[1] // 32)
    stem = _weight(key)
    return {f"{stem}weight_packed": codes, f"{stem}weight_scale": exponents}, values * by_block(powers, shape, (1, 32))


def _group(format: str = "", targets: tuple[str, ...] = ("Linear",), **weights: Any) -> dict[str, Any]:
    group = {"targets": list(targets), "weights": weights, "input_activations": None}
    return {**group, "format": format} if format else group


def _compressed(format: str, *groups: dict[str, Any]) -> dict[str, Any]:
    named = {f"group_{place}": group for place, group in enumerate(groups)}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": named,
        "format": format,
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _int(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **more}


def _float(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, **more}


def _mixed(key: str, shape: tuple[int, int], draw: Draw) -> Encoded:
    """Experts in 4-bit integers, all else in FP8 by row."""
    encode = integers(4) if ".experts." in key else fp8_rows("weight_scale")
    return encode(key, shape, draw)


@dataclass(frozen=True)
class Published:
    """A format: config.json's quantization_config, and how matrices are stored."""

    quantization: Mapping[str, Any]
    encode: Callable[[str, tuple[int, int], Draw], Encoded]


_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
_WHOLE = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
_CHANNEL = {"strategy": "channel", "group_size": None}
FORMATS: dict[str, Published] = {
    "fp8, weight_scale_inv": Published(_BLOCKS, fp8_blocks("weight_scale_inv")),
    "fp8, .scale": Published({**_BLOCKS, "scale_fmt": "ue8m0"}, fp8_blocks("scale", e8m0=True)),
    "fp8, fp4 experts": Published({**_BLOCKS, "expert_dtype": "fp4"}, fp4_experts),
    "fp8, qscale_weight": Published(_WHOLE, fp8_rows("qscale_weight", whole=True, beside="qscale_act")),
    "fp8, a whole's weight_scale": Published(_WHOLE, fp8_rows("weight_scale", whole=True, beside="input_scale")),
    "fp8, a row's weight_scale": Published(_WHOLE, fp8_rows("weight_scale")),
    "mxfp8": Published({"quant_method": "mxfp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 32]}, mxfp8),
    "fbgemm": Published({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8_rows("weight_scale")),
    "modelopt NVFP4": Published(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4("weight", "weight_scale_2", divides=False)
    ),
    "modelopt FP8": Published(
        {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_rows("weight_scale", whole=True, beside="input_scale")
    ),
    "int4 by group": Published(_compressed("pack-quantized", _group(**_int(4))), integers(4)),
    "int4 with zero points": Published(
        _compressed("pack-quantized", _group(**_int(4, symmetric=False))), integers(4, zeros=True)
    ),
    "int4 by activation": Published(
        _compressed("pack-quantized", _group(**_int(4, actorder="group"))), integers(4, ordered=True)
    ),
    "int3 by row": Published(
        _compressed("pack-quantized", _group(**_int(3, symmetric=False, **_CHANNEL))),
        integers(3, group=None, zeros=True),
    ),
    "int8 by row": Published(
        _compressed("int-quantized", _group(**_int(8, symmetric=False, **_CHANNEL))), bytes8(zeros=True)
    ),
    "FP8 by row": Published(
        _compressed("float-quantized", _group(**_float(8, strategy="channel"))), fp8_rows("weight_scale")
    ),
    "FP8 by block": Published(
        _compressed("float-quantized", _group(**_float(8, strategy="block", block_structure=[16, 16]))),
        fp8_blocks("weight_scale"),
    ),
    "MXFP8": Published(
        _compressed("mxfp8-quantized", _group(**_float(8, strategy="group", group_size=32, scale_dtype="torch.uint8"))),
        mxfp8,
    ),
    "MXFP4": Published(
        _compressed("mxfp4-pack-quantized", _group(**_float(4, strategy="group", group_size=32))), mxfp4_packed
    ),
    "NVFP4": Published(
        _compressed("nvfp4-pack-quantized", _group(**_float(4, strategy="tensor_group", group_size=16))),
        nvfp4("weight_packed", "weight_global_scale", divides=True),
    ),
    "FP8 and int4": Published(
        _compressed(
            "mixed-precision",
            _group("float-quantized", **_float(8, strategy="channel")),
            _group("pack-quantized", (r"re:.*\.experts\..*",), **_int(4)),
        ),
        _mixed,
    ),
}


@dataclass
class Written:
    """A checkpoint in a published format beside a plain one with the same values, in float32."""

    folder: Path
    plain: Path
    coded: list[str] = field(default_factory=list)


def write_published(
    source: Path,
    folder: Path,
    published: Published,
    *,
    only: str = r"_proj\.weight$",
    extra: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> Written:
    """A copy of a checkpoint whose matrices with keys that match `only` are stored in the format, and `extra` ones.

    Others stay as they are; the plain copy has no extra ones.
    `text_config` gets the quantization_config where there is one, as Kimi-K2.5 has it.
    """
    draw = Draw(seed)
    stored: Stored = {}
    values: Stored = {}
    coded = []
    for key, tensor in [*tiny_models.read_tensors(source).items(), *(extra or {}).items()]:
        parts, exact = {key: tensor}, tensor
        if re.search(only, key) and tensor.ndim == 2 and "vision" not in key:
            parts, exact = published.encode(key, (tensor.shape[0], tensor.shape[1]), draw)
            exact = exact.float()
            coded.append(key)
        stored |= parts
        if key not in (extra or {}):
            values[key] = exact
    assert coded
    tiny_models.with_tensors(source, folder / "published", stored)
    tiny_models.with_tensors(source, folder / "plain", values)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    changes: dict[str, Any] = {"quantization_config": published.quantization}
    if "text_config" in config:
        changes = {"text_config": {**config["text_config"], **changes}}
    tiny_models.with_config(folder / "published", **changes)
    return Written(folder / "published", folder / "plain", coded)
