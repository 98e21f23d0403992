"""An export carries the policy that was measured; loading applies it; it can be switched off and re-tuned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mc_cli
from mc_cli.artifacts.packed import read_layout
from mc_cli.artifacts.pruning import TENSOR_PREFIX, Pruning, read_pruning, write_pruning
from mc_cli.artifacts.store import Manifest, StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import InputError, StaleArtifactError
from mc_cli.models.experts import PRUNER, find_experts
from mc_cli.packed.loading import load_packed
from mc_cli.policies import otp
from mc_cli.progress import SilentProgress, StageResult
from mc_cli.serving.packed_weights import PackedWeights
from mc_cli.settings import ExportSettings, PruneSettings, RunSettings
from mc_cli.skipping.pruning import apply_pruning
from mc_cli.stages import export
from tests.conftest import ScoredWork
from tests.tiny_chain import (
    run_allocate,
    run_prune_eval,
    run_quantize,
    write_documents,
)

TOKENS = torch.randint(3, 300, (2, 14), generator=torch.Generator().manual_seed(5))
RATES = (0.1, 0.2, 0.3)


def do_export(work_dir: Path, out: Path, **changes: Any) -> StageResult:
    settings = ExportSettings(out=str(out), **changes)
    return export.run(settings, RunSettings(device="cpu"), work_dir, force=True, progress=SilentProgress())


@pytest.fixture(scope="module")
def measured(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `work`, measured under odp, and `out`, its export."""
    folder = tmp_path_factory.mktemp("measured")
    scored_work(folder, "mixtral", documents=40, calibrate={"sequences": 16}, bits=(2, 4))
    run_allocate(folder / "work", target_stored_bits=4.0)
    run_quantize(folder / "work")
    write_documents(folder / "other.jsonl", documents=10, offset=80)
    prune = PruneSettings(policy=("odp",), target_rate=0.2, rates=RATES)
    run_prune_eval(folder / "work", folder / "other.jsonl", prune=prune)
    do_export(folder / "work", folder / "out")
    return folder


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits.float()


def expected(measured: Path, rate: float | None) -> torch.Tensor:
    model = load_packed(measured / "work" / "packed")
    apply_pruning(model, read_pruning(measured / "work" / "pruning" / "odp")[0], rate=rate)
    return logits_of(model)


