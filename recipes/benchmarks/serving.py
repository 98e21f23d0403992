"""Throughput in vLLM at 1, 8 and 32 requests: a packed model beside the dense one, each in a process of its own.

    .venv-vllm/bin/python recipes/benchmarks/serving.py --packed DIR2 --dense DIR --json runs/serving.json

Time is the processor's: where other work runs too, a clock on the wall would measure that. One thread, bfloat16, greedy
tokens, prompts of random token ids that are not repeated. A first round that is not counted warms everything up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REQUESTS = (1, 8, 32)


def measure(folder: str, *, dtype: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Tokens per second of processor time at each number of requests, in vLLM."""
    import torch

    torch.set_num_threads(1)
    from vllm import LLM, SamplingParams

    before = resident_bytes()
    length = prompt_tokens + new_tokens
    engine = LLM(
        model=folder, dtype=dtype, max_model_len=length, max_num_seqs=max(REQUESTS), enforce_eager=True, seed=0
    )
    loaded = resident_bytes() - before
    vocabulary = engine.model_config.get_vocab_size()
    ask = SamplingParams(temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True)
    drawn = random.Random(0)
    found: dict[str, Any] = {"model": folder, "dtype": dtype, "resident_bytes": loaded, "tokens_per_s": {}}
    for count in (1, *REQUESTS):  # the first one again: it was the round that warms up
        prompts = [{"prompt_token_ids": drawn.choices(range(3, vocabulary), k=prompt_tokens)} for _ in range(count)]
        begun = time.process_time()
        engine.generate(prompts, ask, use_tqdm=False)
        found["tokens_per_s"][str(count)] = count * new_tokens / (time.process_time() - begun)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def resident_bytes() -> int:
    """Memory of this process that is in use now, files that it has mapped included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", required=True, help="exported directory")
    parser.add_argument("--dense", required=True, help="the original")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = {"prompt_tokens": given.prompt_tokens, "new_tokens": given.new_tokens}
    if given.one:
        print("\n" + json.dumps(measure(given.one, dtype=given.dtype, **sizes)))
        return
    found = [one_process(folder) for folder in (given.packed, given.dense)]
    packed, dense = (each["tokens_per_s"] for each in found)
    for count, speed in packed.items():
        print(
            f"{count:>3} requests: {speed:8.1f} tokens/s packed, {dense[count]:8.1f} dense: {speed / dense[count]:.2f}"
        )
    if given.json:
        given.json.write_text(json.dumps({**sizes, "models": found}, indent=1), encoding="utf-8")


def one_process(folder: str) -> dict[str, Any]:
    """What `measure` finds in a process that computes nothing else."""
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
