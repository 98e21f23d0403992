"""Settings of score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mc_cli.errors import InputError, McError
from mc_cli.parts import DROPPED
from mc_cli.registry import widths_of
from mc_cli.settings.declared import Flag, StageSettings, setting, without_effect
from mc_cli.settings.engines import engine_flag, quantizer_conflict, width_conflicts, widths_to_score
from mc_cli.settings.merge import MERGES, PUZZLE, SUB_MOE
from mc_cli.settings.quantizer import QuantizerSettings
from mc_cli.settings.written import as_written, parse_bits_list

_SCORE = "Measures"
LEAST_WIDTHS = 5  # with fewer, all are measured on every expert
# Units that are measured: experts and their projections; channels besides; or channels where they can be cut.
EXPERT, CHANNEL, AUTO = "expert", "channel", "auto"


@dataclass(frozen=True)
class ScoreSettings(StageSettings):
    """The widths that are measured, the quantizer, and the number of tokens."""

    bits: tuple[float, ...] = setting(  # none given: what the encodings of the quantizer's family say
        (),
        Flag(
            "Candidate widths, bits per weight; 0 lets experts be dropped.",
            _SCORE,
            metavar="LIST",
            parse=parse_bits_list,
        ),
    )
    quantizer: QuantizerSettings = field(default=QuantizerSettings())
    loss_tokens: int = setting(
        1024,
        Flag("Tokens per expert, at most, on which output errors are measured.", _SCORE, metavar="TOKENS", least=1),
    )
    unit: str = setting(
        EXPERT,
        Flag(
            "channel measures every channel of the experts too, in the same pass: allocate cuts by that. auto does so "
            "where channels can be cut.",
            _SCORE,
            metavar="expert|channel|auto",
            known=(EXPERT, CHANNEL, AUTO),
        ),
    )

    similarity: bool = setting(
        False,
        Flag(
            "Measure how alike the experts of a layer are, in the same pass: allocate --merge asks for that.",
            _SCORE,
        ),
    )

    pairs: int = setting(
        0,
        Flag(
            "Pairs of experts per layer, the nearest ones, for which score measures what one stored expert in place of "
            "both costs: allocate merges some where that is clearly cheaper than fewer bits.",
            _SCORE,
            metavar="COUNT",
            least=0,
        ),
    )
    pair_merge: str = setting(
        SUB_MOE,
        Flag(
            "With --pairs, how two experts become one: sub-moe, mergemoe or average, as --merge of allocate.",
            _SCORE,
            metavar="NAME",
            known=tuple(name for name in MERGES if name != PUZZLE),
        ),
    )
    all_widths: bool = setting(
        False,
        Flag(
            "Measure every width on every expert. By default a few experts of each layer have all measured, the others "
            "every third, where there are five or more and no --for; losses between are bent as those few's are.",
            _SCORE,
        ),
    )

    roles: bool = setting(
        True,
        Flag(
            "Measure what coding attention, shared experts, embedding and head costs as well: predicted losses are of "
            "the whole model then.",
            _SCORE,
        ),
    )

    engine: str | None = setting(None, engine_flag(_SCORE))

    @property
    def measures_all(self) -> bool:
        """Whether all experts have every width measured: types of an engine have no order that a line could follow."""
        return self.all_widths or self.engine is not None

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result; of what is measured besides, only what was asked."""
        usual = {"unit": EXPERT, "similarity": False, "pairs": 0, "roles": True, "engine": None, "all_widths": False}
        if not self.pairs:
            usual["pair_merge"] = self.pair_merge
        return {name: value for name, value in super().resolved().items() if name not in usual or usual[name] != value}

    def __post_init__(self) -> None:
        if not self.bits:
            object.__setattr__(self, "bits", widths_to_score(self.engine, self.quantizer))
        object.__setattr__(self, "bits", as_written(self.bits))
        super().__post_init__()

    def _conflicts(self) -> Iterator[McError]:
        """Widths that the quantizer does not make, whole ones up to 8 it always does; and what an engine has not."""
        if conflict := quantizer_conflict(self.engine, self.quantizer.quantizer):
            yield conflict
        yield from self.quantizer.idle_conflicts()
        coded = [width for width in self.bits if width != DROPPED]
        if self.all_widths and len(coded) < LEAST_WIDTHS:
            yield from without_effect(
                self, ["all_widths"], f"with --bits {','.join(map(str, coded))}: fewer than {LEAST_WIDTHS} all are"
            )
        elif self.all_widths and self.engine is not None:
            yield from without_effect(self, ["all_widths"], f"with --for {self.engine}: all are measured")
        yield from width_conflicts(self.engine, self.bits, "--bits")
        if self.engine is not None and self.pairs:
            yield InputError(f"--pairs {self.pairs}: experts are not merged for {self.engine}. Leave it out.")
        if not self.pairs and self.pair_merge != SUB_MOE:
            yield InputError(f"--pair-merge {self.pair_merge} is about pairs to merge: say how many with --pairs.")
        known = widths_of(self.quantizer.family)
        wrong = [width for width in self.bits if width != DROPPED and width not in known]
        if wrong:
            yield InputError(
                f"--bits {','.join(map(str, self.bits))}: --quantizer {self.quantizer.quantizer} does not make "
                f"{', '.join(map(str, wrong))}, but {', '.join(map(str, sorted(known)))}."
            )
