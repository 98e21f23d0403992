"""Plans by hand that cut channels, give blocks of channels widths of their own, and let router slots share an expert.

The truth is a model that transformers loads alone, with the packed matrices' values in their places: zeros where
channels are cut, and one expert's weights in every slot that runs it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.packed import read_layout
from mc_cli.artifacts.plan import BlockBits, ExpertBits, Plan
from mc_cli.artifacts.quantization import read_report
from mc_cli.measuring.generation import generate
from mc_cli.models import expert_banks, experts
from mc_cli.packed.dense_tensors import load_dense
from mc_cli.packed.loading import load_packed
from mc_cli.packed.packed_modules import unpack_all
from mc_cli.settings import QuantizerSettings, RunSettings
from mc_cli.status import DONE, work_dir_status
from tests.conftest import ScoredWork
from tests.dense_twin import PRODUCTS, decoded_products, dense_twin, logits_of
from tests.tiny_chain import (
    run_allocate,
    run_export,
    run_prune_eval,
    run_quantize,
    write_documents,
)

CHANNELS = 96
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": CHANNELS},
    "qwen2_moe": {"moe_intermediate_size": CHANNELS},
}
QUANTIZERS = {"trellis": "trellis", "affine": "gptq"}
ROUNDING = 5e-5
BOTH = {"gate_up_proj": 2, "down_proj": 4}


def blocks(*parts: tuple[int, Any]) -> tuple[BlockBits, ...]:
    return tuple(BlockBits(channels, bits) for channels, bits in parts)


# Whole, cut at the end, cut in the middle, blocks of unlike widths, one of which is kept in one layer, all cut away,
# shared, dropped.
ROW: tuple[ExpertBits, ...] = (
    3,
    blocks((64, 3), (32, 0)),
    blocks((32, BOTH), (32, 0), (32, 4)),
    blocks((48, 2), (48, 4)),
    blocks((32, 16), (64, 2)),
    blocks((96, 0)),
    0,
    0,
)
SLOTS = (0, 1, 2, 3, 4, 5, 3, 7)


@dataclass(frozen=True)
class Dividing:
    encodings: str
    model: Path
    work_dir: Path
    held_out: Path

    @property
    def packed(self) -> Path:
        return self.work_dir / "packed"

    @property
    def plan(self) -> Plan:
        return Plan.read(self.work_dir / "mine.yaml")

    def twin(self) -> Any:
        return dense_twin(self.model, self.packed, transposed=False)


@pytest.fixture(scope="module", params=[(family, name) for family in FAMILIES for name in QUANTIZERS], ids="-".join)
def dividing(
    request: pytest.FixtureRequest, scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory
) -> Dividing:
    family, encodings = request.param
    folder = tmp_path_factory.mktemp(f"dividing-{family}-{encodings}")
    work_dir = folder / "work"
    quantizer = QuantizerSettings(quantizer=QUANTIZERS[encodings])
    model = scored_work(folder, family, config=FAMILIES[family], bits=(2, 4), quantizer=quantizer)
    run_allocate(work_dir, target_stored_bits=6.0)
    plan = Plan.read(work_dir / "plan" / "plan.yaml")
    coded = tuple(blocks((32, 4), (64, 2)) if expert == 4 else entry for expert, entry in enumerate(ROW))
    places = {layer: place for place, layer in enumerate(plan.expert_bits)}
    rows = {layer: ROW if place % 2 else tuple(reversed(coded)) for layer, place in places.items()}
    slots = {
        layer: SLOTS if place % 2 else tuple(7 - slot for slot in reversed(SLOTS)) for layer, place in places.items()
    }
    replace(plan, expert_bits=rows, slots=slots).write(work_dir / "mine.yaml")
    run_quantize(work_dir, plan=str(work_dir / "mine.yaml"), quantizer=quantizer)
    return Dividing(encodings, model, work_dir, write_documents(folder / "held-out.jsonl", documents=6, offset=900))


def test_the_packed_model_is_the_dense_one_with_the_same_weights(dividing: Dividing) -> None:
    expected = logits_of(dividing.twin())
    packed = load_packed(dividing.packed)
    assert (logits_of(packed) - expected).abs().mean() < PRODUCTS
    with decoded_products():
        assert (logits_of(packed) - expected).abs().max() < ROUNDING
    dense = load_dense(dividing.packed, dtype=torch.float32, device=torch.device("cpu"))
    assert (logits_of(dense) - expected).abs().max() < ROUNDING
    unpack_all(packed)
    assert not any(experts.is_packed(module) for module in packed.modules())
    assert (logits_of(packed) - expected).abs().max() < ROUNDING


def test_every_weight_is_accounted_for(dividing: Dividing) -> None:
    coverage = json.loads((dividing.packed / "coverage.json").read_text())
    layout, plan = read_layout(dividing.packed), dividing.plan
    each = coverage["expert_weights"] // (8 * len(plan.expert_bits))
    assert coverage["covered"] == 1.0
    assert coverage["shared"] == len(plan.expert_bits) * each
    assert coverage["pruned"] == len(plan.expert_bits) * (each + each // CHANNELS * (32 + 32 + 96))
    for layer, block in zip(sorted(plan.expert_bits), layout.experts, strict=True):
        rows = read_report(dividing.packed / "report" / f"layer_{layer:03d}.json")
        counts = {row.name: row.weight_count for row in rows if row.name.startswith(block.path)}
        assert sum(counts.values()) == 8 * each
        assert block.slots == plan.slots_of(layer)
        stored = [[part.channels for part in found] for found in block.experts]
        assert sorted(map(sum, stored)) == sorted([CHANNELS, 64, 64, CHANNELS, CHANNELS, 0, 0, 0])


def test_an_export_reloads_with_the_same_logits(dividing: Dividing, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(dividing.work_dir, tmp_path / "work"))
    run_prune_eval(work_dir, dividing.held_out)
    expected = logits_of(dividing.twin())
    result = run_export(work_dir, tmp_path / "out", "transformers")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with decoded_products():
        assert (logits_of(model) - expected).abs().max() < ROUNDING
    assert result.summary["read_back"]["generated_tokens"] > 0
    assert {entry.stage: entry.state for entry in work_dir_status(work_dir)}["export"] == DONE
    generated = generate(
        str(tmp_path / "out"), "the rain", compute=RunSettings(device="cpu"), max_new_tokens=5, show=lambda _: None
    )
    assert generated.new_tokens == 5


@pytest.mark.parametrize("calls", [1, 2])
def test_few_calls_compute_all_blocks(dividing: Dividing, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of all sizes are matrices of one bank, whatever a token's slots share; kept ones are not.

    calls  two where the activation is none that compiled code knows, and on a GPU
    """
    if calls == 2:
        monkeypatch.setattr(expert_banks, "_gate_of", lambda module, width: None)
    packed = load_packed(dividing.packed)
    dense = load_dense(dividing.packed, dtype=torch.float32, device=torch.device("cpu"))
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([[3, 6], [6, 1], [4, 2], [5, 0], [1, 2], [8, 3], [6, 6], [5, 5], [0, 4]])
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(3))
    found_in = []
    for path, module in experts.find_experts(packed):
        twin = dense.get_submodule(path)
        with torch.no_grad():
            found = module(hidden, index, weights)
            terms = [weights[t, s] * expert_of(twin, int(index[t, s]), hidden[t]) for t in range(9) for s in range(2)]
        expected = torch.stack(terms).view(9, 2, -1).sum(1)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
        banks = expert_banks.banks_of(module)
        found_in.append(banks is not None and (banks.whole is not None) == (calls == 1))
    assert sorted(found_in) == [False, dividing.encodings == "trellis"]  # groups of affine grids differ in size here


def expert_of(twin: Any, expert: int, row: torch.Tensor) -> torch.Tensor:
    if expert >= twin.gate_up_proj.shape[0]:
        return torch.zeros_like(row)
    gate, up = (twin.gate_up_proj[expert] @ row).chunk(2)
    return twin.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
