"""The chain on rows with images, against a tiny model as transformers runs it, row by row and without padding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mc_cli.artifacts.calibration import LayerRouting, read_inventory, read_sensitivities, routing_file
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.pruning import read_pruning
from mc_cli.artifacts.quantization import read_report
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.coding.linears import TokenMoments
from mc_cli.data.batches import Batch, read_calibration
from mc_cli.data.chat import ChatSettings, Renderer
from mc_cli.data.documents import read_documents
from mc_cli.data.image_rows import RowMaker, evaluation_rows
from mc_cli.data.kinds import IMAGE, PADDING, token_weights
from mc_cli.data.pictures import image_source
from mc_cli.errors import PlanError
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.packed.packed_model import stored_sizes
from mc_cli.parts import Role
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, PruneSettings, QuantizerSettings, RunSettings
from mc_cli.skipping.pruning import pruned, pruners, remove_pruning
from mc_cli.skipping.token_kinds import GivenKinds
from mc_cli.stages import export
from mc_cli.walking.layerwise import LayerWalk
from tests.tiny_chain import run_allocate, run_calibrate, run_export, run_prune_eval, run_quantize, run_score
from tests.tiny_vision import asked, build_tiny_vision, noise, turns, uri, write_rows


class Chain(NamedTuple):
    folder: Path
    work: Path
    heldout: Path
    model: Any
    batch: Batch


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A few conversations, one of them without an image, and as many questions that are held out."""
    folder = tmp_path_factory.mktemp("images")
    source, work = build_tiny_vision(folder / "model"), folder / "work"
    rows = [asked(seed, question, "a red ring") for seed, question in enumerate(("what?", "which one is it?", "and?"))]
    both = [{"type": "image", "image": uri(noise(seed))} for seed in (7, 8)]
    told = turns("a red ring is at the top. what is there?", "a ring")
    data = write_rows(folder / "data.jsonl", *rows, turns(both, "two"), told)
    heldout = write_rows(folder / "heldout.jsonl", *(asked(20 + seed, "so " * seed, "yes") for seed in range(3)))
    run_calibrate(work, source, data, length=96, gradient_tokens=10_000)
    run_score(work, bits=(2, 3), loss_tokens=32)
    run_allocate(work, target_stored_bits=2.8)
    run_quantize(work)
    run_prune_eval(work, heldout, length=96, stride=0)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    vocabulary = model.config.text_config.vocab_size
    return Chain(source, work, heldout, model, read_calibration(work / "calibration", vocabulary=vocabulary))


def unpadded(batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
    """The model's inputs of each row, without padding."""
    assert batch.kinds is not None
    for row in range(batch.rows):
        one = batch.select(slice(row, row + 1))
        length = int((batch.kinds[row] != PADDING).sum())
        yield {**one.inputs, "input_ids": one.token_ids[:, :length]}


def test_routing_is_that_of_whole_rows_by_kind_of_token(chain: Chain) -> None:
    batch, layers = chain.batch, chain.model.model.language_model.layers
    assert batch.kinds is not None and batch.real is not None
    chosen: list[list[torch.Tensor]] = [[] for _ in layers]
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1]))
        for layer, seen in zip(layers, chosen, strict=True)
    ]
    with torch.no_grad():
        for inputs in unpadded(batch):
            chain.model(**inputs)
    for handle in handles:
        handle.remove()
    kinds = batch.kinds[batch.kinds != PADDING]
    for number, seen in enumerate(chosen):
        index = torch.cat(seen)
        found = LayerRouting.read(chain.work / "calibration" / routing_file(number))
        assert found.token_count == len(index) == batch.real_tokens
        assert list(found.routing_count) == torch.bincount(index.reshape(-1), minlength=8).tolist()
        images = torch.bincount(index[kinds == IMAGE].reshape(-1), minlength=8).tolist()
        assert list(found.by_kind["image"].routing_count) == images
        assert sum(entry.token_count for entry in found.by_kind.values()) == found.token_count


def test_sensitivities_are_of_answers_alone(chain: Chain) -> None:
    """An error at a token that no answer looks back to costs nothing: padding, and what is behind the last answer."""
    inventory = read_inventory(chain.work / "calibration" / "inventory.json")
    kinds, answers = chain.batch.kinds, chain.batch.answers
    assert kinds is not None and answers is not None
    last = torch.stack([answer.nonzero()[-1, 0] for answer in answers])  # predicted from the token in front of it
    behind = torch.arange(answers.shape[1])[None] >= last[:, None]
    for sensitivity in read_sensitivities(chain.work / "calibration", inventory).values():
        scale = sensitivity.token_scale.reshape(kinds.shape)
        assert bool((scale[kinds == PADDING] == 0).all())
        assert float(scale[kinds != PADDING].mean()) == pytest.approx(1, rel=1e-4)
    # Nothing chooses experts behind the last layer, so that answers are all that is felt there.
    assert bool((scale[behind] == 0).all())


