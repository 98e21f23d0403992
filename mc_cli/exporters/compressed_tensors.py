"""compressed-tensors, pack-quantized: what vLLM, SGLang and transformers load, by their own kernels.

Runtimes have one scheme for all experts, and transformers one for everything else that is coded, so that each of
the two has a width, as `--for compressed-tensors` plans it. Weights are symmetric integers in groups; scales lie in the
model's dtype. Source of the layout: compressed_tensors.compressors.pack_quantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.files import write_json, write_text
from mc_cli.artifacts.packed import KEPT, PackedLayout
from mc_cli.encodings import Encoding, encoding_from_key
from mc_cli.encodings.integer import IntegerEncoding
from mc_cli.exporters import ExportJob
from mc_cli.exporters.decoded import WalkedCheckpoint, decoding
from mc_cli.exporters.model_card import model_card
from mc_cli.exporters.packed_checkpoint import ExpertPath, Matrix, PackedCheckpoint, check_layout, expert_leaves
from mc_cli.exporters.shards import ShardWriter
from mc_cli.measuring.logit_source import LogitSource, Reading
from mc_cli.models.model_folder import read_config
from mc_cli.packed.packed_files import open_packed

NAME = "compressed-tensors"
CARRIES_POLICY = False
DESCRIPTION = "4 or 8 bits for vLLM, SGLang and transformers; plan and quantize with --for compressed-tensors"
ENGINES = ("vLLM", "SGLang", "transformers")
KEEPS = "one width of 4 or 8 bits for all experts, one for the rest; no dropped, cut or shared experts"
FORMAT = "pack-quantized"
_EXPERTS = r"re:.*\.experts\.\d+\..*"
_BESIDE = "what is coded beside them"

_OPENING = (
    "A Mixture-of-Experts language model in the format compressed-tensors, rounded by mc-cli: integers chosen under "
    "error feedback on the symmetric grids that the format has."
)
_LOADING = """\
```sh
vllm serve PATH
```"""


def check(config: Any) -> None:
    """Raises FamilyError for a model whose checkpoint has no matrix for each expert."""
    expert_leaves(config, NAME)


def _holds(encoding: Encoding) -> bool:
    return isinstance(encoding, IntegerEncoding) and encoding.symmetric


def _scheme_problems(layout: PackedLayout) -> Iterator[str]:
    """Several schemes where the readers have one."""
    experts = {stack.key for block in layout.experts for name in block.projections for stack in block.stacks(name)}
    if len(experts) > 1 or KEPT in experts:
        yield f"experts: {', '.join(sorted(experts))}, where all have one and the same scheme"
    beside = {encoding_from_key(key).bits for key in layout.linears.values()}
    if len(beside) > 1:
        yield f"{_BESIDE}: {', '.join(f'{bits:g} bits' for bits in sorted(beside))}, where there is one width"


def check_packed(layout: PackedLayout, config: Any) -> None:
    """Raises InputError, naming all of them, for experts and matrices that the format cannot hold."""
    check_layout(layout, _holds, name=NAME, engine=NAME, further=_scheme_problems)


def export(job: ExportJob) -> None:
    """Writes config.json with the schemes, packed tensors under the original checkpoint's names, and a card.

    Raises FamilyError for a model without a matrix for each expert, InputError, naming all of them, for experts and
    matrices that the format cannot hold.
    """
    files = open_packed(job.packed_folder)
    config = read_config(job.config_folder)
    check(config)
    check_packed(files.layout, config)
    checkpoint = PackedCheckpoint(files, config)
    writer = ShardWriter(job.target, shard_bytes=job.shard_bytes)
    groups: dict[tuple[bool, IntegerEncoding], list[str]] = {}
    plain: list[str] = []
    for part in job.parts:
        for name, tensor in checkpoint.plain(part).items():
            writer.add(name, tensor)
            plain += [name.removesuffix(".weight")] if name.endswith(".weight") and tensor.ndim == 2 else []
        for matrix in checkpoint.matrices(part):
            assert isinstance(matrix.encoding, IntegerEncoding)
            for name, tensor in _written(matrix, job.dtype).items():
                writer.add(f"{matrix.path}.{name}", tensor)
            groups.setdefault((ExpertPath.of(matrix.path) is None, matrix.encoding), []).append(matrix.path)
        job.advance("outside the layers" if part < 0 else f"layer {part}")
    writer.finish()
    quantization = _quantization(groups, plain)
    write_json(job.target / "config.json", {**job.original_config(), "quantization_config": quantization})
    title = f"{job.card.base_model or job.card.model_type}, in compressed-tensors by mc-cli"
    write_text(job.target / "README.md", model_card(job.card, title=title, opening=_OPENING, loading=_LOADING))


def _written(matrix: Matrix, dtype: str) -> dict[str, Tensor]:
    """Unsigned codes in 32-bit words from the lowest bit on, scales, exactly, in the model's dtype, and the shape."""
    codes, scales = matrix.tensors["codes"], matrix.tensors["scales"]
    packed = codes.contiguous().view(torch.int32)
    shape = (packed.shape[0], packed.shape[1] * 32 // int(matrix.encoding.bits))
    return {
        "weight_packed": packed,
        "weight_scale": scales.to(getattr(torch, dtype)),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }


def _quantization(groups: dict[tuple[bool, IntegerEncoding], list[str]], plain: list[str]) -> dict[str, Any]:
    """`quantization_config`: experts' scheme first, by a pattern; the others' by the paths that have it."""
    schemes = {
        f"group_{number}": {
            "targets": sorted(groups[beside, encoding]) if beside else [_EXPERTS],
            "weights": {
                "num_bits": encoding.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": encoding.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for number, (beside, encoding) in enumerate(sorted(groups, key=lambda group: (group[0], group[1].key)))
    }
    return {
        "quant_method": NAME,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": schemes,
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def open(directory: Path, reading: Reading) -> LogitSource:
    """The directory as mc-cli reads published checkpoints of this format, a layer at a time."""
    with decoding(directory):
        return WalkedCheckpoint(directory, reading, method="weights as compressed-tensors decodes them")
