"""Expert weights through AutoRound: quantized and saved by it, read back from the saved codes.

    python with_autoround.py --model DIR --tokens tokens.safetensors --bits 2 --out DIR

AutoRound's defaults (200 iterations of 8 sequences) with groups of 128 on the given windows. Attention stays as it is.
--extended is its own advice for 2 bits (enable_alg_ext). Counted: qweight, qzeros and scales of the experts.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version

import torch
from auto_round import AutoRound
from experts import Stopwatch, Stored, parser, read_tokens, write_dense
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_layout import read_linears

BATCH = 8


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--bits", type=int, required=True, choices=(2, 3, 4))
    arguments.add_argument("--group-size", type=int, default=128)
    arguments.add_argument("--iterations", type=int, default=200)
    arguments.add_argument("--sym", action="store_true", help="no zero points; AutoRound's default")
    arguments.add_argument("--extended", action="store_true", help="its enable_alg_ext")
    given = arguments.parse_args()
    tokens, seed = read_tokens(given.tokens)
    saved = given.out.with_name(given.out.name + "-saved")
    shutil.rmtree(saved, ignore_errors=True)
    watch = Stopwatch()
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(given.model),
        scheme=f"W{given.bits}A16",
        sym=given.sym,
        group_size=given.group_size,
        iters=given.iterations,
        enable_alg_ext=given.extended,
        dataset=[{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(BATCH)],
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=BATCH,
        device_map="cpu",
        ignore_layers="self_attn",
        seed=seed,
        amp=False,
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(saved), format="auto_round")
    folder = next(path.parent for path in saved.rglob("quantization_config.json"))
    packing = json.loads((folder / "quantization_config.json").read_text())["packing_format"]
    replaced, size = read_linears(
        given.model,
        folder,
        bits=given.bits,
        group_size=given.group_size,
        zero_offset=int(packing.endswith("gptq")),  # 1 where linears are packed as the oldest GPTQ files are
        awq=packing.endswith("awq"),
    )
    stored = Stored(
        tool="AutoRound",
        version=version("auto-round"),
        encoding=", ".join(
            [
                f"{given.bits} bits",
                f"groups of {given.group_size}",
                "sym" if given.sym else "asym",
                f"{given.iterations} iterations",
                *(["extended"] if given.extended else []),
            ]
        ),
        bits=given.bits,
        seed=seed,
        expert_bytes=size,
        seconds=watch.seconds,
    )
    write_dense(given.model, given.out, replaced, stored)
    shutil.rmtree(saved)


if __name__ == "__main__":
    main()
