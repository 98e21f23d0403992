"""Settings of allocate: a budget, a method, and the widths of what is not a routed expert."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mc_cli.errors import InputError, McError, MissingFlagsError
from mc_cli.parts import DROPPED, KEPT_BITS, Role
from mc_cli.settings import texts
from mc_cli.settings.declared import Flag, StageSettings, setting
from mc_cli.settings.prune import GLOBAL, PER_LAYER
from mc_cli.settings.written import parse_bits_list, parse_file_size, parse_floors

# (above this many bits per expert weight, width of what is computed for every token): measured, see docs/results.md.
BESIDE = ((2.75, 8), (2.5, 6), (-1.0, 5))
# The same of the embedding, whose errors go through all layers and their routers, and of a head of its own.
EMBEDDING_BESIDE = ((2.5, 8), (-1.0, 6))
HEAD_BESIDE = ((2.75, 8), (-1.0, 6))
WIDTH_BORDERS = sorted(
    {above for widths in (BESIDE, EMBEDDING_BESIDE, HEAD_BESIDE) for above, _ in widths}, reverse=True
)
TARGETS = ("target_stored_bits", "target_bits", "target_size_bytes", "cut_ratio")  # they exclude each other
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
    cut_ratio: float | None = setting(
        None,
        Flag(
            "Share of the experts' channels to cut away, those of the lowest score. The others keep 16 bits, or get "
            "the one width of --bits (0,4).",
            _BUDGET,
            metavar="SHARE",
            default=_NOT_SET,
            fits=lambda share: 0 < share < 1,
            says="a share of the experts' channels, above 0 and below 1.",
        ),
    )
    method: str = setting(
        "global",
        Flag(
            "How widths are chosen: global (over the whole model), pmq (per layer, as published), uniform, ... With "
            "--cut-ratio how channels are scored: camera-p, heapr, weight-norm, activation-norm, random.",
            _METHOD,
            metavar="NAME",
        ),
    )
    scope: str = setting(
        PER_LAYER,
        Flag(
            "With --cut-ratio. layer: the same share in each; global: the lowest of all.",
            _METHOD,
            metavar="NAME",
            known=(PER_LAYER, GLOBAL),
        ),
    )
    uniform_width: bool = setting(
        False,
        Flag(
            "With --cut-ratio: cut as many channels of every expert, so that stock architectures hold the result.",
            _METHOD,
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
        None,
        Flag(
            "pmq: exponent of the routing frequency. camera-p: share of the largest activation, from 0 to 1.",
            _METHOD,
            default="1 and 0.9, as published",
        ),
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
                "--target-bits (codes only), --target-size (the whole checkpoint, for example 16GiB) or --cut-ratio "
                "(share of the experts' channels to cut away)."
            )
        yield from map(InputError, self._cut_problems())

    def _cut_problems(self) -> Iterator[str]:
        """The faults of requests about cuts, made with a cut or without one."""
        if self.cut_ratio is None:
            asked = {"--scope": self.scope != PER_LAYER, "--uniform-width": self.uniform_width}
            asked["--bits 16"] = KEPT_BITS in (self.bits or ())
            yield from (f"{flag} is about channels to cut: give --cut-ratio." for flag, given in asked.items() if given)
            return
        if self.floors:
            yield "--floor counts experts by their width, but those that --cut-ratio leaves have one width."
        if len([bits for bits in self.bits or (KEPT_BITS,) if bits != DROPPED]) != 1:
            yield (
                f"--bits {','.join(map(str, self.bits or ()))}: with --cut-ratio all channels that are left have one "
                "width, for example --bits 0,4; 0,16 keeps their weights."
            )
        if self.uniform_width and self.scope != PER_LAYER:
            yield f"--uniform-width cuts every expert alike, so --scope {self.scope} has no meaning."

    @property
    def width_left(self) -> float:
        """The width of the channels that a cut leaves."""
        return next((bits for bits in self.bits or () if bits != DROPPED), KEPT_BITS)

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result; those of cuts only where there is one."""
        plain = super().resolved()
        cuts = ("cut_ratio", "scope", "uniform_width")
        return {name: value for name, value in plain.items() if self.cut_ratio is not None or name not in cuts}

    def role_bits(self, mean_bits: float) -> dict[Role, int]:
        """Width per role beside experts of `mean_bits`, kept beside kept ones; DENSE follows SHARED unless set."""

        def width(given: int | None, beside: tuple[tuple[float, int], ...] = BESIDE) -> int:
            if given is None and mean_bits == KEPT_BITS:
                return KEPT_BITS
            return next(bits for above, bits in beside if mean_bits > above) if given is None else given

        return {
            Role.ATTENTION: width(self.attention_bits),
            Role.SHARED: width(self.shared_bits),
            Role.DENSE: width(self.shared_bits if self.dense_bits is None else self.dense_bits),
            Role.ROUTER: self.router_bits,
            Role.HEAD: width(self.head_bits, HEAD_BESIDE),
            Role.EMBEDDING: width(self.embedding_bits, EMBEDDING_BESIDE),
        }
