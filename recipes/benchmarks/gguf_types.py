"""Experts in one GGUF type, rounded by mc-cli and by llama.cpp with its importance matrix: KL on held-out text.

    python recipes/benchmarks/gguf_types.py MODEL EXPORT... --calibration text.jsonl --heldout text.jsonl [--windows 16]

MODEL   the original checkpoint;  EXPORT  directories of `mc-cli export --format gguf`, each with experts of one type
llama.cpp's rounding is that of its own library, through llama-cpp-python; the importance matrix are the mean squares of
inputs over the calibration text, as its own tool takes them. Both models get the same tensors beside the experts.
Prints one JSON object for each export.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as engine
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mc_cli.exporters.gguf import FILE, _Reader, write_gguf
from mc_cli.exporters.gguf_architectures import architecture_of
from mc_cli.exporters.gguf_names import Names
from mc_cli.measuring.logit_source import Reading

# Types of llama.cpp's presets that `pure` gives to all tensors.
PRESETS = {
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ3_XXS": 23,
    "IQ3_S": 26,
    "IQ2_S": 28,
    "IQ4_XS": 30,
}


def windows(path: Path, tokenizer: Any, count: int, length: int) -> Tensor:
    """int64 [count, length] of evenly spaced runs of the texts, laid end to end."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    texts = [json.loads(line)["text"] for file in files for line in file.read_text("utf-8").split("\n") if line]
    ids = torch.tensor(tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.stack([ids[start : start + length] for start in starts])


class Importance:
    """Mean squares of the inputs of every matrix, by GGUF's tensor names; of experts one row each."""

    def __init__(self, model: Any, names: Names) -> None:
        self.sums: dict[str, Tensor] = {}
        self._handles = []
        for path, module in model.named_modules():
            if hasattr(module, "gate_up_proj"):
                place = [*names.place(f"{path}.gate_up_proj").names, *names.place(f"{path}.down_proj").names]
                self._handles.append(module.register_forward_pre_hook(self._experts(place)))
            elif isinstance(module, torch.nn.Linear) and not path.endswith("lm_head"):
                self._handles.append(
                    module.register_forward_pre_hook(self._linear(names.place(f"{path}.weight").names))
                )

    def _add(self, names: tuple[str, ...] | list[str], row: int, rows: int, inputs: Tensor) -> None:
        for name in names:
            found = self.sums.setdefault(name, torch.zeros(rows, inputs.shape[-1]))
            found[row] += inputs.square().mean(0) * (len(inputs) > 0)

    def _linear(self, names: tuple[str, ...]) -> Any:
        return lambda module, args: self._add(names, 0, 1, args[0].reshape(-1, args[0].shape[-1]).float())

    def _experts(self, names: list[str]) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            hidden, index = args[0].reshape(-1, args[0].shape[-1]).float(), args[1]
            for expert in range(len(module.gate_up_proj)):
                inputs = hidden[(index == expert).any(-1)]
                if len(inputs):
                    self._add(names[:2], expert, len(module.gate_up_proj), inputs)
                    gate, up = (inputs @ module.gate_up_proj[expert].float().T).chunk(2, -1)
                    down = torch.nn.functional.silu(gate) * up
                    self._add(names[2:], expert, len(module.gate_up_proj), down)

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def quantized_by_llama_cpp(source: Path, target: Path, preset: int, importance: dict[str, Tensor]) -> None:
    """Writes `target`, every matrix in the preset's type. Raises RuntimeError where llama.cpp refuses."""
    kept = [(name.encode(), tensor.flatten().contiguous()) for name, tensor in importance.items()]
    entries = (engine.llama_model_imatrix_data * (len(kept) + 1))()
    for entry, (name, values) in zip(entries, kept, strict=False):
        entry.name, entry.size = name, values.numel()
        entry.data = ctypes.cast(values.data_ptr(), type(entry.data))
    params = engine.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = 1, preset, True
    params.token_embedding_type = gguf.GGMLQuantizationType.Q6_K.value  # not compared, and has no importance
    params.imatrix = ctypes.cast(entries, type(params.imatrix))
    if engine.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp did not quantize {source}")


@torch.no_grad()
def divergence(expected: list[Tensor], other: Any, tokens: Tensor) -> float:
    """Mean KL of the next-token distributions from `expected`, their logarithms, nats per token."""
    total = 0.0
    for row, wanted in zip(tokens, expected, strict=True):
        found = other(row[None], use_cache=False).logits[0].float().log_softmax(-1)
        total += float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return total / len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path, nargs="+")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    asked = parser.parse_args()
    original: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    names = Names(original.config, architecture_of(original.config))
    collected = Importance(original, names)
    for row in windows(asked.calibration, tokenizer, 48, asked.length):
        with torch.no_grad():
            original(row[None], use_cache=False)
    collected.remove()
    heldout = windows(asked.heldout, tokenizer, asked.windows, asked.length)
    with torch.no_grad():
        expected = [original(row[None], use_cache=False).logits[0].float().log_softmax(-1) for row in heldout]
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder, "dense.gguf")
        tied = set(original.all_tied_weights_keys or ())
        tensors = ((name, tensor, None) for name, tensor in original.state_dict().items() if name not in tied)
        write_gguf(dense, original.config, asked.model, tensors, title="original")
        for export in asked.export:
            print(json.dumps(compared(export, dense, collected.sums, names, expected, heldout)), flush=True)


def compared(
    export: Path, dense: Path, importance: dict[str, Tensor], names: Names, expected: list[Tensor], heldout: Tensor
) -> dict[str, Any]:
    """KL of one export, and of the same model with the experts that llama.cpp rounds to its type."""
    ours = _Reader(export, Reading(torch.float32, torch.device("cpu"))).model
    stored = gguf.GGUFReader(export / FILE).tensors
    kinds = {tensor.tensor_type.name for tensor in stored if "_exps" in tensor.name}
    if len(kinds) != 1:
        raise SystemExit(f"{export}: experts of several types, {', '.join(sorted(kinds))}; one is compared here")
    (kind,) = kinds
    result: dict[str, Any] = {"type": kind, "tokens": heldout.numel(), "ours": divergence(expected, ours, heldout)}
    target = dense.with_name("theirs.gguf")
    quantized_by_llama_cpp(dense, target, PRESETS[kind], importance)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    for name, parameter in ours.named_parameters():
        place = names.place(name)
        if "_exps" in place.names[0]:
            assert {theirs[each].tensor_type.name for each in place.names} == {kind}
            parts = [torch.tensor(gguf.dequantize(theirs[each].data, theirs[each].tensor_type)) for each in place.names]
            parameter.data = place.joined(parts).reshape(parameter.shape)
    result["llama.cpp"] = divergence(expected, ours, heldout)
    result["ratio"] = result["ours"] / result["llama.cpp"]
    return result


if __name__ == "__main__":
    main()
