"""Slow float64 and Python-integer versions of what the package computes, written from the definitions alone."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_row(codes: list[int], bits: int) -> bytes:
    """One row of codes as the little-endian bit stream of the affine layout."""
    stream = sum(code << (position * bits) for position, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) // 8) * bits, "little")


def unpacked_row(packed: bytes, bits: int, count: int) -> list[int]:
    """The first `count` codes of a bit stream."""
    stream = int.from_bytes(packed, "little")
    return [(stream >> (position * bits)) % 2**bits for position in range(count)]


def decoded(tensors: dict[str, Tensor], bits: int, in_features: int) -> Tensor:
    """float64 [B, out, in] of stored tensors with a batch dimension, from the layout's description."""
    packed, scales, zero_points = tensors["codes"], tensors["scales"].double(), tensors["zero_points"].double()
    width = in_features // scales.shape[-1]
    result = torch.empty(*packed.shape[:2], in_features, dtype=torch.float64)
    for item, rows in enumerate(packed):
        for row, stream in enumerate(rows):
            codes = torch.tensor(unpacked_row(bytes(stream.tolist()), bits, in_features), dtype=torch.float64)
            zero = zero_points[item, row].repeat_interleave(width) / 2 ** (8 - bits)
            result[item, row] = (codes - zero) * scales[item, row].repeat_interleave(width)
    return result


def loss(weight: Tensor, value: Tensor, hessian: Tensor) -> Tensor:
    """float64 [B]: trace(D hessian D^T) summed over every pair of inputs."""
    difference = weight.double() - value.double()
    return torch.einsum("boi,bij,boj->b", difference, hessian.double().expand(len(weight), -1, -1), difference)


def nearest(weight: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """float64 [..., n]: the closest of all 2^bits levels to each weight; scales and zero points [...]."""
    levels = torch.arange(2**bits, dtype=torch.float64)
    levels = (levels - zero_points.double().unsqueeze(-1)) * scales.double().unsqueeze(-1)
    choice = (weight.double().unsqueeze(-1) - levels.unsqueeze(-2)).abs().argmin(-1)
    return levels.gather(-1, choice)


def column_by_column(weight: Tensor, hessian: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """float64 codes [out, in] by the definition of GPTQ, on per-weight grids [out, in].

    After a column is rounded, the columns after it are the exact least-squares solution for all rounded ones.
    """
    weight, hessian = weight.double(), hessian.double()
    scales, zero_points = scales.double(), zero_points.double()
    running, codes, values = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        step = running[:, column] / scales[:, column] + zero_points[:, column]
        codes[:, column] = step.round().clamp(0, 2**bits - 1)
        values[:, column] = (codes[:, column] - zero_points[:, column]) * scales[:, column]
        done, rest = slice(0, column + 1), slice(column + 1, None)
        missing = (weight[:, done] - values[:, done]) @ hessian[done, rest]
        running[:, rest] = weight[:, rest] + torch.linalg.solve(hessian[rest, rest], missing.T).T
    return codes


def correlated_hessian(batch: int, in_features: int, *, seed: int, tokens: int = 400) -> Tensor:
    """float32 [batch, in, in] of inputs that share a few directions, as the inputs of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(batch, in_features, in_features, generator=generator)
    mixing = mixing * torch.logspace(0, -1.3, in_features)[:, None]
    inputs = torch.randn(batch, tokens, in_features, generator=generator) @ mixing
    return inputs.transpose(1, 2) @ inputs


def weights(batch: int, out_features: int, in_features: int, *, seed: int) -> Tensor:
    """float32 normal weights of the usual size."""
    return 0.02 * torch.randn(batch, out_features, in_features, generator=torch.Generator().manual_seed(seed))
