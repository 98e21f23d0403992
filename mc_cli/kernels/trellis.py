"""Products with trellis codes on a CPU: the inputs are rotated, the weights stay packed for few tokens.

Few tokens: each activation becomes two int16, a coarse and a fine part, with one scale per token; products are summed
exactly in int32, and every 256 inputs in float32. The result is as good as float32 arithmetic. Many tokens: the rotated
matrix is decoded once, in float32, and the library multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.numerics.rotation import rotate
from mc_cli.numerics.trellis import UNIT, code_levels, decode

FEW_TOKENS = 8  # up to here decoding on the fly is faster than decoding to float32 first
_LARGEST = 32767
_FINE = 2.0**-15  # of a step of the coarse part
_WEIGHTS_PER_THREAD = 2**19  # fewer are done before a second thread has started
PATHS = {0: "portable C", 2: "AVX-512 (VBMI, VNNI)"}


def linear(inputs: Tensor, tensors: Mapping[str, Tensor], encoding: TrellisEncoding) -> Tensor:
    """`inputs @ weight^T` [..., out_features] in the dtype of `inputs`.

    inputs    [..., in_features] floating point, on any device
    tensors   `codes` and `scales` of one matrix
    """
    rows = rotate(inputs.float(), encoding.block)
    flat = rows.reshape(-1, rows.shape[-1])
    if len(flat) <= FEW_TOKENS and flat.device.type == "cpu" and native.library() is not None:
        outputs = _product(flat, tensors, encoding)
    else:
        outputs = _decoded_product(flat, tensors, encoding)
    return outputs.view(*rows.shape[:-1], outputs.shape[-1]).to(inputs.dtype)


def path_name() -> str:
    """How products of few tokens are computed on this machine, and whether the search is compiled."""
    return "none, torch serves" if native.library() is None else PATHS[native.routine("mc_trellis_path", "")()]


def _decoded_product(rows: Tensor, tensors: Mapping[str, Tensor], encoding: TrellisEncoding) -> Tensor:
    """[tokens, out_features] float32 of rotated rows [tokens, in_features], by the library's matrix product."""
    values, scales = decode(tensors["codes"], encoding.rate), tensors["scales"].float()  # values [chunks, in, length]
    outputs = torch.matmul(rows, values).transpose(0, 1).flatten(1)  # of every chunk, side by side
    return outputs[:, : len(scales)] * scales


def _product(rows: Tensor, tensors: Mapping[str, Tensor], encoding: TrellisEncoding, path: int | None = None) -> Tensor:
    """[tokens, out_features] float32 of rotated rows [tokens, in_features]; `path` None takes the machine's best."""
    codes, scales = tensors["codes"].contiguous(), tensors["scales"]
    chunks, inputs, size = codes.shape
    length = int(size * 8 / encoding.rate)
    tokens = len(rows)
    best = native.routine("mc_trellis_path", "")() if path is None else path
    sizes = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    steps = rows / sizes
    coarse = steps.round()
    activations = torch.cat([coarse, ((steps - coarse) / _FINE).round()]).to(torch.int16)
    totals = torch.zeros((chunks, 2 * tokens, length))

    def run(first: int, last: int) -> None:
        native.routine("mc_trellis_product", "pppiiiiiip")(
            codes[first:last].data_ptr(),
            code_levels().data_ptr(),
            activations.data_ptr(),
            last - first,
            2 * tokens,
            inputs,
            length,
            int(2 * encoding.rate),
            best,
            totals[first:last].data_ptr(),
        )

    least = _WEIGHTS_PER_THREAD // (inputs * length)
    native.in_threads(run, chunks, threads=torch.get_num_threads(), least=least)
    outputs = totals[:, :tokens].add_(totals[:, tokens:], alpha=_FINE)
    outputs = outputs.transpose(0, 1).reshape(tokens, chunks * length)[:, : scales.shape[-1]]
    return outputs * (scales.float() * UNIT) * sizes
