"""GPTQ, as GPTQModel loads it: a width and group size for each module, in `dynamic` where it is not the usual one.

Codes lie in 32-bit words along the inputs, zero points, less one, along the outputs (version 1 of the format). 4 and 8
bits are symmetric, which vLLM's kernels want; 2 and 3 bits have whole zero points.
Source of the layout: gptqmodel.nn_modules.qlinear and gptqmodel.utils.model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.files import write_json, write_text
from mc_cli.artifacts.packed import PackedLayout
from mc_cli.encodings import Encoding
from mc_cli.encodings.integer import IntegerEncoding
from mc_cli.exporters import ExportJob
from mc_cli.exporters.decoded import DecodedModel, StoredFiles, decoding
from mc_cli.exporters.model_card import model_card
from mc_cli.exporters.packed_checkpoint import (
    ExpertPath,
    Matrix,
    PackedCheckpoint,
    check_layout,
    expert_leaves,
    require_family,
)
from mc_cli.exporters.shards import ShardWriter
from mc_cli.measuring.logit_source import LogitSource, Reading
from mc_cli.models.model_folder import read_config
from mc_cli.numerics.packing import pack_codes, unpack_codes
from mc_cli.packed.packed_files import open_packed

NAME = "gptq"
CARRIES_POLICY = False
DESCRIPTION = "2, 3, 4 and 8 bits, mixed as planned, for GPTQModel; plan and quantize with --for gptq"
ENGINES = ("GPTQModel",)
KEEPS = "the width of every expert and projection; no dropped, cut or shared experts"
FAMILIES = ("deepseek_v2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # what GPTQModel 7.7 runs as it is read here
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_RENAMED = {"mixtral": "block_sparse_moe"}  # what GPTQModel calls mlp, with the projections' usual names
# Modules that vLLM joins look their settings up by one name.
_JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_JOINED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}

Settings = tuple[int, int, bool]  # bits, group size, symmetric

_OPENING = (
    "A Mixture-of-Experts language model in GPTQ's format, rounded by mc-cli: a width for every projection of every "
    "expert, codes found under error feedback on the grids that the format has."
)
_LOADING = """\
```python
from gptqmodel import GPTQModel

model = GPTQModel.load("PATH")
print(model.tokenizer.decode(model.generate("Once upon a time")[0]))
```"""


def check(config: Any) -> None:
    """Raises FamilyError for a model that GPTQModel does not run, or names otherwise."""
    require_family(config, FAMILIES, "as GPTQ")
    expert_leaves(config, "GPTQ")


def _holds(encoding: Encoding) -> bool:
    return isinstance(encoding, IntegerEncoding)


def check_packed(layout: PackedLayout, config: Any) -> None:
    """Raises InputError, naming all of them, for experts and matrices that the format cannot hold."""
    check_layout(layout, _holds, name="GPTQ", engine=NAME)


def export(job: ExportJob) -> None:
    """Writes config.json with the widths by module, tensors in GPTQ's packing, and a card.

    Raises FamilyError for a model that GPTQModel does not run, InputError, naming all of them, for experts and matrices
    that the format cannot hold.
    """
    files = open_packed(job.packed_folder)
    config = read_config(job.config_folder)
    check(config)
    check_packed(files.layout, config)
    checkpoint = PackedCheckpoint(files, config)
    writer = ShardWriter(job.target, shard_bytes=job.shard_bytes)
    settings: dict[str, Settings] = {}
    plain: list[str] = []
    for part in job.parts:
        for name, tensor in checkpoint.plain(part).items():
            written = _there(name, config.model_type)
            writer.add(written, tensor)
            in_layer = part >= 0 and written.endswith(".weight") and tensor.ndim == 2
            plain += [written.removesuffix(".weight")] if in_layer else []
        for matrix in checkpoint.matrices(part):
            assert isinstance(matrix.encoding, IntegerEncoding)
            path = _there(matrix.path, config.model_type)
            settings[path] = matrix.encoding.bits, matrix.encoding.group_size, matrix.encoding.symmetric
            for name, tensor in _written(matrix).items():
                writer.add(f"{path}.{name}", tensor)
        job.advance("outside the layers" if part < 0 else f"layer {part}")
    writer.finish()
    config_json = job.original_config()
    if settings:
        config_json = {**config_json, "quantization_config": _quantization(settings, plain)}
    write_json(job.target / "config.json", config_json)
    title = f"{job.card.base_model or job.card.model_type}, in GPTQ's format by mc-cli"
    write_text(job.target / "README.md", model_card(job.card, title=title, opening=_OPENING, loading=_LOADING))


def _there(name: str, model_type: str) -> str:
    """GPTQModel's name of a tensor or module of the original checkpoint."""
    before = _RENAMED.get(model_type)
    return name if before is None else _with_leaf(name, lambda leaf: leaf).replace(f".{before}.", ".mlp.")


def _back(name: str, model_type: str, leaves: Mapping[str, str]) -> str:
    """The original checkpoint's name of a tensor."""
    before = _RENAMED.get(model_type)
    return name if before is None else _with_leaf(name, leaves.__getitem__).replace(".mlp.", f".{before}.")


