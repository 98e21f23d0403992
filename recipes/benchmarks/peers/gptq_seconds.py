"""What another tool's GPTQ takes, loading and saving left out: run in the tool's own environment, by ../effort.py.

    python gptq_seconds.py --model DIR --tokens tokens.safetensors --bits 2 --out DIR

Whichever of GPTQModel and llm-compressor is there, with the settings of its script beside this one. Processor seconds
of this process, whose threads count together; a compiler that it starts does not count. Prints a line of JSON and ends
without waiting for these tools' threads, which do not always end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from experts import parser, read_tokens


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--bits", type=int, required=True, choices=(2, 4))
    arguments.add_argument("--group-size", type=int, default=128)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    tokens, _ = read_tokens(given.tokens)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    name = "gptqmodel" if importlib.util.find_spec("gptqmodel") else "llmcompressor"
    quantize = (gptqmodel if name == "gptqmodel" else llmcompressor)(given, rows)
    begun, clock = time.process_time(), time.monotonic()
    quantize()
    found = {"processor_s": time.process_time() - begun, "clock_s": time.monotonic() - clock}
    print("\n" + json.dumps({"tool": name, "version": version(name), "bits": given.bits, **found}), flush=True)
    sys.stderr.flush()
    os._exit(0)


def gptqmodel(given: Any, rows: list[dict[str, Any]]) -> Any:
    """Its quantize, of a loaded model."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=given.bits,
        group_size=given.group_size,
        sym=False,
        desc_act=False,
        format="gptq_v2",
        dynamic={r"-:.*self_attn.*": {}},
        device="cpu",
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(given.model), config, dtype=torch.float32)
    return lambda: model.quantize(rows, batch_size=8)


def llmcompressor(given: Any, rows: list[dict[str, Any]]) -> Any:
    """Its oneshot, of a loaded model; an expert's own tokens, since that is the faster way."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.utils import load_context
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from with_llmcompressor import EXPERTS

    with load_context(AutoModelForCausalLM):
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    weights = QuantizationArgs(
        num_bits=given.bits, type="int", symmetric=False, strategy="group", group_size=given.group_size
    )
    modifier = GPTQModifier(config_groups={"experts": QuantizationScheme(targets=[EXPERTS], weights=weights)})
    return lambda: oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(given.model),
        dataset=Dataset.from_list(rows),
        recipe=[modifier],
        max_seq_length=len(rows[0]["input_ids"]),
        num_calibration_samples=len(rows),
        moe_calibrate_all_experts=False,
    )


if __name__ == "__main__":
    main()
