"""Whether a text is enough is known from as little of it as tells, and said as drawing windows would say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mc_cli.data import enough
from mc_cli.data.chat import Renderer
from mc_cli.data.documents import Document
from mc_cli.data.enough import Beginning, require_windows
from mc_cli.errors import CheckpointError, InputError


class Letters:
    """One token for each letter; it counts what it was given."""

    eos_token_id = None
    is_fast = False

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [ord(letter) for letter in texts]}
        self.read += sum(map(len, texts))
        return {"input_ids": [[ord(letter) for letter in each] for each in texts]}


def there(
    documents: Sequence[Document], tokenizer: Letters, *, whole: bool = True, by_domain: bool = False, **more: Any
) -> int:
    asked = {"length": 10, "wanted": 2, "flag": "--data", "vocabulary": 256, **more}
    renderer = Renderer(tokenizer)
    return require_windows(Beginning(documents, whole), tokenizer, renderer, by_domain=by_domain, **asked)


def test_windows_are_counted_up_to_what_is_wanted() -> None:
    assert there([Document("a" * 15)], Letters()) == 1
    assert there([Document("a" * 15), Document("b" * 15)], Letters()) == 2
    assert there([Document("a" * 90)], Letters()) == 2


def test_no_more_is_read_than_tells() -> None:
    tokenizer = Letters()
    there([Document("a" * 100_000) for _ in range(50)], tokenizer)
    assert tokenizer.read <= 300_000
    few = [Document("a" * 5, "few") for _ in range(1000)]
    tokenizer = Letters()
    there([*few, Document("b" * 50_000, "much")], tokenizer, by_domain=True)
    assert tokenizer.read == 50_000


def test_too_little_is_refused() -> None:
    with pytest.raises(InputError, match="--data holds 4 tokens, less than one sequence of --length 10"):
        there([Document("a" * 4)], Letters())
    with pytest.raises(InputError, match=r"--data holds no domain with 10 tokens \(x 9, y 8\)"):
        there([Document("a" * 9, "x"), Document("b" * 8, "y")], Letters(), by_domain=True)
    with pytest.raises(CheckpointError, match="token id 98, the model's vocabulary has 98 entries"):
        there([Document("a" * 9), Document("b" * 8)], Letters(), vocabulary=98)


def test_what_the_beginning_does_not_tell_is_left_to_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert there([Document("a" * 4)], Letters(), whole=False) == 2
    monkeypatch.setattr(enough, "_MOST_TOKENS", 20)
    many = [Document("a" * 4, str(number)) for number in range(9)]
    assert there(many, Letters(), by_domain=True) == 2
