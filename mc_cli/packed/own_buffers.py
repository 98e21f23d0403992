"""Buffers of packed modules that no checkpoint holds, as the scale of an embedding in Gemma's models.

transformers fills them by the code that draws the module's weight, which it must not run where that is packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mc_cli.models.skeleton import initialise, non_persistent_buffers

_VALUES = "_mc_buffers"  # attribute of a module: name -> tensor on the CPU


def note_buffers(model: Any, module: nn.Module) -> None:
    """Computes the buffers of a module whose weight is not packed yet, and keeps them; to be called on meta or CPU."""
    buffers = non_persistent_buffers(module)
    if not buffers:
        return
    with torch.device("cpu"):
        initialise(model, module, [name for name, buffer in buffers.items() if buffer.is_meta])
    values = {name: buffer.detach().cpu().clone() for name, buffer in non_persistent_buffers(module).items()}
    setattr(module, _VALUES, values)


def restore_buffers(model: nn.Module) -> None:
    """Fills the buffers that were kept, where loading has left them empty."""
    for module in model.modules():
        for name, value in vars(module).get(_VALUES, {}).items():
            held = module._buffers[name]
            assert held is not None
            module._buffers[name] = value.to(device="cpu" if held.is_meta else held.device, dtype=held.dtype)
