"""Settings of skipping experts, a part of those of prune-eval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mc_cli.errors import InputError, McError
from mc_cli.settings.declared import Flag, StageSettings, changed, setting, without_effect
from mc_cli.settings.written import parse_names, parse_rates

REAP, FREQUENCY, ROUTER_WEIGHT = "reap", "frequency", "router-weight"  # by which experts are dropped as a whole
PER_LAYER, GLOBAL = "layer", "global"  # the same share of experts in each layer, or the lowest of the whole model
ALL, OTP, ODP = "all", "otp", "odp"  # policies with settings of their own
# Settings that choose how much is skipped, and what that is fitted on.
_POINT, _FITTED = ("target_rate", "max_loss"), ("rates", "fit_data", "fit_sequences", "policy_seed")
_PRUNING = "Skipping experts while running"


@dataclass(frozen=True)
class PruneSettings(StageSettings):
    """The experts that a token skips while running. Without `policy` none is skipped, and nothing else here counts."""

    policy: tuple[str, ...] = setting(
        (),
        Flag(
            "Policy that lets tokens skip experts: otp, odp, dualsparse, top-k, random or router-threshold. It is "
            "fitted, measured and exported. More names, separated by commas, are fitted and measured beside it.",
            _PRUNING,
            metavar="LIST",
            parse=parse_names,
            default="none",
        ),
    )
    target_rate: float | None = setting(
        None,
        Flag(
            "Share of expert calls to skip.",
            _PRUNING,
            metavar="SHARE",
            default="not set",
            fits=lambda value: 0 < value < 1,
            says="a share of expert calls, above 0 and below 1.",
        ),
    )
    max_loss: float | None = setting(  # None = 0.01, unless there is a target_rate
        None,
        Flag(
            "Skip as many calls as raise the perplexity of fitting text by at most this share.",
            _PRUNING,
            metavar="SHARE",
            default="0.01 unless --target-rate is set",
            fits=lambda value: value > 0,
            says="a relative rise of perplexity above 0, for example 0.01.",
        ),
    )
    sweep: bool = setting(
        False, Flag("Measure the policies and the baselines at all --rates, and draw the front.", _PRUNING)
    )
    rates: tuple[float, ...] = setting(
        (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
        Flag("Shares of expert calls to find thresholds for.", _PRUNING, metavar="LIST", parse=parse_rates),
    )
    protect: float = setting(
        0.02,
        Flag(
            "odp: share of tokens that keep all their experts.",
            _PRUNING,
            metavar="SHARE",
            fits=lambda value: 0 <= value < 1,
            says="a share of tokens, from 0 to below 1.",
        ),
    )
    fit_data: str | None = setting(
        None,
        Flag(
            "Text to fit the policy on, as --data. Never the text it is evaluated on.",
            _PRUNING,
            metavar="PATH|NAME",
            default="the calibration tokens",
        ),
    )
    fit_sequences: int = setting(128, Flag("Windows to fit the policy on.", _PRUNING, metavar="COUNT", least=4))
    policy_seed: int = setting(0, Flag("Seed of everything random in a policy.", _PRUNING, metavar="NUMBER"))
    otp_steps: int = setting(200, Flag("otp: steps of training.", _PRUNING, metavar="COUNT", least=1))
    otp_learning_rate: float = setting(
        0.01,
        Flag(
            "otp: learning rate at the start.",
            _PRUNING,
            metavar="RATE",
            fits=lambda value: value > 0,
            says="above 0.",
        ),
    )
    otp_batch: int = setting(8, Flag("otp: windows per step.", _PRUNING, metavar="COUNT", least=1))
    drop_experts: float = setting(
        0.0,
        Flag(
            "Share of experts that no token is sent to any more; with --policy all, nothing is skipped. Their "
            "weights stay stored: `allocate --method reap --drop-ratio` drops the same ones for good.",
            _PRUNING,
            metavar="SHARE",
            fits=lambda value: 0 <= value < 1,
            says="a share of the experts, from 0 to below 1.",
        ),
    )
    drop_by: str = setting(
        REAP,
        Flag(
            "Score by which the lowest experts are taken: reap, frequency or router-weight.",
            _PRUNING,
            metavar="NAME",
            known=(REAP, FREQUENCY, ROUTER_WEIGHT),
        ),
    )
    drop_scope: str = setting(
        PER_LAYER,
        Flag(
            "layer: the same share in each; global: the lowest of all.",
            _PRUNING,
            metavar="NAME",
            known=(PER_LAYER, GLOBAL),
        ),
    )
    not_fingerprinted = frozenset({"fit_data"})

    def _conflicts(self) -> Iterator[McError]:
        if self.target_rate is not None and self.max_loss is not None:
            yield InputError("--target-rate and --max-loss exclude each other: one follows from the other. Give one.")
        if not self.policy:
            if self.drop_experts:
                yield InputError("--drop-experts needs --policy; --policy all drops whole experts and skips no calls.")
            given = [name for name in changed(self) if name != "drop_experts"]
            yield from without_effect(self, given, "without --policy, for example --policy odp")
            return
        if self.policy == (ALL,):
            if not self.drop_experts:
                yield InputError(f"--policy {ALL} skips no calls, and drops no experts without --drop-experts SHARE.")
            idle = (*_POINT, *(() if self.sweep else _FITTED))  # a sweep fits the baselines
            given = [name for name in changed(self) if name in idle]
            yield from without_effect(self, given, f"with --policy {ALL}, by which no token skips a call")
        for prefix, there, of in (
            ("drop_", self.drop_experts, "without --drop-experts"),
            ("otp_", OTP in self.policy, f"without --policy {OTP}"),
            ("protect", ODP in self.policy, f"without --policy {ODP}"),
        ):
            if not there:
                yield from without_effect(self, [name for name in changed(self) if name.startswith(prefix)], of)
