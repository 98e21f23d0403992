"""Expert weights through HQQ: one HQQLinear per expert projection, read back from its stored codes.

    python with_hqq.py --model DIR --bits 2 --group-size 64 --out DIR

HQQ sees no data. Its own walk over a model finds nn.Linear only, and passes over experts that are stacked in one
parameter without a word; here every expert projection is given to it as a Linear of its own. Scales and zero points are
float16, codes as it packs them (3 bits: ten in a 32-bit word). --axis 0 groups along the outputs: slower to run, and by
its documentation better, which the demo model does not show.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from experts import Stopwatch, Stored, parser, read_experts, write_dense
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import nn


def main() -> None:
    arguments = parser(__doc__, data_free=True)
    arguments.add_argument("--bits", type=int, required=True, choices=(1, 2, 3, 4, 8))
    arguments.add_argument("--group-size", type=int, default=64)
    arguments.add_argument("--axis", type=int, default=1, choices=(0, 1))
    given = arguments.parse_args()
    config = BaseQuantizeConfig(nbits=given.bits, group_size=given.group_size, axis=given.axis)
    watch = Stopwatch()
    replaced: dict[str, torch.Tensor] = {}
    size = 0
    for name, weight in read_experts(given.model).items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.float()
        coded = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        codes, meta = coded.W_q.data, coded.meta
        size += sum(tensor.numel() * tensor.element_size() for tensor in (codes, meta["scale"], meta["zero"]))
        # The stored float16 scales and zero points, multiplied out in float32.
        replaced[name] = Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32}).float()
    stored = Stored(
        tool="HQQ",
        version=version("hqq"),
        encoding=f"{given.bits} bits, groups of {given.group_size}, axis {given.axis}",
        bits=given.bits,
        seed=None,
        expert_bytes=size,
        seconds=watch.seconds,
    )
    write_dense(given.model, given.out, replaced, stored)


if __name__ == "__main__":
    main()
