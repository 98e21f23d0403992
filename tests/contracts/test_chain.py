"""Every family through every stage: all of the model is packed or kept, and what was packed is what is measured."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mc_cli.artifacts.calibration import INVENTORY, read_inventory, routing_file
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.quantization import MatrixReport, read_report
from mc_cli.artifacts.store import STAGE_FOLDERS
from mc_cli.data.batches import Batch
from mc_cli.families import CONTRACT_TESTED
from mc_cli.packed.packed_model import PackedSource
from mc_cli.parts import ModelInventory, Role
from mc_cli.stages import quantize
from mc_cli.walking.layerwise import LayerWalk
from tests.conftest import ScoredWork
from tests.dense_twin import PRODUCTS, PackedMatrices, decoded_products, dense_twin, read_packed
from tests.tiny_chain import (
    EVALUATE,
    run_allocate,
    run_prune_eval,
    run_quantize,
    write_documents,
)

ROUNDING = 5e-5  # of float32 sums in another order; logits are about 1
TOKEN_IDS = torch.randint(3, 300, (5, 12), generator=torch.Generator().manual_seed(1))
PACKED_ROLES = (Role.ATTENTION, Role.SHARED, Role.DENSE, Role.HEAD, Role.EMBEDDING)


@dataclass(frozen=True)
class Chain:
    """One family after all stages."""

    model_type: str
    model: Path
    work_dir: Path
    held_out: Path
    hidden: torch.Tensor  # what quantize had after the last layer, for its calibration tokens

    @property
    def packed(self) -> Path:
        return self.work_dir / STAGE_FOLDERS["quantize"]

    @property
    def inventory(self) -> ModelInventory:
        return read_inventory(self.work_dir / STAGE_FOLDERS["calibrate"] / INVENTORY)

    @property
    def plan(self) -> Plan:
        return Plan.read(self.work_dir / STAGE_FOLDERS["allocate"] / "plan.yaml")

    @property
    def rows(self) -> list[MatrixReport]:
        return [row for path in sorted((self.packed / "report").iterdir()) for row in read_report(path)]

    @property
    def matrices(self) -> PackedMatrices:
        return read_packed(self.packed)

    def twin(self) -> Any:
        return dense_twin(self.model, self.packed, transposed=self.model_type == "gpt_oss")

    def source(self) -> PackedSource:
        return PackedSource(self.packed, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module", params=CONTRACT_TESTED)
def chain(
    request: pytest.FixtureRequest, scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp(f"chain-{request.param}")
    model = scored_work(folder, request.param)
    work_dir = folder / "work"
    held_out = write_documents(folder / "held-out.jsonl", documents=6, offset=900)
    run_allocate(work_dir)
    states: dict[int, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "save_progress", lambda _, walk, __: states.update({walk.depth: walk.hidden.clone()}))
        run_quantize(work_dir)
    with decoded_products():
        run_prune_eval(work_dir, held_out)
    yield Chain(request.param, model, work_dir, held_out, states[max(states)])


def test_every_matrix_is_reported_once(chain: Chain) -> None:
    inventory, plan = chain.inventory, chain.plan
    wanted = {
        f"{block.path}.{expert}.{projection.name}": plan.blocks_of(block.layer, expert, block.channels)[0].bits_of(
            projection.name
        )
        for block in inventory.expert_blocks
        for expert in range(block.num_experts)
        for projection in block.projections
    }
    assert len(set(wanted.values())) > 1, "the plan mixes no widths, so it tests little"
    linears = [part for part in inventory.tensors if part.role in PACKED_ROLES]
    wanted |= {part.name.removesuffix(".weight"): plan.role_bits[part.role] for part in linears}
    rows = chain.rows
    assert Counter(row.name for row in rows) == Counter(list(wanted))
    assert {row.name: row.bits for row in rows} == wanted
    assert all(row.outcome == "quantized" for row in rows)
    coverage = json.loads((chain.packed / "coverage.json").read_text(encoding="utf-8"))
    assert coverage["covered"] == 1.0
    assert coverage["quantized"] == coverage["expert_weights"] == inventory.expert_weight_count


def test_report_tells_the_tokens_behind_every_expert(chain: Chain) -> None:
    """An expert without tokens leans on the layer's pool alone; attention in front is quantized, so counts may move."""
    rows = {row.name: row for row in chain.rows if row.role == Role.EXPERT.value}
    for block in chain.inventory.expert_blocks:
        routing = json.loads((chain.work_dir / "calibration" / routing_file(block.layer)).read_text(encoding="utf-8"))
        up, down = ([rows[f"{block.path}.{e}.{p.name}"] for e in range(8)] for p in block.projections)
        assert [row.tokens for row in up] == [row.tokens for row in down]
        assert (
            sum(row.tokens or 0 for row in up) == sum(routing["routing_count"]) == routing["token_count"] * block.top_k
        )
        for row in (*up, *down):
            assert (row.pooled_share == 1.0) == (row.tokens == 0)
            assert row.proxy_loss is not None and row.proxy_loss > 0


def test_files_hold_every_tensor_of_the_model(chain: Chain) -> None:
    inventory, matrices = chain.inventory, chain.matrices
    original = AutoModelForCausalLM.from_pretrained(chain.model, dtype=torch.bfloat16).state_dict()
    packed = {f"{path}.weight" for path in matrices.linears}
    fused = {f"{path}.{projection}" for path, found in matrices.experts.items() for projection in found}
    tied = {"lm_head.weight"} if inventory.tied_head else set()
    assert matrices.kept.keys() == original.keys() - packed - fused - tied
    assert all(len(row) == 8 and None not in row for found in matrices.experts.values() for row in found.values())
    for part in inventory.tensors:
        if part.name in matrices.kept:
            kept = matrices.kept[part.name]
            wanted = original[part.name]
            if part.name.endswith("up_proj_bias"):  # an expert's channels are stored in another order, biases with them
                kept, wanted = kept.sort(-1).values, wanted.sort(-1).values
            assert str(kept.dtype) == f"torch.{part.dtype}" and torch.equal(kept, wanted), part.name


