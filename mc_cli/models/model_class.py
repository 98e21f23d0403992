"""Finds the class of transformers that a checkpoint is loaded as: the one its config.json names, text or more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
)

from mc_cli.errors import FamilyError
from mc_cli.models.model_folder import SUPPORTED

CAUSAL = "AutoModelForCausalLM"
_TOWERS = ("vision_config", "audio_config")
# In the order in which a class is looked for where config.json names none of them.
_AUTO: dict[str, tuple[Any, Any]] = {
    CAUSAL: (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "AutoModelForImageTextToText": (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    "AutoModelForMultimodalLM": (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
}


@dataclass(frozen=True)
class ModelClass:
    """A class of causal language models, alone or behind towers for images and sound.

    auto_name   the auto class that makes it, for example AutoModelForImageTextToText
    kind        the class itself; None for a model that brings its own code
    whole       whether it takes everything that the config describes; False for the text part of a model with towers
    """

    auto_name: str
    kind: Any
    whole: bool = True

    @property
    def auto(self) -> Any:
        """The auto class of transformers."""
        return _AUTO[self.auto_name][0]

    @property
    def custom(self) -> bool:
        """Whether the model brings its own code."""
        return self.kind is None


def model_class(config: PretrainedConfig) -> ModelClass:
    """The class for a config: the one that `architectures` names, else the whole model where there are towers.

    Raises FamilyError where transformers has none that continues text.
    """
    if type(config).__module__.startswith("transformers_modules"):  # its code was trusted when it was read
        mapped = getattr(config, "auto_map", None) or {}
        return ModelClass(next((name for name in _AUTO if name in mapped), CAUSAL), None)
    found = list(_classes_for(config))
    if not found:
        raise FamilyError(
            f"model_type {config.model_type!r} has no class in transformers {transformers.__version__} that continues "
            f"text, alone or with images: encoder-decoders, classifiers and diffusion models are not compressed here. "
            f"{SUPPORTED}"
        )
    named = getattr(config, "architectures", None) or ()
    chosen = [each for each in found if each.kind.__name__ in named]
    if not chosen and has_towers(config):
        chosen = [each for each in found if each.whole]
    return (chosen or found)[0]


def has_towers(config: Any) -> bool:
    """Whether a config describes parts for images or sound beside text."""
    return any(getattr(config, name, None) is not None for name in _TOWERS)


def _classes_for(config: PretrainedConfig) -> Iterator[ModelClass]:
    """All that continue text token by token: transformers lists classes for block diffusion among them."""
    for name, (_, mapping) in _AUTO.items():
        if type(config) not in mapping:
            continue
        found = mapping[type(config)]
        for kind in found if isinstance(found, tuple) else (found,):
            if "Diffusion" in kind.__name__:
                continue
            yield ModelClass(name, kind, whole=isinstance(config, kind.config_class))