def test_moments_weigh_tokens_by_their_kind(chain: Chain) -> None:
    config: Any = read_config(chain.folder)
    source = Checkpoint(chain.folder, config, dtype=torch.float32, device=torch.device("cpu"))
    walk = LayerWalk(source, chain.batch, batch_size=2)
    hessian = torch.zeros(64, 64)
    moments = TokenMoments(walk, "a module", hessian)
    counted = sum(moments.add(rows, walk.hidden[rows]) for rows in walk.batches())
    assert chain.batch.kinds is not None and counted == chain.batch.real_tokens
    weights = token_weights(chain.batch.kinds).double()
    wanted = torch.einsum("rl,rlf,rlg->fg", weights, walk.hidden.double(), walk.hidden.double())
    assert torch.allclose(hessian.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_loss_and_right_answers_are_those_of_whole_models(chain: Chain, tmp_path: Path) -> None:
    found = Evaluation.read(chain.work / "evaluation" / "eval.json")
    run_export(chain.work, tmp_path / "out", "transformers")
    packed = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    losses, right = [0.0, 0.0], [0, 0]
    tokens = answers = 0
    for line in chain.heldout.read_text().splitlines():
        messages = json.loads(line)["messages"]
        image = image_source("row", messages[0]["content"][0]["image"], None).picture()
        text = processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        asked = processor(images=[image], text=text, return_tensors="pt", add_special_tokens=False)
        wanted = processor.tokenizer(f"{messages[1]['content']}<|end|>", add_special_tokens=False, return_tensors="pt")
        wanted = wanted["input_ids"]
        tokens, answers = tokens + wanted.shape[1], answers + 1
        for number, model in enumerate((chain.model, packed)):
            inputs = {**asked, "input_ids": torch.cat([asked["input_ids"], wanted], 1)}
            del inputs["attention_mask"]
            with torch.no_grad():
                logits = model(**inputs).logits[0, asked["input_ids"].shape[1] - 1 : -1]
                given = model.generate(**asked, max_new_tokens=wanted.shape[1], do_sample=False)
            losses[number] += float(torch.nn.functional.cross_entropy(logits, wanted[0], reduction="sum"))
            right[number] += torch.equal(given[0, asked["input_ids"].shape[1] :], wanted[0])
    assert found.answers is not None and found.total.tokens == tokens
    assert found.total.original_loss == pytest.approx(losses[0] / tokens, rel=1e-4)
    assert found.total.packed_loss == pytest.approx(losses[1] / tokens, rel=1e-3)
    assert (found.answers.answers, found.answers.original_right, found.answers.packed_right) == (answers, *right)
    assert set(found.kinds) == {"text", "special"} and set(found.router_changes_by_kind) == {"text", "image", "special"}


def test_dense_export_sees_what_the_packed_model_sees(chain: Chain, tmp_path: Path) -> None:
    logits = []
    for format in ("transformers", "dense"):
        run_export(chain.work, tmp_path / format, format)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / format, dtype=torch.float32).eval()
        assert AutoProcessor.from_pretrained(tmp_path / format).image_token == "<image>"
        with torch.no_grad():
            logits.append(torch.cat([model(**inputs).logits[0] for inputs in unpadded(chain.batch)]))
    off = (logits[0] - logits[1]).norm(dim=-1) / logits[1].norm(dim=-1)
    assert float(off.median()) < 0.02  # the dense weights are rounded to bfloat16


