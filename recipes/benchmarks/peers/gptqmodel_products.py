"""Times GPTQModel's own CPU kernels; run by products_beside.py in GPTQModel's environment.

    python gptqmodel_products.py --threads 2 --outputs 4096 --inputs 14336 --rows 1 8 512 --bits 2 3 4

For each width the kernel that GPTQModel itself chooses for a CPU and bfloat16, on random codes in groups of 128 with
zero points. Prints one JSON list: bits, kernel, stored bits per weight, rows, seconds per product.
"""

from __future__ import annotations

import argparse
import json

import torch
from experts import seconds_per_call
from gptqmodel.models._const import DEVICE
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.importer import select_quant_linear

GROUP = 128
COUNTED = ("qweight", "qzeros", "scales")  # g_idx says nothing here


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--threads", "--outputs", "--inputs"):
        arguments.add_argument(name, type=int, required=True)
    arguments.add_argument("--rows", type=int, nargs="+", required=True)
    arguments.add_argument("--bits", type=int, nargs="+", required=True)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    found = []
    for bits in given.bits:
        linear, stored_bits = random_linear(bits, given.outputs, given.inputs)
        for rows in given.rows:
            entry = {"bits": bits, "kernel": type(linear).__name__, "stored_bits": stored_bits, "rows": rows}
            found.append({**entry, "seconds": seconds(linear, rows, given.inputs)})
    print(json.dumps(found))


def random_linear(bits: int, outputs: int, inputs: int) -> tuple[torch.nn.Module, float]:
    """(the kernel with random codes, ready to be called; stored bits per weight)."""
    kind = select_quant_linear(
        bits=bits,
        group_size=GROUP,
        desc_act=False,
        sym=False,
        device=DEVICE.CPU,
        format=FORMAT.GPTQ,
        quant_method=METHOD.GPTQ,
        pack_dtype=torch.int32,
        dtype=torch.bfloat16,
    )
    linear = kind(
        bits=bits,
        group_size=GROUP,
        sym=False,
        desc_act=False,
        in_features=inputs,
        out_features=outputs,
        bias=False,
        pack_dtype=torch.int32,
    )
    buffers = dict(linear.named_buffers())
    for name in ("qweight", "qzeros"):
        codes = buffers[name]
        codes.copy_(torch.randint(-(2**31), 2**31 - 1, codes.shape, dtype=torch.int32))
    buffers["scales"].fill_(0.01)
    stored = sum(buffers[name].numel() * buffers[name].element_size() for name in COUNTED)
    linear.qzero_format(2)
    linear.eval().post_init()
    return linear, 8 * stored / (outputs * inputs)


def seconds(linear: torch.nn.Module, rows: int, inputs: int) -> float:
    """Times one product with so many rows, again and again with the same matrix."""
    activations = torch.randn(rows, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        return seconds_per_call(lambda: linear(activations))


if __name__ == "__main__":
    main()
