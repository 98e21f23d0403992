"""Packed models: streamed, whole and dequantized give the same logits, and damage is named before anything runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.packed import CONFIG_FOLDER, LAYOUT, part_file, read_layout
from mc_cli.data.batches import Batch
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.encodings.trellis import trellis_for
from mc_cli.errors import ArtifactError, InputError
from mc_cli.families import CONTRACT_TESTED
from mc_cli.models import experts
from mc_cli.models.checkpoint import REST
from mc_cli.models.inventory import tied_tensors
from mc_cli.models.model_files import copy_model_files
from mc_cli.packed.loading import load_packed
from mc_cli.packed.packed_files import open_packed
from mc_cli.packed.packed_model import PackedSource, model_bytes
from mc_cli.parts import Role
from mc_cli.walking.layerwise import LayerWalk
from tests.conftest import TinyModel
from tests.dense_twin import PRODUCTS, cut_experts_out, decoded_products
from tests.packed_folders import LINEAR_BITS, pack_folder

CPU = torch.device("cpu")
TOKEN_IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))
ROUNDING = 5e-5  # of float32 sums in another order; logits are about 1
every_family = pytest.mark.parametrize("model_type", CONTRACT_TESTED)

Packed = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`packed(model_type, **options)`: a packed folder, made once. Read only."""
    made: dict[str, Path] = {}

    def folder_of(model_type: str, config: dict[str, Any] | None = None, **options: Any) -> Path:
        key = f"{model_type} {config} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"packed_{model_type}")
            made[key] = pack_folder(tiny_model(model_type, **(config or {})), folder, **options)
        return made[key]

    return folder_of


def source_of(folder: Path, dtype: torch.dtype = torch.float32) -> PackedSource:
    return PackedSource(folder, dtype=dtype, device=CPU)


def streamed_logits(source: PackedSource) -> torch.Tensor:
    walk = LayerWalk(source, Batch.of_text(TOKEN_IDS), batch_size=1)
    for layer in range(walk.num_layers):
        source.load(layer)
        walk.run_layer(advance=True)
        source.free(layer)
    return torch.cat([walk.logits(rows) for rows in walk.batches()])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKEN_IDS, use_cache=False).logits


def dequantized(checkpoint: Path, model: Any) -> Any:
    """transformers' own dense model with its own experts kernels, holding what the packed `model` stands for."""
    dense: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for path, module in dense.named_modules():
            packed_module = modules[path]
            if experts.is_packed(packed_module):
                for projection in (experts.up_name(packed_module), "down_proj"):
                    for expert in range(module.num_experts):
                        target = experts.expert_weight(module, projection, expert)
                        if experts.expert_of_slot(packed_module, expert) is not None:
                            target.copy_(experts.dense_weight(packed_module, projection, expert))
            elif hasattr(packed_module, "_mc_weight"):
                module.weight.copy_(packed_module.weight)
    return dense


