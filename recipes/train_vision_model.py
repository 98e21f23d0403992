"""Train the small image-text MoE that ships with mc-cli (a CLIP tower and Llava over Mixtral) on drawn scenes.

    python recipes/train_vision_model.py --out mc_cli/bundled/demo-vision --data-out mc_cli/bundled/scenes \
        --steps 8000 --seed 0

One thread, no network, no data: recipes/drawn_scenes.py draws the images and asks about them. First the tower and the
projector learn to name what lies where, by the words that the decoder reads. Then they stay as they are, and the
decoder learns to answer. Some rows tell the scene in words instead, so that the model answers without an image too.
`--steps` instead of `--minutes` gives a run that does not depend on the clock. The model folder appears only when
everything in it is complete.

A second thread makes each step slower, on a machine that is shared up to forty times: matrices are small, and threads
wait for one another at each of them.
"""

import argparse
import copy
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import drawn_scenes
import numpy
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from train_demo_model import balance_loss, build_optimizers, record_routing, save_model, write_records
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

SPECIAL = END_OF_TEXT, IMAGE, USER, ASSISTANT, END = (
    "<|endoftext|>",
    "<image>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message.role == 'user' else '<|assistant|>' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PATCH = 16
IMAGE_TOKENS = (drawn_scenes.SIDE // PATCH) ** 2
LENGTH, BATCH_ROWS = 64, 16
TEXT_FRACTION = 0.25  # of the rows, told in words
# Of the rows with images, those that ask for a description first: the densest thing to learn from. Each word of one is
# found by the words before it, so that descriptions in several orders teach what questions ask for.
DESCRIBED_FRACTION = 0.6
# Kinds of questions that are learned last, which half of the rows ask before others.
PRACTISED = ("colour by shape", "where by shape", "where", "relation", "count")
# Kinds that the bundled model has not learned in its time: to find a thing by its shape alone, which relations need
# too. They are trained on and reported, but not asked in the rows that are written.
UNLEARNED = ("colour by shape", "where by shape", "relation")
OTHER_WEIGHT = 0.1  # of tokens that are not answers, in the loss
# What the tower gives for a token of an image is taught to name place, colour and shape, a third each, by the decoder's
# embeddings. Without it the decoder learns for a long time which answers are likely before it looks, and while it does,
# it spoils what the tower knew.
TOWER_STEPS, TOWER_SCENES = 1500, 64
NAMING_WEIGHT = 0.3
BALANCE_WEIGHT, GRADIENT_NORM_LIMIT = 0.1, 1.0
WARMUP_STEPS, DECAY_FRACTION = 50, 0.4
HELDOUT_SCENES = 1_000_000  # seeds of scenes from here on are never trained on
CALIBRATION_ROWS, HELDOUT_ROWS = 192, 1000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its processor")
    parser.add_argument("--data-out", type=Path, help="folder for calibration.jsonl, text.jsonl and heldout.jsonl")
    parser.add_argument(
        "--start", type=Path, help="a folder of this script's making, whose decoder training goes on from"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="learning rates, as a share of the usual ones")
    parser.add_argument(
        "--described",
        type=float,
        default=DESCRIBED_FRACTION,
        help="share of rows with images that ask for descriptions",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop training after this many minutes")
    parser.add_argument("--steps", type=int, help="stop training after this many steps")
    parser.add_argument("--log-every", type=int, default=100, help="optimizer steps per point of the loss curve")
    arguments = parser.parse_args()
    if (arguments.minutes is None) == (arguments.steps is None):
        parser.error("give --minutes or --steps")
    return arguments


# Processor and model -------------------------------------------------------------------------------------------------


def build_processor() -> LlavaProcessor:
    """Byte-level BPE whose merges are the words of the scenes, and images of 48 x 48 pixels in patches of 16 x 16."""
    source = random.Random(0)
    texts = []
    for _ in range(3000):
        scene = drawn_scenes.random_scene(source)
        texts += [f"{text}. {request}" for request, text in drawn_scenes.descriptions(scene).items()]
        texts += [f"{question} {answer}" for _, question, answer in drawn_scenes.questions(scene, source)]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is one token wherever it stands
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        model_max_length=128,
    )
    side = {"height": drawn_scenes.SIDE, "width": drawn_scenes.SIDE}
    images = CLIPImageProcessorPil(
        size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A fresh model: a tower of 2 layers, a decoder of 4 layers of 8 experts, float32."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=drawn_scenes.SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.set_experts_implementation("eager")  # the grouped implementation is slower on CPU
    for layer in model.model.language_model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)  # transformers starts routers at zero: all would tie
    return model


# Rows ----------------------------------------------------------------------------------------------------------------


class Rows:
    """Rows of LENGTH tokens of drawn scenes, made without the processor, whose image part would take most of the time;
    `check` shows that both give the same."""

    def __init__(self, processor: LlavaProcessor, described: float):
        self.described = described
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.special = {name: self.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
        self.ids: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.ids[text]

    def row(self, source: random.Random) -> tuple[list[int], list[float], drawn_scenes.Scene | None]:
        """(token ids, weight of each in the loss, the scene where its image is shown)"""
        scene = drawn_scenes.random_scene(source)
        found = drawn_scenes.questions(scene, source)
        if source.random() < 0.5:
            found.sort(key=lambda each: each[0] not in PRACTISED)
        asked = [(question, answer) for _, question, answer in found]
        seen = source.random() >= TEXT_FRACTION
        if seen and source.random() < self.described:
            asked.insert(0, source.choice(list(drawn_scenes.descriptions(scene).items())))
        ids, weights = [], []
        for number, (question, answer) in enumerate(asked):
            told = [] if seen or number else self.encode(f"{drawn_scenes.describe(scene)}.")
            shown = [self.special[IMAGE]] * IMAGE_TOKENS if seen and not number else []
            begin, end = [self.special[USER], *shown, *told, *self.encode(question)], [*self.encode(answer)]
            if len(ids) + len(begin) + len(end) + 2 > LENGTH:
                break
            ids += [*begin, self.special[ASSISTANT], *end, self.special[END]]
            lesser = [0.0 if token == self.special[IMAGE] else OTHER_WEIGHT for token in begin]
            weights += [*lesser, OTHER_WEIGHT, *[1.0] * (len(end) + 1)]
        return ids, weights, scene if seen else None

    @staticmethod
    def pixels(image) -> numpy.ndarray:
        return (numpy.asarray(image, dtype=numpy.float32).transpose(2, 0, 1) / 255 - 0.5) / 0.5

    def names(self, scene: drawn_scenes.Scene) -> list[list[int]]:
        """For each place three tokens: its name, its colour, its shape or digit; "nothing" where it is empty."""
        held = {thing.place: thing.name for thing in scene.things}
        words = [f"{place} {held.get(number, 'nothing nothing')}" for number, place in enumerate(drawn_scenes.PLACES)]
        return [self.encode(each) for each in words]

    def scenes(self, source: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels of TOWER_SCENES scenes, names [image tokens of all, 3])"""
        scenes = [drawn_scenes.random_scene(source) for _ in range(TOWER_SCENES)]
        pixels = [torch.from_numpy(self.pixels(drawn_scenes.draw(scene))) for scene in scenes]
        return torch.stack(pixels), torch.tensor([names for scene in scenes for names in self.names(scene)])

    def batch(self, source: random.Random) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """(model inputs, weights [rows, LENGTH], names [image tokens of all rows, 3])"""
        tokens = torch.full((BATCH_ROWS, LENGTH), self.special[END_OF_TEXT])
        weights, images, names = torch.zeros(BATCH_ROWS, LENGTH), [], []
        for number in range(BATCH_ROWS):
            ids, row_weights, scene = self.row(source)
            tokens[number, : len(ids)] = torch.tensor(ids)
            weights[number, : len(ids)] = torch.tensor(row_weights)
            if scene is not None:
                images.append(torch.from_numpy(self.pixels(drawn_scenes.draw(scene))))
                names += self.names(scene)
        return {"input_ids": tokens, "pixel_values": torch.stack(images)}, weights, torch.tensor(names)

    def check(self) -> None:
        """Raises RuntimeError where the processor makes other inputs of a row than training does."""
        source = random.Random(7)
        scene = drawn_scenes.random_scene(source)
        row = drawn_scenes.chat_row(scene, source, 2, seen=True)
        text = self.processor.apply_chat_template(row["messages"], tokenize=False)
        made = self.processor(images=[drawn_scenes.draw(scene)], text=text, return_tensors="pt")
        turns = [message["content"] for message in row["messages"]]
        turns[0] = turns[0][1]["text"]
        ids: list[int] = []
        for number, content in enumerate(turns):
            shown = [self.special[IMAGE]] * IMAGE_TOKENS if number == 0 else []
            ids += [self.special[ASSISTANT if number % 2 else USER], *shown, *self.encode(content)]
            ids += [self.special[END]] if number % 2 else []
        pixels = torch.from_numpy(self.pixels(drawn_scenes.draw(scene)))
        if made["input_ids"].tolist() != [ids] or not torch.allclose(made["pixel_values"][0], pixels, atol=1e-5):
            raise RuntimeError("the processor makes other inputs than training does")


# Training and measuring ----------------------------------------------------------------------------------------------


def naming_loss(model: LlavaForConditionalGeneration, features: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of the names [image tokens, 3] that embeddings read from features [image tokens, hidden]."""
    return -model.lm_head(features).log_softmax(-1).gather(1, names).mean()


def optimizers_of(model: LlavaForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Optimizers of what is not frozen."""
    optimizers = build_optimizers(model, torch.bfloat16)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return optimizers


def step_all(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of each at `rate` of its own learning rate, with all gradients clipped together."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM_LIMIT)
    for group in groups:
        group["lr"] = rate * group["peak_lr"]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def rate_at(step: int, progress: float) -> float:
    return min(1.0, step / WARMUP_STEPS, (1 - progress) / DECAY_FRACTION)


def train_tower(model: LlavaForConditionalGeneration, rows: Rows, seed: int) -> None:
    """Trains tower, projector and embeddings to name what lies where, and freezes the first two."""
    seeing = [model.model.vision_tower, model.model.multi_modal_projector]
    model.requires_grad_(False)
    for module in (*seeing, model.model.language_model.embed_tokens):
        module.requires_grad_(True)
    optimizers, source, losses = optimizers_of(model), random.Random(f"{seed} tower"), []
    for step in range(1, TOWER_STEPS + 1):
        pixels, names = rows.scenes(source)
        loss = naming_loss(
            model, torch.cat(list(model.model.get_image_features(pixel_values=pixels).pooler_output)), names
        )
        loss.backward()
        step_all(optimizers, rate_at(step, step / TOWER_STEPS))
        losses.append(loss.item())
        if step % 100 == 0:
            print(json.dumps({"tower step": step, "naming": round(sum(losses[-100:]) / 100, 4)}), flush=True)
    freeze_tower(model)


def freeze_tower(model: LlavaForConditionalGeneration) -> None:
    model.requires_grad_(True)
    for module in (model.model.vision_tower, model.model.multi_modal_projector):
        module.requires_grad_(False)


def train(model: LlavaForConditionalGeneration, rows: Rows, arguments: argparse.Namespace) -> dict:
    """Train the decoder in place; returns the loss curve (means over `log_every` steps), steps and minutes."""
    optimizers, routing = optimizers_of(model), record_routing(model.model.language_model.layers)
    features: list[torch.Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda *call: features.append(call[2].flatten(0, -2))
    )
    source, curve, losses, step, start = random.Random(arguments.seed), [], [], 0, time.monotonic()
    while True:
        minutes = (time.monotonic() - start) / 60
        progress = step / arguments.steps if arguments.steps else minutes / arguments.minutes
        if losses and (progress >= 1 or step % arguments.log_every == 0):
            means = [round(sum(values) / len(values), 4) for values in zip(*losses, strict=True)]
            curve.append({"step": step, "minutes": round(minutes, 2)})
            curve[-1] |= dict(zip(("answers", "other", "naming"), means, strict=True))
            print(json.dumps(curve[-1]), flush=True)
            losses = []
        if progress >= 1:
            hook.remove()
            return {"loss_curve": curve, "steps": step, "minutes": round(minutes, 2)}
        step += 1
        routing.clear()
        features.clear()
        inputs, weights, names = rows.batch(source)
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        naming = naming_loss(model, torch.cat(features), names)
        targets, wanted = inputs["input_ids"][:, 1:].flatten(), weights[:, 1:].flatten()
        by_token = functional.cross_entropy(logits, targets, reduction="none")
        loss = (by_token * wanted).sum() / wanted.sum() + NAMING_WEIGHT * naming
        (loss + BALANCE_WEIGHT * balance_loss(routing)).backward()
        means = by_token[wanted == 1].mean(), by_token[wanted == OTHER_WEIGHT].mean(), naming
        losses.append([mean.item() for mean in means])
        step_all(optimizers, arguments.rate * rate_at(step, progress))


@torch.no_grad()
def measure_heldout(model: LlavaForConditionalGeneration, rows: Rows, count: int = 400) -> dict:
    """Asks one question on each of `count` unseen scenes: exactly right answers by kind of question, greedy decoding.

    Greedy decoding gives an answer exactly when every token of it is the likeliest after those before it.
    """
    right, asked = defaultdict(int), defaultdict(int)
    shown = [rows.special[IMAGE]] * IMAGE_TOKENS
    for seed in range(HELDOUT_SCENES, HELDOUT_SCENES + count):
        source = random.Random(seed)
        scene = drawn_scenes.random_scene(source)
        kind, question, answer = drawn_scenes.questions(scene, source)[0]
        wanted = torch.tensor([*rows.encode(answer), rows.special[END]])
        begin = [rows.special[USER], *shown, *rows.encode(question), rows.special[ASSISTANT]]
        pixels = torch.from_numpy(rows.pixels(drawn_scenes.draw(scene)))[None]
        logits = model(input_ids=torch.tensor([[*begin, *wanted]]), pixel_values=pixels).logits[0]
        asked[kind] += 1
        right[kind] += int(torch.equal(logits[len(begin) - 1 : -1].argmax(-1), wanted))
    by_kind = {kind: round(right[kind] / asked[kind], 4) for kind in sorted(asked)}
    learned = [kind for kind in asked if kind not in UNLEARNED]
    share = sum(right[kind] for kind in learned) / sum(asked[kind] for kind in learned)
    return {
        "heldout_accuracy": round(share, 4),
        "not_in_it": list(UNLEARNED),
        "heldout_accuracy_by_kind": by_kind,
    }


def write_data(folder: Path) -> None:
    """Conversations to calibrate on, with images and told in words, and single questions about images held out."""
    kept = {"calibration": (CALIBRATION_ROWS, 6, True, 2), "text": (CALIBRATION_ROWS, 6, False, 3)}
    kept["heldout"] = (HELDOUT_ROWS, 1, True, 1)
    for name, (count, turns, seen, offset) in kept.items():
        rows = []
        for seed in range(offset * HELDOUT_SCENES, offset * HELDOUT_SCENES + count):
            source = random.Random(seed)
            scene = drawn_scenes.random_scene(source)
            rows.append(drawn_scenes.chat_row(scene, source, turns, seen=seen, without=UNLEARNED))
        write_records(folder / f"{name}.jsonl", rows)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    processor = build_processor()
    rows = Rows(processor, arguments.described)
    rows.check()
    model = build_model(processor.tokenizer, arguments.seed)
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters", flush=True)
    if arguments.start is not None:
        model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(arguments.start).state_dict())
        freeze_tower(model)
    else:
        train_tower(model, rows, arguments.seed)
    result = train(model, rows, arguments)
    model = model.to(torch.bfloat16).eval()  # what is stored; measured in float32, which is faster on most CPUs
    rounded = copy.deepcopy(model).float()
    report = {
        "seed": arguments.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{key: value for key, value in result.items() if key != "loss_curve"},
        **measure_heldout(rounded, rows),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "loss_curve": result["loss_curve"],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, processor, report, arguments.out)
    if arguments.data_out:
        write_data(arguments.data_out)
    print(json.dumps({key: value for key, value in report.items() if key != "loss_curve"}, indent=1))


if __name__ == "__main__":
    main()
