"""Thresholds by kind of token: decisions against a loop over tokens, shared curves against sums, what is recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mc_cli import native
from mc_cli.artifacts.pruning import OperatingPoint, PrunedLayer, Pruning
from mc_cli.data.kinds import IMAGE, PADDING, SPECIAL, TEXT
from mc_cli.errors import ArtifactError
from mc_cli.skipping.kind_costs import kind_scales, kind_tokens
from mc_cli.skipping.pruning import pruners
from mc_cli.skipping.pruning_thresholds import layer_curve, merged_curve
from mc_cli.skipping.token_kinds import GivenKinds
from tests.tiny_models import tiny_config

EXPERTS, TOP_K, HIDDEN = 6, 3, 8
KINDS = torch.tensor([SPECIAL, IMAGE, IMAGE, IMAGE, TEXT, TEXT, TEXT, PADDING], dtype=torch.uint8)
IDS = torch.tensor([7, 9, 9, 9, 1, 2, 3, 4])  # 7 is special, 9 stands for an image
BY_KIND = {"text": 0.15, "image": 0.35, "special": 0.05}
LOWEST = 0.05


class Module:
    num_experts = EXPERTS


class Given(GivenKinds):
    """Told of tokens by hand, as a model's hook tells."""

    def tell(self, ids: Tensor | None) -> None:
        self._forget()
        self._note(torch.nn.Identity(), (), {"input_ids": ids})


def policy(name: str = "router-threshold") -> Pruning:
    layers = (PrunedLayer(0, "a", TOP_K, True),)
    by_kind = {kind: (value,) for kind, value in BY_KIND.items()}
    point = OperatingPoint(0.3, (LOWEST,), by_kind=by_kind)
    higher = OperatingPoint(0.5, (0.1,), by_kind={kind: (value + 0.1,) for kind, value in BY_KIND.items()})
    return Pruning(name, 0, layers, (point, higher), 0, kind_tokens={"image": [9], "special": [7]})


def tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(KINDS), HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in KINDS])
    return hidden, index, torch.rand(len(KINDS), TOP_K, generator=generator).softmax(-1)


def by_hand(index: Tensor, weights: Tensor, thresholds: list[float], name: str) -> list[list[int]]:
    """The rules of the two policies, token by token."""
    found = []
    for experts, shares, threshold in zip(index.tolist(), weights.tolist(), thresholds, strict=True):
        order = sorted(range(TOP_K), key=lambda slot: -shares[slot])
        kept = list(order)
        if name == "odp":
            while len(kept) > 1 and shares[kept[-1]] / sum(shares[slot] for slot in kept) < threshold:
                kept.pop()
        else:
            kept = [slot for slot in order if slot == order[0] or shares[slot] / sum(shares) >= threshold]
        found.append([experts[slot] if slot in kept else EXPERTS for slot in range(TOP_K)])
    return found


