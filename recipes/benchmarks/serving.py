"""Decoding in vLLM at 1, 8 and 32 requests: a packed model beside the dense one, each in a process of its own.

    .venv/bin/python recipes/benchmarks/serving.py --make S    # two models of usual layer shapes, 1.8 GB
    .venv-vllm/bin/python recipes/benchmarks/serving.py --packed S/packed --dense S/dense --requests 1
    .venv-vllm/bin/python recipes/benchmarks/serving.py --packed DIR2 --dense DIR --json runs/serving.json

Time is the processor's: where other work runs too, a clock on the wall would measure that. One thread, bfloat16, greedy
tokens, prompts of random token ids that are not repeated. What the first token of each request takes, its prompt
included, is taken off. The median of some rounds; one before them is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES = {"hidden_size": 2048, "intermediate_size": 7168, "num_local_experts": 8, "num_experts_per_tok": 2}
SHAPES |= {"num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}


def measure(
    folder: str, *, dtype: str, prompt_tokens: int, new_tokens: int, requests: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Decoded tokens per second of processor time at each number of requests, in vLLM."""
    import torch

    torch.set_num_threads(1)
    from vllm import LLM, SamplingParams

    before = resident_bytes()
    engine = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=prompt_tokens + new_tokens,
        max_num_seqs=max(requests),
        max_num_batched_tokens=max(requests) * (prompt_tokens + new_tokens),
        enforce_eager=True,
        skip_tokenizer_init=True,
        seed=0,
    )
    loaded = resident_bytes() - before
    vocabulary = engine.model_config.get_vocab_size()
    drawn = random.Random(0)

    def seconds(count: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": drawn.choices(range(3, vocabulary), k=prompt_tokens)} for _ in range(count)]
        ask = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        begun = time.process_time()
        engine.generate(prompts, ask, use_tqdm=False)
        return time.process_time() - begun

    speeds: dict[str, float] = {}
    for count in requests:
        took = [seconds(count, new_tokens) - seconds(count, 1) for _ in range(rounds + 1)][1:]
        speeds[str(count)] = count * (new_tokens - 1) / statistics.median(took)
    return {"model": folder, "dtype": dtype, "loaded_bytes": loaded, "tokens_per_s": speeds}


def resident_bytes() -> int:
    """Memory of this process that is in use now, files that it has mapped included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def make(folder: Path) -> None:
    """A random Mixtral of SHAPES, dense, and packed at 2.5 bits in the mean, by the environment of the stages."""
    import decode
    import torch
    from transformers import MixtralConfig

    config = MixtralConfig(**SHAPES, vocab_size=8192, max_position_embeddings=4096, dtype="bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    decode.write_packed(folder / "packed", config)
    stated = json.loads((folder / "packed" / "config.json").read_text(encoding="utf-8"))
    stated["architectures"] = ["MixtralForCausalLM"]
    (folder / "packed" / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    torch.manual_seed(0)
    model: Any = decode.build_skeleton(config, dtype=torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder / "dense")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, help="write two models of usual layer shapes into this folder, and end")
    parser.add_argument("--packed", help="exported directory")
    parser.add_argument("--dense", help="the original")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    asked = {name: getattr(given, name) for name in ("dtype", "prompt_tokens", "new_tokens", "requests", "rounds")}
    if given.make:
        return make(given.make)
    if given.one:
        return print("\n" + json.dumps(measure(given.one, **asked)))
    found = [one_process(folder) for folder in (given.packed, given.dense)]
    packed, dense = (each["tokens_per_s"] for each in found)
    for count, speed in packed.items():
        beside = dense[count]
        print(f"{count:>3} requests: {speed:8.1f} tokens/s packed, {beside:8.1f} dense: {speed / beside:.2f}")
    if given.json:
        given.json.write_text(json.dumps({**asked, "models": found}, indent=1), encoding="utf-8")
    return None


def one_process(folder: str) -> dict[str, Any]:
    """The result of `measure` in a process that computes nothing else."""
    fixed = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--one", folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **fixed},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


if __name__ == "__main__":
    main()
