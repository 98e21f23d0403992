"""Expert weights through llm-compressor's GPTQ: quantized and saved by it, read back from the saved codes.

    python with_llmcompressor.py --model DIR --tokens tokens.safetensors --bits 2 --observer mse --routed-only --out DIR

Without options its defaults (ranges from least to most, static activation order, every expert calibrated on all tokens)
with groups of 128, in the checkpoint's dtype. At 2 bits it is better with both options. Only the experts are named as
targets. Counted: packed weights, scales and packed zero points of the experts.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from experts import Stopwatch, Stored, parser, read_experts, read_tokens, read_weights, write_dense
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.utils import load_context
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_layout import parts_of, unpacked

EXPERTS = r"re:.*experts\.\d+\..*(proj|w[123])$"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--bits", type=int, required=True, choices=(2, 3, 4))
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--sym", action="store_true", help="no zero points")
    arguments.add_argument("--routed-only", action="store_true", help="an expert's own tokens instead of all")
    arguments.add_argument(
        "--observer", help="what looks for the ranges, mse for one; without it, the tool's own choice"
    )
    given = arguments.parse_args()
    tokens, seed = read_tokens(given.tokens)
    watch = Stopwatch()
    with load_context(AutoModelForCausalLM):
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    weights = QuantizationArgs(
        num_bits=given.bits,
        type="int",
        symmetric=given.sym,
        strategy="group",
        group_size=given.group_size,
        observer=given.observer,
    )
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(given.model),
        dataset=Dataset.from_list(rows),
        recipe=[GPTQModifier(config_groups={"experts": QuantizationScheme(targets=[EXPERTS], weights=weights)})],
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        moe_calibrate_all_experts=not given.routed_only,
    )
    saved = given.out.with_name(given.out.name + "-saved")
    shutil.rmtree(saved, ignore_errors=True)
    model.save_pretrained(saved, save_compressed=True)
    replaced, size = read_back(given.model, saved, bits=given.bits, group_size=given.group_size)
    stored = Stored(
        tool="llm-compressor",
        version=version("llmcompressor"),
        encoding=f"GPTQ {given.bits} bits, groups of {given.group_size}, {'sym' if given.sym else 'asym'}"
        + (f", {given.observer}" if given.observer else "")
        + (", routed tokens only" if given.routed_only else ""),
        bits=given.bits,
        seed=seed,
        expert_bytes=size,
        seconds=watch.seconds,
    )
    write_dense(given.model, given.out, replaced, stored)
    shutil.rmtree(saved)


def read_back(model: Path, saved: Path, *, bits: int, group_size: int) -> tuple[dict[str, torch.Tensor], int]:
    """(expert weights as their codes stand for, bytes of all that is stored for them)."""
    found = read_weights(saved)
    replaced: dict[str, torch.Tensor] = {}
    size = 0
    for name, weight in read_experts(model).items():
        parts = parts_of(found, name, "weight_packed")
        counted = {part: tensor for part, tensor in parts.items() if part not in ("weight_shape", "weight_g_idx")}
        size += sum(tensor.numel() * tensor.element_size() for tensor in counted.values())
        group = torch.arange(weight.shape[1]) // group_size
        if "weight_g_idx" in parts and not torch.equal(parts["weight_g_idx"].long(), group):
            raise ValueError(f"{name}: its columns are out of order, and their order is not counted")
        codes = unpacked(parts["weight_packed"], bits, axis=1)
        if "weight_zero_point" in parts:
            zeros = unpacked(parts["weight_zero_point"], bits, axis=0)[:, group]
        else:
            zeros = torch.full_like(codes, 1 << (bits - 1))
        replaced[name] = (codes - zeros).float() * parts["weight_scale"].float()[:, group]
    return replaced, size


if __name__ == "__main__":
    main()
