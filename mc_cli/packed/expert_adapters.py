"""LoRA adapters on routed experts that are packed: what PEFT's `target_parameters` asks for, without a dense weight.

PEFT adds an adapter's product to the fused weight of all experts, at each forward. Here the low-rank factors of each
expert go beside its own packed product, as with a packed linear: nothing is decoded to train, save or load an adapter.
Names, shapes and nesting are PEFT's, so that its files, `add_adapter`, `set_adapter` and merging work as ever.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mc_cli.errors import PackedWeightError
from mc_cli.models import experts

_ASKING = "_inject_parameters"  # PEFT's function that looks for what `target_parameters` names


def targets_for(module: Any, asking: FrameType) -> list[tuple[str, Tensor]]:
    """(name, stand-in) of the fused weights that packing has replaced, for PEFT alone, which looks for targets.

    asking   the frame that wants the module's own parameters. Everybody else, for example who moves or saves them, gets
             nothing: there are no such parameters
    PEFT's configuration learns here which adapter fits these experts, by the way that PEFT has for modules it does not
    know.
    """
    config: Any = asking.f_locals.get("peft_config")
    if asking.f_code.co_name != _ASKING or not hasattr(config, "_register_custom_module"):
        return []
    config._register_custom_module({type(module): _adapter_class()})
    return [(name, stand_in(module, name)) for name in (experts.up_name(module), "down_proj")]


def stand_in(module: Any, projection: str) -> Tensor:
    """A tensor of one element's memory with shape, dtype and device of a fused weight that packing has replaced."""
    layout = module._mc_layout
    if layout.divided:
        raise PackedWeightError(
            f"{len(layout.divided)} of {layout.num_experts} experts at {layout.path} lack channels or are stored in "
            f"blocks of channels, which an adapter on {projection} does not know. Train adapters on other modules, on "
            "an export whose experts are whole, or on dense experts: `mc_cli.unpack(module)`."
        )
    shape = layout.projections[projection]
    shape = (layout.num_experts, *(reversed(shape) if module.is_transposed else shape))
    device = next(iter(module.parameters())).device
    return torch.zeros((), dtype=module._mc_dtype, device=device).expand(shape)


class _ExpertsAdapter:
    """PEFT's wrapper of one fused weight, for packed experts; once they are dense it does what PEFT's own does."""

    parameter_name: str
    num_experts: int
    lora_A: Any  # module per adapter, weight [rank * experts, in_features]
    lora_B: Any  # weight [out_features, rank * experts]
    scaling: dict[str, float]

    def __init__(self, base_layer: Any, adapter_name: str, parameter_name: str | None = None, **options: Any) -> None:
        if parameter_name is None:
            raise PackedWeightError(
                "Routed experts are no linear that `target_modules` could name. Name their fused weights instead, as "
                "in LoraConfig(target_parameters=['experts.gate_up_proj', 'experts.down_proj']); see docs/training.md."
            )
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, **options)  # type: ignore[call-arg]

    def get_param(self) -> Tensor:
        module = self._mc_experts()
        return stand_in(module, self.parameter_name) if experts.is_packed(module) else super().get_param()  # type: ignore[misc]

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        module = self._mc_experts()
        if not experts.is_packed(module):
            with super()._activate_lora(active_adapters):  # type: ignore[misc]
                yield
            return
        factors = [self._mc_factors(name) for name in active_adapters or () if name in self.lora_A]
        with experts.with_low_rank(module, self.parameter_name, factors):
            yield

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the experts of this layer dense, with a warning, and merges into them."""
        from peft.tuners.tuners_utils import check_adapters_to_merge

        module = self._mc_experts()
        packed = experts.is_packed(module)
        names = check_adapters_to_merge(self, adapter_names)  # type: ignore[arg-type]
        if packed and any(name in self.lora_A for name in names):
            module._mc_keep_dense()
        if names:
            super().merge(safe_merge=safe_merge, adapter_names=names)  # type: ignore[misc]

    def _mc_experts(self) -> Any:
        return self.get_base_layer()  # type: ignore[attr-defined]

    def _mc_factors(self, adapter: str) -> experts.LowRank:
        inner, outer = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        inner = inner.view(self.num_experts, -1, inner.shape[-1])
        outer = outer.view(len(outer), -1, self.num_experts).permute(2, 0, 1)
        return experts.LowRank(inner.unbind(0), outer.unbind(0), self.scaling[adapter])


@functools.cache
def _adapter_class() -> Any:
    """PEFT's wrapper with our behaviour; PEFT knows its own wrappers by the name of their class."""
    from peft.tuners.lora.layer import ParamWrapper  # the caller has imported peft

    return type(ParamWrapper.__name__, (_ExpertsAdapter, ParamWrapper), {"__module__": __name__})
