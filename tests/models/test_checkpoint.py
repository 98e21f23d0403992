"""Checkpoints in the forms that they are published in: sharded, tied, FP8, MXFP4, with more or fewer tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.mixtral.modeling_mixtral import MixtralPreTrainedModel

from mc_cli.data.batches import Batch
from mc_cli.models.checkpoint import REST, Checkpoint, read_config
from mc_cli.models.experts import IMPLEMENTATION
from mc_cli.models.inventory import take_inventory
from mc_cli.numerics.block_formats import dequantize_fp8_blocks, dequantize_mxfp4
from mc_cli.walking.layerwise import LayerWalk
from tests import tiny_models
from tests.conftest import TinyModel

CPU = torch.device("cpu")
TOKEN_IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))


def open_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    checkpoint = Checkpoint(folder, read_config(folder), dtype=dtype, device=CPU)
    checkpoint.model.set_experts_implementation(IMPLEMENTATION)
    return checkpoint


def all_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    checkpoint.load(REST)
    for layer in range(len(checkpoint.model.get_submodule(checkpoint.layers_path))):  # type: ignore[arg-type]
        checkpoint.load(layer)
    return checkpoint.model.state_dict()


def original_tensors(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    walk = LayerWalk(checkpoint, Batch.of_text(TOKEN_IDS), batch_size=2)
    for layer in range(walk.num_layers):
        checkpoint.load(layer)
        walk.run_layer(advance=True)
        checkpoint.free(layer)
    return torch.cat([walk.logits(rows) for rows in walk.batches()])


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_sharded_checkpoint_is_the_same_model(tiny_model: TinyModel, tmp_path: Path, model_type: str) -> None:
    source = tiny_model(model_type)
    assert_equal(all_tensors(open_checkpoint(tiny_models.shard(source, tmp_path))), original_tensors(source))


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe", "ernie4_5_moe", "gpt_oss"])
def test_loaded_tensors_revert_to_the_keys_on_disk(tiny_model: TinyModel, model_type: str) -> None:
    folder = tiny_model(model_type, tie_word_embeddings=False)
    checkpoint = open_checkpoint(folder)
    reverted = revert_weight_conversion(checkpoint.model, all_tensors(checkpoint))
    assert_equal(reverted, tiny_models.read_tensors(folder))


def test_a_part_can_be_loaded_again(tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model("ernie4_5_moe"))
    first = {name: tensor.clone() for name, tensor in all_tensors(checkpoint).items()}
    for layer in (2, 1):
        checkpoint.free(layer)
    assert_equal(all_tensors(checkpoint), first)
    assert torch.equal(logits(checkpoint), logits(checkpoint))


def test_experts_that_a_family_keeps_in_float32_are_not_rounded(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MixtralPreTrainedModel, "_keep_in_fp32_modules_strict", ["experts.down_proj"])
    folder = tiny_model("mixtral", torch.float32)
    loaded = all_tensors(open_checkpoint(folder))
    assert loaded["model.layers.0.mlp.experts.down_proj"].dtype == torch.float32
    assert loaded["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert_equal(loaded, original_tensors(folder))


@pytest.mark.usefixtures("module_cache")
def test_custom_code_is_run_when_trusted(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Code that comes with a checkpoint: its tensors have the names of its module tree, nothing is converted."""
    source = tiny_model("mixtral", torch.float32)
    folder = tiny_models.with_own_code(source, tmp_path / "custom")
    config = read_config(folder, trust_remote_code=True)
    checkpoint = Checkpoint(folder, config, dtype=torch.float32, device=CPU)
    checkpoint.model.set_experts_implementation(IMPLEMENTATION)
    assert type(checkpoint.model).__name__ == "OwnForCausalLM"
    assert not take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes).contract_tested
    # some libraries' products depend in their last bit on where in memory a matrix lies
    torch.testing.assert_close(logits(checkpoint), logits(open_checkpoint(source, torch.float32)), rtol=1e-5, atol=1e-6)


def test_buffers_that_no_file_holds_outlive_a_layer(tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model("mixtral"))
    attention = checkpoint.model.get_submodule("model.layers.1.self_attn")
    attention.register_buffer("own", torch.arange(3.0), persistent=False)
    attention.register_buffer("empty", None, persistent=False)
    for _ in range(2):
        checkpoint.load(1)
        checkpoint.free(1)
    assert torch.equal(attention.get_buffer("own"), torch.arange(3.0))
    assert all(parameter.is_meta for parameter in attention.parameters())


# Tied heads


