"""Settings of allocate: a budget, a method, and the widths of what is not a routed expert."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mc_cli.errors import InputError, McError, MissingFlagsError
from mc_cli.parts import BESIDE_TEXT, DROPPED, KEPT_BITS, Role
from mc_cli.settings import texts
from mc_cli.settings.cut import CAMERA_Q, cut_problems, group_problems
from mc_cli.settings.declared import Flag, StageSettings, changed, setting, without_effect
from mc_cli.settings.drop import DROP_METHODS, drop_problems
from mc_cli.settings.engines import ENGINES, engine_flag, role_conflicts, width_conflicts
from mc_cli.settings.merge import MERGES, merge_problems
from mc_cli.settings.prune import GLOBAL, PER_LAYER, REAP
from mc_cli.settings.written import as_written, parse_bits_list, parse_file_size, parse_floors

# (above this many bits per expert weight, width of what is computed for every token): measured, see docs/results.md.
BESIDE = ((2.75, 8), (2.5, 6), (-1.0, 5))
# The same of the embedding, whose errors go through all layers and their routers, and of a head of its own.
EMBEDDING_BESIDE = ((2.5, 8), (-1.0, 6))
HEAD_BESIDE = ((2.75, 8), (-1.0, 6))
_BESIDE_OF = {Role.HEAD: HEAD_BESIDE, Role.EMBEDDING: EMBEDDING_BESIDE}
WIDTH_BORDERS = sorted(
    {above for widths in (BESIDE, EMBEDDING_BESIDE, HEAD_BESIDE) for above, _ in widths}, reverse=True
)
TARGETS = ("target_stored_bits", "target_bits", "target_size_bytes", "cut_ratio", "experts_left")  # one of them
# `run` has channels measured for up to so many stored bits. On moe-21m plans with cuts had 13 to 20 % less KL up to
# here (docs/results/inside-experts.md); larger sizes were not compared.
CUTS_WITHIN = 2.25
EXPONENTS = ("alpha", "beta", "gamma")
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
            "Bytes of the whole exported directory, for example 16GiB.",
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
    experts_left: float | None = setting(
        None,
        Flag(
            "With --merge: share of each layer's experts that are stored; others are merged into them. They keep 16 "
            "bits, or get the one width of --bits; with a budget beside it, widths as method global chooses them.",
            _BUDGET,
            metavar="SHARE",
            default=_NOT_SET,
            fits=lambda share: 0 < share < 1,
            says="a share of a layer's experts, above 0 and below 1.",
        ),
    )
    drop_ratio: float | None = setting(
        None,
        Flag(
            "Share of whole experts to drop, those of the lowest score. The others keep 16 bits, or get the one width "
            "of --bits (0,4); with a budget beside it, the widths of method global.",
            _METHOD,
            metavar="SHARE",
            default=_NOT_SET,
            fits=lambda share: 0 < share < 1,
            says="a share of the experts, above 0 and below 1.",
        ),
    )
    method: str = setting(
        "global",
        Flag(
            "How widths are chosen: global (over the whole model), pmq (per layer, as published), uniform, ... With "
            "--cut-ratio how channels are scored: camera-p, heapr, weight-norm, activation-norm, random. With "
            "--drop-ratio how experts are: reap, frequency, router-weight. camera-q: three groups of channels by "
            "energy, each of one of the three widths of --bits.",
            _METHOD,
            metavar="NAME",
        ),
    )
    scope: str = setting(
        PER_LAYER,
        Flag(
            "With --cut-ratio or --drop-ratio. layer: the same share in each; global: the lowest of all.",
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
    cuts: bool = setting(
        True,
        Flag(
            "Where score measured channels, method global may cut some if that is clearly cheaper than fewer bits.",
            _METHOD,
        ),
    )
    merges: bool = setting(
        True,
        Flag(
            "Where score measured pairs of experts, method global may merge some if that is clearly cheaper than fewer "
            "bits.",
            _METHOD,
        ),
    )
    merge: str | None = setting(
        None,
        Flag(
            "With --experts-left, how experts become one. sub-moe: mean on shared singular directions; mergemoe: down "
            "projection by least squares; puzzle: pairs share magnitudes; average: plain mean.",
            _METHOD,
            metavar="NAME",
            default=_NOT_SET,
            known=MERGES,
        ),
    )
    merge_rank: float = setting(
        1.0,
        Flag(
            "With --merge sub-moe: share of the singular directions that merged matrices keep.",
            _METHOD,
            metavar="SHARE",
            fits=lambda share: 0 < share <= 1,
            says="a share of the directions, above 0 and at most 1.",
        ),
    )
    halves: bool = setting(
        False,
        Flag(
            "Store every expert in two halves, the better channels first, so that prune-eval --policy dualsparse can "
            "run the first alone.",
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
    hedge: float = setting(
        0.0,
        Flag(
            "Share of text of other kinds that the plan is made for beside text like the calibration's, taken to use a "
            "layer's experts alike.",
            _METHOD,
            metavar="SHARE",
            fits=lambda share: 0 <= share < 1,
            says="a share of the text, from 0 to below 1.",
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
            "pmq: exponent of the routing frequency. camera-p, camera-q: share of the largest activation, from 0 to 1.",
            _METHOD,
            default="1 and 0.9, as published",
        ),
    )
    beta: float | None = setting(
        None, Flag("pmq: exponent of the routing weight.", _METHOD, default="1.5, as published")
    )
    gamma: float | None = setting(None, Flag("pmq: exponent of the loss.", _METHOD, default="1, as published"))
    figures: bool = setting(
        False,
        Flag(
            "Draw beside the plan which widths experts got, which channels stay, which experts were merged and, if "
            "channels were measured, where their energy lies; the numbers go into figures.json.",
            _METHOD,
        ),
    )
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
    vision_bits: int = setting(KEPT_BITS, _part("Towers for images and sound, and their projectors"))

    engine: str | None = setting(None, engine_flag(_METHOD))

    def __post_init__(self) -> None:
        if self.bits is not None:
            object.__setattr__(self, "bits", as_written(self.bits))
        super().__post_init__()

    def _conflicts(self) -> Iterator[McError]:
        asked = (self.cut_ratio, self.drop_ratio, self.experts_left)
        loses = any(share is not None for share in asked) or DROPPED in (self.bits or ())
        if self.engine is not None and loses:
            yield InputError(
                f"--for {self.engine}: experts are neither dropped, cut nor merged there. Leave --cut-ratio, "
                "--drop-ratio, --experts-left and width 0 out."
            )
        if self.engine is not None and (self.halves or self.method == CAMERA_Q):
            flag = "--halves" if self.halves else f"--method {CAMERA_Q}"
            yield InputError(
                f"{flag}: {self.engine} has one width for all channels of an expert. Leave it out, or --for."
            )
        yield from width_conflicts(self.engine, [bits for bits in self.bits or () if bits != DROPPED], "--bits")
        yield from role_conflicts(self.engine, self.given_beside)
        if self.engine is not None and self.vision_bits != KEPT_BITS:
            yield InputError(f"--vision-bits {self.vision_bits}: {self.engine} keeps that at 16 bits. Leave it out.")
        given = [name for name in TARGETS if getattr(self, name) is not None]
        yield from map(InputError, drop_problems(self, given))
        budgets = [name for name in given if name != "experts_left"]
        if len(budgets) > 1 or not (given or self.drop_ratio is not None):
            kind = InputError if given else MissingFlagsError
            yield kind(
                f"allocate needs exactly one target, {len(given)} given: --target-stored-bits (scales included), "
                "--target-bits (codes only), --target-size (the whole directory, for example 16GiB), --cut-ratio "
                "(share of the experts' channels to cut away) or --experts-left (share of them that --merge leaves); "
                "or --drop-ratio (share of whole experts); the last two with a budget or alone."
            )
        yield from map(InputError, merge_problems(self))
        if self.halves and (not self.is_plain or self.method == CAMERA_Q):
            yield InputError(
                "--halves divides whole experts by a budget's widths: leave it out with what cuts or merges."
            )
        yield from map(InputError, cut_problems(self))
        yield from map(InputError, group_problems(self))
        yield from self._idle()

    def _idle(self) -> Iterator[McError]:
        """The fault of settings of a programme over costs where none is solved, and of exponents that nothing takes."""
        given = changed(self)
        if self.is_by_scores and (self.has_one_width or self.method == CAMERA_Q):
            idle = [name for name in given if name in ("hedge", "gap", "time_limit_s")]
            yield from without_effect(self, idle, "where scores alone say what goes, and no programme is solved")
        if self.drop_ratio is not None or self.experts_left is not None:
            idle = [name for name in given if name in EXPONENTS]
            yield from without_effect(self, idle, "with --drop-ratio or --experts-left")
        elif self.method == CAMERA_Q:
            yield from without_effect(self, [name for name in given if name in EXPONENTS[1:]], f"with {CAMERA_Q}")

    @property
    def drop_by(self) -> str:
        """The score by which whole experts are dropped."""
        return self.method if self.method in DROP_METHODS else REAP

    @property
    def has_one_width(self) -> bool:
        """Whether all that is left has one width: a cut, and merged experts or a drop without a budget."""
        shares = ("cut_ratio", "experts_left")
        return not any(getattr(self, name) is not None for name in TARGETS if name not in shares)

    @property
    def is_plain(self) -> bool:
        """Whether experts stay as they are but for their widths."""
        return self.cut_ratio is None and self.drop_ratio is None and self.experts_left is None

    @property
    def is_by_scores(self) -> bool:
        """Whether scores alone say what is cut, merged, dropped or grouped, without a programme over costs."""
        return not self.is_plain or self.method == CAMERA_Q

    @property
    def width_left(self) -> float:
        """The width of what a cut, a drop or merging leaves."""
        return next((bits for bits in self.bits or () if bits != DROPPED), KEPT_BITS)

    @property
    def codes_no_expert(self) -> bool:
        """Whether what is left of the experts keeps its weights, so that everything beside them does unless asked."""
        return {bits for bits in self.bits or () if bits != DROPPED} == {KEPT_BITS}

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result; those of cuts, drops and such only where asked."""
        plain = super().resolved()
        left_out = {name for name in ("cuts", "merges") if getattr(self, name)}
        left_out |= {"cut_ratio", "uniform_width"} if self.cut_ratio is None else set()
        left_out |= {"engine"} if self.engine is None else set()
        left_out |= {"experts_left", "merge", "merge_rank"} if self.experts_left is None else set()
        left_out |= {name for name in ("halves", "figures") if not getattr(self, name)}
        left_out |= {"vision_bits"} if self.vision_bits == KEPT_BITS else set()
        left_out |= {"drop_ratio"} if self.drop_ratio is None else set()
        left_out |= {"scope"} if self.cut_ratio is None and self.drop_ratio is None else set()
        return {name: value for name, value in plain.items() if name not in left_out}

    @property
    def given_beside(self) -> dict[Role, int | None]:
        """The widths that were given for what is not an expert; DENSE follows SHARED unless set."""
        return {
            Role.ATTENTION: self.attention_bits,
            Role.SHARED: self.shared_bits,
            Role.DENSE: self.shared_bits if self.dense_bits is None else self.dense_bits,
            Role.ROUTER: self.router_bits,
            Role.HEAD: self.head_bits,
            Role.EMBEDDING: self.embedding_bits,
        }

    def role_bits(self, mean_bits: float) -> dict[Role, int]:
        """Width per role beside experts of `mean_bits`, kept beside kept ones; as an engine has them."""
        engine = ENGINES.get(self.engine or "")
        coded = [bits for bits in self.given_beside.values() if bits is not None and bits != KEPT_BITS]
        common = coded[0] if coded and engine is not None and engine.one_beside else None

        def width(role: Role, given: int | None) -> int:
            if given is not None:
                return given
            if mean_bits == KEPT_BITS:
                return KEPT_BITS
            beside = _BESIDE_OF.get(role, BESIDE)
            usual = next(bits for above, bits in beside if mean_bits > above)
            return usual if engine is None else engine.beside(role, common or usual)

        towers = {} if self.vision_bits == KEPT_BITS else dict.fromkeys(BESIDE_TEXT, self.vision_bits)
        return {role: width(role, given) for role, given in self.given_beside.items()} | towers
