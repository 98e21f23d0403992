"""Shared by every peer's script: a checkpoint's expert weights, and the dense folder that stands for a peer's result.

Needs only torch and safetensors, so that it runs in each peer's own environment.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EXPERT_WEIGHT = re.compile(
    r"\.layers\.(?P<layer>\d+)\..*experts\.(?P<expert>\d+)\.(?P<linear>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$"
)
ATTENTION_WEIGHT = re.compile(r"\.layers\.\d+\.self_attn\.(q|k|v|o)_proj\.weight$")
EMBEDDING_WEIGHT = "model.embed_tokens.weight"
MIXED_UP = 1.5  # squared distance over squared norm; two unrelated matrices have 2
LEAST_S = 0.3  # that a product is timed for
STORED = "stored.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """Counts what a peer stores for all expert weights: `expert_bytes` counts codes, scales, zero points, everything.

    attention_bytes   the same of attention where that is compressed too; None where it is as in the checkpoint
    embedding_bytes   the same of a token embedding that is the head, too
    """

    tool: str
    version: str
    encoding: str
    bits: float
    seed: int | None
    expert_bytes: int
    seconds: float
    notes: str = ""
    attention_bytes: int | None = None
    embedding_bytes: int | None = None


def parser(description: str | None, *, data_free: bool = False) -> argparse.ArgumentParser:
    """The options that all peers' scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True, help="checkpoint folder with unfused experts")
    made.add_argument("--out", type=Path, required=True, help="dense folder to make")
    if not data_free:
        made.add_argument("--tokens", type=Path, required=True, help="what calibration_tokens.py wrote")
    return made


def read_tokens(path: Path) -> tuple[torch.Tensor, int]:
    """(token ids [sequences, length] int64, the seed that they were drawn by)."""
    content = load_file(path)
    return content["token_ids"], int(content["seed"])


def read_weights(model: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def read_experts(model: Path) -> dict[str, torch.Tensor]:
    """The expert weights [out_features, in_features] by name. Raises ValueError where there are none."""
    experts = {name: tensor for name, tensor in read_weights(model).items() if EXPERT_WEIGHT.search(name)}
    if not experts:
        raise ValueError(f"{model}: no unfused expert weights in the checkpoint")
    return experts


def write_dense(model: Path, out: Path, replaced: Mapping[str, torch.Tensor], stored: Stored) -> None:
    """Writes `out`: the checkpoint with `replaced` in place of its expert weights, and stored.json.

    replaced   every expert weight as float32, in the checkpoint's names: what the peer's stored codes stand for; and
               every matrix of attention, and the embedding, where `stored` counts them
    All other tensors stay as they are. Raises ValueError where a weight is missing, misshapen, not finite or still the
    original: a peer that passes over experts without a word must not be measured as lossless.
    """
    tensors = read_weights(model)
    experts = read_experts(model)
    wanted = dict(experts)
    if stored.attention_bytes is not None:
        wanted |= {name: tensor for name, tensor in tensors.items() if ATTENTION_WEIGHT.search(name)}
    if stored.embedding_bytes is not None:
        wanted[EMBEDDING_WEIGHT] = tensors[EMBEDDING_WEIGHT]
    faults = [f"{name}: not quantized" for name in sorted(wanted.keys() - replaced.keys())]
    faults += [f"{name}: not to be quantized" for name in sorted(replaced.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & replaced.keys()):
        original, other = wanted[name].float(), replaced[name].float()
        if other.shape != original.shape:
            faults.append(f"{name}: shape {tuple(other.shape)}, expected {tuple(original.shape)}")
        elif not other.isfinite().all():
            faults.append(f"{name}: not finite")
        elif torch.equal(other, original):
            faults.append(f"{name}: unchanged")
        elif (other - original).square().sum() > MIXED_UP * original.square().sum():
            faults.append(f"{name}: not near the original; are names or layout mixed up?")
    if faults:
        raise ValueError("\n  ".join([f"{len(faults)} weights at fault:", *faults[:10]]))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            (out / file.name).write_bytes(file.read_bytes())
    tensors |= {name: tensor.float().contiguous() for name, tensor in replaced.items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    parameters = sum(tensor.numel() for tensor in experts.values())
    error = sum(float((replaced[name].float() - experts[name].float()).square().sum()) for name in experts)
    energy = sum(float(tensor.float().square().sum()) for tensor in experts.values())
    content = {
        **stored.__dict__,
        "expert_parameters": parameters,
        "stored_bits": 8 * stored.expert_bytes / parameters,
        "relative_error": error / energy,
        "command": shlex.join(Path(word).name if "/" in word else word for word in sys.argv),  # not where things lie
    }
    (out / STORED).write_text(json.dumps(content, indent=1) + "\n")
    print(f"{out}: {stored.encoding}, {content['stored_bits']:.4f} stored bits, {stored.seconds:.0f} s")


def seconds_per_call(call: Callable[[], object]) -> float:
    """Mean over calls one after the other for LEAST_S seconds, after one that does not count."""
    call()
    begun, runs = time.perf_counter(), 0
    while time.perf_counter() - begun < LEAST_S:
        call()
        runs += 1
    return (time.perf_counter() - begun) / runs


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._started, 1)
