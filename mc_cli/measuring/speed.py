"""How fast a model folder loads, reads a prompt and decodes, and what memory that takes; each model in its own process.

python -m mc_cli.measuring.speed '{"folder": ..., "dtype": ..., ...}'     prints one Speed as JSON: what `measure` runs
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mc_cli.artifacts.packed import QUANT_METHOD
from mc_cli.errors import CheckpointError, McError
from mc_cli.measuring.requests import UNTIMED, check_tokens
from mc_cli.models.memory import large_blocks_mapped, peak_memory_bytes, resident_bytes

_READ_BYTES = 512 * 2**20  # larger than most last-level caches
_PROMPT_TOKENS = 256  # where nothing is asked for and the model has as many positions
_FAILED = "mc-cli could not measure: "  # begins the last words of a process that knows why


@dataclass(frozen=True)
class Speed:
    """One model's figures; times in seconds, memory in bytes.

    weight_bytes   of all parameters in memory; `token_bytes` are those that decoding one token reads: of routed experts
                   as many as a token has, of the embedding one row
    base_bytes     resident memory once everything is imported, `peak_bytes` at the end of everything
    tokens_s       every token decoded, one after another
    """

    folder: str
    dtype: str
    threads: int
    load_s: float
    prompt_tokens: int
    prompt_s: float
    tokens_s: tuple[float, ...]
    weight_bytes: int
    token_bytes: int
    base_bytes: int
    peak_bytes: int
    products: str
    last_tokens: tuple[int, ...]

    @property
    def token_s(self) -> float:
        """The median."""
        return statistics.median(self.tokens_s)


def measure(
    folder: Path, *, dtype: str, prompt_tokens: int | None, new_tokens: int, threads: int | None, repeats: int = 3
) -> Speed:
    """Loads the model in a process of its own and lets it read random tokens, then decode greedily.

    prompt_tokens  None: 256, or as many as the model's positions leave
    prompt_s is the fastest of `repeats`. Raises CheckpointError with what stopped the process where it fails.
    """
    wanted = {
        "folder": str(folder),
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": threads,
        "repeats": repeats,
    }
    command = [sys.executable, "-m", "mc_cli.measuring.speed", json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        words = done.stderr.partition(_FAILED)[2].strip() or lines[-1]
        raise CheckpointError(f"Measuring {folder} in {dtype} failed, exit status {done.returncode}: {words}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Speed(**{**found, "tokens_s": tuple(found["tokens_s"]), "last_tokens": tuple(found["last_tokens"])})


def reading_rate(threads: int | None = None, repeats: int = 5) -> float:
    """Bytes per second at which this machine sums a plain array: the best of some tries."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        array = torch.ones(_READ_BYTES // 4)
        times = []
        for _ in range(repeats):
            for way in (array.sum, array.max):
                begun = time.perf_counter()
                way()
                times.append(time.perf_counter() - begun)
        return array.nbytes / min(times)
    finally:
        torch.set_num_threads(before)


@large_blocks_mapped()
def _measured_here(wanted: dict[str, Any]) -> Speed:
    import torch

    from mc_cli.measuring.generation import load_model
    from mc_cli.settings import RunSettings

    torch.set_num_threads(wanted["threads"] or torch.get_num_threads())
    torch.manual_seed(0)
    base_bytes = resident_bytes()
    begun = time.perf_counter()
    network = load_model(Path(wanted["folder"]), RunSettings(device="cpu", dtype=wanted["dtype"]))
    load_s = time.perf_counter() - begun
    config, weights = network.config.get_text_config(), list(_weights(network))
    limit = getattr(config, "max_position_embeddings", None)
    decoded = wanted["new_tokens"] + UNTIMED
    prompt_tokens = wanted["prompt_tokens"] or max(1, min(_PROMPT_TOKENS, (limit or math.inf) - decoded))
    check_tokens(limit, prompt_tokens, wanted["new_tokens"])
    prompt = torch.randint(0, config.vocab_size, (1, prompt_tokens))
    with torch.inference_mode():
        prompt_times = []
        for _ in range(wanted["repeats"]):
            begun = time.perf_counter()
            output = network(prompt, use_cache=True, logits_to_keep=1)
            prompt_times.append(time.perf_counter() - begun)
        times, tokens = [], []
        for _ in range(decoded):
            token = output.logits[:, -1:].argmax(-1)
            tokens.append(int(token))
            begun = time.perf_counter()
            output = network(token, past_key_values=output.past_key_values, use_cache=True)
            times.append(time.perf_counter() - begun)
    return Speed(
        folder=wanted["folder"],
        dtype=str(network.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        load_s=load_s,
        prompt_tokens=prompt_tokens,
        prompt_s=min(prompt_times),
        tokens_s=tuple(times[UNTIMED:]),
        weight_bytes=sum(size for size, _ in weights),
        token_bytes=round(sum(size * share for size, share in weights)),
        base_bytes=base_bytes,
        peak_bytes=peak_memory_bytes(),
        products=_products(network),
        last_tokens=tuple(tokens[-8:]),
    )


def _products(network: Any) -> str:
    """The routines that multiply by the model's weights, in words."""
    from mc_cli.artifacts.packed import encoding_of
    from mc_cli.kernels import path_names

    if getattr(network, "quantization_method", None) != QUANT_METHOD:
        return "torch"
    layout = network.hf_quantizer.quantization_config.layout
    blocks = (block for bank in layout.experts for expert in bank.experts for block in expert)
    keys = {key for block in blocks for key in block.encodings.values() if key}
    encodings = (encoding_of(key) for key in keys | set(layout.linears.values()))
    return path_names((encoding for encoding in encodings if encoding is not None), network.device)


def _weights(network: Any) -> Iterator[tuple[int, float]]:
    """(bytes, share of them that one token reads) of every parameter."""
    from mc_cli.models.experts import find_experts

    shares: dict[int, float] = {}
    config = network.config.get_text_config()
    chosen = next((getattr(config, name) for name in ("num_experts_per_tok", "top_k") if hasattr(config, name)), None)
    for _, module in find_experts(network):
        for parameter in module.parameters():
            shares[id(parameter)] = 1.0 if chosen is None else min(1.0, chosen / module.num_experts)
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    own = set(map(id, embedding.parameters()))
    if head is None or not own.issuperset(map(id, head.parameters())):  # a tied head reads all of the embedding
        shares |= dict.fromkeys(own, 1 / embedding.num_embeddings)
    for parameter in network.parameters():
        yield parameter.nbytes, shares.get(id(parameter), 1.0)


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measured_here(json.loads(sys.argv[1])))))
    except McError as problem:
        sys.exit(_FAILED + str(problem))
