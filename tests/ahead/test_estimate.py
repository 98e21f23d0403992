"""estimate: what compressing a model takes and gives, from headers alone, checked against what happens."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner, Result

from mc_cli import ahead, cli
from mc_cli.ahead import budget, machine, memory
from mc_cli.ahead import estimate as found_in
from mc_cli.ahead.fit import cache_bytes, token_bytes
from mc_cli.ahead.memory import memory_needs
from mc_cli.ahead.workload import Workload
from mc_cli.allocators import feasible_problem
from mc_cli.allocators.feasibility import size_range
from mc_cli.allocators.target import beside_experts, budget_of
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.inventory import take_inventory
from mc_cli.parts import ModelInventory, Role
from mc_cli.settings import AllocateSettings, ScoreSettings
from mc_cli.walking import resume
from tests import sparse_models
from tests.conftest import TinyModel
from tests.models.test_hub import Hub, hub  # noqa: F401
from tests.tiny_chain import CALIBRATE, LENGTH, run_calibrate, write_documents

SECONDS = 15.0  # what should take 3: `make bench-estimates` measures that; here a slow machine must not fail
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def measured_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def estimate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["estimate", *map(str, arguments)])


def found_by(*arguments: object) -> dict[str, Any]:
    result = estimate(*arguments, "--json")
    assert result.stdout, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def inventory_of(folder: Path) -> ModelInventory:
    checkpoint = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=torch.device("cpu"))
    return take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)


def deepseek_tensors(config: dict[str, Any]) -> Iterator[sparse_models.Tensor]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        low, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        both = config["qk_nope_head_dim"] + rope
        yield f"{prefix}.self_attn.q_a_proj.weight", (config["q_lora_rank"], hidden)
        yield f"{prefix}.self_attn.q_a_layernorm.weight", (config["q_lora_rank"],)
        yield f"{prefix}.self_attn.q_b_proj.weight", (heads * both, config["q_lora_rank"])
        yield f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", (low + rope, hidden)
        yield f"{prefix}.self_attn.kv_a_layernorm.weight", (low,)
        values = heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
        yield f"{prefix}.self_attn.kv_b_proj.weight", (values, low)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * config["v_head_dim"])
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
        names, inner = [f"{prefix}.mlp"], config["intermediate_size"]
        if layer >= config["first_k_dense_replace"]:
            inner = config["moe_intermediate_size"]
            yield f"{prefix}.mlp.gate.weight", (config["n_routed_experts"], hidden)
            yield f"{prefix}.mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
            names = [f"{prefix}.mlp.shared_experts"]
            names += [f"{prefix}.mlp.experts.{expert}" for expert in range(config["n_routed_experts"])]
        for name in names:
            for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                yield f"{name}.{part}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def test_671_billion_weights_in_163_files_take_three_seconds(tmp_path: Path) -> None:
    tensors = list(deepseek_tensors(DEEPSEEK_V3))
    folder = sparse_models.write(tmp_path / "model", DEEPSEEK_V3, tensors, shards=163)
    estimate("bundled:demo-moe")  # imports
    began, used = time.monotonic(), time.process_time()
    targets = ("--target-size", "200GiB", "--target-stored-bits", "2.5", "--target-stored-bits", "3")
    found = found_by(folder, *targets, "--fit", "256GiB", "--context", "8192")
    assert min(time.monotonic() - began, time.process_time() - used) < SECONDS
    assert (found["layers"], found["layers_with_experts"], found["experts_per_layer"]) == (61, 58, 256)
    weights = {}
    for name, shape in tensors:
        role = "expert" if ".experts." in name else "rest"
        weights[role] = weights.get(role, 0) + int(torch.tensor(shape).prod())
    assert found["roles"]["expert"]["weights"] == weights["expert"] == 58 * 256 * 3 * 7168 * 2048
    assert sum(role["weights"] for role in found["roles"].values()) == sum(weights.values())
    assert found["model_bytes"] == 2 * sum(weights.values())
    bits = {target["target"]: target["stored_bits_per_expert_weight"] for target in found["targets"]}
    assert bits["--target-stored-bits 2.5"] == 2.5
    whole = next(target for target in found["targets"] if "200GiB" in target["target"])
    assert 0.999 * 200 * 2**30 < whole["stored_bytes"] <= 200 * 2**30 and whole["fit"]["fits"]


@pytest.mark.parametrize(
    ("family", "method"), [("mixtral", "global"), ("qwen2_moe", "uniform"), ("deepseek_v3", "global")]
)
@pytest.mark.parametrize("target", ["target_stored_bits", "target_bits", "target_size_bytes"])
def test_one_layer_of_each_kind_stands_for_all(family: str, method: str, target: str, tiny_model: TinyModel) -> None:
    """Against the problem of all layers, which is what allocate solves."""
    inventory, score = inventory_of(tiny_model(family)), ScoreSettings(bits=(2, 3, 4))
    amount = 100_000 if target == "target_size_bytes" else 3.2
    settings = AllocateSettings(**{target: amount}, method=method)
    _, others = beside_experts(settings, inventory, score.quantizer)
    whole = feasible_problem(
        budget.importance_of_shapes(inventory, score), method=method, budget=budget_of(settings, inventory, others)
    )
    least, most = size_range(whole)
    found = budget.reachable_size(settings, score, inventory)
    shown = whole.budget.shown(
        whole.budget.amount_of(least, whole.weight_count), whole.budget.amount_of(most, whole.weight_count)
    )
    assert found.facts["reachable"] == shown
    if target != "target_bits":
        assert found.facts["predicted expert bytes"] == min(whole.limit, most)


def test_budgets_out_of_reach_are_told_and_the_others_shown(tmp_path: Path) -> None:
    folder = sparse_models.mixtral(tmp_path / "model", num_hidden_layers=2, shards=2)
    wrong = ("--target-size", "3MB", "--format", "ggml", "--tasks", "arc_easyy")
    result = estimate(folder, *wrong, "--target-stored-bits", "2.5", "-w", tmp_path / "w")
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "leaves nothing for the experts" in said and "Unknown export format 'ggml'" in said and "arc_easyy" in said
    assert re.search(r"--target-size 3MB +cannot be met", result.stdout)
    assert re.search(r"--target-stored-bits 2.5 +\d", result.stdout)
    assert not (tmp_path / "w").exists()


def test_a_model_that_cannot_be_read_is_the_one_thing_told(tiny_model: TinyModel, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_model("mixtral"), tmp_path / "broken"))
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    told = estimate(broken, "--target-stored-bits", 2.5)
    assert told.exit_code == 1 and weights.name in told.output
    assert "was not measured" not in told.output


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_keys_and_values_take_what_transformers_keeps(family: str, tiny_model: TinyModel) -> None:
    folder, context = tiny_model(family, torch.float32), 11
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(1, context, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    config = model.config.get_text_config()
    assert cache_bytes(config.to_dict(), config.num_hidden_layers, context) == held


def test_layers_with_a_window_keep_that() -> None:
    config = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    config |= {"layer_types": ["sliding_attention", "full_attention", "linear_attention"]}
    assert cache_bytes(config, 3, 100) == (16 + 100) * 2 * 16 * 2


def test_a_token_reads_its_experts_and_all_of_the_rest(tiny_model: TinyModel) -> None:
    inventory = inventory_of(tiny_model("mixtral", torch.bfloat16))
    score = ScoreSettings(bits=(2, 4))
    kept = dict.fromkeys(("attention_bits", "shared_bits", "dense_bits", "head_bits", "embedding_bits"), 16)
    size = budget.reachable_size(AllocateSettings(target_stored_bits=3.5, **kept), score, inventory)
    read = token_bytes(inventory, size, 1000)
    by_role = inventory.bytes_by_role()
    rest = sum(by_role[role] for role in by_role if role not in (Role.EXPERT, Role.EMBEDDING))
    block = inventory.expert_blocks[0]
    assert read.kept == rest and read.cache == 1000
    assert read.packed == pytest.approx(size.facts["predicted expert bytes"] * block.top_k / block.num_experts, abs=1)


def test_a_limit_of_memory_is_kept_or_refused_before_any_work(tmp_path: Path, much_room: None) -> None:
    folder = sparse_models.mixtral(tmp_path / "model", num_hidden_layers=2, shards=2)
    whole = ("run", "--model", folder, "--data", "bundled:calibration", "--target-stored-bits", "2.5")
    whole += ("-w", tmp_path / "w", "--out", tmp_path / "o")
    needed = found_by(folder, "--target-stored-bits", "2.5")["memory"]
    most = max(need["peak_bytes"] for need in needed)
    pieces = found_by(folder, "--target-stored-bits", "2.5", "--max-memory", str(2**30))["memory"]
    least = max(need["peak_bytes"] for need in pieces)
    assert least < most / 2
    for limit, words in ((least - 2**29, r"--[a-z]+.* would fit\."), (2**30, "No setting makes it fit")):
        for more in (("--dry-run",), ()):
            arguments = [*map(str, whole), "--max-memory", str(limit), *more]
            result = CliRunner().invoke(cli.app, arguments)
            said = " ".join(result.stderr.split())
            assert result.exit_code == 1 and f"--max-memory {limit:,} bytes is less than is needed" in said
            assert re.search(words, said), said
    assert not (tmp_path / "w" / "calibration").exists()
    for limit in (least + 2**30, most + 2**30):
        fits = CliRunner().invoke(cli.app, [*map(str, whole), "--max-memory", str(limit), "--dry-run"])
        assert "--max-memory" not in fits.stderr


def test_fewer_workers_are_named_where_they_fit(
    tmp_path: Path, much_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ahead, memory):  # what the process has grown to by other tests is nothing to this one
        monkeypatch.setattr(module, "resident_bytes", lambda: 400 * 2**20)
    folder = sparse_models.mixtral(tmp_path / "model", num_hidden_layers=2, shards=2)
    asked = ["run", "--model", str(folder), "--data", "bundled:calibration", "--target-stored-bits", "2.5"]
    asked += ["-w", str(tmp_path / "w"), "--out", str(tmp_path / "o"), "--batch-tokens", "2048", "--dry-run"]

    def said(gib: int, *workers: str) -> str:
        given = [*asked, "--max-memory", f"{gib}GiB", *workers]
        return " ".join(CliRunner().invoke(cli.app, given).stderr.split())

    remedies = {gib: said(gib, "--workers", "8") for gib in (8, 12, 16, 20, 26, 34, 44, 58, 76, 100)}
    fewer = {gib: re.search(r"(--workers) (\d) would fit", text) for gib, text in remedies.items()}
    assert {found[2] for found in fewer.values() if found} <= {"1", "2", "4"} and any(fewer.values())
    assert all("than is needed" not in said(gib, *found.groups()) for gib, found in fewer.items() if found)
    alone = [gib for gib, text in remedies.items() if ") without --workers would fit" in text]
    assert alone and all("than is needed" not in said(gib) for gib in alone)
    assert all("than is needed" in said(gib, "--workers", "1") for gib in alone)


@pytest.mark.parametrize("model", ["bundled:demo-moe", "mixtral"])
def test_the_lightest_settings_need_no_more_than_the_present_ones(
    tiny_model: TinyModel, tmp_path: Path, much_room: None, model: str
) -> None:
    """The remedy is of the stages to do: what others of a run would take is nothing to them."""
    folder = model if model.startswith("bundled:") else tiny_model(model)
    asked = ["calibrate", "--model", str(folder), "--data", "bundled:calibration", "-w", str(tmp_path / "w")]
    asked += ["--sequences", "4", "--length", "64", "--gradient-tokens", "256", "--dry-run", "--max-memory"]
    said = " ".join(CliRunner().invoke(cli.app, [*asked, "10MiB"]).stderr.split())
    needed, least = (
        int(re.search(rf"{words} about ([0-9,]+) bytes", said)[1].replace(",", ""))  # type: ignore[index]
        for words in ("calibrate:", "with the lightest ones")
    )
    assert least <= needed
    assert CliRunner().invoke(cli.app, [*asked, str(needed + 2**26)]).exit_code == 0


def test_memory_grows_with_what_it_is_made_of(tiny_model: TinyModel) -> None:
    inventory = inventory_of(tiny_model("mixtral"))
    work = Workload(inventory, 32, 300, 4, 4096, 32, 256, 1024, 4, (2.0, 4.0), 64, True, "trellis", 0)

    def peaks(work: Workload) -> dict[str, int]:
        return {need.stage: need.peak_bytes for need in memory_needs(work, base_bytes=0)}

    before = peaks(work)
    assert all(size > work.layer_bytes(0) for size in before.values())
    for changes, stages in (
        ({"tokens": 8192}, ("calibrate", "score", "quantize")),
        ({"samples": 8}, ("calibrate",)),
        ({"itemsize": 8}, tuple(before)),
    ):
        after = peaks(replace(work, **changes))
        assert all(after[stage] > before[stage] for stage in stages)
    assert peaks(replace(work, corrects=False))["quantize"] < before["quantize"]


def test_scratch_on_disk_is_what_calibrate_writes(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are measured at their largest: when the next one is written, and the last not yet removed."""
    sizes = [0]
    write = resume.write_state

    def measured(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        states = (tmp_path / "work" / "calibration" / "resume").glob("*.safetensors")
        sizes.append(sum(path.stat().st_size for path in states))

    monkeypatch.setattr(resume, "write_state", measured)
    model = tiny_model("mixtral", num_hidden_layers=8, hidden_size=64)
    data = write_documents(tmp_path / "text.jsonl", documents=400)
    settings = {"sequences": 64, "gradient_tokens": 40 * LENGTH}
    run_calibrate(tmp_path / "work", model, data, **settings)
    flags = ("--sequences", 64, "--length", LENGTH, "--gradient-tokens", 40 * LENGTH, "--data", data)
    predicted = found_by(model, *flags)["scratch_bytes"]["calibrate"]
    assert CALIBRATE.gradient_samples == 4
    assert max(sizes) == pytest.approx(predicted, rel=0.15)


def test_what_was_measured_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LEAST_S", 0.0)
    monkeypatch.setattr(machine, "_SIDE", 256)
    monkeypatch.setattr(machine, "_FORECAST", 256)
    monkeypatch.setattr(machine, "_WRITTEN", 1 << 20)
    assert machine.known_machine() is None
    assert "no times are told: --probe does that" in estimate("bundled:demo-moe").stderr
    measured = found_by("bundled:demo-moe", "--probe", "--target-stored-bits", "3")
    rates = {name: value for name, value in measured["machine"].items() if isinstance(value, float)}
    assert len(rates) == 6 and all(value > 0 for value in rates.values())
    assert all(len(pair) == 2 and min(pair) > 0 for pair in measured["machine"]["coding"].values())
    assert measured["targets"][0]["tokens_per_s"] > 0
    assert set(measured["seconds"]) == {"calibrate", "score", "allocate", "quantize", "prune-eval", "export"}
    assert machine.place_of_measurements() == tmp_path / "cache" / "mc-cli" / "machine.json"
    assert found_by("bundled:demo-moe")["machine"] == measured["machine"]
    for damaged in ({**measured["machine"], "coding": {"gptq": [1.0]}}, {**measured["machine"], "coding": 1}, []):
        machine.place_of_measurements().write_text(json.dumps(damaged))
        assert machine.known_machine() is None
    machine.place_of_measurements().write_text("{")
    assert machine.known_machine() is None


def test_times_follow_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coding in GGUF's points takes longer than in trellis codes, where the machine says so."""
    rates = {"trellis": [2e-7, 1e-7], "gptq": [1e-7, 1e-7], "gguf": [4e-6, 5e-7]}
    made = machine.Machine(machine._name(), torch.get_num_threads(), "", 1e11, 1e10, 1e10, rates, 3e9, 2e9, 1e9)
    for module in (ahead, found_in):
        monkeypatch.setattr(module, "known_machine", lambda: made)
    ours = found_by("bundled:demo-moe", "--target-stored-bits", "3")["seconds"]
    other = found_by("bundled:demo-moe", "--target-stored-bits", "3", "--for", "llama.cpp")["seconds"]
    assert other["quantize"] > ours["quantize"] + 3e-6 * 2e6
    assert other["calibrate"] == ours["calibrate"]


def test_a_model_on_the_hub_is_described_without_its_weights(
    hub: type[Hub],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {**sparse_models.MIXTRAL_8X7B}
    local = sparse_models.mixtral(tmp_path / "model")
    index = json.loads((local / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = 93_405_585_408
    index["weight_map"]["model.layers.32.mtp.weight"] = "model-00019-of-00019.safetensors"
    files = {"config.json": json.dumps(config).encode(), "model.safetensors.index.json": json.dumps(index).encode()}
    monkeypatch.setattr("tests.models.test_hub.FILES", files)
    targets = ("--target-stored-bits", "2.5", "--target-size", "16GiB", "-w", tmp_path / "w")
    remote, here = found_by("org/name", *targets), found_by(local, *targets)
    for target in (*remote["targets"], *here["targets"]):
        for name in ("base_bytes", "needed_bytes"):  # of this process, which grows as tests run
            assert target["fit"].pop(name) > 0
    for name in ("layers", "experts_per_layer", "roles", "model_bytes", "expert_weights", "scratch_bytes"):
        assert remote[name] == here[name], name
    bits, size = zip(remote["targets"], here["targets"], strict=True)
    assert bits[0] == bits[1]
    # Only a folder shows how large a tokenizer is, and what else the size has to hold.
    assert 0 < size[0]["stored_bytes"] - size[1]["stored_bytes"] < 2**18
    assert remote["bytes_in_its_files"] == 93_405_585_408
    assert "1 tensors are of layers that nobody reads" in " ".join(remote["warnings"])
    hub.mode = "none"
    refused = estimate("org/name")
    assert refused.exit_code == 1 and "log in with `hf auth login`" in refused.stderr
