"""Packed modules for an engine's own model: found by the original checkpoint's names, computing the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mc_cli.errors import ArtifactError
from mc_cli.serving.packed_weights import PackedWeights
from mc_cli.serving.vllm_ops import multiplied, name_experts, name_matrix, through_experts
from tests.conftest import TinyModel
from tests.exported_models import exported, load

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def checkpoints(tiny_model: TinyModel) -> dict[str, Path]:
    return {"mixtral": tiny_model("mixtral"), "qwen2_moe": tiny_model("qwen2_moe", tie_word_embeddings=True)}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family, checkpoint in checkpoints.items():
        folder = tmp_path_factory.mktemp(family)
        made[family] = exported(checkpoint, folder, tied=family == "qwen2_moe", pruned=(1, 4))
    return made


def opened(folder: Path) -> PackedWeights:
    return PackedWeights(folder, dtype=torch.float32, device=torch.device("cpu"))


def keys_of(checkpoint: Path) -> set[str]:
    found: set[str] = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def take_all(weights: PackedWeights, family: str) -> dict[str, Any]:
    """Everything as an engine with merged linears asks for it, by the original checkpoint's names."""
    taken: dict[str, Any] = {"embedding": weights.take_matrix("model.embed_tokens")}
    taken["head"] = weights.take_matrix("lm_head")
    experts = {"mixtral": "block_sparse_moe.experts", "qwen2_moe": "mlp.experts"}[family]
    for layer in range({"mixtral": 2, "qwen2_moe": 3}[family]):
        start = f"model.layers.{layer}"
        taken[f"{layer}.qkv"] = weights.take_matrix(f"{start}.self_attn.qkv_proj", QKV)
        taken[f"{layer}.out"] = weights.take_matrix(f"{start}.self_attn.o_proj")
        dense = family == "qwen2_moe" and layer == 1
        if not dense:
            taken[f"{layer}.experts"] = weights.take_experts(f"{start}.{experts}")
        if family == "qwen2_moe":
            mlp = f"{start}.mlp" if dense else f"{start}.mlp.shared_expert"
            taken[f"{layer}.up"] = weights.take_matrix(f"{mlp}.gate_up_proj", ("gate_proj", "up_proj"))
            taken[f"{layer}.down"] = weights.take_matrix(f"{mlp}.down_proj")
    return taken


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_products_are_those_of_transformers(family: str, folders: dict[str, Path]) -> None:
    weights = opened(folders[family])
    taken = take_all(weights, family)
    weights.require_all_taken("the test")
    weights.load()
    model = load(folders[family])
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    layer = model.model.layers[0]
    with torch.no_grad():
        parts = [getattr(layer.self_attn, name) for name in QKV]
        expected = torch.cat([part(hidden) - (0 if part.bias is None else part.bias) for part in parts], -1)
        torch.testing.assert_close(taken["0.qkv"](hidden), expected, atol=1e-5, rtol=0)
        assert taken["0.qkv"].out_features == expected.shape[-1] and taken["0.qkv"].in_features == 32
        torch.testing.assert_close(taken["head"](hidden), model.lm_head(hidden))
        ids = torch.tensor([3, 250, 7])
        torch.testing.assert_close(taken["embedding"](ids), model.model.embed_tokens(ids))
        index, routing = torch.tensor([[0, 2], [7, 3], [5, 6]]), torch.rand(3, 2)
        found = taken["0.experts"](hidden[:3], index, routing)
        torch.testing.assert_close(found, layer.mlp.experts(hidden[:3], index, routing))
        assert taken["0.experts"].dropped == (1, 4)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_what_is_kept_has_the_checkpoints_names(
    family: str, folders: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    weights = opened(folders[family])
    take_all(weights, family)
    ours = ("experts.", "_proj.weight", "embed_tokens", "lm_head.weight")
    kept = {name for name in keys_of(checkpoints[family]) if not any(each in name for each in ours)}
    found = dict(weights.kept())
    assert found.keys() == kept and len(kept) > 4
    assert all(tensor.is_floating_point() for tensor in found.values())


def test_a_merged_linear_may_have_kept_parts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A name that the engine merges and the model has no part of is refused; one that is kept whole is the engine's."""
    from mc_cli.parts import Role
    from tests.exported_models import ROLE_BITS

    bits = {role: width for role, width in ROLE_BITS.items() if role != Role.ATTENTION}
    folder = exported_with(checkpoints["mixtral"], tmp_path, bits)
    weights = opened(folder)
    assert weights.take_matrix("model.layers.0.self_attn.qkv_proj", QKV) is None
    assert "model.layers.0.self_attn.q_proj.weight" in dict(weights.kept())
    with pytest.raises(ArtifactError, match="the model has no"):
        weights.take_matrix("model.qk", ("embed_tokens", "layers.9.nothing"))


def exported_with(checkpoint: Path, folder: Path, bits: dict[Any, int]) -> Path:
    from mc_cli.progress import SilentProgress
    from mc_cli.settings import ExportSettings, RunSettings
    from mc_cli.stages import export
    from tests.packed_folders import packed_work_dir

    packed_work_dir(checkpoint, folder / "work", role_bits=bits)
    settings = ExportSettings(out=str(folder / "out"))
    export.run(settings, RunSettings(), folder / "work", force=False, progress=SilentProgress())
    return folder / "out"


class _Prefix:
    """An engine that has all under another name, as those of image-text models do."""

    def map_name(self, key: str) -> str | None:
        return None if key.startswith("lm_head") else f"language_model.{key}"


def test_an_engines_renaming_is_followed(folders: dict[str, Path]) -> None:
    weights, renames = opened(folders["mixtral"]), _Prefix()
    weights.rename(renames)
    weights.rename(renames)
    assert weights.take_matrix("language_model.model.embed_tokens") is not None
    assert weights.take_experts("language_model.model.layers.1.block_sparse_moe.experts").dropped == (1, 4)
    assert weights.take_matrix("lm_head") is None
    assert weights.take_matrix("model.embed_tokens") is None


def test_what_nobody_asks_for_is_named(folders: dict[str, Path]) -> None:
    weights = opened(folders["mixtral"])
    weights.take_experts("model.layers.0.block_sparse_moe.experts")
    calls: list[Callable[[], object]] = [
        lambda: weights.require_all_taken("An engine"),
        lambda: weights.take_experts("model.layers.9.mlp.experts"),
    ]
    for call, words in zip(calls, ("model.layers.1.mlp.experts", "the engine has routed experts"), strict=True):
        with pytest.raises(ArtifactError, match=words) as told:
            call()
        assert "--engine transformers" in str(told.value)
        assert "model.layers.0.mlp.experts:" not in str(told.value)


def test_graphs_call_them_as_operations(folders: dict[str, Path]) -> None:
    """torch's own check of an operation's shape function, and a graph without a break that gives the same."""
    weights = opened(folders["mixtral"])
    taken = take_all(weights, "mixtral")
    weights.load()
    qkv, experts = name_matrix("qkv", taken["0.qkv"]), name_experts("experts", taken["0.experts"])
    embedding = name_matrix("qkv", taken["embedding"])
    assert embedding != qkv
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([3, 4, 5, 6, 7])
    index, routing = torch.tensor([[0, 2], [7, 3], [5, 6], [0, 3], [2, 5]], dtype=torch.int32), torch.rand(5, 2)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mc_cli.packed_matrix.default, (hidden, qkv), test_utils=tests)
    torch.library.opcheck(torch.ops.mc_cli.packed_matrix.default, (ids, embedding), test_utils=tests)
    torch.library.opcheck(torch.ops.mc_cli.packed_experts.default, (hidden, index, routing, experts), test_utils=tests)

    def layer(hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        looked_up = multiplied(ids, embedding)
        return multiplied(hidden + looked_up, qkv), through_experts(looked_up, index, routing, experts)

    traced = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        for found, expected in zip(traced(hidden, ids), layer(hidden, ids), strict=True):
            assert torch.equal(found, expected)
    weights, taken = None, None  # type: ignore[assignment]  # names do not keep a model alive
    gc.collect()
    with pytest.raises(KeyError):
        multiplied(hidden, qkv)
