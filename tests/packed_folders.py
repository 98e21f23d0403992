"""Packed folders made from tiny checkpoints by plain rounding, with widths mixed in every way the format allows.

Written without stage quantize, so that loading and exporting are tested against an independent writer of the format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.packed import CONFIG_FOLDER, KEPT, LAYOUT, ExpertLayout, PackedLayout, part_file
from mc_cli.artifacts.store import StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.encodings import encoding_for
from mc_cli.encodings.affine import AffineEncoding, choose_group_size
from mc_cli.encodings.gguf import GgufEncoding
from mc_cli.exporters import dequantizes, exporter_from_name
from mc_cli.measuring.logit_source import Reading
from mc_cli.measuring.readback import ReadBack, read_back
from mc_cli.models import experts
from mc_cli.models.checkpoint import REST, Checkpoint, read_config
from mc_cli.models.inventory import take_inventory, tied_tensors
from mc_cli.models.model_files import copy_model_files
from mc_cli.numerics.gguf_bytes import pack, unpack, values
from mc_cli.numerics.grids import minmax_grid
from mc_cli.numerics.packing import pack_codes
from mc_cli.parts import ModelInventory, Role

WIDTHS = (1, 2, 3, 4, 16)
LINEAR_BITS = {Role.ATTENTION: 4, Role.SHARED: 4, Role.DENSE: 3, Role.EMBEDDING: 6}


def pack_folder(
    checkpoint_folder: Path,
    folder: Path,
    *,
    widths: tuple[int, ...] = WIDTHS,
    role_bits: dict[Role, int] | None = None,
    pruned: tuple[int, ...] = (),
    trust_remote_code: bool = False,
    family: str = "affine",
) -> Path:
    """Writes the packed folder of a tiny checkpoint: expert e's projection p has width number e + p of `widths`.

    role_bits   width of other roles' matrices; what is not named is kept
    pruned      experts without weights, in every layer
    family      of the encodings: affine, gguf, mlx or integer; groups of the last two have up to 64 inputs
    """
    config = read_config(checkpoint_folder, trust_remote_code=trust_remote_code)
    source = Checkpoint(checkpoint_folder, config, dtype=config.dtype or torch.bfloat16, device=torch.device("cpu"))
    inventory = take_inventory(source.model, stored_dtypes=source.stored_dtypes)
    for part in [REST, *range(inventory.num_layers)]:
        source.load(part)
    bits_of = LINEAR_BITS if role_bits is None else role_bits
    linears = _linear_keys(inventory, bits_of, family)
    blocks = (_expert_layout(block, widths, pruned, family) for block in inventory.expert_blocks)
    layout = PackedLayout(tuple(blocks), linears)
    tensors = _tensors(source.model, layout)
    copy_model_files(checkpoint_folder, folder / CONFIG_FOLDER)
    write_json(folder / LAYOUT, layout.to_json())
    for part in [REST, *range(inventory.num_layers)]:
        mine = {name: tensor.contiguous() for name, tensor in tensors.items() if source.layer_of(name) == part}
        save_file(mine, folder / part_file(part), metadata={"format": "pt"})
    return folder


def packed_work_dir(checkpoint_folder: Path, work_dir: Path, **options: Any) -> Path:
    """A work directory whose stage quantize is done, without the stages before it. Options as for `pack_folder`."""
    stage = StageFolder(WorkDir(work_dir), "quantize", {"quantizer": "rounding for tests"}, {"model": "0" * 64})
    stage.begin(force=False)
    pack_folder(checkpoint_folder, stage.folder, **options)
    stage.finish("0")
    return work_dir


def encode(weight: torch.Tensor, encoding: Any) -> dict[str, torch.Tensor]:
    """The stored parts of a matrix [out_features, in_features], rounded to the nearest level of each group's range.

    Blocks of GGUF are random ones, of weights as large as the matrix's.
    """
    if isinstance(encoding, GgufEncoding):
        return {"codes": _random_blocks(weight, encoding)}
    grouped = weight.float().unflatten(-1, (-1, encoding.group_size))
    if not isinstance(encoding, AffineEncoding):
        grid = minmax_grid(grouped, bits=encoding.bits, rule=encoding.rule)
        codes = grid.codes(grouped).to(torch.uint8).flatten(-2)
        return {"codes": pack_codes(codes, bits=encoding.bits), **grid.stored()}
    low, high = grouped.amin(-1), grouped.amax(-1)
    levels = 2**encoding.bits - 1
    scales = ((high - low) / levels).clamp_min(1e-6).half()
    denominator = encoding.zero_point_denominator
    zero_points = (-low / scales.float() * denominator).round().clamp(0, 255).to(torch.uint8)
    codes = grouped / scales.float()[..., None] + (zero_points.float() / denominator)[..., None]
    codes = codes.round().clamp(0, levels).to(torch.uint8).flatten(-2)
    return {"codes": pack_codes(codes, bits=encoding.bits), "scales": scales, "zero_points": zero_points}


def _random_blocks(weight: torch.Tensor, encoding: GgufEncoding) -> torch.Tensor:
    spec = encoding.tensor_specs(*weight.shape)["codes"]
    fields = unpack(encoding.kind, torch.randint(0, 256, spec.shape, dtype=torch.uint8))
    for name in fields.keys() & {"d", "dmin"}:
        fields[name] = torch.ones_like(fields[name])
    size = float(weight.float().std() / values(encoding.kind, fields).std())
    for name in fields.keys() & {"d", "dmin"}:
        fields[name] = fields[name] * size
    return pack(encoding.kind, fields)


def _key(bits: float, in_features: int, family: str) -> str:
    if family != "affine" and bits != 16:
        return encoding_for(family, bits, 256, in_features, group_size_limit=64).key
    return KEPT if bits == 16 else AffineEncoding(bits, choose_group_size(in_features, 32)).key


def _expert_layout(block, widths: tuple[int, ...], pruned: tuple[int, ...], family: str) -> ExpertLayout:
    encodings = {
        projection.name: tuple(
            None if expert in pruned else _key(widths[(expert + number) % len(widths)], projection.in_features, family)
            for expert in range(block.num_experts)
        )
        for number, projection in enumerate(block.projections)
    }
    shapes = {projection.name: (projection.out_features, projection.in_features) for projection in block.projections}
    return ExpertLayout.of_whole(block.path, shapes, encodings)


def _linear_keys(inventory: ModelInventory, bits_of: dict[Role, int], family: str) -> dict[str, str]:
    return {
        part.name.removesuffix(".weight"): _key(bits_of[part.role], part.shape[1], family)
        for part in inventory.tensors
        if part.role in bits_of and len(part.shape) == 2 and part.name.endswith(".weight")
    }


def _tensors(model: torch.nn.Module, layout: PackedLayout) -> dict[str, torch.Tensor]:
    """Every tensor of the packed model by its stored name."""
    from mc_cli.artifacts.packed import encoding_of

    found = {name: tensor for name, tensor in model.state_dict().items() if name not in tied_tensors(model)}
    for path, key in layout.linears.items():
        weight = found.pop(f"{path}.weight")
        found |= {f"{path}.{part}": tensor for part, tensor in encode(weight, encoding_of(key)).items()}
    for block in layout.experts:
        module = model.get_submodule(block.path)
        for projection in block.projections:
            del found[f"{block.path}.{projection}"]
            for stack in block.stacks(projection):
                encoding = encoding_of(stack.key)
                weights = [experts.expert_weight(module, projection, expert) for expert, _ in stack.members]
                parts = [{"weight": weight} if encoding is None else encode(weight, encoding) for weight in weights]
                for part in parts[0]:
                    found[f"{block.path}.{stack.name(part)}"] = torch.stack([entry[part] for entry in parts])
    return found


def read_again(out: Path, packed: Path, format: str, **how: Any) -> ReadBack:
    """Returns what stage export finds on reading `out`, of that format, back; `how` are further fields of Reading."""
    exporter = exporter_from_name(format)
    reading = Reading(torch.float32, torch.device("cpu"), **how)
    return read_back(out, packed, exporter.open, reading, dequantized=dequantizes(format))