@every_family
def test_streamed_whole_and_dequantized_models_agree(model_type: str, packed: Packed, tiny_model: TinyModel) -> None:
    folder = packed(model_type)
    whole = load_packed(folder)
    dense = logits_of(dequantized(tiny_model(model_type), whole))
    assert torch.isfinite(dense).all() and dense.std() > 0.1
    assert (logits_of(whole) - dense).abs().mean() < PRODUCTS
    assert (streamed_logits(source_of(folder)) - dense).abs().mean() < PRODUCTS
    with decoded_products():
        torch.testing.assert_close(streamed_logits(source_of(folder)), dense, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(logits_of(whole), dense, atol=ROUNDING, rtol=0)


@every_family
def test_every_stored_byte_has_a_role(model_type: str, packed: Packed) -> None:
    folder = packed(model_type)
    sizes = model_bytes(folder)
    files = open_packed(folder)
    assert sum(stored.total for stored in sizes.values()) == files.size_bytes
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert files.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    prefixes = tuple(f"{block.path}." for block in files.layout.experts)
    stacked = {
        name: tensor for name, tensor in tensors.items() if name.startswith(prefixes) and "_proj_bias" not in name
    }
    by_kind = {"codes": sizes[Role.EXPERT].codes, "kept_weight": sizes[Role.EXPERT].kept}
    for ending, counted in by_kind.items():
        assert counted == sum(tensor.nbytes for name, tensor in stacked.items() if name.endswith(ending)) > 0
    assert sizes[Role.EXPERT].total == sum(tensor.nbytes for tensor in stacked.values())
    embedding = tensors["model.embed_tokens.codes"]
    assert sizes[Role.EMBEDDING].codes == embedding.nbytes and sizes[Role.EMBEDDING].kept == 0


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "hunyuan_v1_moe", "granitemoe"])
def test_routers_and_head_can_be_packed(model_type: str, packed: Packed, tiny_model: TinyModel) -> None:
    """A router is no torch.nn.Linear in most families; its code reads `weight`, which dequantizes."""
    roles = {**LINEAR_BITS, Role.ROUTER: 8, Role.HEAD: 4}
    folder = packed(model_type, {"tie_word_embeddings": False}, role_bits=roles)
    whole = load_packed(folder)
    dense = dequantized(tiny_model(model_type, tie_word_embeddings=False), whole)
    with decoded_products():
        torch.testing.assert_close(logits_of(whole), logits_of(dense), atol=ROUNDING, rtol=0)
    sizes = model_bytes(folder)
    assert sizes[Role.ROUTER].codes > 0 and sizes[Role.HEAD].kept == 0


