"""Checks of policies that skip experts, as far as they can be made before any is fitted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.names import IMPORTANCE
from mc_cli.artifacts.packed import ExpertLayout, read_layout
from mc_cli.artifacts.store import as_planned
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import InputError, listed
from mc_cli.parts import ModelInventory
from mc_cli.policies import dualsparse, otp, policy_from_name, runs_halves
from mc_cli.policies.static_experts import experts_to_drop
from mc_cli.settings import FREQUENCY, REAP, ROUTER_WEIGHT, PruneSettings

BASELINES = ("top-k", "random", "router-threshold")
LEAST_ROWS = 2  # windows that a policy is fitted on


def policy_names(settings: PruneSettings) -> list[str]:
    """The policies to fit, the one that ships first. Raises InputError for unknown and untrainable ones."""
    names = list(dict.fromkeys([*settings.policy, *(BASELINES if settings.sweep else ())]))
    for name in names:
        if policy_from_name(name).LEARNED and name != otp.NAME:
            raise InputError(
                f"--policy {name}: it has to be trained, and prune-eval trains {otp.NAME} alone. Give a policy "
                "of which thresholds are all that is fitted."
            )
        if runs_halves(policy_from_name(name)) and name != dualsparse.NAME:
            raise InputError(f"--policy {name}: prune-eval fits thresholds of halves for {dualsparse.NAME} alone.")
    return names


def check_halves(settings: PruneSettings, layers: Iterable[ExpertLayout]) -> None:
    """Raises InputError for a policy of halves where a packed model has none, naming its layers."""
    asked = policies_of_halves(settings)
    if not asked:
        return
    problems = []
    for block in layers:
        if block.shared:
            problems.append(f"{block.path}: {len(block.shared)} router slots run another's expert")
        elif block.without_halves:
            problems.append(f"{block.path}: {len(block.without_halves)} experts are not stored in two equal blocks")
    if problems:
        raise InputError(
            f"--policy {asked[0]} runs the better half of an expert alone, but this model's are not stored in halves:\n"
            f"{listed(problems)}\nRun allocate with --halves, then quantize, and prune-eval again."
        )


def require_halves_asked(settings: PruneSettings, *, halves: bool) -> None:
    """Raises InputError for a policy of halves where allocate is asked for none, so that there will be none."""
    asked = policies_of_halves(settings)
    if asked and not halves:
        raise InputError(
            f"--policy {asked[0]} runs the better half of an expert alone, and without --halves experts are stored "
            "whole. Give --halves too, or another policy."
        )


def policies_of_halves(settings: PruneSettings) -> list[str]:
    """The policies asked for that run the better half of an expert alone."""
    return [name for name in settings.policy if runs_halves(policy_from_name(name))]


def dropped_experts(settings: PruneSettings, work: WorkDir, inventory: ModelInventory) -> dict[int, list[int]]:
    """Layer -> experts that are dropped as a whole, by what calibrate and score measured; {} where none are to be.

    Raises InputError where too few would be left.
    """
    if not settings.drop_experts:
        return {}
    importance = Importance.read(as_planned(work).folder("score") / IMPORTANCE)
    field_of = {REAP: "output_norm_mean", FREQUENCY: "routing_count", ROUTER_WEIGHT: "routing_weight_sum"}
    scores = {layer.layer: getattr(layer, field_of[settings.drop_by]) for layer in importance.layers}
    packed = {block.path: block.dropped for block in read_layout(work.folder("quantize")).experts}
    gone = {block.layer: packed[block.path] for block in inventory.expert_blocks}
    return _dropped(settings, scores, inventory, gone)


def check_drops(
    settings: PruneSettings, inventory: ModelInventory, gone: Mapping[int, Collection[int]] | None = None
) -> None:
    """Raises InputError where too few experts would be left, whatever their scores are.

    gone   layer -> experts that a plan drops, as far as that is known: the fewer there are, the more may go here
    """
    if settings.drop_experts:
        scores = {block.layer: [1.0] * block.num_experts for block in inventory.expert_blocks}
        _dropped(settings, scores, inventory, gone or {})


def _dropped(
    settings: PruneSettings,
    scores: Mapping[int, list[float]],
    inventory: ModelInventory,
    gone: Mapping[int, Collection[int]],
) -> dict[int, list[int]]:
    top_k = {block.layer: block.top_k for block in inventory.expert_blocks}
    left_out = {layer: tuple(experts) for layer, experts in gone.items()}
    share, scope = settings.drop_experts, settings.drop_scope
    return experts_to_drop(scores, top_k, share=share, scope=scope, gone=left_out)


def require_rows(rows: int, length: int) -> None:
    """Raises InputError where there are fewer windows than fitting needs. length: tokens of one."""
    if rows < LEAST_ROWS:
        raise InputError(
            f"There are {rows} windows of {length} tokens to fit a policy on, and at least {LEAST_ROWS} are needed: "
            "one is kept for checking. Give more text with --fit-data, or calibrate on more --sequences."
        )