def test_each_file_holds_its_layer(chain: Chain) -> None:
    files = {f"layer_{layer:03d}.safetensors": f"model.layers.{layer}." for layer in range(chain.inventory.num_layers)}
    assert {path.name for path in chain.packed.glob("*.safetensors")} == {"rest.safetensors", *files}
    for name, prefix in files.items():
        with safe_open(chain.packed / name, "pt") as handle:
            assert all(key.startswith(prefix) for key in handle.keys())  # noqa: SIM118 a handle is no mapping
    with safe_open(chain.packed / "rest.safetensors", "pt") as handle:
        assert not any(".layers." in key for key in handle.keys())  # noqa: SIM118


def test_packed_logits_are_those_of_the_dequantized_model(chain: Chain) -> None:
    with torch.no_grad():
        expected = chain.twin()(TOKEN_IDS, use_cache=False).logits
        original = AutoModelForCausalLM.from_pretrained(chain.model, dtype=torch.float32).eval()(TOKEN_IDS).logits
    assert (_streamed_logits(chain) - expected).abs().median() < PRODUCTS  # a near tie of experts may tip
    with decoded_products():
        logits = _streamed_logits(chain)
    assert (logits - expected).abs().max() < ROUNDING
    assert (logits - original).abs().max() > 100 * ROUNDING


def _streamed_logits(chain: Chain) -> torch.Tensor:
    source = chain.source()
    walk = LayerWalk(source, Batch.of_text(TOKEN_IDS), batch_size=2)
    for layer in range(walk.num_layers):
        source.load(layer)
        walk.run_layer(advance=True)
        source.free(layer)
    return torch.cat([walk.logits(rows) for rows in walk.batches()])


def test_quantize_goes_on_with_what_it_stores(chain: Chain) -> None:
    """The hidden states behind the last layer: a matrix that is stored but not put back into the layer would show."""
    source = chain.source()
    token_ids = _load(chain.work_dir / "calibration" / "tokens.safetensors")["token_ids"]
    walk = LayerWalk(source, Batch.of_text(token_ids), batch_size=4)
    with decoded_products():  # quantize computes with decoded weights; other products may tip a near tie of experts
        for layer in range(walk.num_layers):
            source.load(layer)
            walk.run_layer(advance=True)
    assert (walk.hidden - chain.hidden).abs().max() < 1e-4 * chain.hidden.abs().max()


def test_bytes_on_disk_are_those_of_the_plan(chain: Chain) -> None:
    budget = chain.plan.budget
    assert chain.matrices.expert_bytes == budget["expert_bytes"]
    assert 8 * chain.matrices.expert_bytes / chain.inventory.expert_weight_count <= 3.4
    files = sum(path.stat().st_size for path in chain.packed.glob("*.safetensors"))
    assert files - chain.matrices.expert_bytes <= budget["other_bytes"]
    evaluation = Evaluation.read(chain.work_dir / "evaluation" / "eval.json")
    stored = {role: sum(parts.values()) for role, parts in evaluation.stored_bytes.items()}
    assert stored["expert"] == budget["expert_bytes"]
    assert sum(evaluation.original_bytes.values()) == sum(part.size_bytes for part in chain.inventory.tensors)
    assert sum(stored.values()) == sum(
        tensor.nbytes for path in chain.packed.glob("*.safetensors") for tensor in _load(path).values()
    )


def test_perplexity_is_that_of_plain_transformers(chain: Chain) -> None:
    evaluation = Evaluation.read(chain.work_dir / "evaluation" / "eval.json")
    streams = _streams(chain)
    original = AutoModelForCausalLM.from_pretrained(chain.model, dtype=torch.float32).eval()
    for model, name in ((original, "original_loss"), (chain.twin(), "packed_loss")):
        losses = {domain: _losses(model, stream) for domain, stream in streams.items()}
        for domain, values in losses.items():
            assert evaluation.domains[domain].tokens == len(values) == len(streams[domain]) - 1
            assert getattr(evaluation.domains[domain], name) == pytest.approx(sum(values) / len(values), rel=1e-5)
        every = [value for values in losses.values() for value in values]
        assert evaluation.total.tokens == len(every)
        assert math.exp(getattr(evaluation.total, name)) == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)


def _streams(chain: Chain) -> dict[str, list[int]]:
    """Each domain's documents as one row of token ids, an end token after each."""
    tokenizer = AutoTokenizer.from_pretrained(chain.model)
    streams: dict[str, list[int]] = {}
    for line in chain.held_out.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        stream = streams.setdefault(entry["domain"], [])
        stream += tokenizer(entry["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return streams


@torch.no_grad()
def _losses(model: Any, stream: list[int]) -> list[float]:
    """Minus log probability of each token but the first, in the first window that holds it."""
    length, found, begin = EVALUATE.length, {}, 0
    while len(found) < len(stream) - 1:
        begin = min(begin, len(stream) - length)
        ids = torch.tensor([stream[begin : begin + length]])
        scores = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        for place in range(1, length):
            found.setdefault(begin + place, -float(scores[place - 1, ids[0, place]]))
        begin += EVALUATE.stride
    return [found[token] for token in sorted(found)]


def _load(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 a handle is no mapping
