"""The model card: figures as they are in the artifacts, and valid Markdown whatever is missing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mc_cli.artifacts.packed import StoredBytes
from mc_cli.exporters.model_card import CardFacts, model_card

SIZES = {"expert": StoredBytes(codes=2000, side=300, kept=0), "embedding": StoredBytes(codes=0, side=0, kept=40_000)}


def card_of(**changes: Any) -> str:
    facts: dict[str, Any] = {
        "model_type": "mixtral",
        "code_bits_per_weight": 2.0,
        "stored_bits_per_weight": 2.3,
        "role_bytes": SIZES,
        "tool_version": "1.2.3",
    }
    return model_card(CardFacts(**{**facts, **changes}), title="A title", opening="An opening.", loading="Load it.")


def test_sizes_are_listed_by_role_largest_first_and_add_up() -> None:
    card = card_of()
    rows = [line for line in card.splitlines() if line.startswith(("| expert", "| embedding", "| all"))]
    assert rows == [
        "| embedding | 0 | 0 | 40,000 | 40,000 |",
        "| expert | 2,000 | 300 | 0 | 2,300 |",
        "| all | 2,000 | 300 | 40,000 | 42,300 |",
    ]
    assert "2.300 stored bits per weight" in card and "2.000 bits of codes" in card and "42,300 bytes" in card


@pytest.mark.parametrize("evaluation", [{}, {"total": {}}, {"total": 3}, {"tasks": {"piqa": 0.5}}])
def test_without_figures_there_is_no_section_for_them(evaluation: dict[str, Any]) -> None:
    assert "## Measured" not in card_of(evaluation=evaluation)


def test_domains_and_tasks_are_shown() -> None:
    text = {"tokens": 10, "original_loss": 0.0, "packed_loss": 1.0, "kl_divergence": 0.5, "same_top_token": 0.25}
    evaluation = {"total": text, "domains": {"code": text, "prose": text}, "tasks": {"packed": {"piqa": {"acc": 0.75}}}}
    card = card_of(evaluation=evaluation)
    for name in ("code", "prose", "all"):
        assert f"| {name} | 10 | 1.0000 | 2.7183 | 0.5 | 0.25 |" in card
    assert "| `packed.piqa.acc` | 0.75 |" in card


def test_settings_cannot_break_a_table() -> None:
    stages = {"quantize": {"settings": {"odd": "a|b\nc", "long": "x" * 500, "list": [1, 2]}, "fingerprint": "f00"}}
    card = card_of(stages=stages)
    assert r"| `odd` | a\|b c |" in card and "| `list` | [1, 2] |" in card and "x" * 118 not in card
    assert "| fingerprint | `f00` |" in card


def test_front_matter_names_the_base_model_only_where_it_is_known() -> None:
    assert "base_model" not in card_of()
    assert card_of(base_model="org/name").startswith("---\nlibrary_name: transformers\n")
    assert "base_model: org/name" in card_of(base_model="org/name")


def test_the_hub_reads_metadata_and_figures() -> None:
    """By the hub's own reader of cards."""
    text = {"tokens": 10, "original_loss": 0.5, "packed_loss": 1.0, "kl_divergence": 0.25, "same_top_token": 0.75}
    original = {"license": "apache-2.0", "language": ["en", "de"]}
    card = card_of(base_model="org/name", evaluation={"total": text}, original=original)
    data = ModelCard(card).data
    assert (data.base_model, data.license, data.language) == ("org/name", "apache-2.0", ["en", "de"])
    assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert {"quantized", "mixture-of-experts", "mixtral"} <= set(data.tags)
    assert data.model_name == "A title"
    values = {result.metric_type: result.metric_value for result in data.eval_results or []}
    assert values["loss_gap"] == 0.5 and values["kl_divergence"] == 0.25 and values["tokens"] == 10
    assert values["perplexity"] == pytest.approx(math.e)
    assert values["stored_bits_per_expert_weight"] == 2.3
    assert "## Licence" in card and "org/name: apache-2.0" in card


def test_a_licence_that_nobody_named_is_told() -> None:
    card = card_of()
    assert "whose files did not say which" in card and "license:" not in card
    assert ModelCard(card).data.eval_results is None
