"""What stands against families that are refused, shown on transformers' own classes: when that falls, they may work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mc_cli.families import facts_for
from tests.families.tiny_families import build_tiny_family
from tests.tiny_models import read_tensors


def test_transformers_cannot_load_longcat_flash_as_it_is_published(tmp_path: Path) -> None:
    """Experts that give their input back have no weights on the hub, and rows of `gate_up_proj` in transformers."""
    folder = build_tiny_family("longcat_flash", tmp_path)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.zero_expert_num > 0
    published = {
        name: tensor
        for name, tensor in read_tensors(folder).items()
        if ".experts." not in name or int(name.split(".experts.")[1].split(".")[0]) < config.n_routed_experts
    }
    save_file(published, folder / "model.safetensors")
    with pytest.raises((RuntimeError, ValueError), match=r"gate_up_proj|mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "transformers cannot load" in facts_for("longcat_flash").refused


def test_what_follows_a_token_changes_where_doge_sends_it(tmp_path: Path) -> None:
    """A forward over a text routes otherwise than the same text token by token: no window measures its experts."""
    model = AutoModelForCausalLM.from_pretrained(build_tiny_family("doge", tmp_path), dtype=torch.float32).eval()
    sent: list[torch.Tensor] = []
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, output: sent.append(output[1]))
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        model(tokens[:, :8], use_cache=False)
        model(tokens, use_cache=False)
    first, second = sent  # [2, tokens, keys], the scores by which experts are chosen
    assert not torch.allclose(first[:, 0], second[:, 0]) or not torch.allclose(first[:, 1], second[:, 1])
    assert "depends on the tokens behind" in facts_for("doge").refused
