"""How a plain checkpoint says that experts are dropped, for readers that know nothing of masks.

A router with a bias on its choice gets a very low one for each dropped expert, if that makes it route as a masked one
does: a softmax over all experts, in front of the bias, would still count them. Else the experts are left out, rows of
the router and all, which takes the same number in every layer: config.json has one number for all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mc_cli.artifacts.packed import PackedLayout
from mc_cli.errors import InputError, listed
from mc_cli.models.inventory import take_inventory
from mc_cli.models.router_masks import CORRECTION_BIAS, LOW, mask_router
from mc_cli.models.skeleton import build_skeleton

_DRAWN_TOKENS = 256
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class PlainRouters:
    """The change of a model's tensors where its layout drops experts; none where it drops none.

    config          the model's, with fewer experts where some are left out
    config_changes  the entries of config.json, or of its text_config, that say so
    Raises InputError where a plain checkpoint cannot say which experts are dropped.
    """

    def __init__(self, config: Any, layout: PackedLayout) -> None:
        self.config = config
        self.config_changes: dict[str, int] = {}
        self._lowered: dict[str, Sequence[int]] = {}  # name of a bias -> dropped experts
        self._count = 0  # experts of a layer before some are left out
        self._kept: dict[str, list[int]] = {}  # module path -> experts that stay, of experts and routers that shrink
        dropped = {block.path: block.dropped for block in layout.experts}
        if any(dropped.values()):
            self._decide(dropped)

    def kept(self, path: str, num_experts: int) -> Sequence[int]:
        """The experts of the module at `path` that the checkpoint has, in order."""
        return self._kept.get(path, range(num_experts))

    def plain(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint by its module-tree name, from the packed model's."""
        if name in self._lowered:
            return tensor.index_fill(-1, torch.tensor(self._lowered[name]), LOW)
        for path, kept in self._kept.items():
            if name.startswith(f"{path}.") and self._count in tensor.shape:
                return tensor.index_select(tensor.shape.index(self._count), torch.tensor(kept))
        return tensor

    def _decide(self, dropped: Mapping[str, Sequence[int]]) -> None:
        model: Any = build_skeleton(self.config, dtype=torch.float32)
        blocks = {block.path: block for block in take_inventory(model, stored_dtypes={}).expert_blocks}
        state = model.state_dict()
        without = []
        for path, names in dropped.items():
            router, count = blocks[path].router_path, blocks[path].num_experts
            biases = [
                name
                for name, tensor in state.items()
                if name.startswith(f"{router}.") and tensor.shape[-1] == tensor.numel() == count and _is_bias(name)
            ]
            if not names:
                continue
            if biases and _bias_is_mask(model.get_submodule(router), biases[0].removeprefix(f"{router}."), names):
                self._lowered[biases[0]] = names
            else:
                without.append(path)
        if without:
            self._lowered.clear()
            self._leave_out(dropped, blocks)

    def _leave_out(self, dropped: Mapping[str, Sequence[int]], blocks: Mapping[str, Any]) -> None:
        groups = {
            sum(expert in members for expert in names)
            for path, names in dropped.items()
            for members in _groups(blocks[path])
        }
        survivors = {blocks[path].num_experts - len(names) for path, names in dropped.items()}
        before = {block.num_experts for block in blocks.values()}
        if len(groups) > 1 or len(survivors) > 1 or len(before) > 1:
            raise self._refusal(dropped, blocks)
        (count,), (left,) = before, survivors
        text = self.config.get_text_config()
        real = {getattr(text, "attribute_map", {}).get(name, name) for name in _COUNTS}
        self.config_changes = {name: left for name in sorted(real) if getattr(text, name, None) == count}
        self.config = copy.deepcopy(self.config)
        for name in self.config_changes:
            setattr(self.config.get_text_config(), name, left)
        shrunk = take_inventory(build_skeleton(self.config, dtype=torch.float32), stored_dtypes={}).expert_blocks
        if {block.num_experts for block in shrunk} != {left}:
            raise self._refusal(dropped, blocks)
        self._count = count
        for path, names in dropped.items():
            kept = [expert for expert in range(count) if expert not in names]
            self._kept[path] = self._kept[blocks[path].router_path] = kept

    def _refusal(self, dropped: Mapping[str, Sequence[int]], blocks: Mapping[str, Any]) -> InputError:
        lines = (f"layer {blocks[path].layer:<4} drops {len(names)} experts" for path, names in dropped.items())
        grouped = any(block.router_groups > 1 for block in blocks.values())
        return InputError(
            f"The plan drops experts, which a plain checkpoint of model_type {self.config.model_type!r} cannot say: "
            "its routers have no bias that would keep them from being chosen, and experts can be left out only where "
            f"every layer{' and every group of its router' if grouped else ''} drops as many:\n{listed(lines)}\n"
            "Use --format transformers, whose loader masks them; or quantize with a plan.yaml that drops the same "
            "number everywhere, or none (allocate without 0 in --bits)."
        )


@torch.no_grad()
def _bias_is_mask(router: nn.Module, bias: str, dropped: Sequence[int]) -> bool:
    """Whether a low bias makes such a router, drawn at random, choose and weigh as with these experts masked."""
    drawn: Any = copy.deepcopy(router).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for tensor in [*drawn.parameters(), *drawn.buffers()]:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    features = next(tensor.shape[-1] for tensor in drawn.parameters() if tensor.dim() > 1)
    hidden = torch.randn(_DRAWN_TOKENS, features, generator=generator)
    handles = mask_router(drawn, drawn.state_dict()[bias].numel(), dropped)
    masked = drawn(hidden)
    for handle in handles:
        handle.remove()
    drawn.state_dict()[bias][..., list(dropped)] = LOW
    lowered = drawn(hidden)
    return torch.equal(lowered[2], masked[2]) and torch.allclose(lowered[1], masked[1], rtol=1e-4)


def _is_bias(name: str) -> bool:
    return name.endswith((f".{CORRECTION_BIAS}", ".bias"))


def _groups(block: Any) -> list[range]:
    size = block.num_experts // block.router_groups
    return [range(begin, begin + size) for begin in range(0, block.num_experts, size)]
