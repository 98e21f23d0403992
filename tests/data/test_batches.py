"""Batches of model inputs: rows taken out with all that belongs to them, and what does not fit together refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mc_cli.artifacts.calibration import INPUTS, TOKENS
from mc_cli.artifacts.files import write_tensors
from mc_cli.data.batches import Batch, read_calibration
from mc_cli.errors import ArtifactError, ShapeError

IDS = torch.arange(24).view(4, 6)


def seeing() -> Batch:
    """Rows with two images, none, one and none; an image is as many patches as its number says."""
    inputs = {
        "input_ids": IDS,
        "mm_token_type_ids": IDS % 2,
        "image_sizes": torch.tensor([[1, 2], [1, 1], [2, 2]]),
        "pixel_values": torch.arange(7.0)[:, None],
    }
    return Batch(inputs, {"image_sizes": (2, 0, 1, 0), "pixel_values": (3, 0, 4, 0)})


def test_text_is_its_token_ids() -> None:
    batch = Batch.of_text(IDS)
    assert (batch.rows, batch.length, batch.tokens) == (4, 6, 24)
    assert dict(**batch) == {"input_ids": batch.token_ids} and batch["input_ids"] is IDS
    part = batch.select(slice(1, 3)).token_ids
    assert torch.equal(part, IDS[1:3]) and part.data_ptr() == IDS[1:].data_ptr(), "a view"
    assert torch.equal(batch.select(torch.tensor([3, 0])).token_ids, IDS[[3, 0]])
    assert batch.select(slice(-1, None)).rows == 1 and batch.select(slice(99)).rows == 4


def test_rows_take_their_images_along() -> None:
    part = seeing().select(torch.tensor([2, 1, 0]))
    assert torch.equal(part["pixel_values"].flatten(), torch.tensor([3.0, 4, 5, 6, 0, 1, 2]))
    assert part["image_sizes"].tolist() == [[2, 2], [1, 2], [1, 1]]
    assert part.counts == {"image_sizes": (1, 0, 2), "pixel_values": (4, 0, 3)}
    assert torch.equal(part["mm_token_type_ids"], (IDS % 2)[[2, 1, 0]])
    again = part.select(slice(0, 1))
    assert again["pixel_values"].flatten().tolist() == [3, 4, 5, 6] and again.counts["image_sizes"] == (1,)


def test_rows_without_an_image_name_none() -> None:
    part = seeing().select(slice(3, 4))
    assert set(part.keys()) == {"input_ids", "mm_token_type_ids"} and not part.counts
    assert set(seeing().text_alone().keys()) == {"input_ids"}


def test_all_tensors_go_to_the_device() -> None:
    moved = seeing().to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.inputs.values()} == {"meta"} and moved.counts == seeing().counts
    cast = seeing().to(torch.device("cpu"), torch.bfloat16).inputs
    assert {name for name, tensor in cast.items() if tensor.dtype == torch.bfloat16} == {"pixel_values"}
    assert cast["input_ids"].dtype == cast["image_sizes"].dtype == torch.int64


@pytest.mark.parametrize(
    ("inputs", "counts", "said"),
    [
        ({"pixel_values": IDS}, {}, "it has none"),
        ({"input_ids": IDS[0]}, {}, r"\[6\] torch.int64"),
        ({"input_ids": IDS.float()}, {}, "torch.float32"),
        ({"input_ids": IDS, "token_type_ids": IDS[:3]}, {}, r"4 entries of token_type_ids, here \[3, 6\]"),
        ({"input_ids": IDS, "pixel_values": IDS[:3]}, {"pixel_values": (1, 1, 0, 0)}, "2 entries of pixel_values"),
        ({"input_ids": IDS, "pixel_values": IDS}, {"pixel_values": (4,)}, "pixel_values for 1 rows; it has 4"),
        ({"input_ids": IDS}, {"pixel_values": (0, 0, 0, 0)}, "holds input_ids"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(
    inputs: dict[str, torch.Tensor], counts: dict[str, tuple[int, ...]], said: str
) -> None:
    with pytest.raises(ShapeError, match=said):
        Batch(inputs, counts)


def test_calibration_rows_come_from_the_stages_folder(tmp_path: Path) -> None:
    write_tensors(tmp_path / TOKENS, {"token_ids": IDS})
    assert torch.equal(read_calibration(tmp_path, vocabulary=24).token_ids, IDS)
    with pytest.raises(ArtifactError, match="vocabulary has 23"):
        read_calibration(tmp_path, vocabulary=23)


def test_lists_are_given_as_lists_from_the_processor_to_the_model_and_over_the_disk(tmp_path: Path) -> None:
    inputs = {"input_ids": IDS, "grid": torch.tensor([[2, 1], [1, 1], [3, 1]])}
    batch = Batch(inputs, {"grid": (2, 0, 1, 0)}, lists=frozenset({"grid"}))
    write_tensors(tmp_path / TOKENS, {"token_ids": IDS})
    write_tensors(tmp_path / INPUTS, batch.stored())
    for each in (batch, read_calibration(tmp_path, vocabulary=24)):
        assert each["grid"] == [[2, 1], [1, 1], [3, 1]] and isinstance(each["input_ids"], torch.Tensor)
        assert dict(**each.select(torch.tensor([2, 1])))["grid"] == [[3, 1]]
