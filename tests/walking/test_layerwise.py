"""The layer walk on a toy model: what layers may be handed, and what is refused."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn

from mc_cli.data.batches import Batch
from mc_cli.errors import FamilyError, InputError
from mc_cli.walking.layerwise import LayerWalk

TOKEN_IDS = torch.randint(0, 20, (5, 6), generator=torch.Generator().manual_seed(0))


class ToyLayer(nn.Module):
    """Adds to the hidden states what depends on them and on the token ids."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.answer = answer

    def forward(self, hidden_states: torch.Tensor, token_ids: torch.Tensor, *, shared: Any, scale: Any = None) -> Any:
        hidden = hidden_states + self.linear(hidden_states) + token_ids[..., None] * scale["factor"]
        if self.answer == "fills":
            shared["state"] = hidden
        return {"tuple": (hidden, None), "pair": (hidden, hidden.sum())}.get(self.answer, hidden)


class ToyModel(nn.Module):
    def __init__(self, answer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.answer = answer
        self.config = type("Config", (), {})()
        self.embed = nn.Embedding(20, 4)
        self.layers = nn.ModuleList(ToyLayer(answer) for _ in range(3))
        self.head = nn.Linear(4, 20)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        assert not use_cache
        hidden = self.embed(input_ids)
        shared: Any = UserDict()
        for index, layer in enumerate(self.layers):
            if self.answer == "skips" and index == 1:
                continue
            if self.answer == "scales":
                hidden = hidden * 2
            output = layer(hidden, input_ids, shared=shared, scale={"factor": torch.tensor(0.1)})
            hidden = output[0] if isinstance(output, tuple) else output
        return type("Output", (), {"logits": self.head(hidden)})()


class ToySource:
    layers_path = "layers"
    device = torch.device("cpu")

    def __init__(self, answer: str = "") -> None:
        self.model: ToyModel = ToyModel(answer).eval()

    def load(self, part: int) -> None: ...

    def free(self, layer: int) -> None: ...


class ToySeer(ToyModel):
    """Puts the features of a row's images, as many as it has, at its tokens 19."""

    def __init__(self) -> None:
        super().__init__("")
        self.tower = nn.Linear(2, 4)
        self.towers_run = 0

    def forward(self, input_ids: torch.Tensor, pixel_values: Any = None, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        if pixel_values is not None:
            self.towers_run += 1
            hidden[input_ids == 19] = self.tower(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden, input_ids, shared=UserDict(), scale={"factor": torch.tensor(0.1)})
        return type("Output", (), {"logits": self.head(hidden)})()


@torch.no_grad()
def expected(source: ToySource) -> torch.Tensor:
    return source.model(TOKEN_IDS).logits


def walked(source: ToySource, batch_size: int) -> torch.Tensor:
    walk = LayerWalk(source, Batch.of_text(TOKEN_IDS), batch_size=batch_size)
    for _ in range(walk.num_layers):
        walk.run_layer(advance=True)
    return torch.cat([walk.logits(rows) for rows in walk.batches()])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("answer", ["", "tuple"])
def test_arguments_that_depend_on_the_tokens_reach_their_batch(answer: str, batch_size: int) -> None:
    source = ToySource(answer)
    torch.testing.assert_close(walked(source, batch_size), expected(source))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_come_in_with_the_embeddings_and_go_on_in_the_hidden_states(batch_size: int) -> None:
    source = ToySource()
    source.model = ToySeer().eval()
    tokens, counts = TOKEN_IDS.clone() % 19, (2, 0, 0, 1, 3)
    for row, count in enumerate(counts):
        tokens[row, 1 : 1 + count] = 19
    pixels = torch.randn(sum(counts), 2, generator=torch.Generator().manual_seed(1))
    batch = Batch({"input_ids": tokens, "pixel_values": pixels}, {"pixel_values": counts})
    with torch.no_grad():
        whole = source.model(**batch).logits
    blind = source.model(tokens).logits
    walk = LayerWalk(source, batch, batch_size=batch_size)
    towers_run = source.model.towers_run
    for _ in range(walk.num_layers):
        walk.run_layer(advance=True)
    found = torch.cat([walk.logits(rows) for rows in walk.batches()])
    torch.testing.assert_close(found, whole)
    assert (found - blind).abs().max() > 1e-3
    assert source.model.towers_run == towers_run, "norm and head let no image through the tower again"


def test_layers_are_the_models_own_again_after_the_walk() -> None:
    source = ToySource()
    before = list(source.model.layers)
    walked(source, 2)
    assert list(source.model.layers) == before
    torch.testing.assert_close(source.model(TOKEN_IDS).logits, expected(source))


def test_a_pass_without_advancing_shows_outputs_and_leaves_the_walk_where_it_is() -> None:
    walk = LayerWalk(ToySource(), Batch.of_text(TOKEN_IDS), batch_size=2)
    before = walk.hidden.clone()
    seen: list[tuple[slice, torch.Tensor]] = []
    walk.run_layer(lambda rows, output: seen.append((rows, output)), advance=False)
    assert [rows for rows, _ in seen] == list(walk.batches()) and walk.depth == 0
    assert torch.equal(walk.hidden, before)
    walk.run_layer(advance=True)
    assert walk.depth == 1 and torch.equal(walk.hidden, torch.cat([output for _, output in seen]))


def test_gradients_flow_through_a_layer_and_the_head() -> None:
    walk = LayerWalk(ToySource(), Batch.of_text(TOKEN_IDS), batch_size=5)
    rows = next(walk.batches())
    hidden = walk.hidden.clone().requires_grad_()
    walk.head(rows, walk.call_layer(hidden, rows)).sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.any())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("pair", "hand more than hidden states"),
        ("fills", "hand more than hidden states"),
        ("scales", "changes the hidden states between its layers"),
        ("skips", "does not call each layer once"),
    ],
)
def test_layers_that_do_more_than_pass_hidden_states_on_are_refused(answer: str, reason: str) -> None:
    with pytest.raises(FamilyError, match=f"ToyModel cannot be run with one layer in memory: .*{reason}"):
        walked(ToySource(answer), 2)


def test_no_sequences() -> None:
    with pytest.raises(InputError, match="no calibration sequences"):
        LayerWalk(ToySource(), Batch.of_text(TOKEN_IDS[:0]), batch_size=2)


def test_saved_states_of_another_run_are_refused() -> None:
    walk = LayerWalk(ToySource(), Batch.of_text(TOKEN_IDS), batch_size=2)
    with pytest.raises(InputError, match=r"\(5, 6, 8\).*\(5, 6, 4\).*--force"):
        walk.restore(torch.zeros(5, 6, 8), 1)
    with pytest.raises(InputError, match=r"bfloat16.*float32"):
        walk.restore(walk.hidden.bfloat16(), 1)
