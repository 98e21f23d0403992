"""The order of work inside a layer, and plans that keep, prune, mix or cannot be followed."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.quantization import MatrixReport, read_report
from mc_cli.coding import linears
from mc_cli.coding.layer_quantizer import LayerQuantizer
from mc_cli.coding.layer_result import LayerResult
from mc_cli.coding.quantization import quantizer_for
from mc_cli.data.batches import Batch
from mc_cli.encodings import Encoding
from mc_cli.errors import InputError, PlanError
from mc_cli.executors.here import Here
from mc_cli.models import inventory as inventory_module
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.experts import IMPLEMENTATION
from mc_cli.models.inventory import take_inventory
from mc_cli.packed.loading import load_packed
from mc_cli.parts import ModelInventory, Role, TensorPart
from mc_cli.quantizers import Prepared, QuantizedLinear, quantizer_from_name
from mc_cli.settings import QuantizerSettings
from mc_cli.stages import quantize
from mc_cli.walking.layerwise import LayerWalk
from tests.conftest import ScoredWork, TinyModel
from tests.dense_twin import PRODUCTS, decoded_products, dense_twin, read_packed
from tests.tiny_chain import run_allocate, run_calibrate, run_prune_eval, run_quantize, run_score, write_documents

TOKEN_IDS = torch.randint(3, 300, (6, 16), generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Recorder:
    """A quantizer that rounds to nearest and notes the Hessians it is given, with the weights they are used for."""

    hessians: list[Tensor]
    weights: list[Tensor]
    name: str = "recorder"

    def prepare(self, hessian: Tensor | None, *, basis: str) -> Prepared:
        assert hessian is not None
        self.hessians.append(hessian.clone())
        return Prepared(hessian, basis)

    def quantize(
        self, weight: Tensor, prepared: Prepared, encoding: Encoding, *, row_importance: Tensor | None = None
    ) -> QuantizedLinear:
        assert prepared.hessian is not None
        self.weights.append(weight.clone())
        return quantizer_from_name("rtn").quantize(weight, prepared, encoding)


@dataclass
class QuantizedLayer:
    """A resident layer after quantization, and what the quantizer was given."""

    model: Any
    layer: Any
    walk: LayerWalk
    recorder: Recorder
    result: LayerResult
    original: dict[str, Tensor]

    def inputs_of(self, module: nn.Module) -> Tensor:
        """Everything that `module` is called with when the quantized layer runs: [tokens, in_features] float64."""
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
        self.walk.run_layer(advance=False)
        handle.remove()
        return torch.cat(seen).double()


def uniform_plan(inventory: ModelInventory, bits: int = 3, **role_bits: int) -> Plan:
    widths = {block.layer: (bits,) * block.num_experts for block in inventory.expert_blocks}
    roles = {Role.ATTENTION: 4, Role.SHARED: 4, Role.DENSE: 4, Role.ROUTER: 16, Role.HEAD: 16}
    roles |= {Role(role): width for role, width in role_bits.items()}
    return Plan(inventory.model_type, "by hand", widths, roles)


def open_walk(folder: Path) -> tuple[Checkpoint, ModelInventory, LayerWalk]:
    checkpoint = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=torch.device("cpu"))
    checkpoint.model.set_experts_implementation(IMPLEMENTATION)
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    return checkpoint, inventory, LayerWalk(checkpoint, Batch.of_text(TOKEN_IDS), batch_size=4)


def quantized_layer(folder: Path, layer: int, **role_bits: int) -> QuantizedLayer:
    checkpoint, inventory, walk = open_walk(folder)
    for depth in range(layer):
        checkpoint.load(depth)
        walk.run_layer(advance=True)
        checkpoint.free(depth)
    checkpoint.load(layer)
    module: Any = checkpoint.model.get_submodule(f"model.layers.{layer}")
    original = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    recorder = Recorder([], [])
    worker = LayerQuantizer(walk, uniform_plan(inventory, **role_bits), recorder, Here(), shrinkage=0.0)
    parts = [part for part in inventory.tensors if part.layer == layer]
    block = next((block for block in inventory.expert_blocks if block.layer == layer), None)
    result = worker.quantize(parts, block)
    return QuantizedLayer(checkpoint.model, module, walk, recorder, result, original)


def second_moments(rows: Tensor) -> Tensor:
    return rows.T @ rows


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one.double() - other).abs().max() < 1e-5 * other.abs().max())


def names_below(result: LayerResult, layer: int) -> list[str]:
    return [path.removeprefix(f"model.layers.{layer}.") for path in result.linears]


def test_linears_are_quantized_in_calling_order_on_quantized_inputs(tiny_model: TinyModel) -> None:
    done = quantized_layer(tiny_model("mixtral"), 1)
    assert names_below(done.result, 1) == [f"self_attn.{name}_proj" for name in "qkvo"]
    attention = done.layer.self_attn
    for hessian, module in zip(done.recorder.hessians[:2], (attention.q_proj, attention.o_proj), strict=True):
        assert close(hessian[0], second_moments(done.inputs_of(module)))
    assert [len(weight) for weight in done.recorder.weights[:4]] == [1, 1, 1, 1]
    attention.v_proj.weight.data.copy_(done.original["self_attn.v_proj.weight"])
    unquantized = second_moments(done.inputs_of(attention.o_proj))
    assert not close(done.recorder.hessians[1][0], unquantized)


@pytest.mark.parametrize(
    ("model_type", "layer", "groups"),
    [
        ("mixtral", 0, ["self_attn.{q_proj,k_proj,v_proj}", "self_attn.{o_proj}"]),
        (
            "deepseek_v2",
            1,
            [
                "self_attn.{q_a_proj,kv_a_proj_with_mqa}",
                "self_attn.{q_b_proj}",
                "self_attn.{kv_b_proj}",
                "self_attn.{o_proj}",
                "mlp.shared_experts.{gate_proj,up_proj}",
                "mlp.shared_experts.{down_proj}",
            ],
        ),
        (
            "qwen2_moe",
            1,  # a layer without experts
            [
                "self_attn.{q_proj,k_proj,v_proj}",
                "self_attn.{o_proj}",
                "mlp.{gate_proj,up_proj}",
                "mlp.{down_proj}",
            ],
        ),
        ("minimax", 0, ["self_attn.{qkv_proj,output_gate}", "self_attn.{out_proj}"]),
        (
            "jamba",
            0,  # a Mamba layer without experts
            [
                "mamba.{in_proj}",
                "mamba.{out_proj}",
                "feed_forward.{gate_proj,up_proj}",
                "feed_forward.{down_proj}",
            ],
        ),
        (
            "qwen3_next",
            2,
            [
                "linear_attn.{in_proj_qkvz}",
                "linear_attn.{out_proj}",
                "mlp.shared_expert.{gate_proj,up_proj}",
                "mlp.shared_expert.{down_proj}",
            ],
        ),
    ],
)
def test_matrices_with_one_input_share_one_hessian(
    tiny_model: TinyModel, model_type: str, layer: int, groups: list[str]
) -> None:
    done = quantized_layer(tiny_model(model_type), layer)
    wanted = [
        [f"{group.split('{')[0]}{name}" for name in group.split("{")[1].rstrip("}").split(",")] for group in groups
    ]
    position = 0
    for hessian, group in zip(done.recorder.hessians, wanted, strict=False):
        assert sorted(names_below(done.result, layer)[position : position + len(group)]) == sorted(group)
        for name in group:
            assert close(hessian[0], second_moments(done.inputs_of(done.layer.get_submodule(name)))), name
        position += len(group)
    assert position == len(done.result.linears)


def test_no_forward_goes_as_far_as_through_the_experts(tiny_model: TinyModel) -> None:
    checkpoint, inventory, walk = open_walk(tiny_model("mixtral"))
    checkpoint.load(0)
    block = inventory.expert_blocks[0]
    ended: list[nn.Module] = []
    module = checkpoint.model.get_submodule(block.path)
    module.register_forward_hook(lambda module, *_: ended.append(module))
    worker = LayerQuantizer(walk, uniform_plan(inventory), Recorder([], []), Here(), shrinkage=0.0)
    result = worker.quantize([part for part in inventory.tensors if part.layer == 0], block)
    assert len(result.linears) == 4 and len(result.experts) == 2 and not ended
    walk.run_layer(advance=False)
    assert ended


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_down_projections_see_what_the_quantized_up_projections_give(tiny_model: TinyModel, model_type: str) -> None:
    done = quantized_layer(tiny_model(model_type), 0)
    module = done.layer.mlp.experts
    calls: list[tuple[Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    done.walk.run_layer(advance=False)
    handle.remove()
    hidden, index, weights = (torch.cat([call[place] for call in calls]) for place in range(3))
    up_hessians, down_hessians = done.recorder.hessians[-2:]
    for expert in range(8):
        tokens, ranks = (index == expert).nonzero(as_tuple=True)
        weight = weights[tokens, ranks][:, None]
        assert close(up_hessians[expert], second_moments((hidden[tokens] * weight).double()))
        quantized, untouched = (
            _activations(module, source, expert, hidden[tokens])
            for source in (module.gate_up_proj, done.original["mlp.experts.gate_up_proj"])
        )
        assert close(down_hessians[expert], second_moments((quantized * weight).double()))
        assert not close(down_hessians[expert], second_moments((untouched * weight).double()))


def _activations(module: Any, up_weights: Tensor, expert: int, inputs: Tensor) -> Tensor:
    if module.is_transposed:
        return module._apply_gate(inputs @ up_weights[expert] + module.gate_up_proj_bias[expert])
    gate, up = (inputs @ up_weights[expert].T).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def test_routers_and_gates_of_shared_experts_can_be_packed(tiny_model: TinyModel) -> None:
    for model_type, routers in {
        "qwen2_moe": ["mlp.gate", "mlp.shared_expert_gate"],
        "hunyuan_v1_moe": ["mlp.gate.wg"],
        "deepseek_v3": ["mlp.gate"],
        "gpt_oss": ["mlp.router"],
    }.items():
        layer = 2 if model_type in ("qwen2_moe", "deepseek_v3") else 1
        done = quantized_layer(tiny_model(model_type), layer, router=8)
        rows = {row.name: row for row in done.result.report if row.role == Role.ROUTER.value}
        assert sorted(rows) == sorted(f"model.layers.{layer}.{name}" for name in routers)
        assert all(row.outcome == "quantized" and row.bits == 8 for row in rows.values())


def test_matrix_that_is_never_called_is_kept_and_reported(tiny_model: TinyModel) -> None:
    checkpoint, inventory, walk = open_walk(tiny_model("mixtral"))
    checkpoint.load(0)
    layer: Any = checkpoint.model.get_submodule("model.layers.0")
    layer.idle = nn.Linear(32, 8, bias=False)
    name = "model.layers.0.idle.weight"
    part = TensorPart(name, Role.ATTENTION, 0, (8, 32), "bfloat16", 512, packable=True)
    worker = LayerQuantizer(walk, uniform_plan(inventory), Recorder([], []), Here(), shrinkage=0.0)
    (row,) = worker.quantize([part], None).report
    assert (row.name, row.outcome, row.bits, row.weight_count) == ("model.layers.0.idle", "kept", 16, 256)
    assert "never called" in row.notes[0]


def test_quantizer_gets_the_settings() -> None:
    quantizer: Any = quantizer_for(QuantizerSettings(damping=0.05, activation_order=False))
    assert (quantizer.name, quantizer.damping, quantizer.activation_order) == ("trellis", 0.05, False)
    assert quantizer_for(QuantizerSettings()).activation_order is True  # type: ignore[attr-defined]
    assert quantizer_for(QuantizerSettings(quantizer="rtn")).name == "rtn"


# Plans


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "qwen2_moe"])
def allocated(
    request: pytest.FixtureRequest, scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A work directory that is ready to be quantized; `model.json` in it names the checkpoint."""
    folder = tmp_path_factory.mktemp(f"allocated-{request.param}")
    scored_work(folder, request.param, bits=(2, 4))
    run_allocate(folder / "work", target_stored_bits=3.9)
    return folder / "work"


