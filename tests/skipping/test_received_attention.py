"""Column sums of attention against whole attention maps, in batches with padding, and while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.skipping.received_attention import (
    PRIOR_VIEWERS,
    AttentionWatch,
    received_attention,
    watching_attention,
)
from tests.conftest import TinyModel

LENGTH = 12


def twin(attention: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(looks, viewers) [batch, tokens] of whole maps [batch, heads, tokens, tokens], loops over every pair.

    real  [batch, tokens] bool: no padding
    """
    batch, _, tokens, _ = attention.shape
    looks, viewers = torch.zeros(batch, tokens), torch.zeros(batch, tokens)
    for row in range(batch):
        for viewer in range(tokens):
            seen = [other for other in range(viewer + 1) if attention[row, :, viewer, other].sum() > 0]
            for other in seen:
                if other != viewer and real[row, viewer] and real[row, other]:
                    looks[row, other] += attention[row, :, viewer, other].mean() * len(seen)
                    viewers[row, other] += 1
    return looks, viewers


def load(folder: Any, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


@torch.no_grad()
def watched(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, layer: int, **options: Any) -> Any:
    watch = AttentionWatch()
    with watching_attention(model.model.layers[layer], watch):
        model(ids, attention_mask=mask, use_cache=False, **options)
    assert watch.received is not None
    return watch.received


def masks() -> list[torch.Tensor | None]:
    left, right = torch.ones(2, LENGTH, dtype=torch.int64), torch.ones(2, LENGTH, dtype=torch.int64)
    left[1, :5], right[0, 8:] = 0, 0
    return [None, left, right]


@pytest.mark.parametrize("mask", masks(), ids=["no padding", "left", "right"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_column_sums_are_those_of_the_whole_map(
    attention: str, family: str, mask: torch.Tensor | None, tiny_model: TinyModel
) -> None:
    if (family, attention) == ("gpt_oss", "sdpa"):
        attention = "eager"  # all that the family has
    ids = torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    found = watched(load(tiny_model(family), attention), ids, mask, layer=1)
    with torch.no_grad():
        maps = load(tiny_model(family), "eager")(ids, attention_mask=mask, output_attentions=True).attentions[1]
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    looks, viewers = twin(maps.float(), real)
    torch.testing.assert_close(found.looks * real, looks, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.viewers * real, viewers)
    assert viewers.max() > 4


def test_blocks_of_rows_change_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 4, 37, 8, generator=generator), torch.randn(2, 2, 45, 8, generator=generator)
    whole = received_attention(query, key, None)
    parts = received_attention(query, key, None, block_rows=5)
    torch.testing.assert_close(parts.looks, whole.looks)
    assert torch.equal(parts.viewers, whole.viewers)
    assert whole.viewers[0].tolist() == list(range(36, -1, -1))


def test_a_uniform_look_is_one_at_every_length() -> None:
    for tokens in (8, 300):
        found = received_attention(torch.zeros(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4), None)
        torch.testing.assert_close(found.estimate(1.0), torch.ones(tokens))


def test_few_viewers_leave_the_prior() -> None:
    found = received_attention(torch.zeros(1, 2, 6, 4), torch.randn(1, 2, 6, 4), None)
    estimate = found.estimate(3.0)
    assert float(estimate[-1]) == 3.0
    assert float(estimate[0]) == pytest.approx((5 + PRIOR_VIEWERS * 3) / (5 + PRIOR_VIEWERS))


@torch.no_grad()
def test_while_decoding_nobody_has_looked_yet(tiny_model: TinyModel) -> None:
    model = load(tiny_model("mixtral"), "sdpa")
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    cache = model(ids[:, :8], use_cache=True).past_key_values
    watch = AttentionWatch()
    with watching_attention(model.model.layers[0], watch):
        model(ids[:, 8:], past_key_values=cache, use_cache=True)
        assert watch.received is None and watch.estimate(1, 0.7) == 0.7
        assert watch.estimate(1, 0.7) is None, "it is taken away"
        model(ids, use_cache=False)
        assert watch.received is not None and watch.estimate(1, 0.7) is None


@torch.no_grad()
def test_hooks_for_maps_stay_only_where_maps_are(tiny_model: TinyModel) -> None:
    model = load(tiny_model("mixtral"), "sdpa")
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    attention, watch = model.model.layers[0].self_attn, AttentionWatch()
    expected = watched(model, ids, None, layer=0).estimate(0.7)
    with watching_attention(model.model.layers[0], watch):
        for implementation, hooks in (("sdpa", 0), ("sdpa", 0), ("eager", 1), ("eager", 1), ("sdpa", 0)):
            model.set_attn_implementation(implementation)
            model(ids, use_cache=False)
            found = watch.estimate(9, 0.7)
            assert len(attention._forward_hooks) == hooks
            if found is not None:  # the first forward after a change to eager code is not watched
                torch.testing.assert_close(found, expected)
        assert found is not None
    assert not attention._forward_hooks


def test_a_watch_inside_another_hands_back(tiny_model: TinyModel) -> None:
    model = load(tiny_model("mixtral"), "sdpa")
    ids = torch.randint(3, 300, (1, 6), generator=torch.Generator().manual_seed(0))
    outer, inner = AttentionWatch(), AttentionWatch()
    with torch.no_grad(), watching_attention(model.model.layers[0], outer):
        with watching_attention(model.model.layers[0], inner):
            model(ids, use_cache=False)
        assert inner.received is not None and outer.received is None
        model(ids, use_cache=False)
        assert outer.received is not None
    assert not any("_mc_watch" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_watching_does_not_change_the_model(tiny_model: TinyModel) -> None:
    model = load(tiny_model("mixtral"), "sdpa")
    ids = torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    with watching_attention(model.model.layers[0], AttentionWatch()):
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
