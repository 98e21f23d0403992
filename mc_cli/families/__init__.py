"""Model families: which ones are contract-tested, and the facts that transformers' experts interface does not tell.

A family file holds a `FAMILY = FamilyFacts(...)`; most families need none, the default facts fit them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mc_cli.parts import Role
from mc_cli.registry import Registry

_REGISTRY = Registry("model family", __name__, marker="FAMILY", name_of=lambda module: module.FAMILY.model_type)

# Every type here has a contract test on a tiny checkpoint: stream, calibrate, quantize, export, load, equal logits.
CONTRACT_TESTED = (
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "jamba",
    "minimax",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)


@dataclass(frozen=True)
class FamilyFacts:
    """Facts in which one family differs. Patterns are searched in module-tree names, first match wins.

    roles    pattern -> role, where the general rules say something else
    derived  patterns of persistent buffers that the config determines, so that a checkpoint may lack them
    """

    model_type: str
    roles: tuple[tuple[str, Role], ...] = ()
    derived: tuple[str, ...] = ()

    def role_of(self, name: str) -> Role | None:
        """The role that this family gives to the tensor `name`, None where the general rules hold."""
        for pattern, role in self.roles:
            if re.search(pattern, name):
                return role
        return None

    def is_derived(self, name: str) -> bool:
        """True for a persistent buffer that a checkpoint may lack."""
        return any(re.search(pattern, name) for pattern in self.derived)


def facts_for(model_type: str) -> FamilyFacts:
    """The facts of one model type; the default facts where the family has no file."""
    module = _REGISTRY.modules.get(model_type)
    return FamilyFacts(model_type) if module is None else module.FAMILY
