"""Rows with images: in any of the usual forms they give the same inputs, kinds of token and measured answers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mc_cli.artifacts.files import DigestCache
from mc_cli.data.batches import Batch
from mc_cli.data.chat import ChatSettings
from mc_cli.data.inputs import Drawn, Feeder
from mc_cli.data.kinds import BALANCE, IMAGE, PADDING, SPECIAL, TEXT, token_weights
from mc_cli.data.text import TextSource, Windows, report_warnings
from mc_cli.errors import InputError
from mc_cli.models.model_folder import read_config
from tests.tiny_vision import build_tiny_vision, turns, uri, write_rows

QUESTION, ANSWER = "what is at a1?", "red circle"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.new("RGB", (48, 48), (200, 30, 30)).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vision(tmp_path_factory.mktemp("vision") / "model")


def feeder(model: Path, path: Path, *, images: bool = True) -> Feeder:
    config: Any = read_config(model)
    source = TextSource(str(path), "train", "text", ChatSettings(), images=images)
    return Feeder(model, config, config.get_text_config().vocab_size, source, trust_remote_code=False)


def drawn(model: Path, folder: Path, *rows: Mapping[str, Any], length: int = 128) -> Drawn[Batch]:
    path = write_rows(folder / "rows.jsonl", *rows)
    return feeder(model, path).calibration(sequences=9, length=length, seed=0)


def measured(model: Path, folder: Path, *rows: Mapping[str, Any]) -> Drawn[Windows]:
    path = write_rows(folder / "rows.jsonl", *rows)
    return feeder(model, path).evaluation(length=128, stride=0, max_sequences=0)


def test_all_forms_of_a_row_give_what_the_processor_gives(model: Path, picture: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(model)
    image = {"type": "image"}
    text = {"type": "text", "text": QUESTION}
    forms: list[dict[str, Any]] = [
        turns([{**image, "image": picture.name}, text], ANSWER),
        turns([{"type": "image_url", "image_url": {"url": uri(Image.open(picture))}}, text], ANSWER),
        {**turns([image, text], ANSWER), "images": [picture.name]},
        {**turns(f"<image>\n{QUESTION}", ANSWER), "image": str(picture)},
        {**turns(QUESTION, ANSWER), "image": picture.name},
        {
            "image": picture.name,
            "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}],
        },
    ]
    chat = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": ANSWER}]
    wanted = processor(
        images=[Image.open(picture)],
        text=processor.apply_chat_template(chat, tokenize=False),
        return_tensors="pt",
        add_special_tokens=False,
    )
    for form in forms:
        batch = drawn(model, tmp_path, form).made
        assert torch.equal(batch.token_ids, wanted["input_ids"]), form
        assert torch.equal(batch["pixel_values"], wanted["pixel_values"]) and batch.counts == {"pixel_values": (1,)}
        assert batch.kinds is not None and batch.answers is not None and batch.real is None
        assert int((batch.kinds == IMAGE).sum()) == 9
        assert processor.decode(batch.token_ids[0][batch.answers[0]]) == f"{ANSWER}<|end|>"


def test_rows_are_padded_and_images_follow_theirs(model: Path, picture: Path, tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), (10, 220, 30)).save(tmp_path / "other.png")
    told = turns("a longer question without an image, to which the others are padded: how many?", "two")
    both = turns([{"type": "image", "image": "scene.png"}, {"type": "image", "image": "other.png"}], "two")
    alone = {"image": "other.png", "text": "a green <image> square"}
    found = measured(model, tmp_path, told, turns([{"type": "image", "image": "scene.png"}], "one"), both, alone).made
    batch = found.batch
    assert batch.counts["pixel_values"] == (0, 1, 2, 1) and batch.kinds is not None and batch.real is not None
    green, red = (float(batch["pixel_values"][entry, 1].mean()) for entry in (2, 0))
    assert green > red
    assert torch.equal(batch.select(slice(3, 4))["pixel_values"], batch["pixel_values"][3:])
    lengths = (batch.kinds != PADDING).sum(-1)
    assert batch.real_tokens == int(lengths.sum()) and int(lengths.max()) == batch.length
    for row, length in enumerate(lengths.tolist()):
        assert bool((batch.kinds[row, length:] == PADDING).all()) and not bool(batch.answers[row, length:].any())
        assert torch.equal(found.labels(row), batch.token_ids[row][batch.answers[row]])
        assert torch.equal(found.places(row) + 1, batch.answers[row].nonzero()[:, 0])
    # A text without turns is measured whole, but for its first token and its images.
    words = (batch.kinds[3] == TEXT) | (batch.kinds[3] == SPECIAL)
    assert int(batch.answers[3].sum()) == int(words[1:].sum())


def test_weights_balance_images_and_text() -> None:
    kinds = torch.tensor([[TEXT, SPECIAL, *[IMAGE] * 8, PADDING, PADDING]], dtype=torch.uint8)
    weights = token_weights(kinds)[0].tolist()
    sides = {TEXT: (10 / 2) ** BALANCE, SPECIAL: (10 / 2) ** BALANCE, IMAGE: (10 / 8) ** BALANCE, PADDING: 0.0}
    raw = [sides[kind] for kind in kinds[0].tolist()]
    assert weights == pytest.approx([10 * weight / sum(raw) for weight in raw])
    assert sum(weights[:2]) == pytest.approx(0.5 * sum(weights[2:]))  # 2 of 10 tokens have a third, not a fifth
    assert token_weights(torch.zeros(1, 4, dtype=torch.uint8)).tolist() == [[1.0] * 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "image": "https://example.org/a.png"}, "is an address. Download it"),
        ({"text": "a", "image": "gone.png"}, "is no file"),
        ({"text": "a", "image": 3}, "not a path, a data URI or a picture"),
        ({"text": "a", "image": "data:image/png;base64,??"}, "is no base64"),
        ({"text": "a", "image": "data:image/png;base64,aGFsbG8="}, "cannot be read as an image"),
        ({**turns("<image> and <image>?", "x"), "image": "scene.png"}, "more <image> than the row has images"),
        (turns([{"type": "image"}], "x"), "more places for images than the row has"),
        ({"messages": [{"role": "assistant", "content": "so"}], "image": "scene.png"}, "have no place in the messages"),
        ({"text": "<image> and <image>", "image": "scene.png"}, "processor cannot make inputs of 1 images"),
    ],
)
def test_rows_that_cannot_be_read_are_named(
    row: dict[str, Any], message: str, model: Path, picture: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"line 1|rows\.jsonl") as caught:
        drawn(model, tmp_path, row)
    assert message in str(caught.value)


def test_rows_that_are_too_long_are_cut_behind_images_or_left_out(model: Path, picture: Path, tmp_path: Path) -> None:
    row = {**turns(QUESTION, ANSWER), "image": "scene.png"}
    late = turns([{"type": "text", "text": "long words before it " * 3}, {"type": "image", "image": "scene.png"}], "x")
    found = drawn(model, tmp_path, row, late, length=16)
    assert found.made.rows == 1 and found.made.length == 16
    assert found.images is not None and (found.images["cut"], found.images["left_out"]) == (1, 1)
    with pytest.raises(InputError, match="no row of at most 9 tokens"):
        drawn(model, tmp_path, row, length=9)


def test_a_model_that_reads_no_images_says_so(model: Path, picture: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"text": "some words " * 20, "image": "scene.png"})
    found = feeder(model, path, images=False).calibration(sequences=1, length=16, seed=0)
    assert found.images is None and found.made.kinds is None
    (warning,) = report_warnings(found.text)
    assert warning.startswith("1 rows have images, which this model does not read")


def test_digests_know_the_images_beside_the_rows(model: Path, picture: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"text": "a", "image": "scene.png"})

    def digest(images: bool) -> str:
        cache = DigestCache(tmp_path / "digests.json")
        return TextSource(str(path), "train", "text", images=images).digest(cache)

    before, blind = digest(True), digest(False)
    Image.new("RGB", (48, 48), (0, 0, 255)).save(picture)
    assert digest(True) != before and digest(False) == blind


def test_a_folder_of_images_is_read(model: Path, picture: Path, tmp_path: Path) -> None:
    found = feeder(model, tmp_path).calibration(sequences=2, length=32, seed=0).made
    assert found.rows == 1 and found.counts == {"pixel_values": (1,)}


def test_bytes_of_a_table_are_read(picture: Path) -> None:
    from mc_cli.data.pictures import image_source

    wanted = Image.open(picture).convert("RGB").tobytes()
    held = {"bytes": picture.read_bytes(), "path": None}
    for value in (held, picture.read_bytes(), Image.open(io.BytesIO(picture.read_bytes()))):
        assert image_source("row 1", value, None).picture().tobytes() == wanted
