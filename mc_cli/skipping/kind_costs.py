"""The costs by which thresholds by kind of token are fitted: which tokens are of a kind, and what errors there cost.

The loss of answers hardly reacts to what happens at most tokens of an image, and behind the last layer's experts not at
all. Calibrate's backward pass has measured that token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mc_cli.artifacts.calibration import read_sensitivities
from mc_cli.data import text
from mc_cli.data.batches import Batch, read_calibration
from mc_cli.data.image_rows import special_numbers
from mc_cli.data.kinds import IMAGE, KINDS, MEASURED, SPECIAL, kind_means
from mc_cli.models.session import Session
from mc_cli.parts import ModelInventory


def costs_of_kinds(
    inputs: Batch, session: Session, calibration: Path, inventory: ModelInventory
) -> tuple[dict[int, dict[str, float]], dict[str, list[int]]]:
    """(layer -> kind of token -> what its errors cost over the mean token's, kind -> its tokens' numbers).

    Both are empty where the fitting rows have no image. Without gradients errors cost the same everywhere.
    """
    if inputs.kinds is None or not bool((inputs.kinds == IMAGE).any()):
        return {}, {}
    tokenizer = text.load_tokenizer(session.folder, trust_remote_code=session.compute.trust_remote_code)
    felt = read_sensitivities(calibration, inventory)
    calibrated = read_calibration(calibration, vocabulary=session.vocabulary).flat_kinds
    scales = {}
    for layer in (block.layer for block in inventory.expert_blocks):
        scales[layer] = kind_scales(felt[layer].token_scale if layer in felt else torch.zeros(0), calibrated)
    return scales, kind_tokens(inputs.token_ids, inputs.kinds, special_numbers(tokenizer))


def kind_scales(token_scale: Tensor, kinds: Tensor | None) -> dict[str, float]:
    """Kind of token -> what errors at its tokens cost over those at the mean token; 1 where none was measured.

    token_scale  [tokens] of the first calibration tokens, as in `LayerSensitivity`
    kinds        [tokens] uint8 of all calibration tokens; None: all are text
    """
    return dict.fromkeys(MEASURED, 1.0) | ({} if kinds is None else kind_means(token_scale, kinds))


def kind_tokens(token_ids: Tensor, kinds: Tensor, special: Sequence[int]) -> dict[str, list[int]]:
    """Kind -> the numbers of its tokens, by rows whose kinds are known; all others are text.

    token_ids, kinds  of one shape;  special  all special tokens of the vocabulary, whether in the rows or not
    """
    found: Mapping[int, set[int]] = {kind: set(token_ids[kinds == kind].unique().tolist()) for kind in (IMAGE, SPECIAL)}
    found[SPECIAL].update(set(special) - found[IMAGE])
    return {KINDS[kind]: sorted(numbers) for kind, numbers in found.items() if numbers}
