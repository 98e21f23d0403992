"""Settings of calibrate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mc_cli.errors import McError
from mc_cli.settings import texts
from mc_cli.settings.declared import Flag, StageSettings, changed, setting, without_effect

_MODEL, _TEXT = "Model", "Text"


@dataclass(frozen=True)
class CalibrateSettings(StageSettings):
    """The model, the text, and how the sensitivity of layers is measured."""

    model: str = setting(
        "",
        Flag(
            "Checkpoint: a folder with config.json and *.safetensors, a hub id, or bundled:demo-moe.",
            _MODEL,
            metavar="DIR|ID",
            required=True,
        ),
    )
    revision: str | None = setting(
        None, Flag("Branch, tag or commit of a hub id.", _MODEL, default="the hub's main branch")
    )
    data: str = setting("", Flag(texts.DATA + "calibration.", _TEXT, metavar="PATH|NAME", required=True))
    split: str = setting("train", Flag(texts.SPLIT, _TEXT))
    text_field: str = setting("text", Flag(texts.TEXT_FIELD, _TEXT))
    chat_template: str | None = setting(
        None, Flag(texts.CHAT_TEMPLATE, _TEXT, metavar="NAME|FILE", default="the tokenizer's own")
    )
    no_chat_template: bool = setting(False, Flag(texts.NO_CHAT_TEMPLATE, _TEXT))
    sequences: int = setting(128, Flag("Sequences to measure on.", _TEXT, metavar="COUNT", least=1))
    length: int = setting(
        0,
        Flag(
            "Tokens per sequence.",
            _TEXT,
            metavar="TOKENS",
            default=texts.LENGTH_DEFAULT,
            fits=texts.is_length,
            says=texts.LENGTHS,
        ),
    )
    seed: int = setting(0, Flag(texts.SEED, _TEXT))
    # Without a backward pass, score goes by the share of the residual stream's energy.
    gradient_tokens: int = setting(
        32768,
        Flag(
            "Tokens of the backward pass that measures how much each layer matters; 0 goes by the residual "
            "stream's energy instead, without a backward pass.",
            _TEXT,
            metavar="TOKENS",
            least=0,
        ),
    )
    gradient_samples: int = setting(
        4, Flag("Labels drawn from the model for each of these tokens.", _TEXT, metavar="COUNT", least=1)
    )
    choice_costs: bool = setting(
        True, Flag("Count in what it costs that errors make later routers choose other experts.", _TEXT)
    )
    # The digests of model files and of the text, which counts its chat template, stand for these.
    not_fingerprinted = frozenset({"model", "data", "chat_template", "no_chat_template"})

    def _conflicts(self) -> Iterator[McError]:
        yield from texts.two_templates(self.chat_template, self.no_chat_template)
        if not self.gradient_tokens:
            idle = [name for name in changed(self) if name in ("gradient_samples", "choice_costs")]
            yield from without_effect(self, idle, "with --gradient-tokens 0: there is no backward pass")
