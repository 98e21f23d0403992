"""Tiny random checkpoints of every contract-tested family, written offline in the families' own disk layout.

Matrices have std 0.15 so that routing is far from uniform, and norms and biases differ from their usual ones and zeros,
so that a tensor that is dropped or swapped shows in the logits. Widths of 24 and 48 exercise group sizes that are not
powers of two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 320

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LOCAL = {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2}

# Entries of each family's config beyond _BASE. None of it relies on a default that a release could change.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _MLA,
    "olmoe": {"hidden_size": 48, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "gpt_oss": {
        **_LOCAL,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "phimoe": _LOCAL,
    "granitemoe": _LOCAL,
    "jamba": {
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "glm4_moe": {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
    "minimax": {
        **_LOCAL,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
    },
    "hunyuan_v1_moe": {"head_dim": 8, "intermediate_size": 48, "num_experts": 8, "moe_topk": 2},
    # Not contract-tested: the dense model that must be refused, and families that prove the interface alone suffices.
    "llama": {"intermediate_size": 48},
    "flex_olmo": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "dots1": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "layer_types": ["full_attention", "full_attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "gemma4_text": {
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "sliding_window": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    # Uses the interface, but its layers hand the tokens that attention selects on to the layers after them.
    "glm_moe_dsa": {**_MLA, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8, "n_group": 1},
    # Mixtures of Experts that do not use transformers' experts interface.
    "llama4_text": {
        **_LOCAL,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "attention_chunk_size": 64,
    },
    "jetmoe": {**_LOCAL, "kv_channels": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
}


def tiny_config(model_type: str, **config_changes: Any) -> Any:
    """The tiny configuration of a family; config_changes override it, e.g. tie_word_embeddings=True."""
    from transformers import CONFIG_MAPPING

    base = {} if model_type == "dbrx" else _BASE
    return CONFIG_MAPPING[model_type](**{**base, **CONFIGS[model_type], **config_changes})


def build_tiny(
    model_type: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config_changes: Any
) -> Path:
    """Writes a random checkpoint of the family and a tokenizer into `folder`, and returns the folder."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **config_changes)
    torch.manual_seed(seed)
    return save_tiny(AutoModelForCausalLM.from_config(config, dtype=dtype), folder)


def save_tiny(model: Any, folder: Path) -> Path:
    """Gives a model random weights and writes it and a tokenizer into `folder`, which is returned."""
    _randomise(model.eval())
    for pattern in model._keep_in_fp32_modules_strict or ():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if pattern in name:
                tensor.data = tensor.data.float()
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)


def tiny_tokenizer(folder: Path) -> Path:
    """Writes a byte-level BPE tokenizer that can encode every text in at most 300 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["hello world the cat sat on a mat while the rain fell on the hills"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    tokenizer.save_pretrained(folder)
    return folder


def copy_without_weights(source: Path, folder: Path) -> Path:
    """Copies everything but the weights and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy2(path, folder / path.name)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their key on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def with_tensors(source: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of the checkpoint `source` that holds `tensors` instead of its own."""
    copy_without_weights(source, folder)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def with_copied_experts(source: Path, folder: Path, originals: Mapping[int, int]) -> Path:
    """A copy of a mixtral checkpoint in which experts of every layer are another one (expert -> whose copy it is)."""
    tensors = read_tensors(source)
    for name in list(tensors):
        for copy, original in originals.items():
            if f".experts.{original}." in name:
                tensors[name.replace(f".experts.{original}.", f".experts.{copy}.")] = tensors[name].clone()
    return with_tensors(source, folder, tensors)


def with_own_code(source: Path, folder: Path) -> Path:
    """A mixtral checkpoint as one that brings its own classes: float32 tensors, under module-tree names."""
    from transformers import AutoModelForCausalLM

    with_tensors(source, folder, AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict())
    code = {
        "configuration_own": "from transformers import MixtralConfig\n\n"
        "class OwnConfig(MixtralConfig):\n    model_type = 'own_moe'\n",
        "modeling_own": "from transformers import MixtralForCausalLM\nfrom .configuration_own import OwnConfig\n\n"
        "class OwnForCausalLM(MixtralForCausalLM):\n    config_class = OwnConfig\n",
    }
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    with_config(folder, model_type="own_moe", architectures=["OwnForCausalLM"], auto_map=classes)
    return folder


def with_config(folder: Path, **changes: Any) -> Path:
    """Changes entries of config.json in place; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return folder


def shard(source: Path, folder: Path, *, shards: int = 3) -> Path:
    """A copy of a checkpoint in several files with an index; a layer's tensors are spread over all of them."""
    copy_without_weights(source, folder)
    tensors = read_tensors(source)
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    weight_map = {key: names[position % shards] for position, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key, file in weight_map.items() if file == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def to_fp8(source: Path, folder: Path, *, block: int = 16) -> Path:
    """A copy in the FP8 disk format of DeepSeek-V3: square blocks with an inverse scale each, ragged at the edges."""
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(source).items():
        if not key.endswith("_proj.weight") and "kv_a_proj_with_mqa" not in key and "_b_proj" not in key:
            tensors[key] = tensor
            continue
        rows, columns = tensor.shape
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-rows // block), -(-columns // block))
        for row in range(0, rows, block):
            for column in range(0, columns, block):
                tile = tensor[row : row + block, column : column + block].float()
                scale = tile.abs().amax() / 448.0
                scales[row // block, column // block] = scale
                codes[row : row + block, column : column + block] = (tile / scale).to(torch.float8_e4m3fn)
        tensors[key] = codes
        tensors[f"{key}_scale_inv"] = scales
    with_tensors(source, folder, tensors)
    return with_config(
        folder,
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [block, block],
        },
    )


def to_mxfp4(source: Path, folder: Path, *, seed: int = 0) -> Path:
    """A copy in the MXFP4 disk format of gpt-oss, with random codes and exponents for the experts.

    Blocks are [experts, out_features, groups, 16] bytes of two 4-bit codes, low nibble first; scales are the exponents
    [experts, out_features, groups] with a bias of 127. The widths must be multiples of 32.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(source).items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[key] = tensor
            continue
        experts, in_features, out_features = tensor.shape
        shape = (experts, out_features, in_features // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
    with_tensors(source, folder, tensors)
    return with_config(
        folder,
        quantization_config={
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    )
