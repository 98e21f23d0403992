"""Whether a text is enough for what a stage will draw from it, known from as little of it as tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mc_cli.data import text
from mc_cli.data.chat import Renderer
from mc_cli.data.documents import ALL, Document
from mc_cli.data.tokenizing import token_ids

_MOST_TOKENS = 2**20  # beyond which a text that is still too short for what is asked is left to the stage


@dataclass(frozen=True)
class Beginning:
    """The first documents of a text. whole: whether they are all."""

    documents: Sequence[Document]
    whole: bool


def require_windows(
    found: Beginning,
    tokenizer: Any,
    renderer: Renderer,
    *,
    length: int,
    wanted: int,
    flag: str,
    by_domain: bool,
    vocabulary: int,
) -> int:
    """The number of windows of `length` tokens, counted up to `wanted`; `wanted` too where it is not known.

    by_domain   whether windows are of one domain each, as in evaluation, or of all documents joined
    vocabulary  entries of the model's embedding
    Raises what drawing them would: InputError where there is none, or chats lack a template that takes any of them;
    CheckpointError for a tokenizer that fails, or is of another model.
    """
    domains: dict[str, list[Document]] = {}
    for document in found.documents:
        domains.setdefault(document.domain if by_domain else ALL, []).append(document)
    tokens = Counter(dict.fromkeys(domains, 0))
    read = True  # whether all of the documents were
    largest, count = -1, 0
    for domain in sorted(domains, key=lambda name: -sum(map(_size, domains[name]))):
        for ids in token_ids(domains[domain], tokenizer, renderer):
            tokens[domain] += len(ids)
            count += len(ids)
            if max(ids, default=-1) > largest:
                largest = max(ids)
                text.check_vocabulary(torch.tensor([largest]), vocabulary)
            if tokens[domain] >= wanted * length or count > _MOST_TOKENS:
                break
        else:
            continue
        read = False
        break
    if not read and not renderer.rendered:
        _try_chats(found, renderer)
    if found.whole:
        text.require_rendered(renderer)
    if not read or not found.whole:
        return wanted
    if by_domain:
        text.require_domain(tokens, length, flag)
    else:
        text.require_sequence(tokens[ALL], length, flag)
    return min(wanted, sum(each // length for each in tokens.values()))


def _try_chats(found: Beginning, renderer: Renderer) -> None:
    """Chats one after another, up to one that the template takes, where text beside them was enough."""
    renderer.refused.clear()
    chats = [document.chat for document in found.documents if document.chat is not None]
    for chat in chats if found.whole else chats[:1]:
        if renderer.text(chat) is not None:
            return


def _size(document: Document) -> int:
    """Characters of a document, about."""
    return len(document.text) if document.chat is None else len(str(document.chat.messages))
