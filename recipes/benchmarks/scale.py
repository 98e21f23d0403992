"""Layers of real models' widths under a limit of memory: what each stage takes, beside what was predicted.

Writes a checkpoint of random weights with a real model's widths and few layers, and runs calibrate, score, allocate and
quantize on little text, each in a process of its own, with `--max-memory`. `--coded` experts of each layer are coded,
the others kept, by a plan made for it; a whole run takes hours. Prints memory, scratch, bytes and processor seconds
beside the predictions, and ends with an error where a peak is beyond the limit, or a prediction too far off.

    python recipes/benchmarks/scale.py --shape qwen3-30b --layers 1 --coded 4 --out scale.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layer_shapes import SHAPES, Shape
from memory import WORDS, _tokenizer

STAGES = ("calibrate", "score", "quantize")  # allocate computes little, and a plan is made without it
OFF_MEMORY, OFF_BYTES, OFF_TIME = 0.15, 0.001, 1.5
POOL = 1 << 26  # random numbers, of which every tensor takes some


def main() -> None:
    """Runs the benchmark, or in a child process one piece of it."""
    options = _parser().parse_args()
    if options.child:
        print(json.dumps(_child(options)))
        return
    with tempfile.TemporaryDirectory(prefix="mc-scale-", dir=options.scratch) as folder:
        options.folder = folder
        found = {what: _in_child(what, options) for what in ("build", *options.stages, "predict")}
    rows = _rows(found, options)
    for row in rows:
        print(f"{row['what']:<24} {row['predicted']:>16,.0f} {row['measured']:>16,.0f} {row['unit']:<8} {row['off']}")
    limit = options.limit or SHAPES[options.shape].limit
    peaks = {stage: found[stage]["peak_bytes"] for stage in options.stages}
    if options.out:
        facts = {
            name: getattr(options, name)
            for name in ("shape", "layers", "tokens", "length", "coded", "samples", "unit", "vocabulary")
        }
        content = {**facts, "limit_bytes": limit, "stages": found, "rows": rows}
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    wrong = [f"{stage} took {peak:,} bytes" for stage, peak in peaks.items() if peak > limit]
    wrong += [f"{row['what']}: {row['off']}" for row in rows if row["wrong"]]
    if wrong:
        sys.exit("; ".join(wrong))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-30b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="of calibration, all of them in the backward pass")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--samples", type=int, default=1, help="labels drawn for each token")
    parser.add_argument("--coded", type=int, default=4, help="experts of a layer that are coded; the others are kept")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="the first ones alone")
    parser.add_argument("--unit", default="expert", choices=("expert", "channel"), help="what score measures")
    parser.add_argument("--vocabulary", type=int, help="ids; default: the shape's own")
    parser.add_argument("--limit", type=int, help="bytes; default: the shape's own")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--scratch", help="folder for the checkpoint; it is removed at the end")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=json.loads, help=argparse.SUPPRESS)
    return parser


def _in_child(what: str, options: argparse.Namespace) -> dict[str, Any]:
    names = (
        "shape",
        "layers",
        "tokens",
        "length",
        "samples",
        "coded",
        "unit",
        "vocabulary",
        "limit",
        "dtype",
        "folder",
    )
    given = [f"--{name}={getattr(options, name)}" for name in names if getattr(options, name) is not None]
    before, begin = os.times(), time.monotonic()
    command = [sys.executable, __file__, "--child", what, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{what}: {spent:.0f} s of a processor, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "processor_s": spent}


def _rows(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each prediction that can be held against something measured."""
    predicted = found["predict"]
    rows = []
    stages = options.stages
    for stage in stages:
        own = found[stage]["imported_bytes"]
        peak = predicted["peaks"][stage] + own
        row = _row(f"peak of {stage}", peak, found[stage]["peak_bytes"], "bytes", 1 + OFF_MEMORY)
        if stage == "quantize":  # predicted: a layer coded whole, as many experts at a time as fit
            row["wrong"] = row["measured"] > (1 + OFF_MEMORY) * row["predicted"]
        rows.append(row)
    for stage in stages:
        size = predicted["scratch"].get(stage, 0)
        rows.append(_row(f"scratch of {stage}", size, found[stage]["scratch_bytes"], "bytes", None))
    if "quantize" in stages:
        rows.append(
            _row("packed model", predicted["packed"], found["quantize"]["packed_bytes"], "bytes", 1 + OFF_BYTES)
        )
    for stage, seconds in predicted["seconds"].items():
        if stage in stages:
            rows.append(_row(f"time of {stage}", seconds, found[stage]["processor_s"], "s", OFF_TIME))
    return rows


