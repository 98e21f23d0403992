"""Settings of prune-eval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mc_cli.errors import InputError, McError
from mc_cli.settings import texts
from mc_cli.settings.declared import Flag, StageSettings, changed, setting, without_effect
from mc_cli.settings.prune import PruneSettings
from mc_cli.settings.written import parse_names

_EVALUATION = "Evaluation"
ACTIVATION_BITS = Flag(
    "Bits of inputs in a processor's compiled products with packed weights. 8 is faster with many tokens at a time, "
    "and less exact: prune-eval says what it costs.",
    _EVALUATION,
    option="--activation-bits",
    metavar="16|8",
    fits=lambda bits: bits in (16, 8),
    says="16 or 8.",
)


@dataclass(frozen=True)
class EvaluateSettings(StageSettings):
    """The held-out text that the packed model is measured on, and how, and the experts that tokens skip."""

    data: str = setting(
        "",
        Flag(
            texts.DATA + "heldout. Never text that was calibrated on.",
            _EVALUATION,
            metavar="PATH|NAME",
            required=True,
        ),
    )
    split: str = setting("test", Flag(texts.SPLIT, _EVALUATION))
    text_field: str = setting("text", Flag(texts.TEXT_FIELD, _EVALUATION))
    chat_template: str | None = setting(
        None, Flag(texts.CHAT_TEMPLATE, _EVALUATION, metavar="NAME|FILE", default="the tokenizer's own")
    )
    no_chat_template: bool = setting(False, Flag(texts.NO_CHAT_TEMPLATE, _EVALUATION))
    length: int = setting(
        0,
        Flag(
            "Tokens per window.",
            _EVALUATION,
            metavar="TOKENS",
            default=texts.LENGTH_DEFAULT,
            fits=texts.is_length,
            says=texts.LENGTHS,
        ),
    )
    stride: int = setting(  # 0 = length
        0,
        Flag(
            "Tokens by which windows advance; smaller than --length gives each token more context.",
            _EVALUATION,
            metavar="TOKENS",
            default="--length: no overlap",
        ),
    )
    max_sequences: int = setting(  # 0 = all of the text
        0,
        Flag(
            "Windows at most, taken evenly over the text.",
            _EVALUATION,
            metavar="COUNT",
            default="all of the text",
            least=0,
        ),
    )
    tasks: tuple[str, ...] = setting(
        (),
        Flag(
            "lm-eval tasks, separated by commas (needs the extra: pip install 'mixture-compressor[eval]').",
            _EVALUATION,
            metavar="LIST",
            parse=parse_names,
            default="none",
        ),
    )
    include_path: str | None = setting(
        None,
        Flag("Folder with lm-eval task files of your own (YAML).", _EVALUATION, metavar="DIR", default="none"),
    )
    task_limit: int | None = setting(
        None, Flag("Examples per lm-eval task at most.", _EVALUATION, metavar="COUNT", default="all", least=1)
    )
    activation_bits: int = setting(16, ACTIVATION_BITS)
    prune: PruneSettings = field(default=PruneSettings())
    not_fingerprinted = frozenset({"data", "chat_template", "no_chat_template"})

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result; a policy's only where there is one."""
        plain = super().resolved()
        del plain["prune"]
        return {**plain, "prune": self.prune.resolved()} if self.prune.policy else plain

    def _conflicts(self) -> Iterator[McError]:
        yield from texts.two_templates(self.chat_template, self.no_chat_template)
        if not self.tasks:
            given = [name for name in changed(self) if name in ("include_path", "task_limit")]
            yield from without_effect(self, given, "without --tasks")
        if self.stride < 0 or (self.length and self.stride > self.length):
            yield InputError(f"--stride {self.stride}: from 0 (no overlap) to --length {self.length}.")
