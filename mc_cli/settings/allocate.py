"""Settings of allocate: a budget, a method, and the widths of what is not a routed expert."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mc_cli.errors import InputError, McError, MissingFlagsError
from mc_cli.parts import KEPT_BITS, Role
from mc_cli.settings import texts
from mc_cli.settings.declared import Flag, StageSettings, setting
from mc_cli.settings.written import parse_bits_list, parse_file_size, parse_floors

# (above this many bits per expert weight, width of what is computed for every token): measured, see docs/results.md.
BESIDE = ((2.75, 8), (2.5, 6), (-1.0, 5))
# The same of the embedding, whose errors go through all layers and their routers, and of a head of its own.
EMBEDDING_BESIDE = ((2.5, 8), (-1.0, 6))
HEAD_BESIDE = ((2.75, 8), (-1.0, 6))
WIDTH_BORDERS = sorted(
    {above for widths in (BESIDE, EMBEDDING_BESIDE, HEAD_BESIDE) for above, _ in widths}, reverse=True
)
TARGETS = ("target_stored_bits", "target_bits", "target_size_bytes")  # they exclude each other
_BUDGET, _METHOD, _PARTS = "Budget (exactly one)", "Method", "Widths of the other parts"
_TARGET, _NOT_SET = "a target is above 0.", "not set"
_WIDTH = "1 to 8, or 16 to keep the checkpoint's own."


def _is_target(value: Any) -> bool:
    return math.isfinite(value) and value > 0


def _beside(widths: tuple[tuple[float, int], ...]) -> str:
    """A table of widths by the bits of the experts, in words."""
    return "; ".join(
        f"{bits} where experts have more than {border:g} bits" if border > 0 else f"else {bits}"
        for border, bits in widths
    )


def _part(what: str, default: str = "") -> Flag:
    """The flag of the width of a part that is not a routed expert."""
    return Flag(
        f"{what}: {_WIDTH}",
        _PARTS,
        metavar="BITS",
        default=default,
        fits=lambda bits: 1 <= bits <= 8 or bits == KEPT_BITS,
        says="a width is 1 to 8, or 16 to keep the checkpoint's own.",
    )


@dataclass(frozen=True)
class AllocateSettings(StageSettings):
    """Exactly one target, a method, and widths of parts that are not routed experts.

    Such a width may be 16 = kept, or None = what pays beside experts of the mean width asked for.
    """

    target_stored_bits: float | None = setting(
        None,
        Flag(
            "Mean stored bits per expert weight, scales and zero points included.",
            _BUDGET,
            metavar="BITS",
            default=_NOT_SET,
            fits=_is_target,
            says=_TARGET,
        ),
    )
    target_bits: float | None = setting(
        None,
        Flag(
            "Mean code bits per expert weight, scales and zero points left out.",
            _BUDGET,
            metavar="BITS",
            default=_NOT_SET,
            fits=_is_target,
            says=_TARGET,
        ),
    )
    target_size_bytes: int | None = setting(
        None,
        Flag(
            "Bytes of the whole checkpoint, for example 16GiB.",
            _BUDGET,
            option="--target-size",
            metavar="SIZE",
            parse=parse_file_size,
            default=_NOT_SET,
            fits=_is_target,
            says=_TARGET,
        ),
    )
    method: str = setting(
        "global",
        Flag(
            "How widths are chosen: global (over the whole model), pmq (per layer, as published), uniform, ...",
            _METHOD,
            metavar="NAME",
        ),
    )
    bits: tuple[float, ...] | None = setting(
        None,
        Flag(
            "Candidate widths, bits per weight; 0 lets experts be dropped.",
            _METHOD,
            metavar="LIST",
            parse=parse_bits_list,
            default="the method's own, else those that were scored",
        ),
    )
    floors: tuple[tuple[int, int], ...] | None = setting(
        None,
        Flag(
            "At least this many experts of a width in each layer, WIDTH:EXPERTS; once per width; none for no floor.",
            _METHOD,
            option="--floor",
            metavar="3:1",
            parse=parse_floors,
            repeated=True,
            default="the method's own",
        ),
    )
    alpha: float | None = setting(
        None, Flag("pmq: exponent of the routing frequency.", _METHOD, default="1, as published")
    )
    beta: float | None = setting(
        None, Flag("pmq: exponent of the routing weight.", _METHOD, default="1.5, as published")
    )
    gamma: float | None = setting(None, Flag("pmq: exponent of the loss.", _METHOD, default="1, as published"))
    seed: int = setting(0, Flag(texts.SEED, _METHOD))
    gap: float | None = setting(
        None,
        Flag(
            "Relative distance to the optimum at which the solver may stop.",
            _METHOD,
            metavar="FRACTION",
            default="the method's own: 0.0001 for global, 0 for pmq",
            fits=lambda value: 0 <= value < 1,
            says="a relative distance, from 0 to below 1.",
        ),
    )
    time_limit_s: float = setting(
        300.0,
        Flag(
            "Seconds for one integer programme.",
            _METHOD,
            option="--time-limit",
            metavar="SECONDS",
            fits=lambda value: value > 0,
            says="seconds above 0.",
        ),
    )
    attention_bits: int | None = setting(None, _part("Attention and other sequence mixers", _beside(BESIDE)))
    shared_bits: int | None = setting(None, _part("Shared experts", _beside(BESIDE)))
    dense_bits: int | None = setting(None, _part("MLPs of layers without experts", "as --shared-bits"))
    head_bits: int | None = setting(None, _part("Output head", _beside(HEAD_BESIDE)))
    embedding_bits: int | None = setting(
        None, _part("Token embedding, and a head that is tied to it", _beside(EMBEDDING_BESIDE))
    )
    router_bits: int = setting(KEPT_BITS, _part("Routers"))

    def _conflicts(self) -> Iterator[McError]:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            kind = InputError if given else MissingFlagsError
            yield kind(
                f"allocate needs exactly one target, {len(given)} given: --target-stored-bits (scales included), "
                "--target-bits (codes only) or --target-size (the whole checkpoint, for example 16GiB)."
            )

    def role_bits(self, mean_bits: float) -> dict[Role, int]:
        """Width per role beside experts of `mean_bits`; DENSE follows SHARED unless set."""

        def width(given: int | None, beside: tuple[tuple[float, int], ...] = BESIDE) -> int:
            return next(bits for above, bits in beside if mean_bits > above) if given is None else given

        return {
            Role.ATTENTION: width(self.attention_bits),
            Role.SHARED: width(self.shared_bits),
            Role.DENSE: width(self.shared_bits if self.dense_bits is None else self.dense_bits),
            Role.ROUTER: self.router_bits,
            Role.HEAD: width(self.head_bits, HEAD_BESIDE),
            Role.EMBEDDING: width(self.embedding_bits, EMBEDDING_BESIDE),
        }