@every_family
def test_dropped_experts_are_as_if_they_were_not_there(model_type: str, packed: Packed, tiny_model: TinyModel) -> None:
    folder = packed(model_type, pruned=(0, 5))
    whole = load_packed(folder)
    dense = dequantized(tiny_model(model_type), whole)
    for path, module in whole.named_modules():
        if experts.is_packed(module):
            cut_experts_out(dense, path, (0, 5))
    assert (logits_of(whole) - logits_of(dense)).abs().mean() < PRODUCTS
    with decoded_products():
        torch.testing.assert_close(streamed_logits(source_of(folder)), logits_of(whole), atol=ROUNDING, rtol=0)
        torch.testing.assert_close(logits_of(whole), logits_of(dense), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compute_dtype_casts_what_is_kept_and_nothing_that_is_packed(dtype: torch.dtype, packed: Packed) -> None:
    folder = packed("deepseek_v3")
    source = source_of(folder, dtype)
    for part in source.parts:
        source.load(part)
    found = source.model.state_dict()
    stored = source.files.tensors
    for name in source.packed:
        assert found[name].dtype == stored[name].dtype
    assert found["model.norm.weight"].dtype == source.model.dtype == dtype
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert {found[name].dtype for name in found if name.endswith("_kept_weight")} == {dtype}
    assert torch.isfinite(logits_of(source.model).float()).all()


def test_casting_a_loaded_model_leaves_packed_tensors_alone(packed: Packed) -> None:
    model = load_packed(packed("mixtral"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if name.endswith(("codes", "scales", "zero_points")):
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_only_one_layer_is_resident(packed: Packed) -> None:
    source = source_of(packed("qwen2_moe"))
    source.load(REST)
    source.load(1)
    source.load(2)
    source.free(1)
    layers = source.model.get_submodule(source.layers_path)
    assert [{tensor.is_meta for tensor in layer.parameters()} for layer in layers] == [{True}, {True}, {False}]
    rest = {name for name, tensor in source.model.named_parameters() if not tensor.is_meta and ".layers." not in name}
    embedding = {f"model.embed_tokens.{part}" for part in ("codes", "scales", "zero_points")}
    assert rest == embedding | {"model.norm.weight", "lm_head.weight"}


def test_a_tied_head_is_stored_once(packed: Packed) -> None:
    folder = packed("ernie4_5_moe", role_bits={Role.ATTENTION: 4})
    assert "lm_head.weight" not in open_packed(folder).tensors
    model = load_packed(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_multiplies_with_the_packed_embedding(packed: Packed) -> None:
    folder = packed("ernie4_5_moe")
    assert not [name for name in open_packed(folder).tensors if name.startswith("lm_head")]
    model = load_packed(folder)
    assert isinstance(model.lm_head, torch.nn.Linear) and not list(model.lm_head.parameters())
    assert model.get_output_embeddings() is model.lm_head and not tied_tensors(model)
    weight = model.model.embed_tokens.weight
    assert torch.equal(weight, model.lm_head.weight)
    hidden = torch.randn(3, 5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.lm_head(hidden), hidden @ weight.T, atol=1e-3, rtol=0)
    model.tie_weights()  # finds nothing to tie, whatever table it looks into
    model.tie_weights(recompute_mapping=False)
    assert not list(model.lm_head.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_embedding_looks_up_rows_in_the_dtype_of_its_model(dtype: torch.dtype, packed: Packed) -> None:
    model = load_packed(packed("qwen3_moe"), dtype=dtype)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding) and model.dtype == model.model.dtype == dtype
    token_ids = torch.tensor([[5, 0, 5], [7, 319, 1]])
    assert torch.equal(embedding(token_ids), embedding.weight[token_ids])
    assert embedding(token_ids).dtype == embedding.weight.dtype == dtype
    model.to(torch.float16)
    assert embedding(token_ids).dtype == embedding.weight.dtype == model.dtype == torch.float16
    assert model.num_parameters() > 0 and type(model).__name__ == "Qwen3MoeForCausalLM"


def test_a_packed_embedding_decodes_no_other_rows(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = load_packed(packed("qwen3_moe")).get_input_embeddings()
    asked: list[int] = []
    real = AffineEncoding.dequantize

    def dequantize(self: AffineEncoding, tensors: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        asked.append(len(tensors["codes"]))
        return real(self, tensors, in_features)

    monkeypatch.setattr(AffineEncoding, "dequantize", dequantize)
    embedding(torch.tensor([[3, 4]]))
    assert asked == [2]


def test_a_layout_that_packs_a_tied_head_twice_is_refused(packed: Packed, tmp_path: Path) -> None:
    folder = shutil.copytree(packed("ernie4_5_moe"), tmp_path / "packed")
    change_layout(folder, lambda layout: layout["linears"].update({"lm_head": 0}))
    with pytest.raises(ArtifactError, match="lm_head: the layout packs it, but it is"):
        source_of(folder)


def test_an_embedding_whose_rows_are_not_apart_is_refused(packed: Packed, tmp_path: Path) -> None:
    folder = shutil.copytree(packed("qwen3_moe"), tmp_path / "packed")
    key = trellis_for(4.0, 32).key

    def change(layout: dict[str, Any]) -> None:
        layout["encodings"].append(key)
        layout["linears"]["model.embed_tokens"] = len(layout["encodings"]) - 1

    change_layout(folder, change)
    with pytest.raises(ArtifactError, match=f"{key} does not store the rows of an embedding apart"):
        source_of(folder)


def test_a_whole_model_generates_and_is_not_saved(packed: Packed, tmp_path: Path) -> None:
    model: Any = load_packed(packed("mixtral"))
    ids = TOKEN_IDS[:1, :4]
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, use_cache=False)
    assert cached.shape[1] > 4 and torch.equal(cached, plain)
    with pytest.raises(InputError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def change_layout(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / LAYOUT).read_text())
    change(content)
    (folder / LAYOUT).write_text(json.dumps(content))


def change_tensors(folder: Path, part: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / part_file(part)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensor missing": (
        lambda folder: change_tensors(folder, 1, lambda t: t.pop("model.layers.1.self_attn.q_proj.scales")),
        "model.layers.1.self_attn.q_proj.scales: missing",
    ),
    "tensor too many": (
        lambda folder: change_tensors(folder, 0, lambda t: t.update({"model.layers.0.extra": torch.zeros(2)})),
        "model.layers.0.extra: not part of the model",
    ),
    "tensor twice": (
        lambda folder: change_tensors(folder, 0, lambda t: t.update({"model.norm.weight": torch.zeros(32)})),
        "model.norm.weight: in layer_000.safetensors and rest.safetensors",
    ),
    "other shape": (
        lambda folder: change_tensors(folder, REST, lambda t: t.update({"model.norm.weight": torch.zeros(31)})),
        r"model.norm.weight: stored \(31,\), model \(32,\)",
    ),
    "other dtype": (
        lambda folder: change_tensors(
            folder,
            1,
            lambda t: t.update({"model.layers.1.self_attn.q_proj.scales": torch.zeros(32, 1, dtype=torch.bfloat16)}),
        ),
        "q_proj.scales: stored as torch.bfloat16, its encoding has torch.float16",
    ),
    "file missing": (lambda folder: (folder / part_file(1)).unlink(), "model.layers.1.input_layernorm.weight: missing"),
    "file cut off": (
        lambda folder: (folder / part_file(1)).write_bytes((folder / part_file(1)).read_bytes()[:-100]),
        "layer_001.safetensors is not a whole safetensors file",
    ),
    "layout of another version": (
        lambda folder: change_layout(folder, lambda layout: layout.update(format_version=99)),
        "has version 99",
    ),
    "layout without experts of a layer": (
        lambda folder: change_layout(folder, lambda layout: layout["experts"].pop()),
        "model.layers.1.mlp.experts: the model has experts, the layout none",
    ),
    "layout with other experts": (
        lambda folder: change_layout(folder, lambda layout: layout["experts"][0].update(path="model.layers.0.ffn")),
        "model.layers.0.ffn: the layout has experts, the model none",
    ),
    "layout with fewer experts": (
        lambda folder: change_layout(folder, lambda layout: layout["experts"][0].update(num_experts=7)),
        "8 encodings, 7 experts",
    ),
    "layout with an unknown linear": (
        lambda folder: change_layout(folder, lambda layout: layout["linears"].update({"model.layers.9.q_proj": 0})),
        "model.layers.9.q_proj: the layout packs it, the model has no matrix there",
    ),
    "layout with an unknown encoding": (
        lambda folder: change_layout(folder, lambda layout: layout["encodings"].append("trellis_b2")),
        "Unknown weight encoding 'trellis_b2'",
    ),
    "layout with a group that does not divide": (
        lambda folder: change_layout(
            folder, lambda layout: layout["encodings"].__setitem__(0, layout["encodings"][0].split("_g")[0] + "_g7")
        ),
        "does not fit",
    ),
    "layout cut off": (lambda folder: (folder / LAYOUT).write_text("{"), "is not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, packed: Packed, tmp_path: Path) -> None:
    folder = shutil.copytree(packed("mixtral"), tmp_path / "packed")
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(ArtifactError, match=message):
        source_of(folder)


def test_a_folder_without_a_packed_model_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no packed model"):
        open_packed(tmp_path)
    with pytest.raises(InputError, match="not one packed by mc-cli"):
        open_packed(tiny_model("mixtral"))


def test_a_packed_linear_still_has_its_weight(packed: Packed) -> None:
    """Weights read through `module.weight` are those that the product uses."""
    source = source_of(packed("mixtral"))
    source.load(0)
    linear = source.model.model.layers[0].self_attn.q_proj
    assert isinstance(linear, torch.nn.Linear) and "weight" not in dict(linear.named_parameters())
    inputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(inputs, linear.weight)
    assert (linear(inputs) - expected).abs().mean() < PRODUCTS * expected.abs().mean()
    with decoded_products():
        torch.testing.assert_close(linear(inputs), expected)
    assert math.isclose(float(linear.weight.std()), 0.15, rel_tol=0.1)


def test_copied_model_files_describe_the_packed_model_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    original = shutil.copytree(tiny_model("mixtral"), tmp_path / "original")
    config = json.loads((original / "config.json").read_text())
    extra = {"quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoConfig": "a.B"}}
    (original / "config.json").write_text(json.dumps({**config, **extra}))
    (original / "LICENSE.txt").write_text("a licence")
    (original / "README.md").write_text("of the original")
    copy_model_files(original, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE.txt"} == names
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config


def test_the_packed_folder_needs_nothing_beside_it(packed: Packed, tmp_path: Path) -> None:
    folder = shutil.copytree(packed("olmoe"), tmp_path / "moved")
    assert (folder / CONFIG_FOLDER / "tokenizer.json").exists()
    assert read_layout(folder).to_json() == json.loads((folder / LAYOUT).read_text())
    torch.testing.assert_close(logits_of(load_packed(folder)), logits_of(load_packed(packed("olmoe"))))
