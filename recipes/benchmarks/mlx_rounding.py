"""MLX exports beside mlx-lm's own rounding at the same widths and bytes: KL and loss on held-out text, in MLX itself.

    python recipes/benchmarks/mlx_rounding.py MODEL EXPORT... --heldout DIR [--windows 16] [--length 256]

MODEL   the original checkpoint;  EXPORT  directories of `mc-cli export --format mlx`
mlx-lm's rounding is `mlx.nn.quantize`, which `mlx_lm.convert` calls, with the bits and group size of every path of the
export, so that both hold the same tensors of the same bytes. Computed in float32. Run it where mlx-lm and mc-cli are
installed (`make test-engine-mlx` makes such an environment). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from heldout_windows import windows
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from transformers import AutoTokenizer


def log_probabilities(model: Any, rows: mx.array) -> mx.array:
    """float32 [rows, length - 1, vocabulary] of the next token; rows are [rows, length] token ids."""
    logits = mx.concatenate([model(row[None])[:, :-1].astype(mx.float32) for row in rows])
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    return found


def compared(found: mx.array, original: mx.array, rows: mx.array) -> dict[str, float]:
    """Mean KL of the original from it, loss, and share of the same top token."""
    kl = (mx.exp(original) * (original - found)).sum(-1).mean()
    loss = -mx.take_along_axis(found, rows[:, 1:, None], axis=-1).mean()
    same = (found.argmax(-1) == original.argmax(-1)).astype(mx.float32).mean()
    return {"kl": kl.item(), "loss": loss.item(), "same_top_token": same.item()}


def size(model: Any) -> int:
    """Bytes of all its arrays."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def in_float32(model: Any) -> Any:
    """The model with every number in float32: scales and biases are the same numbers there."""
    model.set_dtype(mx.float32)
    return model


def rounded_by_mlx(folder: Path, quantization: dict[str, Any]) -> Any:
    """The original, every path of `quantization` rounded by MLX's own function."""
    model, _ = load_model(folder)
    nn.quantize(model, class_predicate=lambda path, module: quantization.get(path, False))
    return model


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = mx.array(windows(arguments.heldout, tokenizer, arguments.windows, arguments.length))
    original_model = in_float32(load_model(arguments.model)[0])
    original = log_probabilities(original_model, rows)
    found: dict[str, Any] = {
        "model": arguments.model.name,
        "tokens": rows[:, 1:].size,
        "original_loss": compared(original, original, rows)["loss"],
        "exports": {},
    }
    for folder in arguments.exports:
        quantization = json.loads((folder / "config.json").read_text("utf-8"))["quantization"]
        paths = {path: each for path, each in quantization.items() if isinstance(each, dict)}
        ours, theirs = load_model(folder)[0], rounded_by_mlx(arguments.model, paths)
        sizes = {"bytes": size(ours), "bytes_of_mlx": size(theirs)}
        found["exports"][folder.name] = {
            "expert_bits": sorted({each["bits"] for path, each in paths.items() if "switch_mlp" in path}),
            **sizes,
            "ours": compared(log_probabilities(in_float32(ours), rows), original, rows),
            "mlx": compared(log_probabilities(in_float32(theirs), rows), original, rows),
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    print(json.dumps(run(parser.parse_args()), indent=1))