def test_tied_head_stored_beside_the_embedding_counts_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("mixtral", tie_word_embeddings=True)
    tensors = tiny_models.read_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    checkpoint = open_checkpoint(tiny_models.with_tensors(source, tmp_path, tensors))
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    assert inventory.tied_head and "lm_head.weight" not in [part.name for part in inventory.tensors]
    assert checkpoint.unused == []
    loaded = all_tensors(checkpoint)
    assert loaded["lm_head.weight"].data_ptr() == loaded["model.embed_tokens.weight"].data_ptr()
    assert_equal(loaded, original_tensors(source))


def test_only_the_head_of_a_tied_pair_is_stored(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("mixtral", tie_word_embeddings=True)
    tensors = tiny_models.read_tensors(source)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    checkpoint = open_checkpoint(tiny_models.with_tensors(source, tmp_path, tensors), torch.float32)
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    assert {part.dtype for part in inventory.tensors} == {"bfloat16"}
    assert_equal(all_tensors(checkpoint), original_tensors(source, torch.float32))


# Keys that the model has no place for, and buffers that it can make itself


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("deepseek_v3", "model.layers.3.eh_proj.weight"),
        ("glm4_moe", "model.layers.3.mlp.experts.0.gate_proj.weight"),
        ("qwen3_next", "mtp.fc.weight"),
        ("mixtral", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_tensors_beside_the_language_model_are_listed(
    tiny_model: TinyModel, tmp_path: Path, model_type: str, key: str
) -> None:
    source = tiny_model(model_type)
    extra = {key: torch.zeros(8, 8, dtype=torch.bfloat16)}
    checkpoint = open_checkpoint(tiny_models.with_tensors(source, tmp_path, tiny_models.read_tensors(source) | extra))
    assert checkpoint.unused == [key]
    assert_equal(all_tensors(checkpoint), original_tensors(source))


def test_minimax_without_its_decay_buffers_makes_them(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("minimax", torch.float32)
    tensors = tiny_models.read_tensors(source)
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(("_decay", "slope_rate"))}
    assert len(kept) == len(tensors) - 4
    checkpoint = open_checkpoint(tiny_models.with_tensors(source, tmp_path, kept), torch.float32)
    assert_equal(all_tensors(checkpoint), original_tensors(source, torch.float32))
    checkpoint.free(0)
    assert_equal(all_tensors(checkpoint), original_tensors(source, torch.float32))


# The walk


def test_router_logits_of_a_training_config_are_not_asked_for(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("mixtral", torch.float32)
    expected = logits(open_checkpoint(source, torch.float32))
    folder = tiny_models.with_tensors(source, tmp_path, tiny_models.read_tensors(source))
    checkpoint = open_checkpoint(tiny_models.with_config(folder, output_router_logits=True), torch.float32)
    assert torch.equal(logits(checkpoint), expected)
    assert checkpoint.model.config.output_router_logits is True


@pytest.mark.parametrize("sequences", [1, 2, 3])  # two unpack as if the layer had returned two things
def test_a_second_value_goes_from_layer_to_layer(tiny_model: TinyModel, sequences: int) -> None:
    """GLM-5's attention hands on which tokens it chose; later layers may have no choice of their own."""
    kinds = {"indexer_types": ["full", "shared", "full"]}
    folder = tiny_model("glm_moe_dsa", torch.float32, index_topk=4, **kinds)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = open_checkpoint(folder, torch.float32)
    walk = LayerWalk(checkpoint, Batch.of_text(TOKEN_IDS[:sequences]), batch_size=sequences)
    for layer in range(walk.num_layers):
        checkpoint.load(layer)
        if layer == 1:  # as after a kill
            state = {name: tensor.clone() for name, tensor in walk.state().items()}
            walk = LayerWalk(checkpoint, Batch.of_text(TOKEN_IDS[:sequences]), batch_size=sequences)
            walk.restore(state["hidden"], layer, state["hidden_handed"])
        walk.run_layer(advance=True)
    found = torch.cat([walk.logits(rows) for rows in walk.batches()])
    torch.testing.assert_close(found, whole(TOKEN_IDS[:sequences], use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_restored_hidden_states_continue_the_walk(tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model("jamba", torch.float32), torch.float32)
    expected = logits(checkpoint)
    walk = LayerWalk(checkpoint, Batch.of_text(TOKEN_IDS), batch_size=2)
    for layer in range(2):
        checkpoint.load(layer)
        walk.run_layer(advance=True)
        checkpoint.free(layer)
    later = LayerWalk(checkpoint, Batch.of_text(TOKEN_IDS), batch_size=2)
    later.restore(walk.hidden.clone(), 2)
    for layer in (2, 3):
        checkpoint.load(layer)
        later.run_layer(advance=True)
        checkpoint.free(layer)
    assert torch.equal(torch.cat([later.logits(rows) for rows in later.batches()]), expected)


# Block formats. The twins decode bit by bit and scale element by element, from the formats' definitions.


def fp8_value(code: int) -> float:
    """E4M3: sign, 4 exponent bits with a bias of 7, 3 mantissa bits; no infinity, 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def fp4_value(code: int) -> float:
    """E2M1: sign, 2 exponent bits with a bias of 1, 1 mantissa bit."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def fp8_twin(codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    raw = codes.view(torch.uint8).tolist()
    rows = [
        [fp8_value(code) * float(scales[row // block, column // block]) for column, code in enumerate(line)]
        for row, line in enumerate(raw)
    ]
    return torch.tensor(rows, dtype=torch.float64).float()


def mxfp4_twin(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    out_features, groups, _ = blocks.shape
    values = torch.empty(out_features, groups * 32)
    for row in range(out_features):
        for group in range(groups):
            scale = 2.0 ** (int(exponents[row, group]) - 127)
            for position, pair in enumerate(blocks[row, group].tolist()):
                values[row, group * 32 + 2 * position] = fp4_value(pair & 15) * scale
                values[row, group * 32 + 2 * position + 1] = fp4_value(pair >> 4) * scale
    return values


def test_twins_agree_with_torch_on_every_fp8_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([fp8_value(code) for code in range(256)])
    assert torch.equal(codes.view(torch.float8_e4m3fn).float().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_blocks_become_their_values(tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype) -> None:
    """24 rows in blocks of 16 leave a cut block, as 576 rows in blocks of 128 do in DeepSeek-V3."""
    source = tiny_model("deepseek_v3")
    quantized = tiny_models.to_fp8(source, tmp_path / "fp8", block=16)
    stored = tiny_models.read_tensors(quantized)
    scaled = {key.removesuffix("_scale_inv"): scales for key, scales in stored.items() if key.endswith("_scale_inv")}
    assert any(stored[key].shape[0] % 16 for key in scaled) and any(stored[key].shape[1] % 16 for key in scaled)
    values = {
        key: fp8_twin(tensor, scaled[key], 16) if key in scaled else tensor.float()
        for key, tensor in stored.items()
        if not key.endswith("_scale_inv")
    }
    plain = tiny_models.with_tensors(source, tmp_path / "plain", values)
    checkpoint = open_checkpoint(quantized, dtype)
    assert_equal(all_tensors(checkpoint), original_tensors(plain, dtype))
    assert checkpoint.unused == []
    assert getattr(checkpoint.model.config, "quantization_config", None) is None
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    kept = {part.dtype for part in inventory.tensors if not part.name.endswith("e_score_correction_bias")}
    assert kept == {"bfloat16"}


def test_fp8_whole_blocks_agree_with_transformers(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_models.to_fp8(tiny_model("deepseek_v3"), tmp_path, block=8)
    config = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    assert_equal(all_tensors(open_checkpoint(folder)), theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_blocks_become_their_values(tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny_model("gpt_oss", intermediate_size=64)
    folder = tiny_models.to_mxfp4(source, tmp_path)
    stored = tiny_models.read_tensors(folder)
    checkpoint = open_checkpoint(folder, dtype)
    loaded = all_tensors(checkpoint)
    for layer in (0, 1):
        for projection in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{projection}"
            assert loaded[name].dtype == dtype
            for expert in (0, 5):
                twin = mxfp4_twin(stored[f"{name}_blocks"][expert], stored[f"{name}_scales"][expert])
                assert torch.equal(loaded[name][expert].float(), twin.T)
    assert checkpoint.unused == []
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    assert {part.dtype for part in inventory.tensors} == {"bfloat16"}
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype)
    assert_equal(loaded, theirs.state_dict())


def test_fp8_single_scale_and_power_of_two_scales() -> None:
    codes = torch.randn(4, 6).to(torch.float8_e4m3fn)
    assert torch.equal(dequantize_fp8_blocks(codes, torch.tensor([0.25]), block=(128, 128)), codes.float() * 0.25)
    powers = torch.tensor([[2.0, 0.5]]).to(torch.float8_e8m0fnu)
    expected = codes.float() * torch.tensor([2.0, 2.0, 2.0, 0.5, 0.5, 0.5])
    assert torch.equal(dequantize_fp8_blocks(codes, powers, block=(4, 3)), expected)


def test_mxfp4_extreme_exponents_are_exact() -> None:
    blocks = torch.full((1, 3, 16), 0x7E, dtype=torch.uint8)  # codes 14 and 7: -4 and 6
    values = dequantize_mxfp4(blocks, torch.tensor([[0, 127, 200]], dtype=torch.uint8))
    for group, exponent in enumerate((-127, 0, 73)):
        assert values[0, 32 * group : 32 * group + 2].double().tolist() == [-4 * 2.0**exponent, 6 * 2.0**exponent]