def _row(what: str, predicted: float, measured: float, unit: str, within: float | None) -> dict[str, Any]:
    ratio = predicted / measured if measured else float("inf")
    wrong = within is not None and not 1 / within <= ratio <= within
    off = f"{100 * (ratio - 1):+.2f} %"
    return {"what": what, "predicted": predicted, "measured": measured, "unit": unit, "off": off, "wrong": wrong}


# In the child


def _child(options: argparse.Namespace) -> dict[str, Any]:
    from mc_cli.cli import prepare_libraries

    prepare_libraries(debug=False)  # as the command would
    if options.child == "build":
        return _build(Path(options.folder), SHAPES[options.shape], options)
    return _predicted(options) if options.child == "predict" else _stage(options)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(options.folder)
    return {
        "calibrate": {
            "model": str(folder / "model"),
            "data": str(folder / "text.txt"),
            "sequences": options.tokens // options.length,
            "length": options.length,
            "gradient_tokens": options.tokens,
            "gradient_samples": options.samples,
        },
        "score": {"bits": (2,), "loss_tokens": 64, "unit": options.unit},
        "quantize": {"plan": str(folder / "plan.yaml")},
        "compute": {
            "device": "cpu",
            "dtype": options.dtype,
            "batch_tokens": 2 * options.length,
            "max_memory_bytes": options.limit or SHAPES[options.shape].limit,
        },
    }


