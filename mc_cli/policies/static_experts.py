"""--drop-experts: whole experts get no token any more; they are chosen once, by what calibration measured.

The router chooses among the others as if the dropped ones had no row: their logits are minus infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mc_cli.errors import InputError
from mc_cli.settings import GLOBAL, PER_LAYER

__all__ = ["GLOBAL", "PER_LAYER", "experts_to_drop"]


def experts_to_drop(
    scores: Mapping[int, Sequence[float]],
    top_k: Mapping[int, int],
    *,
    share: float,
    scope: str,
    gone: Mapping[int, Sequence[int]] | None = None,
    flag: str = "--drop-experts",
) -> dict[int, list[int]]:
    """Layer -> the experts with the lowest scores, ascending by number; every layer keeps at least its top-k.

    scores   layer -> one value per expert: REAP's mean of routing weight times output norm over the expert's tokens,
             its count of tokens, or its sum of routing weights
    share    of all experts;  scope  PER_LAYER: the same share in every layer, rounded down; GLOBAL: the lowest of the
             whole model, each score over its layer's mean, since norms of different layers do not compare
    gone     layer -> experts that the plan has dropped already; the share is of the others
    flag     that `share` was given by
    Raises InputError where the floor leaves fewer experts to drop than were asked for.
    Source: Lasby et al. 2025, arXiv:2510.13999 (REAP).
    """
    there = {
        layer: [expert for expert in range(len(values)) if expert not in (gone or {}).get(layer, ())]
        for layer, values in scores.items()
    }
    scores = {layer: [values[expert] for expert in there[layer]] for layer, values in scores.items()}
    if scope == PER_LAYER:
        found = {layer: _lowest(values, int(share * len(values))) for layer, values in scores.items()}
        short = {layer for layer, gone in found.items() if len(scores[layer]) - len(gone) < top_k[layer]}
    else:
        found, short = _lowest_of_all(scores, top_k, share)
    if short:
        names = ", ".join(str(layer) for layer in sorted(short)[:8])
        raise InputError(
            f"{flag} {share}: layers {names} would keep fewer experts than a token is sent to. Drop fewer."
        )
    return {layer: sorted(there[layer][place] for place in places) for layer, places in found.items()}


def _lowest(values: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda expert: (values[expert], expert))[:count]


def _lowest_of_all(
    scores: Mapping[int, Sequence[float]], top_k: Mapping[int, int], share: float
) -> tuple[dict[int, list[int]], set[int]]:
    means = {layer: sum(values) / len(values) or 1.0 for layer, values in scores.items()}
    ranked = sorted(
        (value / means[layer], layer, expert) for layer, values in scores.items() for expert, value in enumerate(values)
    )
    left = int(share * len(ranked))
    found: dict[int, list[int]] = {layer: [] for layer in scores}
    for _, layer, expert in ranked:
        if left and len(scores[layer]) - len(found[layer]) > top_k[layer]:
            found[layer].append(expert)
            left -= 1
    return found, set(scores) if left else set()