def _with_leaf(name: str, leaf_of: Callable[[str], str]) -> str:
    """A name with what an expert's projection is called there: `leaf_of` takes gate_proj, up_proj or down_proj."""
    path = name.removesuffix(".weight")
    expert = ExpertPath.of(path)
    if expert is None:
        return name
    return f"{expert.experts}.{expert.number}.{leaf_of(expert.projection)}{name[len(path) :]}"


def _written(matrix: Matrix) -> dict[str, Tensor]:
    """The four tensors of a module; see above. Scales are numbers that float16 holds exactly."""
    encoding = matrix.encoding
    assert isinstance(encoding, IntegerEncoding)
    scales = matrix.tensors["scales"]
    middle = torch.full(scales.shape, 2 ** (encoding.bits - 1), dtype=torch.uint8)
    zeros = middle if encoding.symmetric else matrix.tensors["zero_points"]
    groups = torch.arange(scales.shape[1], dtype=torch.int32)
    return {
        "qweight": _turned(matrix.tensors["codes"].contiguous().view(torch.int32)),
        "qzeros": pack_codes(_turned(zeros - 1), bits=encoding.bits).view(torch.int32),
        "scales": _turned(scales.to(torch.float16)),
        "g_idx": groups.repeat_interleave(encoding.group_size),
    }


def _turned(tensor: Tensor) -> Tensor:
    """The transposed tensor as rows of its own: those of one column count as contiguous with any stride."""
    return tensor.T.clone(memory_format=torch.contiguous_format)


def _quantization(settings: Mapping[str, Settings], plain: list[str]) -> dict[str, Any]:
    """`quantization_config`: the most frequent settings, and the others, or none, by patterns of paths."""
    usual = Counter(settings.values()).most_common(1)[0][0]
    bits, group, symmetric = usual
    dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(path)}$": {} for path in plain}
    for pattern, found in _patterns(settings).items():
        if found != usual:
            dynamic[f"+:^{pattern}$"] = {"bits": found[0], "group_size": found[1], "sym": found[2], "desc_act": False}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    }


def _patterns(settings: Mapping[str, Settings]) -> dict[str, Settings]:
    """Patterns of paths that share settings: experts of a layer by their numbers, others by their names.

    Where all that vLLM joins is alike, the joined module's name is in the pattern, too.
    """
    experts: dict[str, dict[str, Settings]] = {}
    found: dict[str, Settings] = {}
    for path, each in settings.items():
        expert = ExpertPath.of(path)
        if expert is not None:
            experts.setdefault(expert.experts, {})[f"{expert.number}.{expert.leaf}"] = each
            continue
        before, _, leaf = path.rpartition(".")
        alike = [name for name, joined in _JOINED.items() if joined == _JOINED.get(leaf)]
        if alike and all(settings.get(f"{before}.{name}") == each for name in alike):
            found[rf"{re.escape(before)}\.({'|'.join((*alike, _JOINED[leaf]))})"] = each
        else:
            found[re.escape(path)] = each
    for before, members in experts.items():
        if len(set(members.values())) == 1:
            found[rf"{re.escape(before)}(\.\d+\.\w+)?"] = next(iter(members.values()))
            continue
        together: dict[tuple[str, Settings], list[str]] = {}
        for name, each in members.items():
            number, leaf = name.split(".")
            together.setdefault((leaf, each), []).append(number)
        for (leaf, each), numbers in together.items():
            found[rf"{re.escape(before)}\.({'|'.join(numbers)})\.{leaf}"] = each
    return found


def open(directory: Path, reading: Reading) -> LogitSource:
    """The directory as config.json says that it is packed, computed by transformers."""
    with decoding(directory):
        config = read_config(directory)
        leaves = expert_leaves(config, "GPTQ")
        named = ((_back(name, config.model_type, leaves), tensor) for name, tensor in _decoded(StoredFiles(directory)))
        return DecodedModel(directory, reading, named, method="weights as GPTQ's format has them")


def _decoded(files: StoredFiles) -> Iterator[tuple[str, Tensor]]:
    """(name there, numbers) of everything in the files."""
    packed = [name.removesuffix(".qweight") for name in files.names if name.endswith(".qweight")]
    parts = {f"{path}.{part}" for path in packed for part in _PARTS}
    quantization = files.config.get("quantization_config", {})
    for path in packed:
        yield f"{path}.weight", _numbers(files, path, {**quantization, **_override(quantization["dynamic"], path)})
    for name in sorted(set(files.names) - parts):
        yield name, files[name]


def _override(dynamic: Mapping[str, Mapping[str, Any]], path: str) -> Mapping[str, Any]:
    """The settings of the first pattern that matches, {} where none does."""
    return next((each for pattern, each in dynamic.items() if re.match(pattern.partition(":")[2], path)), {})


def _numbers(files: StoredFiles, path: str, settings: Mapping[str, Any]) -> Tensor:
    """float32 [out, in]: scale * (code - zero - 1), each input in the group that g_idx names."""
    qweight, qzeros, scales, group_of = (files[f"{path}.{part}"] for part in _PARTS)
    bits = settings["bits"]
    codes = unpack_codes(_turned(qweight).view(torch.uint8), bits=bits, count=len(group_of))
    zeros = unpack_codes(qzeros.view(torch.uint8), bits=bits, count=scales.shape[1])
    place = group_of.long()
    numbers: Tensor = (codes.float() - zeros.T.float()[:, place] - 1) * scales.T.float()[:, place]
    return numbers
