"""Weight quantizers, one file each: how codes are chosen. The encoding says how they are stored.

A quantizer file defines `NAME` and `build(**settings)`; it is found by its presence in this folder.
Every quantizer works on a batch of equally shaped matrices, because experts come in stacks.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.errors import InputError


@dataclass(frozen=True)
class QuantizedLinear:
    """A batch of B matrices in one encoding."""

    encoding: Encoding
    tensors: dict[str, Tensor]  # the encoding's stored tensors, each with a leading batch dimension [B, ...]
    proxy_loss: Tensor  # float64 [B]: trace(D hessian D^T), D = weight - dequantized; sum over tokens; NaN without Hessian
    notes: tuple[str, ...]  # fallbacks and raised dampings, "item 3: ..." counting the Hessians of the batch


@dataclass(frozen=True)
class Prepared:
    """What a quantizer computes once from the Hessians, for all widths and all projections with the same inputs."""

    hessian: Tensor | None  # float32 [B or 1, in_features, in_features], as handed in
    group_size: int  # of the encodings it serves
    target: Tensor | None = None  # float32, the regularised Hessian that rounding minimises under; natural order
    inverse_cholesky: Tensor | None = None  # float32, of the damped Hessian, columns in processing order
    order: Tensor | None = None  # int64 [B or 1, in_features]: position -> input; None for the natural order
    notes: tuple[str, ...] = ()


class Quantizer(Protocol):
    """Chooses codes for a batch of matrices."""

    @property
    def name(self) -> str:
        """What `quantizer_from_name` and recipes call it."""
        ...

    @property
    def needs_hessian(self) -> bool:
        """Whether `prepare` refuses None."""
        ...

    def prepare(self, hessian: Tensor | None, *, group_size: int, token_count: Tensor | None = None) -> Prepared:
        """What all widths share. `hessian` float32 [B, in, in], or [1, in, in] for one that all items share."""
        ...

    def quantize(self, weight: Tensor, prepared: Prepared, encoding: Encoding) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] float32, not modified, in `encoding`."""
        ...


def quantizer_from_name(name: str, **settings: Any) -> Quantizer:
    """The quantizer called `name` with `settings`. Raises InputError for unknown names, settings and values."""
    modules = {module.NAME: module for module in _quantizer_modules()}
    if name not in modules:
        raise InputError(f"Unknown quantizer {name!r}. Known quantizers: {', '.join(sorted(modules))}.")
    try:
        return modules[name].build(**settings)
    except TypeError as error:
        raise InputError(f"Quantizer {name!r} does not take these settings: {error}.") from error


def quantizer_names() -> list[str]:
    """Every quantizer of this version, sorted."""
    return sorted(module.NAME for module in _quantizer_modules())


def _quantizer_modules():
    return [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
