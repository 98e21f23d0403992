"""Published formats: what they stand for, value by value, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mc_cli.errors import CheckpointError
from mc_cli.models.tensor_files import TensorFiles
from mc_cli.sources import layouts_of, source_formats
from tests.sources.published import FORMATS, Draw, Published, by_block, fp8_blocks

ATTENTION, EXPERT = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.3.up_proj.weight"
PLAIN = "model.norm.weight"
SHAPES = {ATTENTION: (40, 64), EXPERT: (17, 96)}


def encoded(published: Published) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Stored tensors of two matrices and a plain one, and the values of the matrices."""
    draw = Draw(1)
    stored, values = {PLAIN: torch.ones(8)}, {}
    for key, shape in SHAPES.items():
        parts, values[key] = published.encode(key, shape, draw)
        stored |= parts
    return stored, values


def opened(folder: Path, stored: Mapping[str, torch.Tensor], quantization: Mapping[str, Any] | None) -> TensorFiles:
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, folder / "model.safetensors")
    return TensorFiles(folder, None if quantization is None else dict(quantization))


def read(files: TensorFiles, key: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with files.reading([key], {key: dtype}) as slices:
        found: torch.Tensor = slices[key][...]
        return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_stands_for_its_values(name: str, tmp_path: Path) -> None:
    stored, values = encoded(FORMATS[name])
    files = opened(tmp_path, stored, FORMATS[name].quantization)
    assert {key: files.tensors[key].shape for key in SHAPES} == SHAPES
    for key, exact in values.items():
        assert torch.equal(read(files, key), exact.float())
        assert files.tensors[key].dtype is None and files.tensors[key].layout is not None
    assert files.tensors[PLAIN].dtype == torch.float32
    assert files.size_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert sum(files.ways().values()) == 2
    rest = files.tensors.keys() - SHAPES.keys() - {PLAIN}
    assert all(key.endswith(("input_scale", "qscale_act")) for key in rest)


def test_every_format_is_tried() -> None:
    tried = {published.quantization["quant_method"] for published in FORMATS.values()}
    assert tried | {"mxfp4"} == {method for source in source_formats() for method in source.methods}


def test_stacks_are_decoded_matrix_by_matrix_and_rounded_once(tmp_path: Path) -> None:
    """Fused experts: blocks, a scale for each expert, and fbgemm's for each output of the transpose."""
    draw = Draw(0)
    codes, values = draw.fp8(3, 40, 64)
    blocks, whole, outputs = (
        draw.scales(3, 3, 4, mean=0.05),
        draw.scales(3, 1, 1, mean=0.05),
        draw.scales(3, 1, 64, mean=1),
    )
    grid = torch.stack([by_block(each, (40, 64), (16, 16)) for each in blocks])
    for place, (quantization, ending, scales, factors) in enumerate(
        (
            (FORMATS["fp8, weight_scale_inv"].quantization, "_scale_inv", blocks, grid),
            (FORMATS["fp8, qscale_weight"].quantization, "_scale_inv", whole, whole.double()),
            (FORMATS["fp8, qscale_weight"].quantization, "_scale_inv", whole.flatten(), whole.double()),
            (FORMATS["fbgemm"].quantization, "_scale", outputs, outputs.double()),
        )
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        files = opened(folder, {"mlp.experts.gate_up": codes, f"mlp.experts.gate_up{ending}": scales}, quantization)
        exact = (values * factors).float()
        for dtype in (torch.float32, torch.bfloat16):
            found = read(files, "mlp.experts.gate_up", dtype)
            assert found.dtype == dtype and torch.equal(found, exact.to(dtype))


# Refusals, by name and before a weight is read.


def dropped(ending: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda stored: stored.pop(next(key for key in stored if key.endswith(ending)))


def cut(ending: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(stored: dict[str, torch.Tensor]) -> None:
        key = next(key for key in stored if key.endswith(ending))
        stored[key] = stored[key][:-1] if stored[key].ndim else stored[key].repeat(2)

    return change


def added(ending: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda stored: stored.update({ATTENTION.removesuffix("weight") + ending: torch.ones(64)})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fp8, .scale", dropped("q_proj.weight"), r"scales belong to no quantized.*\n.*q_proj\.scale"),
        ("fp8, .scale", dropped("q_proj.scale"), r"without scales.*\n.*q_proj\.weight: float8"),
        ("fp8, .scale", cut("q_proj.scale"), r"not whole.*\n.*q_proj\.scale: scales \(2, 4\), blocks.* need \(3, 4\)"),
        ("fp8, fp4 experts", dropped("up_proj.scale"), r"without scales.*\n.*up_proj\.weight: int8"),
        ("fp8, fp4 experts", cut("up_proj.scale"), r"not whole.*\n.*up_proj\.scale"),
        ("fp8, qscale_weight", dropped("up_proj.weight"), r"belong to no.*\n.*up_proj\.qscale_weight"),
        ("fp8, qscale_weight", cut("qscale_weight"), r"not whole.*\n.*q_proj\.qscale_weight: scales \(2,\)"),
        ("fp8, qscale_weight", added("weight_scale"), r"several ways.*q_proj\.weight_scale"),
        ("mxfp8", cut("q_proj.weight_scale"), r"not whole.*\n.*q_proj\.weight_scale"),
        ("fbgemm", dropped("q_proj.weight_scale"), r"without scales.*\n.*q_proj\.weight"),
        ("int4 by group", dropped("q_proj.weight_packed"), r"belong to no.*\n.*q_proj\.weight_scale"),
        ("int4 by group", dropped("q_proj.weight_scale"), r"without scales.*\n.*q_proj\.weight_packed: int32"),
        ("int4 by group", cut("q_proj.weight_packed"), r"not whole.*\n.*q_proj\.weight_scale"),
        ("int4 by group", added("weight_own"), r"not known.*\n.*q_proj\.weight_own"),
        ("int4 by group", added("weight"), r"not whole.*\n.*q_proj\.weight is there, too"),
        ("int4 with zero points", cut("q_proj.weight_zero_point"), r"zero points \(4, 2\).* need \(5, 2\)"),
        ("int4 by activation", cut("q_proj.weight_g_idx"), r"groups of columns \(63,\)"),
        ("int3 by row", dropped("q_proj.weight_shape"), r"nothing tells how many columns"),
        ("int8 by row", dropped("q_proj.weight_scale"), r"without scales.*\n.*q_proj\.weight: int8"),
        ("NVFP4", dropped("q_proj.weight_global_scale"), r"without scales.*\n.*q_proj\.weight_packed"),
        ("modelopt NVFP4", cut("q_proj.weight_scale"), r"not whole.*\n.*q_proj\.weight_scale"),
        ("modelopt NVFP4", added("pre_quant_scale"), r"not known.*\n.*q_proj\.pre_quant_scale"),
        ("modelopt NVFP4", cut("weight_scale_2"), r"weight_scale_2 \(2,\) is not one scale"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_by_name(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], words: str, tmp_path: Path
) -> None:
    stored, _ = encoded(FORMATS[name])
    change(stored)
    with pytest.raises(CheckpointError, match=words):
        opened(tmp_path, stored, FORMATS[name].quantization)


@pytest.mark.parametrize("name", FORMATS)
def test_scales_that_are_not_numbers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    stored, _ = encoded(FORMATS[name])
    key = next(key for key in stored if key.startswith(ATTENTION.removesuffix("weight")) and "scale" in key)
    damaged = stored[key].clone().reshape(-1)
    if damaged.element_size() == 1:
        damaged.view(torch.uint8)[-1] = 0x7F if damaged.dtype == torch.float8_e4m3fn else 0xFF
    else:
        damaged[-1] = float("nan")
    files = opened(tmp_path, {**stored, key: damaged.reshape(stored[key].shape)}, FORMATS[name].quantization)
    read(files, EXPERT)
    with pytest.raises(CheckpointError, match=rf"1 of the \d+ scales in {re.escape(key)} \(model.safetensors\)"):
        read(files, ATTENTION)


def test_parts_that_only_their_values_show_to_be_wrong(tmp_path: Path) -> None:
    stored, _ = encoded(FORMATS["int4 by activation"])
    stem = ATTENTION.removesuffix("weight")
    stored[f"{stem}weight_shape"] = torch.tensor([40, 65])
    stored[f"{EXPERT}_g_idx"] += 1
    files = opened(tmp_path, stored, FORMATS["int4 by activation"].quantization)
    with pytest.raises(CheckpointError, match=r"q_proj.weight_packed .*\[40, 65\] by its weight_shape"):
        read(files, ATTENTION)
    with pytest.raises(CheckpointError, match=r"up_proj.weight_packed .*weight_g_idx names group 3, there are 3"):
        read(files, EXPERT)


def compressed(**changes: Any) -> dict[str, Any]:
    return {**FORMATS["int4 by group"].quantization, **changes}


def weights(**changes: Any) -> dict[str, Any]:
    group = FORMATS["int4 by group"].quantization["config_groups"]["group_0"]
    return compressed(config_groups={"group_0": {**group, "weights": {**group["weights"], **changes}}})


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'.*compressed-tensors, fbgemm_fp8, fp8, modelopt, mxfp4, mxfp8"),
        ({"quant_method": "fp8", "expert_dtype": "fp6"}, "expert_dtype is 'fp6'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'"),
        (compressed(format="marlin-24"), "format of quantization_config is 'marlin-24'"),
        (compressed(format="mixed-precision"), "format of quantization_config is 'mixed-precision'"),
        (compressed(config_groups={}), "config_groups of quantization_config is {}"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (compressed(transform_config={"config_groups": {"R1": {}}}), "transform_config.*rotated"),
        (weights(num_bits=12), "12-bit int"),
        (weights(type="float"), "4-bit float"),
        (weights(group_size=0), "group_size"),
        (weights(strategy="attn_head"), "strategy"),
        (weights(strategy="block", block_structure=[16]), "block_structure"),
    ],
)
def test_settings_that_are_not_known_are_refused_by_name(quantization: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        layouts_of(tmp_path, quantization)


def test_codes_of_a_checkpoint_that_says_nothing_of_them(tmp_path: Path) -> None:
    stored, _ = fp8_blocks("weight_scale_inv")(ATTENTION, (40, 64), Draw(0))
    with pytest.raises(CheckpointError, match=r"(?s)1 quantized tensors without scales.*config.json is not there"):
        opened(tmp_path, stored, None)


def test_the_page_on_sources_names_every_format() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "sources.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w-]+)`", page, re.MULTILINE))
    assert named - {"quant_method"} == {method for source in source_formats() for method in source.methods}
