"""Training of otp's routers: gradients against finite differences, resume to the same bytes, and that it learns."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.pruning import TENSOR_PREFIX, PrunedLayer
from mc_cli.data.batches import Batch
from mc_cli.models import experts
from mc_cli.packed.dense_tensors import load_dense
from mc_cli.packed.loading import load_packed
from mc_cli.parts import ExpertBlock
from mc_cli.policies import LayerValues, Routed, keep_mask, kept_weights, odp, otp
from mc_cli.progress import SilentProgress
from mc_cli.skipping import pruning_training
from mc_cli.skipping.pruning_samples import LayerSample
from mc_cli.skipping.pruning_training import (
    Target,
    TrainingSettings,
    _TrainingPruner,
    distil_routers,
    distillation_loss,
    gumbel,
    train_layer,
)
from tests.conftest import TinyModel
from tests.dense_twin import decoded_products
from tests.packed_folders import packed_work_dir

IDS = torch.randint(3, 300, (6, 10), generator=torch.Generator().manual_seed(0))
SETTINGS = TrainingSettings(steps=8, batch=2, learning_rate=0.05, seed=3)
TARGETS = (Target(0.2, 0.1, 0.0), Target(0.3, 0.1, -0.5))


def dense(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    model.set_experts_implementation(experts.IMPLEMENTATION)
    return model


def routers_of(model: Any, top_k: int = 2) -> dict[str, torch.Tensor]:
    found = {}
    for path, _ in experts.find_experts(model):
        router = otp.starting_router(model.config.hidden_size, top_k, 0.3)
        found |= {f"{path}.{TENSOR_PREFIX}{name}": tensor for name, tensor in router.items()}
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_gradient_is_that_of_finite_differences(family: str, tiny_model: TinyModel) -> None:
    model = dense(tiny_model(family), torch.float64)
    top_k = 3 if family in ("qwen3_moe", "deepseek_v3") else 2
    paths = [path for path, _ in experts.find_experts(model)]
    generator = torch.Generator().manual_seed(1)
    noise = [gumbel((20, top_k), generator).double() for _ in paths]
    flat = {}
    for name, tensor in routers_of(model, top_k).items():
        flat[name] = tensor.double() + 0.1 * torch.randn(tensor.shape, generator=generator).double()
    with torch.no_grad():
        teacher = model(IDS[:2], use_cache=False).logits.log_softmax(-1)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        pruners = {}
        for path, draws in zip(paths, noise, strict=True):
            router = {kind: parameters[f"{path}.{TENSOR_PREFIX}{kind}"] for kind in (otp.WEIGHT, otp.BIAS)}
            pruners[path] = _TrainingPruner(router, renormalise=True, temperature=0.7, offset=0.2)
            pruners[path].noise = draws
        divergence, kept = distillation_loss(model, Batch.of_text(IDS[:2]), teacher, pruners)
        return divergence + 0.3 * kept

    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in flat.items()}
    gradients = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
    for name, tensor in flat.items():
        direction = torch.randn(tensor.shape, generator=generator).double()
        direction /= direction.norm()
        step = 1e-3  # smaller ones show the float32 of norms, larger ones change which experts are chosen
        with torch.no_grad():
            at = {place: float(loss({**flat, name: tensor + place * step * direction})) for place in (-2, -1, 1, 2)}
        found = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
        expected = float((gradients[name] * direction).sum())
        assert found == pytest.approx(expected, rel=2e-3, abs=4e-6), name
        assert gradients[name].abs().max() > 0


class _Killed(Exception):
    pass


class _KillsAt(SilentProgress):
    """Stops the training like a kill between two steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    @contextmanager
    def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Any:
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise _Killed


def train(model: Any, checkpoint: Path, progress: Any) -> dict[str, torch.Tensor]:
    layers = [PrunedLayer(number, path, 2, True) for number, (path, _) in enumerate(experts.find_experts(model))]
    return distil_routers(
        model,
        Batch.of_text(IDS),
        routers_of(model),
        layers,
        targets=TARGETS,
        settings=SETTINGS,
        checkpoint=checkpoint,
        progress=progress,
    )


