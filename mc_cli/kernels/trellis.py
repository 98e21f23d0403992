"""Products with trellis codes on a CPU: the inputs are rotated, the weights stay packed for few tokens.

Few tokens: each activation becomes two int16, a coarse and a fine part, with one scale per token; products are summed
exactly in int32, and every 256 inputs in float32. The result is as good as float32 arithmetic. Many tokens: the rotated
matrix is decoded once, in float32, and the library multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.errors import McError
from mc_cli.numerics.rotation import rotate, signs
from mc_cli.numerics.trellis import UNIT, code_levels, decode

FEW_TOKENS = 8  # up to here decoding on the fly is faster than decoding to float32 first
_WEIGHTS_PER_THREAD = 2**19  # fewer are done before a second thread has started
PATHS = {0: "portable C", 2: "AVX-512 (VBMI, VNNI)"}


def linear(inputs: Tensor, tensors: Mapping[str, Tensor], encoding: TrellisEncoding) -> Tensor:
    """`inputs @ weight^T` [..., out_features] in the dtype of `inputs`.

    inputs    [..., in_features] floating point, on any device
    tensors   `codes` and `scales` of one matrix
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    compiled = rows.device.type == "cpu" and native.library() is not None
    if len(rows) <= FEW_TOKENS and compiled and not (rows.requires_grad and torch.is_grad_enabled()):
        outputs = packed_product(rows, tensors, encoding)
    else:
        outputs = _decoded_product(rotate(rows, encoding.block), tensors, encoding)
    return outputs.view(*inputs.shape[:-1], outputs.shape[-1]).to(inputs.dtype)


def path_name() -> str:
    """How products of few tokens are computed on this machine, and whether the search is compiled."""
    return "none, torch serves" if native.library() is None else PATHS[best_path()]


@functools.cache
def best_path() -> int:
    """The fastest of PATHS that this machine has."""
    return native.routine("mc_trellis_path", "")()


def _decoded_product(rows: Tensor, tensors: Mapping[str, Tensor], encoding: TrellisEncoding) -> Tensor:
    """[tokens, out_features] float32 of rotated rows [tokens, in_features], by the library's matrix product."""
    values, scales = decode(tensors["codes"], encoding.rate), tensors["scales"].float()  # values [chunks, in, length]
    outputs = torch.matmul(rows, values).transpose(0, 1).flatten(1)  # of every chunk, side by side
    return outputs[:, : len(scales)] * scales


def packed_product(
    rows: Tensor, tensors: Mapping[str, Tensor], encoding: TrellisEncoding, path: int | None = None
) -> Tensor:
    """[tokens, out_features] float32 of rows [tokens, in_features] float32; `path` None takes the machine's best."""
    codes, scales = tensors["codes"].contiguous(), tensors["scales"].float() * UNIT
    chunks, inputs, size = codes.shape
    length, outputs = int(size * 8 / encoding.rate), len(scales)
    rows = rows.contiguous()
    result = torch.empty((len(rows), outputs))

    def run(first: int, last: int) -> None:
        failed = native.routine("mc_trellis_linear", "pppppiiiiiiiiip")(
            rows.data_ptr(),
            codes.data_ptr(),
            code_levels().data_ptr(),
            signs(inputs).data_ptr(),
            scales.data_ptr(),
            len(rows),
            inputs,
            outputs,
            encoding.block,
            length,
            int(2 * encoding.rate),
            best_path() if path is None else path,
            first,
            last,
            result.data_ptr(),
        )
        if failed:
            raise McError(f"No memory left for a product of {len(rows)} tokens with {outputs} outputs.")

    least = _WEIGHTS_PER_THREAD // (inputs * length)
    native.in_threads(run, chunks, threads=torch.get_num_threads(), least=least)
    return result
