"""A limit of memory changes where things lie and what is read when, and not one byte of what a stage writes.

With a limit of one byte everything is in pieces: experts are read one by one, hidden states lie in scratch files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_cli.artifacts.plan import Plan
from mc_cli.models import paged_experts
from mc_cli.settings import QuantizerSettings, RunSettings
from tests import tiny_chain
from tests.conftest import ScoredWork, TinyModel
from tests.contracts.test_divided_experts import CHANNELS, ROW, SLOTS
from tests.tiny_chain import run_allocate, run_calibrate, run_quantize, run_score, write_documents

# Plain; a router with groups, shared experts that run after the routed ones; fused, transposed, with biases; a gate on
# the shared expert and a layer without routed ones.
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe")
IN_PIECES = replace(tiny_chain.COMPUTE, max_memory_bytes=1)


def contents(work_dir: Path) -> dict[str, bytes]:
    """Digests of what stages write, but for manifests, which have times."""
    found = {}
    for path in sorted(work_dir.rglob("*")):
        name = path.relative_to(work_dir).as_posix()
        if path.is_file() and path.name not in ("manifest.json", "digests.json", "model.json"):
            found[name] = path.read_bytes()
    return found


def run_stages(
    work_dir: Path, model: Path, text: Path, compute: RunSettings, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> dict[str, bytes]:
    quantizer = changes.pop("quantizer", QuantizerSettings())
    monkeypatch.setattr(tiny_chain, "COMPUTE", compute)
    run_calibrate(work_dir, model, text, **changes)
    run_score(work_dir, quantizer=quantizer, bits=(2, 4))
    run_allocate(work_dir)
    run_quantize(work_dir, quantizer=quantizer)
    return contents(work_dir)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bytes_in_pieces(
    family: str, tiny_model: TinyModel, scored_work: ScoredWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny_model(family), write_documents(tmp_path / "text.jsonl", documents=30)
    scored_work(tmp_path / "whole", family, bits=(2, 4))
    run_allocate(tmp_path / "whole" / "work")
    run_quantize(tmp_path / "whole" / "work")
    whole = contents(tmp_path / "whole" / "work")
    read: list[tuple[str, int]] = []
    get = paged_experts.PagedWeights.get

    def counting(self: Any, projection: str, expert: int) -> torch.Tensor:
        read.append((projection, expert))
        return get(self, projection, expert)

    monkeypatch.setattr(paged_experts.PagedWeights, "get", counting)
    pieces = run_stages(tmp_path / "pieces", model, text, IN_PIECES, monkeypatch)
    assert {expert for _, expert in read} == set(range(8))
    assert pieces.keys() == whole.keys()
    assert [name for name in whole if whole[name] != pieces[name]] == []


def test_cuts_blocks_drops_and_shared_slots_in_pieces(
    scored_work: ScoredWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan by hand with everything in it, quantized twice over one calibration."""
    scored_work(tmp_path, "mixtral", config={"intermediate_size": CHANNELS}, bits=(2, 4))
    work_dir = tmp_path / "work"
    run_allocate(work_dir, target_stored_bits=6.0)
    plan = Plan.read(work_dir / "plan" / "plan.yaml")
    rows = dict.fromkeys(plan.expert_bits, ROW)
    replace(plan, expert_bits=rows, slots=dict.fromkeys(plan.expert_bits, SLOTS)).write(work_dir / "mine.yaml")
    found = []
    for variant, compute in (("whole", tiny_chain.COMPUTE), ("pieces", IN_PIECES)):
        monkeypatch.setattr(tiny_chain, "COMPUTE", compute)
        run_quantize(work_dir, variant=variant, plan=str(work_dir / "mine.yaml"))
        found.append(contents(work_dir / "variants" / variant / "packed"))
    assert found[0] and found[0] == found[1]
