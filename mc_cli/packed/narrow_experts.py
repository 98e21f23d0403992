"""How a plain checkpoint says that channels of experts are cut: its config.json has one width for all experts.

So every expert that is stored has to keep as many channels, in every layer, and a number of the config has to mean the
width of routed experts and nothing else. A skeleton that is built with another number there tells which one it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from mc_cli.artifacts.packed import ExpertLayout, PackedLayout
from mc_cli.errors import InputError, listed
from mc_cli.models import experts
from mc_cli.models.expert_gates import rows_by_channel, rows_of_block, up_name
from mc_cli.models.inventory import take_inventory
from mc_cli.models.skeleton import build_skeleton

_STOCK_MULTIPLE = 8  # of 16-bit weights are 16 bytes, of which torch's grouped products want rows to be multiples
_FIRST = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")  # others are tried after these


class NarrowExperts:
    """The change of experts whose layout cuts channels; none where it cuts none.

    config          the model's, with narrower experts where channels are cut
    config_changes  the entries of config.json, or of its text_config, that say so
    Raises InputError where a plain checkpoint cannot hold what is left.
    """

    def __init__(self, config: Any, layout: PackedLayout) -> None:
        self.config = config
        self.config_changes: dict[str, int] = {}
        self._width: int | None = None  # channels that every expert keeps, where some are cut
        widths = {block.path: _widths(block) for block in layout.experts}
        whole = {block.path: block.channels for block in layout.experts}
        if any(set(found.values()) - {whole[path]} for path, found in widths.items()):
            self._decide(widths, whole)

    def narrow(self, module: Any, projection: str, weight: torch.Tensor) -> torch.Tensor:
        """The part that the checkpoint has of a whole upright weight, whose stored channels come first."""
        if self._width is None:
            return weight
        if projection != up_name(module):
            return weight[:, : self._width]
        channels = module._mc_layout.channels
        rows = rows_by_channel(module, len(weight), channels, weight.device)
        assert rows is not None  # quantize has asked before it cut
        return weight[rows_of_block(rows, 0, self._width)]

    def _decide(self, widths: Mapping[str, Mapping[int, int]], whole: Mapping[str, int]) -> None:
        every = {width for found in widths.values() for width in found.values()}
        if len(every) > 1 or len(set(whole.values())) > 1 or not min(every):
            raise _unequal(self.config, widths)
        (self._width,), (channels,) = every, set(whole.values())
        if self._width % _STOCK_MULTIPLE:
            raise InputError(
                f"Every expert keeps {self._width} of {channels} channels, but the products of all experts in stock "
                f"transformers take a multiple of {_STOCK_MULTIPLE}. Run allocate with --uniform-width, which cuts to "
                "multiples of 16, or correct plan.yaml."
            )
        text = self.config.get_text_config()
        real = {getattr(text, "attribute_map", {}).get(name, name): None for name in _FIRST}
        names = [*real, *(name for name in vars(text) if "intermediate" in name and name not in real)]
        for name in names:
            if type(getattr(text, name, None)) is int and getattr(text, name) == channels:
                changed = copy.deepcopy(self.config)
                setattr(changed.get_text_config(), name, self._width)
                if _only_experts_shrink(self.config, changed, self._width):
                    self.config, self.config_changes = changed, {name: self._width}
                    return
        raise InputError(
            f"Every expert keeps {self._width} of {channels} channels, but config.json of model_type "
            f"{self.config.model_type!r} has no number for the width of routed experts alone, so that a plain "
            "checkpoint cannot hold them. Use --format transformers, which stores experts of any width."
        )


def _widths(block: ExpertLayout) -> dict[int, int]:
    """Expert -> channels that are stored of it, of those that a router slot runs."""
    return {
        expert: sum(part.channels for part in block.experts[expert])
        for expert in sorted({slot for slot in block.slots if slot is not None})
    }


def _only_experts_shrink(config: Any, changed: Any, width: int) -> bool:
    """Whether a model of the changed config has narrower routed experts, and all else as it was."""
    try:
        model = build_skeleton(changed, dtype=torch.float32)
    except (ValueError, RuntimeError):  # a number that the model asks other things of
        return False
    found = take_inventory(model, stored_dtypes={}).expert_blocks
    paths = tuple(f"{path}." for path, _ in experts.find_experts(model))
    before = build_skeleton(config, dtype=torch.float32).state_dict()
    after = model.state_dict()
    same = before.keys() == after.keys() and all(
        tensor.shape == after[name].shape for name, tensor in before.items() if not name.startswith(paths)
    )
    return same and {block.channels for block in found} == {width}


def _unequal(config: Any, widths: Mapping[str, Mapping[int, int]]) -> InputError:
    lines = (f"{path}   {min(found.values())} to {max(found.values())} channels" for path, found in widths.items())
    return InputError(
        f"The plan leaves experts of unequal widths, which a plain checkpoint of model_type {config.model_type!r} "
        f"cannot hold: config.json has one number for all.\n{listed(lines)}\n"
        "Use --format transformers, which stores experts of any width; or run allocate with --no-cuts, which keeps "
        "experts whole, or with --cut-ratio and --uniform-width, which cuts every expert alike, and quantize again."
    )