@pytest.mark.parametrize("policy", ["otp", "odp"])
def test_policies_skip_calls_as_in_whole_rows(chain: Chain, tmp_path: Path, policy: str) -> None:
    """Padding is neither counted nor looks at anything, losses are those of answers, kinds have thresholds apart."""
    training = {"otp_steps": 4, "otp_batch": 2} if policy == "otp" else {}
    asked = PruneSettings(policy=(policy,), target_rate=0.2, **training)
    run_prune_eval(chain.work, chain.heldout, variant="main", force=True, length=96, stride=0, prune=asked)
    found = Evaluation.read(chain.work / "evaluation" / "eval.json").pruning
    point = next(entry for entry in found["points"] if entry["chosen"])
    run_export(chain.work, tmp_path / "out", "transformers")
    packed: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    pruning, learned = read_pruning(chain.work / "pruning" / policy)
    kinds = GivenKinds(pruning.kind_tokens)
    runs = pruners(pruning, pruning.points[pruning.chosen], learned, count=True, kinds=kinds)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    documents = read_documents(str(chain.heldout), split="train", text_field="text", images=True)
    maker = RowMaker(processor, Renderer(processor.tokenizer, ChatSettings()), packed.config)
    windows = evaluation_rows(documents, maker, length=96, max_sequences=0)

    @torch.no_grad()
    def loss() -> float:
        total = 0.0
        for row, inputs in enumerate(unpadded(windows.batch)):
            logits = packed(**inputs).logits[0, windows.places(row)]
            total += float(torch.nn.functional.cross_entropy(logits, windows.labels(row), reduction="sum"))
        return total

    as_loaded = loss()
    remove_pruning(packed)
    with ExitStack() as stack:
        stack.enter_context(kinds.watching(packed, next(iter(runs))))
        for path, pruner in runs.items():
            stack.enter_context(pruned(packed, path, pruner))
        total = loss()
    assert as_loaded == pytest.approx(total, rel=1e-6)
    assert set(point["thresholds_by_kind"]) == set(point["rate_by_kind"]) == {"text", "image", "special"}
    assert point["rate_by_kind"]["image"] > point["rate"]  # behind the last layer nothing is felt of an image's tokens
    assert point["tokens"] == int(windows.fresh.sum()) and point["answers"] == len(documents)
    assert point["loss"] == pytest.approx(total / point["tokens"], rel=1e-3)
    kept = torch.cat([part for pruner in runs.values() for part in pruner.kept or []])
    assert point["rate"] == pytest.approx(1 - float(kept.double().mean()) / 2, abs=0.01)
    assert sum(found["token_classes"].values()) == windows.batch.real_tokens
    assert found["token_classes"]["image"] == 9 * len(documents)


def test_towers_are_packed_where_asked(chain: Chain, tmp_path: Path) -> None:
    """Each linear of tower and projector, by its inputs on all images; kept by default, refused without images."""
    coded = {"quantizer": QuantizerSettings(quantizer="gptq")}
    seen = {"vision": 0, "projector": 0}
    assert not {row.role for row in read_report(chain.work / "packed" / "report" / "rest.json")} & seen.keys()
    run_score(chain.work, bits=(2, 3), loss_tokens=32, force=True, **coded)
    run_allocate(chain.work, variant="eyes", target_stored_bits=2.8, vision_bits=4)
    run_quantize(chain.work, variant="eyes", **coded)
    folder = WorkDir(chain.work, "eyes").folder("quantize")
    images = int(chain.batch.inputs["pixel_values"].shape[0])
    for row in read_report(folder / "report" / "rest.json"):
        if row.role in seen:
            seen[row.role] += 1
            assert (row.outcome, row.bits) == ("quantized", 4)
            assert row.tokens == images * (9 if row.role == "projector" else 10)
    assert seen == {"vision": 12, "projector": 2}
    stored = stored_sizes(folder)
    assert stored[Role.VISION].codes > 0 and stored[Role.PROJECTOR].codes > 0
    export.run(
        ExportSettings(format="transformers", out=str(tmp_path / "out")),
        RunSettings(device="cpu"),
        chain.work,
        variant="eyes",
        force=False,
        progress=SilentProgress(),
    )
    packed = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    pixels = chain.batch.inputs["pixel_values"]
    with torch.no_grad():
        both = [each.model.get_image_features(pixel_values=pixels).pooler_output for each in (packed, chain.model)]
    features = [torch.cat(list(each)) for each in both]
    assert 0.01 < float((features[0] - features[1]).norm() / features[1].norm()) < 0.3
    told = write_rows(
        tmp_path / "told.jsonl", *(turns(f"a red ring. what is there {'?' * n}", "a ring") for n in range(9))
    )
    run_calibrate(tmp_path / "work", chain.folder, told, length=24, gradient_tokens=24)
    run_score(tmp_path / "work", bits=(2, 3), loss_tokens=24)
    run_allocate(tmp_path / "work", target_stored_bits=2.8, vision_bits=4)
    with pytest.raises(PlanError, match="text alone"):
        run_quantize(tmp_path / "work")
