"""Matrices that compressed-tensors has coded, read by mc-cli: the values that the library itself gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mc_cli.models.tensor_files import TensorFiles

compressed_tensors = pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme  # noqa: E402

ROWS, COLUMNS = 40, 96
KEY = "model.layers.0.mlp.experts.0.up_proj"


def scales_of(weight: torch.Tensor, block: tuple[int, int], largest: float) -> torch.Tensor:
    """The largest magnitude of each block over the format's largest number."""
    grid = [[part.abs().amax() for part in row.split(block[1], dim=1)] for row in weight.split(block[0])]
    return torch.tensor(grid) / largest


CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int], float]] = {
    f"int{bits} by group": (
        "pack-quantized",
        {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32},
        (1, 32),
        max(1.0, 2.0 ** (bits - 1) - 1),
    )
    for bits in (2, 3, 4, 5, 6, 8)
} | {
    "int4 by row": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}, (1, COLUMNS), 7),
    "int8 by row": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (1, COLUMNS), 127),
    "FP8 by row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (1, COLUMNS), 448),
    "FP8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, (ROWS, COLUMNS), 448),
    "FP8 by block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
        (16, 64),
        448,
    ),
    "MXFP8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        (1, 32),
        448,
    ),
    "MXFP4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        (1, 32),
        6,
    ),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        (1, 16),
        6,
    ),
}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_library(name: str, zeros: bool, tmp_path: Path) -> None:
    format, weights, block, largest = CASES[name]
    if zeros and weights["type"] == "float":
        pytest.skip("floating-point codes have no zero points")
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS) * 0.1
    scheme = QuantizationScheme(targets=["Linear"], weights={**weights, "symmetric": not zeros}, format=format)
    scales = scales_of(weight, block, largest)
    state = {"weight": weight, "weight_scale": scales.reshape(1) if scales.numel() == 1 else scales}
    if name.startswith("MX"):
        state["weight_scale"] = 2.0 ** scales.log2().ceil()
    if name == "NVFP4":
        state["weight_global_scale"] = torch.tensor([448 * 6 / float(weight.abs().max())])
        state["weight_scale"] = (scales * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    if zeros:
        state["weight_zero_point"] = torch.randint(-2, 2, state["weight_scale"].shape).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(format)
    coded = compressor.compress(state, scheme)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=format, quantization_status="compressed")
    save_file({f"{KEY}.{part}": tensor.contiguous() for part, tensor in coded.items()}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path, config.to_dict())
    with files.reading([f"{KEY}.weight"]) as slices:
        found = slices[f"{KEY}.weight"][...]
    theirs = compressor.decompress(dict(coded), scheme)["weight"].float()
    assert found.shape == (ROWS, COLUMNS) and float((found - weight).norm() / weight.norm()) < 1
    if "fp4" in format or "mxfp8" in format:  # the library gives these back in bfloat16
        found = found.bfloat16().float()
    assert torch.equal(found, theirs)
