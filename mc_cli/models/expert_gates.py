"""The step between an expert's projections: the family's own activation, and which rows act on which channel.

The module itself is asked, so that no family needs facts here: numbers that are put through its activation tell
whether rows of gate and up follow each other or take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn


class Experts(Protocol):
    """A layer's routed experts: an nn.Module as transformers' experts decorator leaves it, and what is used of both.

    has_gate              whether the first projection is `gate_up_proj`, of two rows per channel, or plain `up_proj`
    is_transposed         whether fused weights are [experts, in_features, out_features]
    has_bias              whether `<projection>_bias` [experts, out_features] stand beside them
    has_post_expert_norm  whether each expert's output goes through `post_expert_norm`
    """

    has_gate: bool
    is_transposed: bool
    has_bias: bool
    has_post_expert_norm: bool
    num_experts: int
    act_fn: Callable[[torch.Tensor], torch.Tensor]  # [tokens, channels] both, where there is no gate
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    _is_hf_initialized: bool  # transformers gives its parameters no first values any more
    _parameters: dict[str, nn.Parameter | None]

    def _apply_gate(self, gate_up_out: torch.Tensor, /) -> torch.Tensor:
        """[tokens, channels] of [tokens, 2 * channels], where there is a gate."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None: ...


def up_name(module: Experts) -> str:
    """The first projection's parameter name: `gate_up_proj`, or `up_proj` where the family has no gate."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def activate(module: Experts, hidden: torch.Tensor) -> torch.Tensor:
    """The family's own activation between the projections (clamps, interleaving and scales live there)."""
    return module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)


def slopes_of(module: Experts, outputs: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """[tokens, rows]: what a change of each row's output does to its channel's activation, times the reach."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((activate(module, leaf) * reach).sum(), leaf)
    return gradient


def channels_of_rows(module: Experts, rows: int, channels: int, device: torch.device) -> torch.Tensor:
    """int64 [rows]: the channel that each row of an up projection acts on, asked of the activation itself.

    Families order them freely.
    """
    outputs = torch.ones((1, rows), device=device)
    numbers = torch.arange(1.0, channels + 1, device=device)
    ratio = slopes_of(module, outputs, numbers) / slopes_of(module, outputs, torch.ones_like(numbers))
    return ratio[0].round().long() - 1


def rows_by_channel(module: Experts, rows: int, channels: int, device: torch.device) -> torch.Tensor | None:
    """int64 [channels, rows / channels]: the rows of the up projection that act on each channel; None if they vary."""
    found = channels_of_rows(module, rows, channels, device)
    in_range = bool(((found >= 0) & (found < channels)).all())
    if not in_range or bool((found.bincount(minlength=channels) * channels != rows).any()):
        return None
    return found.argsort(stable=True).view(channels, -1)


def rows_of_block(by_channel: torch.Tensor, begin: int, channels: int) -> torch.Tensor:
    """int64, ascending: the rows of the up projection that act on channels `begin` to begin + channels - 1.

    This order keeps a block's rows as a whole expert's: gates first, or in turns.

    by_channel  as `rows_by_channel` gives them
    """
    return by_channel[begin : begin + channels].flatten().sort().values


_PROBED = 8  # channels of an expert that is only asked how it activates


def can_be_divided(module: Experts) -> bool:
    """Whether some channels by themselves are activated as they are among all, so that an expert can be in blocks."""
    rows = _PROBED * (2 if module.has_gate else 1)
    by_channel = rows_by_channel(module, rows, _PROBED, torch.device("cpu"))
    if by_channel is None:
        return False
    # On the CPU by name: transformers builds a model with another device as the default.
    probe = torch.randn(4, rows, generator=torch.Generator().manual_seed(0), device="cpu")
    with torch.no_grad():
        whole = activate(module, probe)
        parts = [activate(module, probe[:, rows_of_block(by_channel, begin, 4)]) for begin in (0, 4)]
    return torch.allclose(torch.cat(parts, -1), whole, rtol=1e-5, atol=1e-6)
