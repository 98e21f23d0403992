"""A whole packed model beside the dense one: load time, memory, prompt and decoding speed, at sizes that need no GPU.

Writes a random Mixtral checkpoint and the packed form of it (experts at 2.5 bits in the mean, mixed; all else as wide
as `allocate` makes it beside them: attention 5 bits, embedding and head 6),
and measures each in a process of its own, as `mc-cli bench` does for real models. Values are random: neither speed nor
memory depends on them. Memory is told over what the libraries take alone, and as a multiple of the packed bytes plus
the key-value cache.

    python recipes/benchmarks/decode.py --hidden 2048 --intermediate 7168 --layers 8 --threads 1 0 --out decode.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig

from mc_cli import console
from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.packed import ExpertLayout, PackedLayout
from mc_cli.encodings import encoding_for, family_of_role
from mc_cli.encodings.trellis import trellis_for
from mc_cli.exporters.shards import ShardWriter
from mc_cli.measuring.speed import Speed, measure, reading_rate
from mc_cli.models.experts import find_experts, projections_of
from mc_cli.models.inventory import take_inventory
from mc_cli.models.skeleton import build_skeleton
from mc_cli.packed.packed_model import attach
from mc_cli.parts import KEPT_BITS
from mc_cli.settings import AllocateSettings

WIDTHS = (1.5, 2.0, 2.5, 2.5, 2.5, 2.5, 3.0, 3.5)  # of a layer's experts in turn
MEAN_BITS = 2.5  # of these
SHARD_BYTES = 2 * 2**30


def main() -> None:
    arguments = parse()
    config = MixtralConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_local_experts=arguments.experts,
        num_experts_per_tok=2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=max(1, arguments.hidden // 512),
        head_dim=128,
        dtype="bfloat16",
    )
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        packed, dense = Path(place) / "packed", Path(place) / "dense"
        write_packed(packed, config)
        write_dense(dense, config)
        for threads in arguments.threads:
            tokens = {"prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens}
            cases = ((packed, "bfloat16"), (packed, "float32"), (dense, "bfloat16"), (dense, "float32"))
            speeds = [measure(folder, dtype=dtype, threads=threads or None, **tokens) for folder, dtype in cases]
            rate = reading_rate(threads or None)
            console.print_speeds(speeds, rate)
            tell_memory(speeds[0], config, arguments)
            results += [{**asdict(speed), "reading_bytes_per_s": rate} for speed in speeds]
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=7168)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0: as many as torch takes")
    parser.add_argument("--folder", type=Path, help="where both models are written for the while; about 7 GB")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write_dense(folder: Path, config: MixtralConfig) -> None:
    model = build_skeleton(config, dtype=torch.bfloat16)
    write(folder, config.to_dict(), model.named_parameters(), torch.bfloat16)


def write_packed(folder: Path, config: MixtralConfig) -> None:
    model = build_skeleton(config, dtype=torch.bfloat16)
    blocks = []
    for path, module in find_experts(model):
        shapes = {one.name: (one.out_features, one.in_features) for one in projections_of(module)}
        keys = {
            name: tuple(trellis_for(WIDTHS[expert % len(WIDTHS)], shape[1]).key for expert in range(module.num_experts))
            for name, shape in shapes.items()
        }
        blocks.append(ExpertLayout.of_whole(path, shapes, keys))
    widths = AllocateSettings(target_stored_bits=MEAN_BITS).role_bits(MEAN_BITS)
    linears = {
        part.name.removesuffix(".weight"): encoding_for(
            family_of_role(part.role, "trellis"), widths[part.role], *part.shape
        ).key
        for part in take_inventory(model, stored_dtypes={}).tensors
        if part.packable and widths[part.role] != KEPT_BITS
    }
    layout = PackedLayout(tuple(blocks), linears)
    attach(model, layout, kept_dtype=torch.bfloat16)
    write(
        folder, {**config.to_dict(), "quantization_config": layout.to_json()}, model.named_parameters(), torch.bfloat16
    )


def write(
    folder: Path, config: dict[str, Any], parameters: Iterator[tuple[str, nn.Parameter]], dtype: torch.dtype
) -> None:
    """A checkpoint of random values for parameters of these shapes."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    writer = ShardWriter(folder, shard_bytes=SHARD_BYTES)
    for name, parameter in parameters:
        if parameter.dtype == torch.uint8:
            writer.add(name, torch.randint(0, 256, parameter.shape, dtype=torch.uint8))
        elif name.endswith("scales"):
            writer.add(name, torch.full(parameter.shape, 0.01, dtype=parameter.dtype))
        else:
            writer.add(name, torch.empty(parameter.shape, dtype=dtype).normal_(0, 0.02))
    writer.finish()


def tell_memory(packed: Speed, config: MixtralConfig, arguments: argparse.Namespace) -> None:
    """The packed model's time, over the least it could take."""
    tokens = arguments.prompt_tokens + arguments.new_tokens
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * 2
    least = packed.weight_bytes + cache
    used = packed.peak_bytes - packed.base_bytes
    console.say(
        f"packed, {packed.dtype}: {console.size_text(used)} over the libraries, {used / least:.2f} x "
        f"{console.size_text(least)} of weights and key-value cache"
    )


if __name__ == "__main__":
    main()