@pytest.mark.parametrize("name", ["odp", "router-threshold"])
@pytest.mark.parametrize("compiled", [True, False])
def test_each_token_has_the_threshold_of_its_kind(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    hidden, index, weights = tokens()
    pruning = policy(name)
    kinds = ["special", *["image"] * 3, *["text"] * 4]
    wanted = by_hand(index, weights, [BY_KIND[kind] for kind in kinds], name)
    unknown = by_hand(index, weights, [LOWEST] * len(kinds), name)
    assert wanted != unknown
    module: Any = Module()
    walked = pruners(pruning, pruning.points[0], {}, count=True, kinds=torch.cat([KINDS, KINDS]))["a"]
    for _ in range(2):
        found, kept_weights = walked(module, hidden, index, weights)
        assert found.tolist() == wanted
        assert torch.allclose(kept_weights.sum(-1), weights.sum(-1), atol=1e-6)
    assert walked.kept is not None and [len(part) for part in walked.kept] == [7, 7]  # padding is not counted
    given = Given(pruning.kind_tokens)
    pruner = pruners(pruning, pruning.points[0], {}, kinds=given)["a"]
    for ids, right in ((IDS, wanted), (None, unknown), (IDS[:5], unknown)):  # features alone; other tokens than given
        given.tell(ids)
        assert pruner(module, hidden, index, weights)[0].tolist() == right


def test_a_model_tells_its_tokens_while_it_runs() -> None:
    config, path = tiny_config("mixtral", num_hidden_layers=1), "model.layers.0.mlp.experts"
    model = AutoModelForCausalLM.from_config(config).eval()  # of text: hooks are those of any model
    given = GivenKinds({"image": [9], "special": [7]})
    seen: list[Any] = []
    experts = model.get_submodule(path)
    handle = experts.register_forward_pre_hook(lambda *_: seen.append(given.parts(6, torch.device("cpu"))))
    ids = torch.tensor([[7, 9, 1], [2, 9, 9]])
    with torch.no_grad(), given.watching(model, path):
        model(input_ids=ids)
        model.model(ids)
        model(inputs_embeds=model.get_input_embeddings()(ids))
    handle.remove()
    told = [None if parts is None else {kind: places.tolist() for kind, places in parts.items()} for parts in seen]
    assert told == [{"text": [2, 3], "image": [1, 4, 5], "special": [0]}] * 2 + [None]
    assert given.parts(6, torch.device("cpu")) is None  # nothing of a forward is left for the next


def test_one_threshold_of_several_layers_has_the_sum_of_their_effects() -> None:
    generator = torch.Generator().manual_seed(3)
    layers = []
    for _ in range(3):
        scores, costs = (torch.rand(40, TOP_K, generator=generator) for _ in range(2))
        layers.append((scores, scores, costs.sort(-1, descending=True).values))
    merged = merged_curve([layer_curve(*layer) for layer in layers])
    assert bool((merged.skipped[1:] > merged.skipped[:-1]).all()) and merged.calls == 3 * 40 * TOP_K
    for threshold, skipped, cost in zip(merged.thresholds.tolist(), merged.skipped, merged.cost, strict=True):
        count, total = 0, 0.0
        for scores, weights, costs in layers:
            under = (scores < threshold).sum(-1).clamp(max=TOP_K - 1)  # the best slot stays
            count += int(under.sum())
            kept = TOP_K - under
            total += float((costs.gather(1, kept[:, None] - 1)[:, 0] - costs[:, -1]).double().sum())
            assert torch.equal(scores, weights)
        # A layer's thresholds lie between its scores: the others' skip one more of its calls at most.
        assert 0 <= count - int(skipped) <= len(layers) and -1e-4 <= total - float(cost) <= len(layers)


def test_what_kinds_cost_and_which_numbers_they_have() -> None:
    scale = torch.tensor([3.0, 0.0, 0.5, 1.0, 2.0, 4.0])  # of the first six of eight tokens
    assert kind_scales(scale, KINDS) == {"text": 3.0, "image": 0.5, "special": 3.0}
    assert kind_scales(torch.zeros(0), KINDS) == {"text": 1.0, "image": 1.0, "special": 1.0}
    assert kind_tokens(IDS, KINDS, [0, 7, 9]) == {"image": [9], "special": [0, 7]}


def test_a_policy_without_kinds_is_written_as_ever_and_with_kinds_comes_back() -> None:
    pruning = policy()
    assert Pruning.from_json(json.loads(json.dumps(pruning.to_json()))).to_json() == pruning.to_json()
    middle = pruning.at_rate(0.4)
    assert middle.thresholds == pytest.approx([0.075]) and middle.by_kind["image"] == pytest.approx([0.4])
    plain = replace(
        pruning, kind_tokens={}, points=tuple(replace(point, by_kind={}) for point in pruning.points)
    ).to_json()
    assert "kind_tokens" not in plain and not any("by_kind" in point for point in plain["points"])
    for change, says in (
        ({"image": [0.1, 0.2], "text": [0.1], "special": [0.1]}, "2 thresholds for 1 layers"),
        ({"image": [0.1]}, "unlike the first point's"),
        ({"image": ["high"]}, "by_kind"),
    ):
        damaged = json.loads(json.dumps(pruning.to_json()))
        damaged["points"][1]["by_kind"] = change
        with pytest.raises(ArtifactError, match=says):
            Pruning.from_json(damaged)
