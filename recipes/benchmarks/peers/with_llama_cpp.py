"""Expert weights through llama.cpp: GGUF, importance matrix, llama-quantize; read back with the `gguf` package.

    python with_llama_cpp.py --bin BUILD/bin --model DIR --tokens tokens.safetensors --type IQ2_XS --out DIR

One type for all expert tensors (--tensor-type), or with --mix what llama-quantize itself chooses for a file type, such
as Q2_K or IQ2_M: most of its names are mixes of tensor types. The importance matrix is llama-imatrix's own, over
exactly the given windows: the GGUF gets a vocabulary in which token 17 is spelled "0017", so the text that
llama-imatrix reads is the token ids themselves, and its chunks are our windows. (llama.cpp's conversion script is not
used: it must know the tokenizer.) Only the expert tensors of the result are taken. llama.cpp itself also rounds
activations to 8 bits when it runs them; that is left out here, in its favour.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy
import torch
from experts import (
    EMBEDDING_WEIGHT,
    EXPERT_WEIGHT,
    Stopwatch,
    Stored,
    parser,
    read_experts,
    read_tokens,
    read_weights,
    write_dense,
)

PROJECTIONS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
DIGITS = 4
BASE_TYPE = "Q8_0"  # of the tensors that are not taken; their type decides nothing


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--bin", type=Path, required=True, help="folder of llama-quantize and llama-imatrix")
    arguments.add_argument("--type", required=True, help="IQ1_S to Q8_0")
    arguments.add_argument("--mix", action="store_true", help="the file type's own mix instead of one tensor type")
    arguments.add_argument(
        "--whole", action="store_true", help="all matrices, by the file type's own mix; the model's head is tied"
    )
    arguments.add_argument("--work-dir", type=Path, default=Path("runs/peers/gguf"), help="GGUF and importance files")
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    tokens, seed = read_tokens(given.tokens)
    given.work_dir.mkdir(parents=True, exist_ok=True)
    plain = given.work_dir / ("tied.gguf" if given.whole else "plain.gguf")
    if not plain.exists():
        write_gguf(given.model, plain, tied=given.whole)
    watch = Stopwatch()
    importance = given.work_dir / f"importance-{plain.stem}{seed}.gguf"
    if not importance.exists():
        measure_importance(given.bin, plain, tokens, importance, given.threads)
    coded = given.work_dir / "coded.gguf"
    chosen = (
        [given.type] if given.mix else ["--tensor-type", f"ffn_(gate|up|down)_exps={given.type.lower()}", BASE_TYPE]
    )
    if given.whole:
        chosen = [given.type]
    options, kind = chosen[:-1], chosen[-1]
    call(given.bin / "llama-quantize", "--imatrix", importance, *options, plain, coded, kind, given.threads)
    replaced, types, size = read_back(given.model, coded)
    attention_bytes = embedding_bytes = None
    if given.whole:
        attention, attention_types, attention_bytes = read_attention(given.model, coded)
        embedding, embedding_type, embedding_bytes = read_tensor(coded, "token_embd.weight")
        replaced |= attention | {EMBEDDING_WEIGHT: embedding}
        types |= attention_types | {"token_embd.weight": embedding_type}
    if not (given.mix or given.whole) and set(types.values()) != {given.type}:
        raise ValueError(f"asked for {given.type}, got {types}")
    stored = Stored(
        tool="llama.cpp",
        version=version(given.bin),
        encoding=f"{given.type}{' mix' if given.mix else ''}, imatrix{', whole' if given.whole else ''}",
        bits=8 * size / sum(tensor.numel() for name, tensor in replaced.items() if EXPERT_WEIGHT.search(name)),
        seed=seed,
        expert_bytes=size,
        seconds=watch.seconds,
        notes=json.dumps({name: list(types.values()).count(name) for name in sorted(set(types.values()))}),
        attention_bytes=attention_bytes,
        embedding_bytes=embedding_bytes,
    )
    write_dense(given.model, given.out, replaced, stored)
    coded.unlink()


def call(program: Path, *arguments: object) -> str:
    """Standard output and error. Raises CalledProcessError after printing them."""
    done = subprocess.run(
        [str(program), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        print(done.stdout[-4000:])
        done.check_returncode()
    return done.stdout


def version(folder: Path) -> str:
    lines = [line for line in call(folder / "llama-imatrix", "--version").splitlines() if line.startswith("version")]
    return lines[0].removeprefix("version:").strip() if lines else "unknown"


def measure_importance(folder: Path, model: Path, tokens: torch.Tensor, out: Path, threads: int) -> None:
    """Runs llama-imatrix over the windows, one chunk each, and keeps its log (with its perplexity) beside `out`."""
    spelled = out.with_suffix(".txt")
    spelled.write_text("".join(f"{token:0{DIGITS}d}" for token in tokens.flatten().tolist()))
    length = tokens.shape[1]
    options = ["-m", model, "-f", spelled, "-o", out, "-c", length, "-b", length, "-ub", length, "-t", threads]
    log = call(folder / "llama-imatrix", *options, "-ngl", 0)
    if f"computing over {len(tokens)} chunks" not in log:
        raise ValueError(f"llama-imatrix did not read {len(tokens)} windows of {length} tokens:\n{log[-2000:]}")
    out.with_suffix(".log").write_text(log)


def write_gguf(model: Path, out: Path, *, tied: bool) -> None:
    """Writes a Mixtral checkpoint as float32 GGUF. Raises ValueError for other families.

    tied   without a head of its own, which llama.cpp then takes from the embedding
    """
    config = json.loads((model / "config.json").read_text())
    if tied and not config.get("tie_word_embeddings"):
        raise ValueError(f"{model}: its head is not tied to its embedding; --whole takes tied models only")
    if config["model_type"] != "mixtral":
        raise ValueError(f"model_type {config['model_type']}: this script writes Mixtral's GGUF only")
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    # Longest match over the vocabulary, no merges, no special tokens: fixed-width words come out as they are.
    if config["vocab_size"] > 10**DIGITS:
        raise ValueError(f"vocabulary of {config['vocab_size']}: token ids need more than {DIGITS} digits")
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"{token:0{DIGITS}d}" for token in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    for name, tensor in gguf_tensors(read_weights(model), config["num_hidden_layers"], heads, key_heads).items():
        if not (tied and name == "output.weight"):
            writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(
    tensors: Mapping[str, torch.Tensor], layers: int, heads: int, key_heads: int
) -> dict[str, torch.Tensor]:
    """Tensors under their names in a GGUF; queries and keys in the order of its interleaved rotary embedding."""
    embedding = tensors["model.embed_tokens.weight"]
    found = {
        "token_embd.weight": embedding,
        "output_norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors.get("lm_head.weight", embedding),
    }
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        attention = {name: tensors[f"{ours}self_attn.{name}_proj.weight"] for name in "qkvo"}
        found[f"{theirs}attn_norm.weight"] = tensors[f"{ours}input_layernorm.weight"]
        found[f"{theirs}attn_q.weight"] = interleaved(attention["q"], heads)
        found[f"{theirs}attn_k.weight"] = interleaved(attention["k"], key_heads)
        found[f"{theirs}attn_v.weight"] = attention["v"]
        found[f"{theirs}attn_output.weight"] = attention["o"]
        found[f"{theirs}ffn_norm.weight"] = tensors[f"{ours}post_attention_layernorm.weight"]
        found[f"{theirs}ffn_gate_inp.weight"] = tensors[f"{ours}block_sparse_moe.gate.weight"]
        for linear, name in PROJECTIONS.items():
            prefix = f"{ours}block_sparse_moe.experts."
            count = sum(key.startswith(prefix) and key.endswith(f".{linear}.weight") for key in tensors)
            stacked = [tensors[f"{prefix}{expert}.{linear}.weight"] for expert in range(count)]
            found[f"{theirs}{name}.weight"] = torch.stack(stacked)
    return found


def read_attention(model: Path, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], int]:
    """Like `read_back`, for the matrices of attention."""
    config = json.loads((model / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    fields = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    replaced, types, size = {}, {}, 0
    for layer in range(config["num_hidden_layers"]):
        for name, key in ATTENTION.items():
            tensor = fields[f"blk.{layer}.{key}.weight"]
            weight = dequantized(tensor)
            if name in heads:
                weight = halved(weight, heads[name])
            replaced[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = weight
            types[tensor.name] = tensor.tensor_type.name
            size += tensor.n_bytes
    return replaced, types, size


def read_tensor(path: Path, name: str) -> tuple[torch.Tensor, str, int]:
    """(weight as its codes stand for, its type, its bytes) of one tensor of a GGUF."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return dequantized(tensor), tensor.tensor_type.name, tensor.n_bytes


def dequantized(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """Decodes a GGUF's tensor to float32."""
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32))


def halved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleaved`."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head [two halves] as pairs: rotary partners beside each other."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def read_back(model: Path, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], int]:
    """(expert weights as their codes stand for, the type of each expert tensor, bytes of all expert tensors)."""
    fields = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    replaced: dict[str, torch.Tensor] = {}
    types: dict[str, str] = {}
    decoded: dict[str, torch.Tensor] = {}
    size = 0
    for name in read_experts(model):
        place = EXPERT_WEIGHT.search(name)
        assert place is not None
        key = f"blk.{place['layer']}.{PROJECTIONS[place['linear']]}.weight"
        if key not in decoded:
            tensor = fields[key]
            decoded[key] = dequantized(tensor)
            types[key] = tensor.tensor_type.name
            size += tensor.n_bytes
        replaced[name] = decoded[key][int(place["expert"])]
    return replaced, types, size


if __name__ == "__main__":
    main()
