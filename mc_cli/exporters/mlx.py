"""MLX, as mlx-lm and what is built on it load it: experts stacked, codes in 32-bit words, widths by path.

A layer's experts lie in one tensor for each of gate, up and down, so that they share a width per projection, as
`--for mlx` plans them. Source of the layout: mlx_lm.models.switch_layers and mlx_lm.utils.load_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.files import write_json, write_text
from mc_cli.artifacts.packed import PackedLayout
from mc_cli.encodings import Encoding
from mc_cli.encodings.mlx import MlxEncoding
from mc_cli.errors import FamilyError, listed
from mc_cli.exporters import ExportJob
from mc_cli.exporters.decoded import DecodedModel, StoredFiles, decoding
from mc_cli.exporters.model_card import model_card
from mc_cli.exporters.packed_checkpoint import (
    ExpertPath,
    PackedCheckpoint,
    check_layout,
    expert_leaves,
    require_family,
)
from mc_cli.exporters.shards import ShardWriter
from mc_cli.measuring.logit_source import LogitSource, Reading
from mc_cli.models.model_folder import read_config
from mc_cli.numerics.packing import unpack_codes
from mc_cli.packed.packed_files import open_packed

NAME = "mlx"
CARRIES_POLICY = False
DESCRIPTION = "for mlx-lm and other tools of Apple's MLX; plan and quantize with --for mlx"
ENGINES = ("mlx-lm",)
KEEPS = "one width for each layer and projection; no dropped, cut or shared experts"
# Families that mlx-lm 0.32 names and computes as these checkpoints do.
FAMILIES = ("glm4_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
# Entries of config.json, by model_type, that it takes for granted or does not read: what they have to be.
_TAKEN: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "mixtral": {"sliding_window": (None,)},
    "olmoe": {"clip_qkv": (None,)},
    "qwen2_moe": {
        "norm_topk_prob": (False,),
        "mlp_only_layers": ([], None),
        "decoder_sparse_step": (1,),
        "qkv_bias": (True,),
        "use_sliding_window": (False,),
    },
    "qwen3_moe": {"use_sliding_window": (False,)},
}
_STACKED = "switch_mlp"

_OPENING = (
    "A Mixture-of-Experts language model in MLX's format, rounded by mc-cli: scales and biases searched as the format "
    "stores them, codes found under error feedback, widths chosen layer by layer."
)
_LOADING = """\
```sh
mlx_lm.generate --model PATH --prompt "Once upon a time"
```"""


def check(config: Any) -> None:
    """Raises FamilyError for a model that mlx-lm does not run, or names otherwise."""
    require_family(config, FAMILIES, "for MLX")
    missing = object()
    taken: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), **_TAKEN.get(config.model_type, {})}
    wrong = [
        f"{name} is {found!r:.60}, there {wanted[0]!r}"
        for name, wanted in taken.items()
        if (found := getattr(config, name, missing)) is not missing and found not in wanted
    ]
    usual = config.hidden_size // config.num_attention_heads
    if config.model_type == "mixtral" and (getattr(config, "head_dim", None) or usual) != usual:
        wrong.append(f"head_dim is {config.head_dim}, there {usual}")
    if wrong:
        raise FamilyError(
            f"mlx-lm computes {config.model_type} otherwise than this model is, so it cannot be exported for MLX:\n"
            f"{listed(wrong)}\nOther formats: mc-cli export --list."
        )
    expert_leaves(config, "MLX")


def _holds(encoding: Encoding) -> bool:
    return isinstance(encoding, MlxEncoding)


def check_packed(layout: PackedLayout, config: Any) -> None:
    """Raises InputError, naming all of them, for experts and matrices that the format cannot hold."""
    check_layout(layout, _holds, name="MLX", engine=NAME, stacked=True)


def export(job: ExportJob) -> None:
    """Writes config.json with the widths by path, tensors in MLX's packing, and a card.

    Raises FamilyError for a model that mlx-lm does not run, InputError, naming all of them, for experts and matrices
    that the format cannot hold.
    """
    files = open_packed(job.packed_folder)
    config = read_config(job.config_folder)
    check(config)
    check_packed(files.layout, config)
    checkpoint = PackedCheckpoint(files, config)
    writer = ShardWriter(job.target, shard_bytes=job.shard_bytes)
    quantization: dict[str, Any] = {}
    for part in job.parts:
        for name, tensor in _stacked(checkpoint.plain(part).items(), leaf=".weight"):
            writer.add(name, tensor)
        matrices = {matrix.path: matrix for matrix in checkpoint.matrices(part)}
        for stored, written in (("codes", "weight"), ("scales", "scales"), ("biases", "biases")):
            parts = {path: _as_written(matrix.tensors[stored], job.dtype) for path, matrix in matrices.items()}
            for path, tensor in _stacked(parts.items()):
                writer.add(f"{path}.{written}", tensor)
        quantization |= {_place(path)[0]: _settings(matrix.encoding) for path, matrix in matrices.items()}
        job.advance("outside the layers" if part < 0 else f"layer {part}")
    writer.finish()
    usual: dict[str, Any] = max(quantization.values(), key=list(quantization.values()).count, default={})
    config_json = _as_published(job.original_config(), config)
    if quantization:
        config_json = {**config_json, "quantization": {**usual, "mode": "affine", **quantization}}
    write_json(job.target / "config.json", config_json)
    title = f"{job.card.base_model or job.card.model_type}, in MLX's format by mc-cli"
    card = model_card(job.card, title=title, opening=_OPENING, loading=_LOADING, library="mlx")
    write_text(job.target / "README.md", card)


def _as_published(entries: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """config.json with the names that mlx-lm reads, also where transformers 5 has written it under its own."""
    found = dict(entries)
    for alias, name in config.attribute_map.items():
        if name in found:
            found.setdefault(alias, found[name])
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        found.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            found.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        kind = rope.get("rope_type", "default")
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        found.setdefault("rope_scaling", None if kind == "default" else {**scaling, "type": kind})
    return found


def _place(path: str) -> tuple[str, int | None]:
    """(path there, number in the stack) of a module of the original checkpoint."""
    expert = ExpertPath.of(path)
    if expert is None:
        return path, None
    return f"{expert.experts.removesuffix('experts')}{_STACKED}.{expert.projection}", expert.number


def _stacked(tensors: Iterable[tuple[str, Tensor]], leaf: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name there, tensor), experts' stacked in their order. leaf: what is behind the path in experts' names."""
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        path, number = _place(name.removesuffix(leaf))
        if number is None:
            yield name, tensor
        else:
            stacks.setdefault(f"{path}{leaf}", {})[number] = tensor
    for path, members in stacks.items():
        yield path, torch.stack([members[number] for number in range(len(members))])


