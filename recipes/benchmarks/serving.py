"""Decoding in vLLM at 1, 8 and 32 requests: a packed model beside the dense one, each in a process of its own.

    .venv/bin/python recipes/benchmarks/serving.py --make S    # two models of usual layer shapes, 1.8 GB
    .venv-vllm/bin/python recipes/benchmarks/serving.py --packed S/packed --dense S/dense --requests 1
    .venv-vllm/bin/python recipes/benchmarks/serving.py --packed DIR2 --dense DIR --json runs/serving.json
    .venv-vllm/bin/python recipes/benchmarks/serving.py --packed DIR2 --skipping    # its policy on, and off

Time is the processor's: where other work runs too, a clock on the wall would measure that. One thread, bfloat16, greedy
tokens, prompts of random token ids that are not repeated. What the first token of each request takes, its prompt
included, is taken off. The median of some rounds; one before them is not counted. The share of expert calls that the
policy really skips while decoding is counted by the plug-in in a third process, of the same prompts.
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
    folder: str,
    *,
    dtype: str,
    prompt_tokens: int,
    new_tokens: int,
    requests: Sequence[int],
    rounds: int,
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """Decoded tokens per second of processor time at each number of requests, in vLLM; and skipped calls if counted.

    overrides   entries of config.json, such as the policy's rate
    """
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
        hf_overrides=overrides,
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

    def decoding(count: int) -> tuple[float, float, float]:
        """Seconds, and calls chosen and computed, of all tokens but the first of so many requests."""
        marks = [(0.0, *calls())]
        for tokens in (1, new_tokens):
            took = seconds(count, tokens)
            marks.append((took, *calls()))
        none, first, whole = marks
        chosen, computed = (whole[place] - 2 * first[place] + none[place] for place in (1, 2))
        return whole[0] - first[0], chosen, computed

    speeds: dict[str, float] = {}
    skipped: dict[str, float] = {}
    for count in requests:
        took, chosen, computed = zip(*[decoding(count) for _ in range(rounds + 1)][1:], strict=True)
        speeds[str(count)] = count * (new_tokens - 1) / statistics.median(took)
        if sum(chosen):
            skipped[str(count)] = 1 - sum(computed) / sum(chosen)
    return {"model": folder, "dtype": dtype, "loaded_bytes": loaded, "tokens_per_s": speeds, "skipped": skipped}


def calls() -> tuple[float, float]:
    """Expert calls chosen and computed so far, where they are counted."""
    from mc_cli.serving.skipped_calls import skipped_calls

    counted = skipped_calls()
    return (0.0, 0.0) if counted is None else (counted.total().chosen, counted.total().computed)


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
    add_policy(folder / "packed")


def add_policy(folder: Path) -> None:
    """Gives a packed model the policy odp as it would be fitted for a quarter of the calls, on random token ids.

    A token's second expert is skipped where its share of the weight is under the layer's median.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mc_cli.models.experts import PRUNER, find_experts

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shares: dict[str, torch.Tensor] = {}
    for path, module in find_experts(model):

        def note(module: Any, hidden: Any, index: Any, weights: Any, path: str = path) -> Any:
            shares[path] = weights.min(-1).values / weights.sum(-1)
            return index, weights

        setattr(module, PRUNER, note)
    with torch.no_grad():
        model(torch.randint(3, 8192, (4, 64), generator=torch.Generator().manual_seed(1)), use_cache=False)
    layers = [{"layer": number, "path": path, "top_k": 2, "renormalise": True} for number, path in enumerate(shares)]
    point = {"rate": 0.25, "thresholds": [float(share.median()) for share in shares.values()]}
    policy = {"schema": 1, "policy": "odp", "seed": 0, "layers": layers, "points": [point], "chosen": 0, "notes": []}
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated["quantization_config"]["pruning"] = policy
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")


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
    parser.add_argument("--skipping", action="store_true", help="the packed model with its policy, and without")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--overrides", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    asked = {name: getattr(given, name) for name in ("dtype", "prompt_tokens", "new_tokens", "requests", "rounds")}
    if given.make:
        return make(given.make)
    if given.one:
        return print("\n" + json.dumps(measure(given.one, **asked, overrides=json.loads(given.overrides))))
    if given.skipping:
        return beside_itself(given, asked)
    found = [one_process(folder) for folder in (given.packed, given.dense)]
    packed, dense = (each["tokens_per_s"] for each in found)
    for count, speed in packed.items():
        beside = dense[count]
        print(f"{count:>3} requests: {speed:8.1f} tokens/s packed, {beside:8.1f} dense: {speed / beside:.2f}")
    if given.json:
        given.json.write_text(json.dumps({**asked, "models": found}, indent=1), encoding="utf-8")
    return None


def beside_itself(given: argparse.Namespace, asked: dict[str, Any]) -> None:
    """Prints speeds with the policy and without, and the share of calls that it skips."""
    kinds = {"on": {}, "off": {"mc_pruning_rate": 0.0}, "counted": {"mc_count_skipped": True}}
    found = {kind: one_process(given.packed, overrides) for kind, overrides in kinds.items()}
    for count, speed in found["on"]["tokens_per_s"].items():
        off, counted = (found[kind]["tokens_per_s"][count] for kind in ("off", "counted"))
        print(
            f"{count:>3} requests: {speed:8.1f} tokens/s with the policy, {off:8.1f} without: {speed / off:.3f}; "
            f"{found['counted']['skipped'][count]:.3f} of the calls skipped; {counted:8.1f} tokens/s while counting"
        )
    if given.json:
        given.json.write_text(json.dumps({**asked, "models": found}, indent=1), encoding="utf-8")


def one_process(folder: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The result of `measure` in a process that computes nothing else."""
    fixed = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--one", folder, "--overrides", json.dumps(overrides or {})],
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
