"""Bytes of GGUF blocks to their fields and back: one pair of functions per layout, vectorised over blocks.

Fields of weights [..., n], as gguf_types.py explains them:
  d, dmin   float16 [..., n / block]
  runs      uint8 [..., n / run], index into the type's factors;  minimums   uint8, likewise, the integers themselves
  codes     int16 [..., n / vector], index of a level or a point
  signs     uint8 [..., n / 8], of the types of points but the IQ1: bit i is set where weight i of 8 is negative
A test compares what they decode to with `gguf.dequantize`, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mc_cli.numerics.gguf_points import points
from mc_cli.numerics.gguf_types import GgufType

Fields = dict[str, Tensor]


def values(kind: GgufType, fields: Mapping[str, Tensor]) -> Tensor:
    """float32 [..., n]: the weights that the fields stand for, by the operations of the format's readers."""
    steps, minimums = steps_of(kind, fields)
    runs: Tensor = units(kind, fields).unflatten(-1, (-1, kind.run)) * steps.unsqueeze(-1)
    if minimums is not None:
        runs = runs - minimums.unsqueeze(-1)
    return runs.flatten(-2)


def steps_of(kind: GgufType, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(step, minimum or None) of every run, float32 [..., n / run]."""
    in_block = kind.block // kind.run
    factors = torch.tensor(kind.factors, dtype=torch.float32, device=fields["d"].device)
    steps = fields["d"].float().repeat_interleave(in_block, -1) * factors[fields["runs"].long()]
    if not kind.minimums:
        return steps, None
    return steps, fields["dmin"].float().repeat_interleave(in_block, -1) * fields["minimums"].float()


def units(kind: GgufType, fields: Mapping[str, Tensor]) -> Tensor:
    """float32 [..., n]: levels, or points with their signs."""
    codes = fields["codes"].long()
    if kind.levels:
        return torch.tensor(kind.levels, dtype=torch.float32, device=codes.device)[codes]
    magnitudes = points(kind.name).to(codes.device)[codes].flatten(-2)
    if kind.signed:
        return magnitudes
    return torch.where(spread_bits(fields["signs"]).bool(), -magnitudes, magnitudes)


def spread_bits(packed: Tensor) -> Tensor:
    """uint8 [..., 8 n] of zeros and ones from bytes [..., n], lowest bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places & 1).flatten(-2)


def pack(kind: GgufType, fields: Mapping[str, Tensor]) -> Tensor:
    """uint8 [..., n / block * size_bytes]: the bytes of a row."""
    blocks = fields["d"].shape[-1]
    cut = {name: tensor.unflatten(-1, (blocks, -1)) for name, tensor in fields.items()}
    pieces = _LAYOUTS[kind.name][0](cut)
    return torch.cat([_raw(piece) for piece in pieces], -1).flatten(-2)


def _raw(piece: Tensor) -> Tensor:
    return piece.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unpack(kind: GgufType, packed: Tensor) -> Fields:
    """The fields of rows of bytes."""
    blocks = packed.unflatten(-1, (-1, kind.size_bytes))
    return {name: tensor.flatten(-2) for name, tensor in _LAYOUTS[kind.name][1](blocks).items()}


def _bytes(number: Tensor) -> Tensor:
    return number.to(torch.uint8)


def _half(blocks: Tensor, place: int) -> Tensor:
    return blocks[..., place : place + 2].contiguous().view(torch.float16)


