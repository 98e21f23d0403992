"""Tiny packed models of the shapes that formats of others hold, and their exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mc_cli.encodings import encoding_from_key
from mc_cli.packed.packed_files import open_packed
from mc_cli.parts import Role
from mc_cli.progress import SilentProgress, StageResult
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export

_SMALL = {"hidden_size": 64, "num_hidden_layers": 2}
_MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {**_SMALL, "intermediate_size": 96, "num_local_experts": 4},
    "qwen2_moe": {
        **_SMALL,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
    },
    "qwen3_moe": {**_SMALL, "head_dim": 16, "mlp_only_layers": [], "moe_intermediate_size": 32, "num_experts": 4},
    "olmoe": {**_SMALL, "num_key_value_heads": 4, "intermediate_size": 32, "num_experts": 4},
    "deepseek_v2": {**_SMALL, **_MLA, "intermediate_size": 64, "moe_intermediate_size": 32},
    "glm4_moe": {**_SMALL, "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 32},
}
LINEARS = {Role.ATTENTION: 8, Role.SHARED: 8, Role.DENSE: 8}
Packed = Callable[..., Path]


def do_export(work: Path, out: Path, format: str) -> StageResult:
    settings = ExportSettings(format=format, out=str(out))
    return export.run(settings, RunSettings(dtype="float32"), work, force=False, progress=SilentProgress())


def decoded_experts(work: Path) -> dict[tuple[str, str, int], Tensor]:
    """(path of the experts module, projection, expert) -> float32 [out, in], gate and up apart."""
    files = open_packed(work / "packed")
    found = {}
    for block in files.layout.experts:
        for projection in block.projections:
            names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
            for stack in block.stacks(projection):
                encoding = encoding_from_key(stack.key)
                parts = {f"{block.path}.{stack.name(part)}": part for part in encoding.tensor_specs(64, 64)}
                tensors = {parts[name]: tensor for name, tensor in files.read(parts)}
                numbers = encoding.dequantize(tensors, stack.shape[1])
                for (expert, _), matrix in zip(stack.members, numbers, strict=True):
                    for name, rows in zip(names, matrix.chunk(len(names)), strict=True):
                        found[block.path, name, expert] = rows
    return found
