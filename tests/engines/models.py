"""Packed models for the engines, and what transformers makes of them, by the environment of the stages.

`python -m tests.engines.models FOLDER` makes what is not there yet.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

NAMES = ("mixtral", "mixtral-dropped", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "gpt_oss")
NAMES += ("flex_olmo", "hunyuan_v1_moe", "dots1", "gemma4_text")
# Families of which vLLM's own code gives other tokens than transformers: the packed model has those of its values in
# dense files. vLLM's latent attention on processors is written for the sizes of the published models alone.
_LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
BESIDE_DENSE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 64, "topk_method": "noaux_tc"},
    "ernie4_5_moe": {},
}
_CUT: dict[str, Any] = {"target_stored_bits": None, "cut_ratio": 0.3, "unit": "channel", "method": "heapr"}
# The bundled model through all stages, and what they are asked for beside 2.5 stored bits. Experts that are cut have
# channels of their own number and keep 16 bits, or are coded; merged ones are stored once for several router slots.
STAGED: dict[str, dict[str, Any]] = {
    "demo": {},
    "demo-odp": {"policy": "odp", "target_rate": 0.25},
    "demo-otp": {"policy": "otp", "target_rate": 0.25, "otp_steps": 20},
    "demo-dualsparse": {"policy": "dualsparse", "target_rate": 0.25, "halves": True},
    "demo-cut": _CUT,
    "demo-cut-coded": {**_CUT, "bits": "0,4"},
    "demo-merged": {"similarity": True, "experts_left": 0.5, "merge": "sub-moe"},
}
NAMES = (*STAGED, *NAMES)
EXPECTED = "expected.json"
PROMPTS, NEW_TOKENS = 8, 24


def make(name: str, folder: Path) -> None:
    """A packed model in `folder`/out, and beside it the greedy tokens that transformers gives in float32.

    Its values are in `folder`/dense too, where the model is compared with these.
    """
    (_by_stages if name in STAGED else _by_rounding)(name, folder)
    if name in BESIDE_DENSE:
        _as_dense(folder)
    (folder / EXPECTED).write_text(json.dumps(expected(folder / "out")), encoding="utf-8")


def _by_stages(name: str, folder: Path) -> None:
    """The bundled model through all stages: trellis codes, mixed widths, packed embedding and head."""
    import mc_cli

    asked = {"target_stored_bits": 2.5, **STAGED[name]}
    made = mc_cli.compress(
        "bundled:demo-moe",
        data="bundled:calibration",
        out=folder / "out",
        work_dir=folder / "work",
        sequences=8,
        length=128,
        max_sequences=8,
        **{flag: value for flag, value in asked.items() if value is not None},
    )
    print(name, made.directory, flush=True)


def _by_rounding(name: str, folder: Path) -> None:
    """A tiny random model of a family, rounded to affine grids of all widths, some matrices kept."""
    from tests.exported_models import exported
    from tests.tiny_models import build_tiny

    family, _, dropped = name.partition("-")
    tied = family == "qwen2_moe"
    changes: dict[str, Any] = {"head_dim": 32} | ({"tie_word_embeddings": True} if tied else {})
    changes = BESIDE_DENSE.get(name, changes)
    checkpoint = build_tiny(family, folder / "checkpoint", hidden_size=128, **changes)
    exported(checkpoint, folder, tied=tied, **({"pruned": (1, 4)} if dropped else {}))


def _as_dense(folder: Path) -> None:
    """Writes the values of the packed model to `folder`/dense, with what else its directory holds."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).dequantize()
    model.save_pretrained(folder / "dense")
    for path in (folder / "out").glob("tokenizer*"):
        shutil.copy(path, folder / "dense")


def expected(folder: Path) -> dict[str, Any]:
    """Prompts of token ids, what transformers appends to each in float32, the most likely token each time, how
    narrowly, and the expert calls that a policy was asked for and left, half an expert counting half."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    skipping = model.hf_quantizer.quantization_config.layout.pruning
    if skipping is not None:
        _with_mean_attention(model)
    drawn = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, model.config.vocab_size, (1, 5 + 3 * row), generator=drawn) for row in range(PROMPTS)]
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        made = [model.generate(prompt, **options, pad_token_id=0)[0, prompt.shape[1] :] for prompt in prompts]
    found = {"prompts": [row[0].tolist() for row in prompts], "tokens": [row.tolist() for row in made]}
    counting = [] if skipping is None else _counting(model)
    found["margins"] = [_margins(model, prompt[0], row) for prompt, row in zip(prompts, made, strict=True)]
    found["calls"] = [[_sum(each.chosen), _sum(each.kept)] for each in counting]
    return found


def _counting(model: Any) -> list[Any]:
    """The policies of the layers, which count from now on."""
    from mc_cli.models.experts import PRUNER

    found = [pruner for module in model.modules() if (pruner := getattr(module, PRUNER, None)) is not None]
    for pruner in found:
        pruner.kept, pruner.chosen = [], []
    return found


def _sum(counts: list[Any]) -> float:
    return float(sum(part.sum() for part in counts))


def _margins(model: Any, prompt: Any, made: Any) -> list[float]:
    """The logit of each token over that of the next likely one: where it is tiny, rounding decides."""
    import torch

    with torch.no_grad():
        logits = model(torch.cat([prompt, made[:-1]])[None], use_cache=False).logits[0, len(prompt) - 1 :].float()
    most = logits.topk(2, -1).values
    return (most[:, 0] - most[:, 1]).tolist()


def _with_mean_attention(model: Any) -> None:
    """Lets every token of a prompt count as looked at as the mean of calibration tokens, as engines have it."""
    from mc_cli.models.experts import PRUNER

    for module in model.modules():
        pruner = getattr(module, PRUNER, None)
        if pruner is not None and pruner.watch is not None:
            pruner.watch.estimate = lambda tokens, prior: prior


def main() -> None:
    folder = Path(sys.argv[1])
    for name in (*NAMES, *BESIDE_DENSE):
        if not (folder / name / EXPECTED).is_file():
            make(name, folder / name)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
