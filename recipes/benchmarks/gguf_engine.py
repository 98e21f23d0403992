"""An export for llama.cpp in llama.cpp: loss and logits beside transformers', its dequantizer, its token ids.

    python recipes/benchmarks/gguf_engine.py MODEL EXPORT --heldout text.jsonl [--windows 16] [--lines 10000]

MODEL   the original checkpoint, for its tokenizer;  EXPORT  a directory of `mc-cli export --format gguf`
Both engines get the same windows. llama.cpp runs on one thread with keys and values in float32; it rounds the inputs of
every product with blocks to 8 bits, which is the difference to be expected. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch
from heldout_windows import windows
from torch import Tensor
from transformers import AutoTokenizer

from mc_cli.exporters.gguf import FILE
from mc_cli.exporters.gguf import open as open_gguf
from mc_cli.measuring.logit_source import Reading
from mc_cli.numerics.gguf_bytes import unpack, values
from mc_cli.numerics.gguf_types import TYPES


class _Traits(ctypes.Structure):
    """`ggml_type_traits` of ggml.h, as far as it is needed."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def decoded_by_llama_cpp(codes: Tensor, number: int, count: int) -> Tensor:
    """float32 [count]: bytes of blocks of the type `number`, by the function of llama.cpp itself."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    found = torch.empty(count)
    library.ggml_get_type_traits(number).contents.to_float(codes.data_ptr(), found.data_ptr(), count)
    return found


def dequantizers(path: Path) -> dict[str, int]:
    """How many matrices llama.cpp, the package `gguf` and mc-cli decode to the same bits, and how many not."""
    kinds = {kind.number: kind for kind in TYPES.values()}
    same = {"matrices": 0, "other in llama.cpp": 0, "other in gguf": 0}
    for tensor in gguf.GGUFReader(path).tensors:
        kind = kinds.get(int(tensor.tensor_type))
        if kind is None:
            continue
        codes = torch.tensor(tensor.data)
        ours = values(kind, unpack(kind, codes)).flatten()
        theirs = decoded_by_llama_cpp(codes.contiguous(), kind.number, ours.numel())
        package = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).flatten()
        same["matrices"] += 1
        same["other in llama.cpp"] += not torch.equal(ours, theirs)
        same["other in gguf"] += not torch.equal(ours, package)
    return same


def token_ids(path: Path, tokenizer: Any, files: list[Path], count: int) -> dict[str, int]:
    """How many of the first `count` lines that are not empty llama.cpp cuts into other tokens than transformers."""
    documents = (json.loads(line)["text"] for file in files for line in file.read_text("utf-8").split("\n") if line)
    lines = [line for text in documents for line in text.split("\n") if line.strip()][:count]
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    other = 0
    for line in lines:
        found = engine.tokenize(line.encode(), add_bos=False, special=True)
        other += found != tokenizer(line, add_special_tokens=False)["input_ids"]
    return {"lines": len(lines), "other": other}


def losses(path: Path, ours: Any, tokens: Tensor) -> dict[str, float]:
    """Loss of both engines in nats per token, KL from ours to llama.cpp's, tokens with the same first choice."""
    engine = llama_cpp.Llama(
        str(path),
        n_ctx=tokens.shape[1],
        n_batch=tokens.shape[1],
        logits_all=True,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    pairs, divergence, same = [], [], []
    for row in tokens:
        engine.reset()
        engine.eval(row.tolist())
        theirs = torch.from_numpy(engine.scores[: len(row)].copy()).log_softmax(-1)[:-1]
        with torch.no_grad():
            mine = ours(row[None], use_cache=False).logits[0].float().log_softmax(-1)[:-1]
        pairs.append(torch.stack([-each.gather(1, row[1:, None])[:, 0] for each in (mine, theirs)]))
        divergence.append((mine.exp() * (mine - theirs)).sum(-1))
        same.append((mine.argmax(-1) == theirs.argmax(-1)).float())
    mine, theirs = torch.cat(pairs, 1)
    return {
        "tokens": mine.numel(),
        "loss": float(mine.mean()),
        "loss in llama.cpp": float(theirs.mean()),
        "perplexity": math.exp(float(mine.mean())),
        "perplexity in llama.cpp": math.exp(float(theirs.mean())),
        "standard error of the difference of losses": float((mine - theirs).std() / math.sqrt(mine.numel())),
        "kl": float(torch.cat(divergence).mean()),
        "same top token": float(torch.cat(same).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--more-lines", type=Path, help="JSON lines to take further lines from for token ids")
    parser.add_argument("--tokens-alone", action="store_true", help="compare token ids and nothing else")
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    path = asked.export / FILE
    files = sorted(asked.heldout.glob("*.jsonl")) if asked.heldout.is_dir() else [asked.heldout]
    of_tokens = [*files, asked.more_lines] if asked.more_lines else files
    if asked.tokens_alone:
        return print(json.dumps({"token ids": token_ids(path, tokenizer, of_tokens, asked.lines)}))
    ours: Any = open_gguf(asked.export, Reading(torch.float32, torch.device("cpu")))
    result = {
        "dequantizers": dequantizers(path),
        "token ids": token_ids(path, tokenizer, of_tokens, asked.lines),
        "losses": losses(path, ours.model, windows(asked.heldout, tokenizer, asked.windows, asked.length)),
    }
    return print(json.dumps(result))


if __name__ == "__main__":
    main()