def _joined(codes: Tensor, *, bits: int, rows: int) -> Tensor:
    """Bytes [..., n * bits / 8] that hold codes `rows` apart: of 8 / bits * rows codes each, the first in low bits."""
    parts = codes.unflatten(-1, (-1, 8 // bits, rows)).long()
    shifts = torch.arange(0, 8, bits, device=codes.device).unsqueeze(-1)
    return _bytes((parts << shifts).sum(-2)).flatten(-2)


def _apart(packed: Tensor, *, bits: int, rows: int) -> Tensor:
    """The inverse of `_joined`, int16."""
    parts: Tensor = packed.unflatten(-1, (-1, 1, rows))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    return (parts >> shifts & (1 << bits) - 1).flatten(-3).to(torch.int16)


# Scales and minimums of Q4_K and Q5_K: 8 + 8 numbers of 6 bits in 12 bytes.


def _join_k4(runs: Tensor, minimums: Tensor) -> Tensor:
    low, high, mlow, mhigh = runs[..., :4], runs[..., 4:], minimums[..., :4], minimums[..., 4:]
    first = low | (high >> 4) << 6
    second = mlow | (mhigh >> 4) << 6
    return torch.cat([first, second, (high & 15) | (mhigh & 15) << 4], -1)


def _part_k4(packed: Tensor) -> Fields:
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    runs = torch.cat([first & 63, third & 15 | (first >> 6) << 4], -1)
    return {"runs": runs, "minimums": torch.cat([second & 63, third >> 4 | (second >> 6) << 4], -1)}


def _pack_q2_k(f: Fields) -> list[Tensor]:
    return [f["runs"] | f["minimums"] << 4, _joined(f["codes"], bits=2, rows=32), f["d"], f["dmin"]]


def _unpack_q2_k(b: Tensor) -> Fields:
    scales = b[..., :16]
    codes = _apart(b[..., 16:80], bits=2, rows=32)
    return {
        "runs": scales & 15,
        "minimums": scales >> 4,
        "codes": codes,
        "d": _half(b, 80),
        "dmin": _half(b, 82),
    }


def _pack_q3_k(f: Fields) -> list[Tensor]:
    low = f["runs"] & 15
    high = _joined(f["runs"] >> 4, bits=2, rows=4)
    codes = f["codes"]
    return [
        _joined(codes >> 2, bits=1, rows=32),
        _joined(codes & 3, bits=2, rows=32),
        torch.cat([low[..., :8] | low[..., 8:] << 4, high], -1),
        f["d"],
    ]


def _unpack_q3_k(b: Tensor) -> Fields:
    scales = b[..., 96:108]
    low = torch.cat([scales[..., :8] & 15, scales[..., :8] >> 4], -1)
    runs = low | _bytes(_apart(scales[..., 8:], bits=2, rows=4)) << 4
    codes = _apart(b[..., 32:96], bits=2, rows=32) | _apart(b[..., :32], bits=1, rows=32) << 2
    return {"runs": runs, "codes": codes, "d": _half(b, 108)}


def _pack_q4_k(f: Fields) -> list[Tensor]:
    return [f["d"], f["dmin"], _join_k4(f["runs"], f["minimums"]), _joined(f["codes"], bits=4, rows=32)]


def _unpack_q4_k(b: Tensor) -> Fields:
    codes = _apart(b[..., 16:], bits=4, rows=32)
    return {"d": _half(b, 0), "dmin": _half(b, 2), **_part_k4(b[..., 4:16]), "codes": codes}


def _pack_q5_k(f: Fields) -> list[Tensor]:
    codes = f["codes"]
    high, low = _joined(codes >> 4, bits=1, rows=32), _joined(codes & 15, bits=4, rows=32)
    return [f["d"], f["dmin"], _join_k4(f["runs"], f["minimums"]), high, low]


def _unpack_q5_k(b: Tensor) -> Fields:
    codes = _apart(b[..., 48:], bits=4, rows=32) | _apart(b[..., 16:48], bits=1, rows=32) << 4
    return {"d": _half(b, 0), "dmin": _half(b, 2), **_part_k4(b[..., 4:16]), "codes": codes}


def _pack_q6_k(f: Fields) -> list[Tensor]:
    codes = f["codes"]
    low, high = _joined(codes & 15, bits=4, rows=64), _joined(codes >> 4, bits=2, rows=32)
    return [low, high, _bytes((f["runs"].to(torch.int16) + 128) & 255), f["d"]]


def _unpack_q6_k(b: Tensor) -> Fields:
    codes = _apart(b[..., :128], bits=4, rows=64) | _apart(b[..., 128:192], bits=2, rows=32) << 4
    runs = _bytes((b[..., 192:208].to(torch.int16) + 128) & 255)
    return {"runs": runs, "codes": codes, "d": _half(b, 208)}


def _no_runs(b: Tensor) -> Tensor:
    return torch.zeros((*b.shape[:-1], 1), dtype=torch.uint8, device=b.device)


def _pack_q8_0(f: Fields) -> list[Tensor]:
    return [f["d"], _bytes((f["codes"] + 128) & 255)]


def _unpack_q8_0(b: Tensor) -> Fields:
    codes = (b[..., 2:].to(torch.int16) + 128) & 255
    return {"runs": _no_runs(b), "codes": codes, "d": _half(b, 0)}


def _pack_iq4_nl(f: Fields) -> list[Tensor]:
    return [f["d"], _joined(f["codes"], bits=4, rows=16)]


def _unpack_iq4_nl(b: Tensor) -> Fields:
    return {"runs": _no_runs(b), "codes": _apart(b[..., 2:], bits=4, rows=16), "d": _half(b, 0)}


def _pack_iq4_xs(f: Fields) -> list[Tensor]:
    runs = f["runs"]
    high = _joined(runs >> 4, bits=2, rows=1)
    return [f["d"], high, _joined(runs & 15, bits=4, rows=1), _joined(f["codes"], bits=4, rows=16)]


def _unpack_iq4_xs(b: Tensor) -> Fields:
    runs = _apart(b[..., 4:8], bits=4, rows=1) | _apart(b[..., 2:4], bits=2, rows=1) << 4
    return {"runs": _bytes(runs), "codes": _apart(b[..., 8:], bits=4, rows=16), "d": _half(b, 0)}


# The types of points. Words of 32 or 16 bits are little-endian, as this machine's.


def _sevens(f: Fields) -> Tensor:
    """int64 [..., 8]: four times 7 signs and the 4 bits of a run of 32, as one word."""
    signs: Tensor = (f["signs"].long() & 127).unflatten(-1, (8, 4))
    shifts = torch.arange(0, 28, 7, device=signs.device)
    return (signs << shifts).sum(-1) | f["runs"].long() << 28


def _signs_of(sevens: Tensor) -> Tensor:
    """The 8 signs of 7: the last makes the number of minuses even."""
    seven = _bytes(sevens & 127)
    odd = seven ^ seven >> 4
    odd = odd ^ odd >> 2
    return seven | ((odd ^ odd >> 1) & 1) << 7


def _word_fields(words: Tensor) -> Fields:
    shifts = torch.arange(0, 28, 7, device=words.device)
    return {"signs": _signs_of((words.unsqueeze(-1) >> shifts).flatten(-2)), "runs": _bytes(words >> 28 & 15)}


def _words(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.int32).long()


def _word_bytes(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous().view(torch.uint8)


def _short_bytes(words: Tensor) -> Tensor:
    """Words of 16 bits [...] as bytes [..., 2]."""
    return _bytes(torch.stack([words & 255, words >> 8], -1))


def _shorts(b: Tensor) -> Tensor:
    """int64: words of 16 bits, of bytes."""
    pairs: Tensor = b.unflatten(-1, (-1, 2)).long()
    return pairs[..., 0] | pairs[..., 1] << 8


def _threes(numbers: Tensor) -> Tensor:
    """int64 [..., n / 4]: words of four numbers of 3 bits."""
    four: Tensor = numbers.long().unflatten(-1, (-1, 4))
    return (four << torch.arange(0, 12, 3, device=four.device)).sum(-1)


def _of_threes(words: Tensor) -> Tensor:
    numbers: Tensor = words.unsqueeze(-1) >> torch.arange(0, 12, 3, device=words.device) & 7
    return numbers.flatten(-2)


_HALF = 2048  # points of an IQ1 type that are moved up; as many others are moved down


def _pack_iq1_s(f: Fields) -> list[Tensor]:
    codes = f["codes"].long() % _HALF
    words = _threes(codes >> 8) | f["runs"].long() << 12
    return [f["d"], _bytes(codes & 255), _short_bytes(words).flatten(-2)]


def _unpack_iq1_s(b: Tensor) -> Fields:
    words = _shorts(b[..., 34:])
    codes = b[..., 2:34].long() | _of_threes(words) << 8 | (words >> 15).repeat_interleave(4, -1) * _HALF
    return {"d": _half(b, 0), "codes": codes.to(torch.int16), "runs": _bytes(words >> 12)}


def _pack_iq1_m(f: Fields) -> list[Tensor]:
    codes = f["codes"].long()
    d = _shorts(_raw(f["d"]))
    nibbles = d >> torch.arange(0, 16, 4, device=d.device) & 15
    return [
        _bytes(codes & 255),
        _joined(codes >> 8, bits=4, rows=1),
        _short_bytes(_threes(f["runs"]) | nibbles << 12).flatten(-2),
    ]


def _unpack_iq1_m(b: Tensor) -> Fields:
    words = _shorts(b[..., 48:])
    d = _short_bytes(((words >> 12) << torch.arange(0, 16, 4, device=words.device)).sum(-1))
    codes = b[..., :32].to(torch.int16) | _apart(b[..., 32:48], bits=4, rows=1) << 8
    return {"d": d.contiguous().view(torch.float16), "codes": codes, "runs": _bytes(_of_threes(words))}


def _pack_iq2_xxs(f: Fields) -> list[Tensor]:
    codes = _bytes(f["codes"]).unflatten(-1, (8, 4))
    signs = _word_bytes(_sevens(f)).unflatten(-1, (8, 4))
    return [f["d"], torch.cat([codes, signs], -1).flatten(-2)]


def _unpack_iq2_xxs(b: Tensor) -> Fields:
    runs = b[..., 2:].unflatten(-1, (8, 8))
    words = _words(runs[..., 4:].flatten(-2))
    return {"d": _half(b, 0), "codes": runs[..., :4].flatten(-2).to(torch.int16), **_word_fields(words)}


def _pack_iq2_xs(f: Fields) -> list[Tensor]:
    words = f["codes"].long() | (f["signs"].long() & 127) << 9
    return [f["d"], _short_bytes(words).flatten(-2), _joined(f["runs"], bits=4, rows=1)]


def _unpack_iq2_xs(b: Tensor) -> Fields:
    words = _shorts(b[..., 2:66])
    runs = _bytes(_apart(b[..., 66:], bits=4, rows=1))
    return {"d": _half(b, 0), "codes": (words & 511).to(torch.int16), "signs": _signs_of(words >> 9), "runs": runs}


def _pack_iq2_s(f: Fields) -> list[Tensor]:
    high = _joined(f["codes"] >> 8, bits=2, rows=1)
    return [f["d"], _bytes(f["codes"] & 255), f["signs"], high, _joined(f["runs"], bits=4, rows=1)]


def _unpack_iq2_s(b: Tensor) -> Fields:
    codes = b[..., 2:34].to(torch.int16) | _apart(b[..., 66:74], bits=2, rows=1) << 8
    runs = _bytes(_apart(b[..., 74:], bits=4, rows=1))
    return {"d": _half(b, 0), "codes": codes, "signs": b[..., 34:66], "runs": runs}


def _pack_iq3_xxs(f: Fields) -> list[Tensor]:
    return [f["d"], _bytes(f["codes"]), _word_bytes(_sevens(f))]


def _unpack_iq3_xxs(b: Tensor) -> Fields:
    return {"d": _half(b, 0), "codes": b[..., 2:66].to(torch.int16), **_word_fields(_words(b[..., 66:]))}


def _pack_iq3_s(f: Fields) -> list[Tensor]:
    high = _joined(f["codes"] >> 8, bits=1, rows=1)
    return [f["d"], _bytes(f["codes"] & 255), high, f["signs"], _joined(f["runs"], bits=4, rows=1)]


def _unpack_iq3_s(b: Tensor) -> Fields:
    codes = b[..., 2:66].to(torch.int16) | _apart(b[..., 66:74], bits=1, rows=1) << 8
    runs = _bytes(_apart(b[..., 106:], bits=4, rows=1))
    return {"d": _half(b, 0), "codes": codes, "signs": b[..., 74:106], "runs": runs}


_LAYOUTS: Mapping[str, tuple[Callable[[Fields], list[Tensor]], Callable[[Tensor], Fields]]] = {
    "q2_k": (_pack_q2_k, _unpack_q2_k),
    "q3_k": (_pack_q3_k, _unpack_q3_k),
    "q4_k": (_pack_q4_k, _unpack_q4_k),
    "q5_k": (_pack_q5_k, _unpack_q5_k),
    "q6_k": (_pack_q6_k, _unpack_q6_k),
    "q8_0": (_pack_q8_0, _unpack_q8_0),
    "iq4_nl": (_pack_iq4_nl, _unpack_iq4_nl),
    "iq4_xs": (_pack_iq4_xs, _unpack_iq4_xs),
    "iq1_s": (_pack_iq1_s, _unpack_iq1_s),
    "iq1_m": (_pack_iq1_m, _unpack_iq1_m),
    "iq2_xxs": (_pack_iq2_xxs, _unpack_iq2_xxs),
    "iq2_xs": (_pack_iq2_xs, _unpack_iq2_xs),
    "iq2_s": (_pack_iq2_s, _unpack_iq2_s),
    "iq3_xxs": (_pack_iq3_xxs, _unpack_iq3_xxs),
    "iq3_s": (_pack_iq3_s, _unpack_iq3_s),
}
