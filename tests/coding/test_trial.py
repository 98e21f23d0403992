"""The rest of an up projection's error after the down projection was fitted, against dense least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.artifacts.importance import Importance
from mc_cli.coding import correction
from mc_cli.coding.expert_inputs import ExpertInputs, expert_activations
from mc_cli.coding.trial import share_left
from mc_cli.models import experts
from mc_cli.settings import QuantizerSettings
from tests.coding.test_expert_inputs import inputs_of, opened
from tests.conftest import TinyModel
from tests.tiny_chain import run_calibrate, run_score, write_documents

COUNT = 700  # tokens of expert 1, for 48 activations


@pytest.fixture
def trial(tiny_model: TinyModel) -> tuple[Any, ExpertInputs, dict[str, Tensor]]:
    """Expert 1 of a layer, with what shipped twice as close as what was forecast."""
    module, block = opened(tiny_model("mixtral"))
    inputs, hidden, *_ = inputs_of(block, (0, COUNT, 5))
    inputs.sensitivity = LayerSensitivity(torch.linspace(0.1, 3, 32), torch.ones(len(hidden)))
    up, down = (experts.expert_weight(module, part.name, 1).float() for part in block.projections)
    noise = torch.randn(up.shape, generator=torch.Generator().manual_seed(5)) * up.std() / 2
    return module, inputs, {"original": up, "forecast": up + noise, "shipped": up + noise / 2, "down": down}


def test_share_is_that_of_fits_on_one_half_judged_on_the_other(
    trial: tuple[Any, ExpertInputs, dict[str, Tensor]],
) -> None:
    module, inputs, weights = trial
    chunks = list(inputs.chunks(1))
    tokens, felt = torch.cat([c.inputs for c in chunks]), torch.cat([c.weights for c in chunks]).double()[:, None]
    original, forecast, shipped = (
        expert_activations(module, 1, tokens, weights[name]).double() * felt
        for name in ("original", "forecast", "shipped")
    )
    down = weights["down"].double()
    first = torch.arange(COUNT) < COUNT // 2  # which is within the first chunk of 512
    missing = (original - shipped) @ down.T
    left = 0.0
    importance = inputs.sensitivity.gradient_square.double()
    for fitted, judged in ((first, ~first), (~first, first)):
        rows = shipped[fitted]
        damping = (correction._DAMPING * rows.square().mean(1).sum()).sqrt()
        damped = torch.cat([rows, damping * torch.eye(48).double()])
        wanted = torch.cat([missing[fitted], torch.zeros(48, 32).double()])
        trust = COUNT / (COUNT + correction._TRUSTED_TOKENS * 48)
        step = trust * torch.linalg.lstsq(damped, wanted).solution.T
        left += float(((missing[judged] - shipped[judged] @ step.T).square() * importance).sum())
    whole = float((((original - forecast) @ down.T).square() * importance).sum())
    assert share_left(module, inputs, 1, **weights) == pytest.approx(left / whole, rel=1e-3)
    assert left / whole < 0.25  # half the error is a quarter of the loss, and the fit takes its part


def test_nothing_to_tell_is_everything_left(trial: tuple[Any, ExpertInputs, dict[str, Tensor]]) -> None:
    module, inputs, weights = trial
    assert share_left(module, inputs, 0, **weights) == 1.0  # no tokens
    exact = dict.fromkeys(("original", "forecast", "shipped"), weights["original"])
    assert share_left(module, inputs, 1, **exact, down=weights["down"]) == 1.0


def test_scores_are_scaled_by_the_share(tiny_model: TinyModel, tmp_path: Any) -> None:
    data = write_documents(tmp_path / "text.jsonl", documents=60)
    model = tiny_model("mixtral")
    found = {}
    for corrected in (True, False):
        work = tmp_path / f"work-{corrected}"
        run_calibrate(work, model, data, sequences=20)
        run_score(work, bits=(1, 2, 3), quantizer=QuantizerSettings(error_correction=corrected))
        found[corrected] = Importance.read(work / "importance" / "importance.json")
    for with_trial, without in zip(found[True].layers, found[False].layers, strict=True):
        share = with_trial.up_share_left
        assert 0 < share < 1.5 and share != 1.0 and without.up_share_left == 1.0
        (up, down), (plain_up, plain_down) = with_trial.projections, without.projections
        for width in (1, 2, 3):
            assert up.predicted_loss_by_bits[width] == pytest.approx(
                [share * cost for cost in plain_up.predicted_loss_by_bits[width]]
            )
            assert down.predicted_loss_by_bits[width] == plain_down.predicted_loss_by_bits[width]
            for expert, whole in enumerate(without.predicted_loss_by_bits[width]):
                parts = plain_up.predicted_loss_by_bits[width][expert], plain_down.predicted_loss_by_bits[width][expert]
                scaled = whole * (share * parts[0] + parts[1]) / sum(parts)
                assert with_trial.predicted_loss_by_bits[width][expert] == pytest.approx(scaled)
        assert with_trial.loss_by_bits == without.loss_by_bits
