"""Peak memory of every stage on rows with images, beside text alone of as many tokens: the towers' bytes may be added.

Builds one random Llava over Mixtral, calibrates it on rows of one length with and without images, runs each stage in a
process of its own, and compares the peaks of resident memory. The ratio is of the peak with images to the peak with
text plus the bytes of tower and projector in float32, as they run.

    python recipes/benchmarks/memory_images.py --out memory_images.json
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory import WORDS, in_child, threads
from rich.console import Console
from rich.table import Table

STAGES = ("calibrate", "score", "quantize", "prune-eval")
INPUTS = ("text", "images")
AIM = 1.1  # times text alone plus the towers
SPECIAL = ("</s>", "<image>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' if message.role == 'user' else '<|assistant|>' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True)
class Shape:
    """Widths of the decoder and of its tower, and the rows: one image in each."""

    hidden: int = 512
    intermediate: int = 1024
    experts: int = 8
    layers: int = 4
    tower_hidden: int = 512
    tower_layers: int = 6
    image: int = 112  # pixels of a side, in patches of 16
    rows: int = 16
    length: int = 128


def main() -> None:
    """Runs the benchmark, or in a child process one piece of it."""
    options = _parser().parse_args()
    if options.child:
        _child(options.child, Path(options.folder), Shape(**json.loads(options.shape)))
        return
    shape = Shape(rows=options.rows, length=options.length, layers=options.layers)
    with tempfile.TemporaryDirectory(prefix="mc-memory-", dir=options.scratch) as scratch:
        folder = Path(scratch)
        towers = int(_in_child("build", folder, shape)["towers"])
        stages = [stage for stage in STAGES if stage in options.stages]
        peaks = {(stage, kind): _in_child(f"{stage} {kind}", folder, shape) for stage in stages for kind in INPUTS}
    rows = [_row(stage, *(peaks[stage, kind] for kind in INPUTS), towers) for stage in stages]
    _print_table(rows, towers)
    if options.out:
        figures = {"shape": asdict(shape), "towers": towers, "threads": threads()}
        Path(options.out).write_text(json.dumps({**figures, "stages": rows}, indent=1) + "\n", encoding="utf-8")
    worst = max(rows, key=lambda row: float(row["ratio"]))
    if worst["ratio"] > AIM:
        sys.exit(f"{worst['stage']} takes {worst['ratio']:.3f} times text alone plus the towers; the aim is {AIM}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=Shape.rows)
    parser.add_argument("--length", type=int, default=Shape.length)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="the first so many of these")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--scratch", help="folder for the checkpoint; it is removed at the end")
    for name in ("--child", "--folder", "--shape"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser


def _in_child(what: str, folder: Path, shape: Shape) -> dict[str, Any]:
    return in_child(__file__, what, {"--child": what, "--folder": folder, "--shape": json.dumps(asdict(shape))})


# In the child


def _child(what: str, folder: Path, shape: Shape) -> None:
    if what == "build":
        print(json.dumps({"towers": _build(folder, shape)}))
        return
    from mc_cli.cli import prepare_libraries

    prepare_libraries(debug=False)  # as the command would
    stage, _, kind = what.partition(" ")
    call = _stage_call(stage, kind, folder, shape)
    from mc_cli.models.memory import peak_memory_bytes

    begin = time.process_time()
    call()
    print(json.dumps({"peak_bytes": peak_memory_bytes(), "processor_s": time.process_time() - begin}))


def _stage_call(stage: str, kind: str, folder: Path, shape: Shape) -> Callable[[], object]:
    """A function that runs the stage, and what it needs before it that costs next to nothing."""
    from mc_cli.chain import stage_module
    from mc_cli.progress import SilentProgress
    from mc_cli.settings import (
        AllocateSettings,
        CalibrateSettings,
        EvaluateSettings,
        QuantizerSettings,
        QuantizeSettings,
        RunSettings,
        ScoreSettings,
    )

    coder = QuantizerSettings(quantizer="gptq")
    compute, work, data = RunSettings(device="cpu", batch_tokens=512), folder / kind, str(folder / f"{kind}.jsonl")
    settings: dict[str, Any] = {
        "calibrate": CalibrateSettings(
            model=str(folder / "model"), data=data, sequences=shape.rows, length=shape.length, gradient_tokens=512
        ),
        "score": ScoreSettings(bits=(2, 4), quantizer=coder, loss_tokens=512),
        "allocate": AllocateSettings(method="uniform", target_stored_bits=4.2),
        "quantize": QuantizeSettings(quantizer=coder),
        "prune-eval": EvaluateSettings(
            data=str(folder / f"heldout_{kind}.jsonl"), length=shape.length, max_sequences=shape.rows
        ),
    }

    def run(name: str) -> object:
        return stage_module(name).run(settings[name], compute, work, force=False, progress=SilentProgress())

    if stage != "quantize":
        return lambda: run(stage)
    return lambda: (run("allocate"), run("quantize"))


def _build(folder: Path, shape: Shape) -> int:
    """A random checkpoint with its processor, rows with and without images; bytes of tower and projector in float32."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MixtralConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_hidden,
        intermediate_size=4 * shape.tower_hidden,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=8,
        image_size=shape.image,
        patch_size=16,
    )
    text = MixtralConfig(
        vocab_size=512,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=shape.experts,
        num_experts_per_tok=2,
        max_position_embeddings=shape.length,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="100MB")
    _processor(shape).save_pretrained(folder / "model")
    for name, seed in (("", 0), ("heldout_", 1)):
        choose = random.Random(seed)
        for kind in INPUTS:
            rows = [json.dumps(_conversation(kind, choose, shape)) + "\n" for _ in range(shape.rows)]
            (folder / f"{name}{kind}.jsonl").write_text("".join(rows), encoding="utf-8")
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    return sum(4 * parameter.numel() for part in parts for parameter in part.parameters())


def _conversation(kind: str, choose: random.Random, shape: Shape) -> dict[str, Any]:
    """A question and an answer that are longer than a row, so that rows of both kinds have its whole length."""
    said = " ".join(choose.choice(WORDS) for _ in range(4 * shape.length))
    asked: Any = "what is there?"
    if kind == "images":
        asked = [{"type": "image", "image": _picture(choose, shape.image)}, {"type": "text", "text": asked}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def _picture(choose: random.Random, side: int) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), choose.randbytes(3 * side * side)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _processor(shape: Shape) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bytewise.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="</s>", pad_token="</s>", additional_special_tokens=list(SPECIAL[1:])
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": shape.image, "width": shape.image}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


# The result


def _row(stage: str, text: dict[str, Any], images: dict[str, Any], towers: int) -> dict[str, Any]:
    ratio = images["peak_bytes"] / (text["peak_bytes"] + towers)
    return {"stage": stage, "text": text, "images": images, "ratio": ratio}


def _print_table(rows: list[dict[str, Any]], towers: int) -> None:
    table = Table(title=f"Peak resident memory; towers and projector take {towers / 2**20:.0f} MiB in float32")
    table.add_column("stage")
    for name in ("text, MiB", "images, MiB", "images / (text + towers)", "processor s"):
        table.add_column(name, justify="right")
    for row in rows:
        peaks = [f"{row[kind]['peak_bytes'] / 2**20:.0f}" for kind in INPUTS]
        seconds = " ".join(f"{row[kind]['processor_s']:.0f}" for kind in INPUTS)
        table.add_row(row["stage"], *peaks, f"{row['ratio']:.3f}", seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