def _stage(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one stage; what it took."""
    from mc_cli.artifacts import scratch
    from mc_cli.chain import stage_module
    from mc_cli.models.memory import peak_memory_bytes, resident_bytes
    from mc_cli.progress import SilentProgress
    from mc_cli.settings import CalibrateSettings, QuantizeSettings, RunSettings, ScoreSettings

    kinds: dict[str, Any] = {
        "calibrate": CalibrateSettings,
        "score": ScoreSettings,
        "quantize": QuantizeSettings,
    }
    given, folder, stage = _settings(options), Path(options.folder), options.child
    made: list[Any] = []
    keep = scratch.Scratch.__init__
    scratch.Scratch.__init__ = lambda self, place: (made.append(self), keep(self, place))[1]  # type: ignore[method-assign]
    module = stage_module(stage)
    family = SHAPES[options.shape].config["model_type"]
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    compute, settings = RunSettings(**given["compute"]), kinds[stage](**given[stage])
    if stage == "quantize":
        _plan_few(folder, options.coded)
    imported = resident_bytes()
    module.run(settings, compute, folder / "work", force=False, progress=SilentProgress())
    packed = sum(path.stat().st_size for path in (folder / "work" / "packed").glob("*.safetensors"))
    return {
        "imported_bytes": imported,
        "peak_bytes": peak_memory_bytes(),
        "scratch_bytes": sum(each.most_bytes for each in made),
        "packed_bytes": packed,
    }


def _plan_few(folder: Path, coded: int) -> None:
    """A plan in which the first experts of every layer are coded, half of them at 3 bits, and all else is kept."""
    from mc_cli.artifacts.calibration import INVENTORY, read_inventory
    from mc_cli.artifacts.plan import Plan
    from mc_cli.parts import Role

    inventory = read_inventory(folder / "work" / "calibration" / INVENTORY)
    rows = {
        block.layer: tuple((2 if each % 2 else 3) if each < coded else 16 for each in range(block.num_experts))
        for block in inventory.expert_blocks
    }
    roles = dict.fromkeys((Role.ATTENTION, Role.SHARED, Role.DENSE, Role.ROUTER, Role.HEAD, Role.EMBEDDING), 16)
    Plan(inventory.model_type, "by hand", rows, roles, family="trellis").write(folder / "plan.yaml")


def _predicted(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the predictions of `estimate`: peaks beyond what is imported, scratch, result, seconds if known."""
    from mc_cli.ahead import Look
    from mc_cli.ahead.duration import durations
    from mc_cli.ahead.machine import known_machine
    from mc_cli.ahead.memory import memory_needs
    from mc_cli.artifacts.work_dir import WorkDir
    from mc_cli.recipe import Recipe, plan_run

    folder = Path(options.folder)
    given = {**_settings(options), "export": {"out": str(folder / "out")}}
    if not (folder / "plan.yaml").exists():
        del given["quantize"]
        given["allocate"] = {"target_stored_bits": 2.5}
    plan = plan_run(Recipe(given, str(folder / "estimate")))
    look = Look(plan.stages, plan.compute, WorkDir(folder / "estimate"), tuple(plan.stages))
    outlook = look.outlook()
    work = look.workload(*look.model(), None)
    assert work is not None
    machine = known_machine()
    seconds = {} if machine is None else durations(work, machine, evaluated_tokens=0)
    return {
        "peaks": {need.stage: need.peak_bytes for need in memory_needs(work, base_bytes=0)},
        "scratch": work.scratch_bytes,
        "packed": outlook.facts["predicted stored bytes"],
        # The plan codes few experts, which durations do not know.
        "seconds": {stage: seconds[stage] for stage in ("calibrate", "score") if stage in seconds},
    }


def _build(folder: Path, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """A checkpoint of random numbers, an expert at a time, a tokenizer and a text."""
    import torch

    from mc_cli.artifacts.streamed import Pieces, write_pieces

    model = folder / "model"
    model.mkdir()
    more = {"num_hidden_layers": options.layers, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    config = {**shape.config, **more, "tie_word_embeddings": False}
    config["vocab_size"] = options.vocabulary or config["vocab_size"]
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    placed: dict[str, str] = {}
    for number, tensors in enumerate(_tensors(config, shape)):
        file = f"model-{number:05d}.safetensors"
        write_pieces(
            model / file, {name: Pieces(size, pool.dtype, _numbers(pool, name, size)) for name, size in tensors}
        )
        placed |= {name: file for name, _ in tensors}
    index = {"metadata": {}, "weight_map": placed}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _tokenizer().save_pretrained(model)
    choose = random.Random(0)
    words = [choose.choice(WORDS) for _ in range(3 * options.tokens)]
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return {"checkpoint_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")), **asdict(shape)}


def _numbers(pool: Any, name: str, size: tuple[int, ...]) -> Any:
    """Pieces of a tensor from the pool; norms are ones."""
    import torch

    def pieces() -> Iterator[Any]:
        left = torch.Size(size).numel()
        if len(size) == 1:
            yield torch.ones(size, dtype=pool.dtype)
            return
        begin = zlib.crc32(name.encode()) % len(pool)
        while left:
            piece = pool[begin : begin + left]
            yield piece
            left, begin = left - len(piece), 0

    return pieces


Sized = list[tuple[str, tuple[int, ...]]]


def _tensors(config: dict[str, Any], shape: Shape) -> Iterator[Sized]:
    """Names and shapes of a checkpoint's tensors, file by file."""
    hidden = config["hidden_size"]
    yield [("model.embed_tokens.weight", (config["vocab_size"], hidden)), ("model.norm.weight", (hidden,))]
    yield [("lm_head.weight", (config["vocab_size"], hidden))]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        moe = f"{prefix}.{shape.moe}"
        count = next(
            config[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if name in config
        )
        inner = config.get("moe_intermediate_size", config["intermediate_size"])
        rest = [(f"{prefix}.self_attn.{name}", size) for name, size in _attention(config)]
        rest += [(f"{prefix}.{name}.weight", (hidden,)) for name in ("input_layernorm", "post_attention_layernorm")]
        rest.append((f"{moe}.gate.weight", (count, hidden)))
        if "n_shared_experts" in config:
            rest.append((f"{moe}.gate.e_score_correction_bias", (count,)))
            rest += _expert(f"{moe}.shared_experts", shape, hidden, inner * config["n_shared_experts"])
        if "shared_expert_intermediate_size" in config:
            rest.append((f"{moe}.shared_expert_gate.weight", (1, hidden)))
            rest += _expert(f"{moe}.shared_expert", shape, hidden, config["shared_expert_intermediate_size"])
        yield rest
        for begin in range(0, count, 32):
            experts = range(begin, min(count, begin + 32))
            yield [part for each in experts for part in _expert(f"{moe}.experts.{each}", shape, hidden, inner)]


def _expert(path: str, shape: Shape, hidden: int, inner: int) -> Sized:
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [(f"{path}.{name}.weight", size) for name, size in zip(shape.parts, sizes, strict=True)]


def _attention(config: dict[str, Any]) -> Sized:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:
        low, rope, nope = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
        rank, values = config["q_lora_rank"], config["v_head_dim"]
        return [
            ("q_a_proj.weight", (rank, hidden)),
            ("q_a_layernorm.weight", (rank,)),
            ("q_b_proj.weight", (heads * (nope + rope), rank)),
            ("kv_a_proj_with_mqa.weight", (low + rope, hidden)),
            ("kv_a_layernorm.weight", (low,)),
            ("kv_b_proj.weight", (heads * (nope + values), low)),
            ("o_proj.weight", (hidden, heads * values)),
        ]
    size = config.get("head_dim", hidden // heads)
    narrow = size * config["num_key_value_heads"]
    found: Sized = [("q_proj.weight", (heads * size, hidden)), ("o_proj.weight", (hidden, heads * size))]
    found += [(f"{name}.weight", (narrow, hidden)) for name in ("k_proj", "v_proj")]
    if config["model_type"] == "qwen2_moe":
        found += [
            (f"{name}.bias", (width,))
            for name, width in (("q_proj", heads * size), ("k_proj", narrow), ("v_proj", narrow))
        ]
    if config["model_type"] == "qwen3_moe":
        found += [(f"{name}.weight", (size,)) for name in ("q_norm", "k_norm")]
    return found


if __name__ == "__main__":
    main()