@pytest.mark.parametrize("killed_at", [1, 3, 6])
def test_a_killed_training_continues_to_the_same_bytes(
    killed_at: int, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning_training, "_SAVE_EVERY", 2)
    model = dense(tiny_model("mixtral"))
    whole = train(model, tmp_path / "whole.safetensors", SilentProgress())
    with pytest.raises(_Killed):
        train(model, tmp_path / "cut.safetensors", _KillsAt(killed_at))
    assert (tmp_path / "cut.safetensors").exists() == (killed_at >= 2)
    continued = train(model, tmp_path / "cut.safetensors", SilentProgress())
    assert all(torch.equal(continued[name], tensor) for name, tensor in whole.items())
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_training_follows_from_the_seed_and_changes_only_the_routers(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = dense(tiny_model("mixtral"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = routers_of(model)
    one, two = (train(model, tmp_path / f"{number}.safetensors", SilentProgress()) for number in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(not torch.equal(one[name], start[name]) for name in one)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(hasattr(module, experts.PRUNER) for module in model.modules())


def test_the_dense_model_is_the_packed_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    packed_work_dir(tiny_model("gpt_oss"), tmp_path / "work")
    folder = tmp_path / "work" / "packed"
    one = load_dense(folder, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad(), decoded_products():
        torch.testing.assert_close(one(IDS).logits, load_packed(folder)(IDS).logits, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in one.parameters())


def test_a_router_starts_as_odp() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(300, 2, generator=generator).softmax(-1)
    routed = Routed(torch.randn(300, 16, generator=generator), torch.zeros(300, 2), weights)
    values = LayerValues(0, tensors=otp.starting_router(16, 2, 0.45))
    by_router = keep_mask(otp.keep_scores(routed, values), weights, 0.0)
    by_share = keep_mask(odp.keep_scores(routed, LayerValues(0)), weights, 0.45)
    assert torch.equal(by_router, by_share) and 0 < int(by_share.all(-1).sum()) < 300


def test_scores_fall_with_the_rank_and_zero_is_the_routers_own_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, 4, generator=generator)
    routed = Routed(torch.randn(50, 8, generator=generator), torch.zeros(50, 4), weights)
    tensors = {
        otp.WEIGHT: torch.randn(3, 11, generator=generator),
        otp.BIAS: torch.randn(3, generator=generator),
    }
    scores = otp.keep_scores(routed, LayerValues(0, tensors=tensors))
    by_rank = scores.gather(-1, weights.argsort(descending=True, dim=-1))
    assert (by_rank.diff(dim=-1) <= 0).all() and torch.isinf(by_rank[:, 0]).all()
    shares = otp.count_logits(otp.features(routed), tensors[otp.WEIGHT], tensors[otp.BIAS]).softmax(-1)
    more_than_half = shares.flip(-1).cumsum(-1).flip(-1) >= 0.5
    assert torch.equal(keep_mask(scores, weights, 0.0).sum(-1), more_than_half.sum(-1))


def test_a_hard_draw_mixes_to_the_weights_of_the_kept_experts() -> None:
    weights = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(torch.arange(20) % 3, 3).float()
    ranks = torch.argsort(torch.argsort(weights, dim=-1, descending=True), dim=-1)
    for renormalise in (True, False):
        expected = kept_weights(weights, ranks <= (torch.arange(20) % 3)[:, None], renormalise=renormalise)
        torch.testing.assert_close(otp.mixed_weights(weights, counts, renormalise=renormalise), expected)
    assert float(otp.kept_share(counts)) == pytest.approx((7 * 1 + 7 * 2 + 6 * 3) / 60)


def test_a_layers_router_learns_which_tokens_need_their_second_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2000, 8, generator=generator)
    needs = hidden[:, 0] > 0.3  # what no routing weight tells
    weights = torch.full((2000, 2), 0.5) + torch.tensor([1e-3, -1e-3])
    costs = torch.stack([torch.where(needs, 2.0, 0.1), torch.zeros(2000)], dim=-1)
    block = ExpertBlock(0, "experts", "router", 4, 2, ())
    routed = Routed(hidden, torch.tensor([[0, 1]]).expand(2000, 2), weights)
    sample = LayerSample(block, routed, None, True, costs)
    router = train_layer(sample, 0.499, 1.0, learning_rate=0.05, seed=0)
    kept = keep_mask(otp.keep_scores(routed, LayerValues(0, tensors=router)), weights, 0.0).all(-1)
    assert float((kept == needs).float().mean()) > 0.95
    again = train_layer(sample, 0.499, 1.0, learning_rate=0.05, seed=0)
    assert all(torch.equal(router[name], again[name]) for name in router)