def test_loading_applies_the_policy(measured: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(measured / "out", dtype=torch.float32)
    assert all(hasattr(module, PRUNER) for _, module in find_experts(model))
    torch.testing.assert_close(logits_of(model), expected(measured, None), atol=1e-5, rtol=1e-5)
    assert (logits_of(model) - expected(measured, 0)).abs().max() > 1e-3


def test_it_can_be_switched_off_or_tuned_when_loading(measured: Path) -> None:
    for rate in (0, 0.1, 0.25):
        model = AutoModelForCausalLM.from_pretrained(measured / "out", dtype=torch.float32, mc_pruning_rate=rate)
        torch.testing.assert_close(logits_of(model), expected(measured, rate), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"0\.9 is outside"):
        AutoModelForCausalLM.from_pretrained(measured / "out", mc_pruning_rate=0.9)


def test_it_can_be_changed_while_loaded(measured: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(measured / "out", dtype=torch.float32)
    for rate in (0, 0.3, None):
        mc_cli.set_pruning_rate(model, rate)
        torch.testing.assert_close(logits_of(model), expected(measured, rate), atol=1e-5, rtol=1e-5)


def test_it_generates_with_a_cache_and_padding(measured: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(measured / "out", dtype=torch.float32)
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    text = model.generate(TOKENS, attention_mask=mask, **options)
    assert text.shape == (2, 19)
    alone = model.generate(TOKENS[1:, 4:], attention_mask=mask[1:, 4:], **options)
    assert torch.equal(alone[0, 10:], text[1, 14:])


def test_a_model_without_a_policy_says_so(measured: Path) -> None:
    with pytest.raises(InputError, match="has no skipping policy"):
        mc_cli.set_pruning_rate(load_packed(measured / "work" / "packed"), 0.1)


def test_the_card_and_the_config_tell_of_the_policy(measured: Path) -> None:
    config = json.loads((measured / "out" / "config.json").read_text())
    point = Pruning.from_json(config["quantization_config"]["pruning"]).at_rate(None)
    assert config["mc_pruning_rate"] == point.rate
    card = (measured / "out" / "README.md").read_text()
    assert "the policy `odp` skips about 20" in card and "mc_pruning_rate=0" in card


def test_a_dense_export_says_that_it_cannot_carry_it(measured: Path, tmp_path: Path) -> None:
    result = do_export(measured / "work", tmp_path / "dense", format="dense")
    assert any("cannot carry the skipping policy 'odp'" in warning for warning in result.warnings)
    assert "mc_pruning_rate" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_policy_that_was_not_measured_does_not_ship(measured: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(measured / "work", tmp_path / "work"))
    shutil.rmtree(work_dir / "pruning")
    with pytest.raises(StaleArtifactError, match="is not the policy that was measured"):
        do_export(work_dir, tmp_path / "out")
    run_prune_eval(work_dir, measured / "other.jsonl", force=True)
    do_export(work_dir, tmp_path / "out")
    assert read_layout(work_dir / "packed").pruning is None
    assert "pruning" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_policy_learned_is_part_of_the_model(dtype: torch.dtype, measured: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(measured / "work", tmp_path / "work"))
    learned = pretend_otp(work_dir)
    do_export(work_dir, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in learned.items():
        assert torch.equal(model.get_parameter(name), tensor), "kept in float32"
    if dtype == torch.float32:
        twin = load_packed(work_dir / "packed")
        apply_pruning(twin, read_pruning(work_dir / "pruning" / "odp")[0], tensors=learned)
        torch.testing.assert_close(logits_of(model), logits_of(twin), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits_of(load_packed(tmp_path / "out")), logits_of(twin), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["odp", "otp"])
def test_an_engine_applies_it(policy: str, measured: Path, tmp_path: Path) -> None:
    """Does as transformers does for tokens that are decoded, whose received attention nobody knows yet."""
    out = measured / "out"
    if policy == "otp":
        shutil.copytree(measured / "work", tmp_path / "work")
        pretend_otp(tmp_path / "work")
        do_export(tmp_path / "work", tmp_path / "out")
        out = tmp_path / "out"
    weights = PackedWeights(out, dtype=torch.float32, device=torch.device("cpu"))
    plain = PackedWeights(out, dtype=torch.float32, device=torch.device("cpu"), rate=0)
    names = [f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(2)]
    taken, unpruned = ([each.take_experts(name) for name in names] for each in (weights, plain))
    weights.load()
    plain.load()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    routing = torch.rand(40, 2, generator=torch.Generator().manual_seed(3))
    index = torch.rand(40, 8, generator=torch.Generator().manual_seed(4)).topk(2).indices
    changed = 0
    with torch.no_grad():
        for (_, module), ours, all_of_them in zip(find_experts(model), taken, unpruned, strict=True):
            pruner = getattr(module, PRUNER)
            if pruner.watch is not None:
                pruner.watch.alone = len(hidden)
            expected = module(hidden, index, routing)
            torch.testing.assert_close(ours(hidden, index, routing), expected, atol=1e-6, rtol=1e-5)
            changed += int((all_of_them(hidden, index, routing) - expected).abs().amax(-1).gt(1e-5).sum())
    assert 5 < changed < 75  # tokens of both layers that have skipped an expert


def pretend_otp(work_dir: Path) -> dict[str, torch.Tensor]:
    """Replaces the fitted policy by otp with drawn routers, made as far as its manifest says."""
    pruning, _ = read_pruning(work_dir / "pruning" / "odp")
    plain = pruning.to_json()
    learned = {}
    for number, layer in enumerate(plain["layers"]):
        router = otp.starting_router(32, 2, 0.3)
        router[otp.WEIGHT][:, :32] = torch.randn(1, 32, generator=torch.Generator().manual_seed(number))
        layer["tensors"] = {name: list(tensor.shape) for name, tensor in router.items()}
        learned |= {f"{layer['path']}.{TENSOR_PREFIX}{name}": tensor for name, tensor in router.items()}
    for point in plain["points"]:
        point["thresholds"] = [0.0 for _ in point["thresholds"]]
    manifest = Manifest.read(work_dir / "pruning")
    assert manifest is not None
    write_pruning(work_dir / "pruning" / "odp", Pruning.from_json({**plain, "policy": "otp"}), learned)
    StageFolder(WorkDir(work_dir), "policy", manifest.settings, manifest.inputs).finish("0")
    return learned