def _as_written(tensor: Tensor, dtype: str) -> Tensor:
    """Codes as 32-bit words, scales and biases, exactly, in the model's dtype, in which the engine computes."""
    if tensor.dtype == torch.uint8:
        return tensor.contiguous().view(torch.uint32)
    written: Tensor = tensor.to(getattr(torch, dtype))
    return written


def _settings(encoding: Encoding) -> dict[str, int]:
    assert isinstance(encoding, MlxEncoding)
    return {"group_size": encoding.group_size, "bits": encoding.bits}


def open(directory: Path, reading: Reading) -> LogitSource:
    """The directory as config.json says that it is packed, computed by transformers."""
    with decoding(directory):
        files = StoredFiles(directory)
        leaves = expert_leaves(read_config(directory), "MLX")
        return DecodedModel(directory, reading, _decoded(files, leaves), method="weights as MLX decodes them")


def _decoded(files: StoredFiles, leaves: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(name in the original checkpoint, numbers) of everything in the files."""
    quantization = files.config.get("quantization", {})
    packed = {name.removesuffix(".scales") for name in files.names if name.endswith(".scales")}
    parts = {f"{path}.{part}" for path in packed for part in ("weight", "scales", "biases")}
    for path in sorted(packed):
        yield from _unstacked(f"{path}.weight", _numbers(files, path, quantization), leaves)
    for name in sorted(set(files.names) - parts):
        yield from _unstacked(name, files[name], leaves)


def _numbers(files: StoredFiles, path: str, quantization: Mapping[str, Any]) -> Tensor:
    """float32 [..., out, in]: scale * code + bias, as mlx.core.dequantize has it."""
    settings = quantization.get(path, quantization)
    scales, biases = (files[f"{path}.{part}"].float().unsqueeze(-1) for part in ("scales", "biases"))
    rows = files[f"{path}.weight"].view(torch.uint8)
    inputs = scales.shape[-2] * settings["group_size"]
    codes = unpack_codes(rows, bits=settings["bits"], count=inputs).float()
    return (scales * codes.unflatten(-1, (-1, settings["group_size"])) + biases).flatten(-2)


def _unstacked(name: str, tensor: Tensor, leaves: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    before, stacked, behind = name.partition(f".{_STACKED}.")
    if not stacked:
        yield name, tensor
        return
    projection, _, part = behind.partition(".")
    for number, member in enumerate(tensor):
        yield f"{before}.experts.{number}.{leaves[projection]}.{part}", member
