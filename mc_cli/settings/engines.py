"""Limits that stages keep to so that a given engine can hold the result: `--for`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mc_cli.errors import InputError
from mc_cli.parts import DROPPED, KEPT_BITS, Role
from mc_cli.registry import QUANTIZERS, widths_of
from mc_cli.settings.declared import Flag
from mc_cli.settings.quantizer import QuantizerSettings

_NONE = "none; any encoding, and widths of their own for all experts"


PER_PROJECTION = "projection"  # experts of a layer have one width per projection
WHOLE_MODEL = "model"  # all experts of the model have one width


_ENTRY = 140  # bytes of a tensor's entry in a file's head, for experts with names of their own


def _nothing(outputs: int, inputs: int, bits: int) -> int:
    """Stacked matrices have no names of their own, and nothing else."""
    return 0


def _of_gptq(outputs: int, inputs: int, bits: int) -> int:
    """Every input's group, as 32 bits; zero points, which are packed for 2 and 3 bits alone; four tensors."""
    return 4 * inputs + outputs * -(-inputs // 128) * bits // 8 + 4 * _ENTRY


def _of_compressed_tensors(outputs: int, inputs: int, bits: int) -> int:
    """The shape, two numbers of 64 bits; three tensors."""
    return 16 + 3 * _ENTRY


@dataclass(frozen=True)
class Engine:
    """Describes the plans that an engine can hold.

    quantizer   makes encodings that it reads;  format   of export
    alike       which experts have one width, since they lie in one tensor or under one scheme; None: each has its own
    widths      those of the quantizer that it takes; empty = all
    kept        what it has in the model's own dtype alone
    one_beside  whether all else that is coded has one width
    more_bytes  (outputs, inputs, bits) of a coded matrix -> bytes that the format has of it beside what is packed
    """

    name: str
    quantizer: str
    format: str
    alike: str | None = PER_PROJECTION
    widths: tuple[int, ...] = ()
    kept: tuple[Role, ...] = ()
    one_beside: bool = False
    more_bytes: Callable[[int, int, int], int] = _nothing

    @property
    def role_widths(self) -> frozenset[float]:
        """Widths that what is not an expert may get beside 16."""
        made = widths_of(QUANTIZERS.fact(QUANTIZERS.named(self.quantizer), "FAMILY"))
        return made & frozenset(self.widths) if self.widths else made

    def beside(self, role: Role, width: float) -> int:
        """The width that a role gets where `width` would be right: the next that there is, or 16."""
        if role in self.kept:
            return KEPT_BITS
        return int(min((each for each in self.role_widths if each >= width and each == int(each)), default=KEPT_BITS))


_OUTSIDE = (Role.ROUTER, Role.EMBEDDING, Role.HEAD)
ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("llama.cpp", "gguf", "gguf"),
        Engine("mlx", "mlx", "mlx", kept=(Role.ROUTER,)),
        Engine("gptq", "integer", "gptq", alike=None, kept=_OUTSIDE, more_bytes=_of_gptq),
        Engine(
            "compressed-tensors",
            "integer",
            "compressed-tensors",
            alike=WHOLE_MODEL,
            widths=(4, 8),
            kept=_OUTSIDE,
            one_beside=True,
            more_bytes=_of_compressed_tensors,
        ),
    )
}


def engine_flag(panel: str) -> Flag:
    """The flag `--for` of a stage."""
    return Flag(
        f"The engine that is to run the result ({', '.join(ENGINES)}): scores and plans keep to what it holds.",
        panel,
        option="--for",
        metavar="ENGINE",
        default=_NONE,
        known=tuple(ENGINES),
    )


def with_engine(values: Mapping[str, Any], fields: Any) -> dict[str, Any]:
    """Field values with the engine's own quantizer, where a section has one and none was given."""
    engine = ENGINES.get(values.get("engine") or "")
    if engine is None or "quantizer" not in fields or values.get("quantizer"):
        return dict(values)
    return {**values, "quantizer": engine.quantizer}


def widths_to_score(engine: str | None, quantizer: QuantizerSettings, target_bits: float = 0.0) -> tuple[float, ...]:
    """The widths that are measured for a target in bits per expert weight unless told otherwise."""
    found = ENGINES.get(engine or "")
    return found.widths if found is not None and found.widths else quantizer.candidate_widths(target_bits)


def width_conflicts(engine: str | None, widths: Iterable[float], flag: str) -> Iterator[InputError]:
    """The fault of experts' widths that an engine has not."""
    found = ENGINES.get(engine or "")
    if found is None:
        return
    if DROPPED in widths:
        yield InputError(f"{flag} {DROPPED}: {engine} has the same number of experts in all layers.")
    wrong = [width for width in widths if width != DROPPED and found.widths and width not in found.widths]
    if wrong:
        yield InputError(
            f"{flag} {', '.join(map(str, wrong))}: {engine} has experts of {' or '.join(map(str, found.widths))} bits."
        )


def role_conflicts(engine: str | None, given: Mapping[Role, int | None]) -> Iterator[InputError]:
    """The faults of widths that were asked for beside the experts, by role."""
    found = ENGINES.get(engine or "")
    if found is None:
        return
    asked = {role: bits for role, bits in given.items() if bits not in (None, KEPT_BITS)}
    for role, bits in asked.items():
        if role in found.kept:
            yield InputError(f"--{role.value}-bits {bits}: {engine} keeps that at 16 bits. Leave it out.")
        elif bits not in found.role_widths:
            known = ", ".join(f"{width:g}" for width in sorted(found.role_widths))
            yield InputError(f"--{role.value}-bits {bits}: {engine} has {known} and 16.")
    if found.one_beside and len(set(asked.values())) > 1:
        several = ", ".join(f"--{role.value}-bits {bits}" for role, bits in asked.items())
        yield InputError(f"{several}: {engine} has one width for all of that. Give the same, or 16 for what is kept.")


def quantizer_conflict(engine: str | None, quantizer: str) -> InputError | None:
    """The fault of a quantizer that makes what an engine cannot read."""
    found = ENGINES.get(engine or "")
    wanted = quantizer if found is None else found.quantizer
    if quantizer == wanted:
        return None
    return InputError(
        f"--quantizer {quantizer}: {engine} reads what --quantizer {wanted} makes. Leave one of --for and --quantizer "
        "out."
    )
