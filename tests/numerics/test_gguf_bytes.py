"""Blocks of GGUF, decoded here and by the `gguf` package, from random bytes of every type: bit by bit the same."""

from __future__ import annotations

import numpy
import pytest
import torch

from mc_cli.numerics.gguf_bytes import pack, unpack, values
from mc_cli.numerics.gguf_points import points
from mc_cli.numerics.gguf_types import TYPES, type_at

gguf = pytest.importorskip("gguf")
every_type = pytest.mark.parametrize("name", sorted(TYPES))


def random_blocks(name: str, rows: int = 5, blocks: int = 3) -> torch.Tensor:
    """Random bytes whose float16 numbers are finite: packed again from fields, with scales of their own."""
    kind = TYPES[name]
    generator = torch.Generator().manual_seed(len(name))
    raw = torch.randint(0, 256, (rows, blocks * kind.size_bytes), generator=generator, dtype=torch.uint8)
    fields = unpack(kind, raw)
    for scale in fields.keys() & {"d", "dmin"}:
        fields[scale] = torch.randn(fields[scale].shape, generator=generator).half()
    return pack(kind, fields)


@every_type
def test_values_are_those_of_the_gguf_package(name: str) -> None:
    packed = random_blocks(name)
    kind = TYPES[name]
    expected = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(kind.number))
    found = values(kind, unpack(kind, packed))
    assert torch.equal(found, torch.from_numpy(expected))


@every_type
def test_fields_pack_to_the_bytes_they_came_from(name: str) -> None:
    packed = random_blocks(name)
    assert torch.equal(pack(TYPES[name], unpack(TYPES[name], packed)), packed)


@every_type
def test_sizes_and_names_are_those_of_the_gguf_package(name: str) -> None:
    kind = TYPES[name]
    number = gguf.GGMLQuantizationType(kind.number)
    assert number.name == kind.label
    assert gguf.GGML_QUANT_SIZES[number] == (kind.block, kind.size_bytes)


@pytest.mark.parametrize("name", ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"])
def test_points_are_those_of_the_gguf_package(name: str) -> None:
    quant = getattr(gguf.quants, name.upper())
    quant.init_grid()
    grid = quant.grid.reshape(quant.grid_shape)
    if name.startswith("iq1"):  # moved up, then moved down
        grid = numpy.concatenate([grid + quant.delta, grid - quant.delta])
    assert (points(name).numpy() == grid).all()


def test_narrow_rows_get_a_small_type() -> None:
    assert type_at(2.0625, 1408).name == "iq4_nl"  # type: ignore[union-attr]
    assert type_at(6, 1408).name == "q8_0"  # type: ignore[union-attr]
    assert type_at(2.0625, 1400) is None and type_at(7, 256) is None
    assert type_at(2.0625, 512).name == "iq2_xxs"  # type: ignore[union-attr]
