"""Expert weights through GPTQModel: quantized and saved by it, read back from the saved codes.

    python with_gptqmodel.py --model DIR --tokens tokens.safetensors --bits 2 --out DIR

Everything that is not said here is GPTQModel's default (groups of 128, activation order within groups, its fallback for
experts that see few tokens). Attention stays as it is, so the experts are calibrated in an otherwise original model.
Counted: qweight, qzeros and scales of the experts; g_idx only with --desc-act, where it is not implied. Its GPTAQ is
left out: it fails once a router behind a quantized layer sends an expert other tokens than in the original.
"""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from experts import Stopwatch, Stored, parser, read_tokens, write_dense
from gptqmodel import GPTQModel, QuantizeConfig
from word_layout import read_linears


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--bits", type=int, required=True, choices=(2, 3, 4))
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--sym", action="store_true", help="no zero points; GPTQModel's default")
    arguments.add_argument("--mse", type=float, default=0.0, help="power of its search for the clipping; 0 = none")
    arguments.add_argument("--desc-act", action="store_true", help="columns in the order of their activations")
    given = arguments.parse_args()
    tokens, seed = read_tokens(given.tokens)
    config = QuantizeConfig(
        bits=given.bits,
        group_size=given.group_size,
        sym=given.sym,
        desc_act=given.desc_act,
        mse=given.mse,
        format="gptq_v2",
        dynamic={r"-:.*self_attn.*": {}},
        device="cpu",
        offload_to_disk=False,
    )
    watch = Stopwatch()
    model = GPTQModel.load(str(given.model), config, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(rows, batch_size=8)
    saved = given.out.with_name(given.out.name + "-saved")
    shutil.rmtree(saved, ignore_errors=True)
    model.save(str(saved))
    replaced, size = read_linears(
        given.model,
        saved,
        bits=given.bits,
        group_size=given.group_size,
        zero_offset=0,
        counts_order=given.desc_act,
    )
    named = ["sym" if given.sym else "asym", f"mse {given.mse:g}" if given.mse else "", "desc_act" * given.desc_act]
    stored = Stored(
        tool="GPTQModel",
        version=version("gptqmodel"),
        encoding=", ".join([f"{given.bits} bits", f"groups of {given.group_size}", *filter(None, named)]),
        bits=given.bits,
        seed=seed,
        expert_bytes=size,
        seconds=watch.seconds,
        notes=fallbacks(saved),
    )
    write_dense(given.model, given.out, replaced, stored)
    shutil.rmtree(saved)


def fallbacks(saved: Path) -> str:
    """How many modules GPTQModel rounded without calibration, as far as its own log tells."""
    log = saved / "quant_log.csv"
    if not log.exists():
        return ""
    text = log.read_text()
    return json.dumps({"rows": text.count("\n") - 1, "fallback": len(re.findall("fallback|rtn", text, re.IGNORECASE))})


if __name__ == "__main__":
    main()
