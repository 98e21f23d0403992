"""Experts in GGUF's types, rounded by mc-cli and by llama.cpp with its importance matrix: KL on held-out text.

    mc-cli calibrate -w W0 --model MODEL --data calibration.jsonl --seed 0
    mc-cli score -w W0 --for llama.cpp --bits 1.5625,1.75,2,2.0625,2.3125,2.5625,3,3.0625,3.4375,4,4.25
    python recipes/benchmarks/gguf_types.py W0 W1 W2 --heldout validation [--types IQ2_XXS Q2_K ...] [--mixed 2.56 3.06]

W0 W1 W2  work directories, one for each seed, with calibration and scores of all types for llama.cpp
llama.cpp's rounding is that of its own library, through llama-cpp-python; its importance matrix are the mean squares of
inputs over the tokens that mc-cli was calibrated on, as its own tool takes them. Beside the experts, which are measured
alone, both models keep the original's tensors. A mixed plan is compared with the best of llama.cpp's types that takes
no more bits.
Prints one JSON object for each result.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as engine
import torch
from heldout_windows import windows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mc_cli.exporters.gguf import FILE, _Reader, write_gguf
from mc_cli.exporters.gguf_architectures import architecture_of
from mc_cli.exporters.gguf_names import Names
from mc_cli.measuring.logit_source import Reading
from mc_cli.numerics.divergence import divergence
from mc_cli.numerics.gguf_types import TYPES, GgufType

# Types of llama.cpp's presets that `pure` gives to all tensors.
PRESETS = {
    "IQ1_S": 24,
    "IQ1_M": 31,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ3_XXS": 23,
    "IQ3_S": 26,
    "IQ2_S": 29,  # named IQ2_M; 28, named IQ2_S, gives IQ2_XS
    "IQ4_XS": 30,
}

# Flags of allocate that keep what is not an expert, so that experts alone make the difference.
EXPERTS_ALONE = tuple(
    part for role in ("attention", "shared", "dense", "head", "embedding") for part in (f"--{role}-bits", "16")
)


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
def mean_divergence(expected: list[Tensor], other: Any, tokens: Tensor) -> float:
    """Mean KL of the next-token distributions from `expected`, their logarithms, nats per token."""
    total = 0.0
    for row, wanted in zip(tokens, expected, strict=True):
        found = other(row[None], use_cache=False).logits[0].float().log_softmax(-1)
        total += float(divergence(wanted, found).mean())
    return total / len(tokens)


class Beside:
    """Results over one calibration, each beside what llama.cpp makes of the same model and tokens."""

    def __init__(self, work: Path, heldout: Path, count: int, folder: Path) -> None:
        calibration = json.loads((work / "calibration" / "manifest.json").read_text("utf-8"))
        self.work, self.folder = work, folder
        self.seed = calibration["settings"]["seed"]
        model = Path(json.loads((work / "model.json").read_text("utf-8"))["folder"])
        original: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.names = Names(original.config, architecture_of(original.config))
        seen = load_file(work / "calibration" / "tokens.safetensors")["token_ids"]
        collected = Importance(original, self.names)
        with torch.no_grad():
            for row in seen.split(8):
                original(row, use_cache=False)
        collected.remove()
        self.importance = collected.sums
        self.tokens = torch.tensor(windows(heldout, AutoTokenizer.from_pretrained(model), count, seen.shape[1]))
        with torch.no_grad():
            self.expected = [
                original(row[None], use_cache=False).logits[0].float().log_softmax(-1) for row in self.tokens
            ]
        self.dense = folder / "dense.gguf"
        tied = set(original.all_tied_weights_keys or ())
        tensors = ((name, tensor, None) for name, tensor in original.state_dict().items() if name not in tied)
        write_gguf(self.dense, original.config, model, tensors, title="original")
        self.theirs: dict[str, float] = {}

    def made(self, variant: str, *allocate: str) -> Path:
        """The export of a plan that `allocate` makes with these flags."""
        out = self.folder / variant
        here = ("-w", str(self.work), "--variant", variant)
        for stage in (
            ("allocate", *here, "--for", "llama.cpp", *allocate, *EXPERTS_ALONE, "--force"),
            ("quantize", *here),
            ("export", *here, "--format", "gguf", "--out", str(out)),
        ):
            subprocess.run([sys.executable, "-m", "mc_cli", *stage], check=True, stdout=sys.stderr)
        return out

    def one_type(self, kind: GgufType) -> dict[str, Any]:
        """KL with all experts in one type, rounded by either."""
        stored = kind.size_bytes * 8 / kind.block
        asked = ("--method", "uniform", "--target-stored-bits", str(stored), "--bits", str(kind.bits))
        export = self.made(f"type-{kind.name.replace('_', '-')}", *asked)
        ours = _Reader(export, Reading(torch.float32, torch.device("cpu"))).model
        found = {tensor.tensor_type.name for tensor in gguf.GGUFReader(export / FILE).tensors if "_exps" in tensor.name}
        assert found == {kind.label}, f"{export}: experts in {found}"
        result = self._row(kind.label, stored, mean_divergence(self.expected, ours, self.tokens))
        self.theirs[kind.label] = self._rounded_by_llama_cpp(kind.label, ours)
        return self._beside(result, kind.label)

    def mixed(self, bits: float) -> dict[str, Any]:
        """KL of a plan with a type for each layer and projection, beside the best of the types measured before."""
        export = self.made(f"mixed-{bits:g}", "--target-stored-bits", str(bits))
        ours = _Reader(export, Reading(torch.float32, torch.device("cpu"))).model
        experts = [tensor for tensor in gguf.GGUFReader(export / FILE).tensors if "_exps" in tensor.name]
        stored = sum(int(tensor.n_bytes) for tensor in experts) * 8 / sum(int(tensor.n_elements) for tensor in experts)
        result = self._row("mixed", stored, mean_divergence(self.expected, ours, self.tokens))
        sizes = {kind.label: kind.size_bytes * 8 / kind.block for kind in TYPES.values()}
        fitting = [name for name in self.theirs if sizes[name] <= bits + 1e-9]
        return self._beside(result, min(fitting, key=lambda name: self.theirs[name])) if fitting else result

    def _row(self, name: str, stored: float, ours: float) -> dict[str, Any]:
        return {"seed": self.seed, "experts": name, "stored bits": round(stored, 4), "ours": ours}

    def _beside(self, result: dict[str, Any], theirs: str) -> dict[str, Any]:
        other = self.theirs[theirs]
        return result | {"beside": theirs, "llama.cpp": other, "ratio": result["ours"] / other}

    def _rounded_by_llama_cpp(self, kind: str, model: Any) -> float:
        """KL of `model` with the experts that llama.cpp rounds to this type in place of its own."""
        target = self.folder / "theirs.gguf"
        quantized_by_llama_cpp(self.dense, target, PRESETS[kind], self.importance)
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
        for name, parameter in model.named_parameters():
            place = self.names.place(name)
            if "_exps" in place.names[0]:
                assert {theirs[each].tensor_type.name for each in place.names} == {kind}
                parts = [
                    torch.tensor(gguf.dequantize(theirs[each].data, theirs[each].tensor_type)) for each in place.names
                ]
                parameter.data = place.joined(parts).reshape(parameter.shape)
        return mean_divergence(self.expected, model, self.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="+")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--types", nargs="*", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--mixed", nargs="*", type=float, default=[])
    asked = parser.parse_args()
    for work in asked.work:
        with tempfile.TemporaryDirectory() as folder:
            beside = Beside(work, asked.heldout, asked.windows, Path(folder))
            for name in asked.types:
                print(json.dumps(beside.one_type(TYPES[name.lower()])), flush=True)
            for bits in asked.mixed:
                print(json.dumps(beside.mixed(bits)), flush=True)


if __name__ == "__main__":
    main()
