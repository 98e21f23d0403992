"""Settings of the quantizer. Values that depend on it are looked up in the registry when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mc_cli.errors import IdleError
from mc_cli.registry import QUANTIZERS, candidate_widths
from mc_cli.settings.declared import Flag, StageSettings, changed, setting, without_effect

LARGEST_GROUP = 2**20  # inputs per scale; more than any matrix has
_QUANTIZER = "Quantizer"
FULL, QUICK = "full", "quick"  # searches
# The fields that a quantizer reads where its SETTINGS name them; the others shape what every quantizer is handed.
_OF_SOME = ("damping", "activation_order", "sweeps", "search")


@dataclass(frozen=True)
class QuantizerSettings(StageSettings):
    """The quantizer and its knobs; score and quantize must agree on them, so that score predicts what ships."""

    quantizer: str = setting(
        "trellis",
        Flag(
            "How weights are rounded: trellis, gptq, or rtn (round to nearest); --for sets gguf, mlx or integer.",
            _QUANTIZER,
            metavar="NAME",
        ),
    )
    damping: float = setting(
        0.01,
        Flag(
            "Fraction of the mean Hessian diagonal that is added to it.",
            _QUANTIZER,
            metavar="FRACTION",
            fits=lambda value: 0 < value < 1,
            says="a fraction of the mean Hessian diagonal, between 0 and 1.",
        ),
    )
    shrinkage: float = setting(
        0.25,
        Flag(
            "Tokens per input feature at which an expert's own statistics and its layer's pooled ones weigh the same.",
            _QUANTIZER,
            metavar="TOKENS",
            fits=lambda value: value >= 0,
            says="tokens per input feature, 0 or more.",
        ),
    )
    activation_order: bool = setting(True, Flag("Round the columns with the largest inputs first.", _QUANTIZER))
    sweeps: int | None = setting(  # None = the quantizer's own
        None,
        Flag(
            "Rounds in which every code is chosen again, given all others; with trellis, errors are then not fed into "
            "later rows, which loses more than this gains.",
            _QUANTIZER,
            metavar="COUNT",
            default="0 for trellis, 4 for gptq",
            least=0,
        ),
    )
    search: str = setting(
        FULL,
        Flag(
            "How trellis looks for codes: full, or quick: half the time, squared errors about 1 percent larger.",
            _QUANTIZER,
            metavar="full|quick",
            known=(FULL, QUICK),
        ),
    )
    group_size: int = setting(
        128,
        Flag(
            "Weights that share one scale, at most; each matrix gets the largest divisor of its width up to this.",
            _QUANTIZER,
            metavar="COUNT",
            least=8,
            fits=lambda value: value <= LARGEST_GROUP,
            says=f"at most {LARGEST_GROUP} inputs share a scale.",
        ),
    )
    error_correction: bool | None = setting(  # None = as the quantizer's CORRECTS_ERRORS says
        None,
        Flag(
            "Fit each expert's down projection to make good for what was quantized before it.",
            _QUANTIZER,
            default="yes with trellis, else no",
        ),
    )

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields; the search only where another than the full one was asked for."""
        return {name: value for name, value in super().resolved().items() if (name, value) != ("search", FULL)}

    @property
    def idle(self) -> list[str]:
        """The fields that were given and that the quantizer does not read; none of an unknown one."""
        given = [name for name in changed(self) if name in _OF_SOME]  # without any, no quantizer is imported
        if not given or self.quantizer not in QUANTIZERS.modules:
            return []
        return [name for name in given if name not in self._fact("SETTINGS")]

    @property
    def effective(self) -> QuantizerSettings:
        """The same without what is idle, as a record of an earlier version may hold it."""
        return replace(self, **{name: getattr(QuantizerSettings, name) for name in self.idle})

    def idle_conflicts(self) -> Iterator[IdleError]:
        """The fault of settings that the quantizer does not read, for those who were given them just now."""
        yield from without_effect(self, self.idle, f"with --quantizer {self.quantizer}")

    @property
    def corrects_errors(self) -> bool:
        """`error_correction`, or what its absence means for the quantizer."""
        if self.error_correction is not None:
            return self.error_correction
        return bool(self._fact("CORRECTS_ERRORS"))

    @property
    def joins_rows(self) -> bool:
        """Whether the quantizer weighs the errors of rows together, where the calibration tells how."""
        return bool(self._fact("JOINS_ROWS"))

    @property
    def family(self) -> str:
        """The family of encodings that the quantizer makes."""
        return str(self._fact("FAMILY"))

    def candidate_widths(self, target_bits: float = 0.0) -> tuple[float, ...]:
        """The widths that are worth scoring for a target in bits per expert weight; without one, for small ones."""
        return candidate_widths(self.family, target_bits)

    def _fact(self, name: str) -> Any:
        """A fact that the quantizer states; for an unknown one, refused where it is built, what most state."""
        return QUANTIZERS.fact(QUANTIZERS.modules.get(self.quantizer), name)
