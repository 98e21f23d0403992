"""Model families: which ones are contract-tested, and the facts that transformers' experts interface does not tell.

A family file holds a `FAMILY = FamilyFacts(...)`; most families need none, the default facts fit them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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

# Model folders of transformers that have experts in their code and no model that continues text, and what they hold.
OUT_OF_SCOPE = {
    "diffusion_gemma": "block diffusion",
    "nllb_moe": "an encoder and a decoder",
    "openai_privacy_filter": "a classifier",
    "switch_transformers": "an encoder and a decoder",
    "vitpose_backbone": "images alone",
}

TABLE = Path(__file__).with_name("table.json")  # what became of every family in its contract test


@dataclass(frozen=True)
class Outcome:
    """The end of one family's contract test: a tiny random checkpoint taken through all stages.

    family        model type in transformers; `outer@text` where an image-text model holds any text model
    kind          text or image-text
    works         whether it was calibrated, quantized and exported, and read back equal
    reason        why it does not work, in a sentence; empty where it does
    packed_error  relative difference of the packed export's logits from the packed model's, median token
    dense_error   the same of the dense export
    images        whether rows with images went through all stages, and errors are of them too; else of text alone
    """

    family: str
    kind: str
    works: bool
    reason: str = ""
    packed_error: float | None = None
    dense_error: float | None = None
    images: bool = False


def read_outcomes() -> tuple[str, tuple[Outcome, ...]]:
    """(release of transformers, outcome of every family in it that has experts), as the contract test wrote them.

    Fields that a table lacks have their defaults; those that are not known are passed over.
    """
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    known = {field.name for field in fields(Outcome)}
    entries = ({name: value for name, value in entry.items() if name in known} for entry in content["families"])
    return content["transformers"], tuple(Outcome(**entry) for entry in entries)


@dataclass(frozen=True)
class Adopted:
    """A class of a family's own code whose instances are called otherwise, as transformers' experts interface has it.

    kind           name of the class
    forward        computes in place of its own forward, `self` first; None for the experts themselves, fused 3-D
                   parameters `gate_up_proj` and `down_proj` that are called with hidden states, indices and weights
    is_transposed  experts: whether they are stored as [experts, in_features, out_features]
    """

    kind: str
    forward: Callable[..., Any] | None = None
    is_transposed: bool = False


@dataclass(frozen=True)
class FamilyFacts:
    """Facts in which one family differs. Patterns are searched in module-tree names, first match wins.

    roles    pattern -> role, where the general rules say something else
    derived  patterns of persistent buffers that the config determines, so that a checkpoint may lack them
    apart    patterns of experts modules that stay as they are, where a layer has others that are compressed
    adopts   classes that do not use transformers' experts interface, and how they are brought to it
    names    pattern at a name's beginning -> replacement, where transformers writes a tensor under another name than
             it is published with; the first match wins
    read_as  the model type of transformers that the family is, where its own name is not one; results bear that name
    refused  why the family is not compressed, to follow its name; empty for all others
    """

    model_type: str
    roles: tuple[tuple[str, Role], ...] = ()
    derived: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    adopts: tuple[Adopted, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    read_as: str = ""
    refused: str = ""

    def role_of(self, name: str) -> Role | None:
        """The role that this family gives to the tensor `name`, None where the general rules hold."""
        for pattern, role in self.roles:
            if re.search(pattern, name):
                return role
        return None

    def is_derived(self, name: str) -> bool:
        """True for a persistent buffer that a checkpoint may lack."""
        return any(re.search(pattern, name) for pattern in self.derived)

    def is_apart(self, path: str) -> bool:
        """True for an experts module that is not compressed."""
        return any(re.search(pattern, path) for pattern in self.apart)


def adopted_classes() -> Iterator[Adopted]:
    """Every class that a family file brings to the experts interface."""
    for module in _REGISTRY.modules.values():
        yield from module.FAMILY.adopts


def facts_for(model_type: str) -> FamilyFacts:
    """The facts of one model type; the default facts where the family has no file."""
    module = _REGISTRY.modules.get(model_type)
    return FamilyFacts(model_type) if module is None else module.FAMILY


def in_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the model type that transformers has for the family, and without code in the place of that."""
    model_type = config.get("model_type")
    read_as = facts_for(model_type).read_as if isinstance(model_type, str) else ""
    if not read_as:
        return dict(config)
    return {**{name: value for name, value in config.items() if name != "auto_map"}, "model_type": read_as}


def facts_of(config: Any) -> FamilyFacts:
    """The facts of a model with this config: its own type's, else those of the text model in it."""
    types = (config.model_type, config.get_text_config().model_type)
    return facts_for(next((each for each in types if each in _REGISTRY.modules), config.model_type))


def is_contract_tested(config: Any) -> bool:
    """Whether the family of a model with this config works in a contract test, of the 15 large ones or of the table."""
    outer, text = config.model_type, config.get_text_config().model_type
    if outer in CONTRACT_TESTED:
        return True
    return any(each.works and each.family in (outer, f"{outer}@{text}") for each in read_outcomes()[1])