def plan_of(work_dir: Path) -> Plan:
    return Plan.read(work_dir / "plan" / "plan.yaml")


def copy_of(work_dir: Path, folder: Path) -> Path:
    return Path(shutil.copytree(work_dir, folder / "work"))


def test_kept_pruned_and_mixed_experts(allocated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_dir = copy_of(allocated, tmp_path)
    plan = plan_of(work_dir)
    layers = sorted(plan.expert_bits)
    mixed = {"gate_up_proj": 2, "down_proj": 16}
    widths: dict[int, tuple[Any, ...]] = dict.fromkeys(layers, (0, 16, mixed, 3, 4, 1, 0, 2))
    replace(plan, expert_bits=widths, role_bits={**plan.role_bits, Role.ROUTER: 8, Role.HEAD: 4}).write(
        tmp_path / "mine.yaml"
    )
    states: dict[int, Tensor] = {}
    monkeypatch.setattr(quantize, "save_progress", lambda _, walk, __: states.update({walk.depth: walk.hidden.clone()}))
    run_quantize(work_dir, plan=str(tmp_path / "mine.yaml"))
    packed = work_dir / "packed"
    rows = {row.name: row for path in (packed / "report").iterdir() for row in read_report(path)}
    coverage = json.loads((packed / "coverage.json").read_text(encoding="utf-8"))
    per_outcome = Counter(row.outcome for row in rows.values() if row.role == "expert")
    assert per_outcome == {"pruned": 4 * len(layers), "kept": 3 * len(layers), "quantized": 9 * len(layers)}
    assert coverage["covered"] == 1.0 and min(coverage["pruned"], coverage["kept"], coverage["quantized"]) > 0
    assert rows["lm_head"].bits == 4
    model = Path(json.loads((work_dir / "model.json").read_text(encoding="utf-8"))["folder"])
    twin = dense_twin(model, packed, transposed=plan.model_type == "gpt_oss")
    loaded = load_packed(packed)
    with torch.no_grad():
        expected = twin(TOKEN_IDS).logits
        assert (loaded(TOKEN_IDS).logits - expected).abs().mean() < PRODUCTS
        with decoded_products():
            assert (loaded(TOKEN_IDS).logits - expected).abs().max() < 5e-5
    _check_kept(read_packed(packed).experts, twin, model)
    token_ids = load_file(work_dir / "calibration" / "tokens.safetensors")["token_ids"]
    _check_hidden(twin, token_ids, states[max(states)])
    run_prune_eval(work_dir, write_documents(tmp_path / "more.jsonl", documents=6, offset=500))


def _check_hidden(twin: Any, token_ids: Tensor, hidden: Tensor) -> None:
    """Quantize went on with what the packed model computes, its routers without the dropped experts."""
    seen: list[Tensor] = []
    handle = twin.model.layers[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        twin(token_ids)
    handle.remove()
    (last,) = seen
    last = last[0] if isinstance(last, tuple) else last
    assert (last - hidden).abs().mean() < PRODUCTS * hidden.abs().max()


def _check_kept(experts: dict[str, dict[str, list[Tensor | None]]], twin: Any, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for path, projections in experts.items():
        for projection, row in projections.items():
            assert row[0] is None and row[6] is None
            before, after = (getattr(each.get_submodule(path), projection) for each in (original, twin))
            assert len(after) == 6, "the twin is without the two that are dropped, the first of them in front"
            assert torch.equal(before[1], after[0]), "an expert at 16 bits is exactly the original"
            assert torch.equal(before[2], after[1]) == (projection == "down_proj")


@pytest.mark.parametrize(
    "where", ["pruned in half", "missing layer", "role that is kept", "pruned role", "half embedding"]
)
def test_plan_that_cannot_be_followed_is_refused(allocated: Path, tmp_path: Path, where: str) -> None:
    work_dir = copy_of(allocated, tmp_path)
    plan = plan_of(work_dir)
    first, *others = sorted(plan.expert_bits)
    row = plan.expert_bits[first]
    half = ({"gate_up_proj": 0, "down_proj": 4}, *row[1:])
    wrong, message = {
        "pruned in half": (replace(plan, expert_bits={**plan.expert_bits, first: half}), f"layer {first} expert 0"),
        "missing layer": (replace(plan, expert_bits={n: plan.expert_bits[n] for n in others}), f"layer {first}"),
        "role that is kept": (replace(plan, role_bits=plan.role_bits | {Role.OTHER: 4}), "other has 4 bits"),
        "pruned role": (replace(plan, role_bits=plan.role_bits | {Role.ATTENTION: 0}), "attention has 0 bits"),
        "half embedding": (replace(plan, role_bits=plan.role_bits | {Role.EMBEDDING: 4.5}), "embedding has 4.5 bits"),
    }[where]  # fmt: skip
    wrong.write(tmp_path / "wrong.yaml")
    with pytest.raises(PlanError, match=message):
        run_quantize(work_dir, plan=str(tmp_path / "wrong.yaml"))
    assert not list((work_dir / "packed").glob("*.safetensors"))


def test_head_that_is_the_embedding_cannot_be_packed(tiny_model: TinyModel, tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    model = tiny_model("mixtral", tie_word_embeddings=True)
    run_calibrate(work_dir, model, write_documents(tmp_path / "text.jsonl", documents=24))
    run_score(work_dir, bits=(2, 4))
    with pytest.raises(PlanError, match="tied to its embedding"):
        run_allocate(work_dir, head_bits=4)
    run_allocate(work_dir)
    plan = plan_of(work_dir)
    replace(plan, role_bits={**plan.role_bits, Role.HEAD: 4}).write(tmp_path / "packed-head.yaml")
    with pytest.raises(PlanError, match="tied to the embedding"):
        run_quantize(work_dir, plan=str(tmp_path / "packed-head.yaml"))
    run_quantize(work_dir)
    found = read_packed(work_dir / "packed")
    assert "lm_head.weight" not in found.kept and "model.embed_tokens" in found.linears


def embedding_rows(work_dir: Path) -> list[MatrixReport]:
    rows = read_report(work_dir / "packed" / "report" / "rest.json")
    return [row for row in rows if row.role == Role.EMBEDDING.value]


@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_is_rounded_before_the_layers_see_it(
    allocated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    work_dir = copy_of(allocated, tmp_path)
    plan = plan_of(work_dir)
    replace(plan, role_bits={**plan.role_bits, Role.EMBEDDING: bits}).write(tmp_path / "mine.yaml")
    seen: dict[str, Tensor] = {}

    def first_inputs(_: Any, walk: LayerWalk, beside: dict[str, LayerWalk]) -> int:
        seen.update(packed=walk.hidden.clone(), **{name: other.hidden.clone() for name, other in beside.items()})
        return 0

    monkeypatch.setattr(quantize, "restore_progress", first_inputs)
    run_quantize(work_dir, plan=str(tmp_path / "mine.yaml"))
    (row,) = embedding_rows(work_dir)
    assert (row.outcome, row.bits, row.notes) == ("quantized", bits, ())
    assert row.relative_error is not None and 0 < row.relative_error < (0.02 if bits == 4 else 1e-4)
    token_ids = load_file(work_dir / "calibration" / "tokens.safetensors")["token_ids"]
    loaded = load_packed(work_dir / "packed")
    stored = loaded.get_input_embeddings()(token_ids)
    scale = (seen["packed"].norm() / stored.norm()).item()  # some families multiply embeddings by a number
    torch.testing.assert_close(seen["packed"], stored * scale, atol=1e-5, rtol=1e-4)
    if "original" in seen:
        error = (seen["packed"] - seen["original"]).square().sum() / seen["original"].square().sum()
        assert 0 < error < (0.02 if bits == 4 else 1e-4)


def test_large_matrices_are_packed_some_rows_at_a_time(
    allocated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = (copy_of(allocated, tmp_path / name) for name in ("whole", "pieces"))
    plan = plan_of(whole)
    replace(plan, role_bits={**plan.role_bits, Role.HEAD: 6, Role.EMBEDDING: 6}).write(tmp_path / "mine.yaml")
    run_quantize(whole, plan=str(tmp_path / "mine.yaml"))
    monkeypatch.setattr(linears, "_PIECE_WEIGHTS", 1000)
    run_quantize(pieces, plan=str(tmp_path / "mine.yaml"))
    found, expected = (read_packed(each / "packed").linears for each in (pieces, whole))
    for path in ("lm_head", "model.embed_tokens"):  # sums of other numbers of rows may turn a code that is on the edge
        assert (found[path] - expected[path]).norm() < 0.02 * expected[path].norm()
    rows = zip(*(read_report(each / "packed" / "report" / "rest.json") for each in (pieces, whole)), strict=True)
    for row, other in rows:
        assert row.proxy_loss == pytest.approx(other.proxy_loss, rel=1e-2)
        assert row.relative_error == pytest.approx(other.relative_error, rel=1e-2)


def test_an_embedding_with_code_of_its_own_is_kept_and_told(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory_module, "_plain_embedding_path", lambda model: None)
    work_dir = tmp_path / "work"
    run_calibrate(work_dir, tiny_model("mixtral"), write_documents(tmp_path / "text.jsonl", documents=24))
    run_score(work_dir, bits=(2, 4))
    run_allocate(work_dir)
    result = run_quantize(work_dir)
    (row,) = embedding_rows(work_dir)
    assert (row.outcome, row.bits) == ("kept", 16) and "reads its weight" in row.notes[0]
    assert any("model.embed_tokens: its family's own code" in warning for warning in result.warnings)
    assert "model.embed_tokens.weight" in read_packed(work_dir / "packed").kept


def test_missing_plan_says_how_to_make_one(allocated: Path, tmp_path: Path) -> None:
    work_dir = copy_of(allocated, tmp_path)
    with pytest.raises(PlanError, match="no such plan"):
        run_quantize(work_dir, plan=str(tmp_path / "none.yaml"))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match="is a pipe"):
        run_quantize(work_dir, plan=str(tmp_path / "pipe.yaml"))


def test_relative_errors_of_linears_are_of_the_weights_as_they_were(tiny_model: TinyModel) -> None:
    done = quantized_layer(tiny_model("mixtral"), 0)
    module = done.layer.self_attn.o_proj
    weight, hessian = done.original["self_attn.o_proj.weight"].double(), second_moments(done.inputs_of(module))
    lost = weight - module.weight.detach().double()
    row = next(row for row in done.result.report if row.name.endswith("o_proj"))
    wanted = float(((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum())
    assert row.relative_error == pytest.approx(wanted, rel=1e-4)
