"""How much attention each token receives from later tokens: column sums of the attention map, made block by block.

No attention map is kept and the model's attention implementation stays what it is: inside `watching_attention` the
functions that transformers dispatches to also add up columns from the queries and keys that they are given anyway,
`_BLOCK_ROWS` rows of the map at a time. Families that compute attention only in their own eager code have the map at
hand; there a hook adds up its columns.

Every row is scaled by the number of tokens that it sees, so that 1 is what a uniform look gives and long and short
contexts compare. During a forward over a prompt a token can know the looks of the tokens behind it in the same forward;
while decoding it knows nothing yet, since nobody has looked at the newest token. So the mean over viewers is drawn
towards a prior by `PRIOR_VIEWERS` imagined viewers, and a token without viewers has the prior alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mc_cli.models.experts import is_standard_experts

PRIOR_VIEWERS = 4.0
_BLOCK_ROWS = 128
_WATCHED_MARK = "_mc_watched"
_WATCH = "_mc_watch"  # key in a module's __dict__: the watch of its decoder layer


@dataclass
class Received:
    """Column sums of one layer's attention over the tokens of one forward.

    looks    [batch, tokens] float32: sum over later tokens of (attention, mean over heads) * (tokens the viewer sees)
    viewers  [batch, tokens] float32: how many later tokens could look
    """

    looks: Tensor
    viewers: Tensor

    def estimate(self, prior: float) -> Tensor:
        """[batch * tokens] float32: the mean look, with `prior` where few have looked."""
        drawn = (self.looks + PRIOR_VIEWERS * prior) / (self.viewers + PRIOR_VIEWERS)
        return drawn.reshape(-1)


@torch.no_grad()
def received_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    viewers: Tensor | None = None,
    block_rows: int = _BLOCK_ROWS,
) -> Received:
    """The attention that the last tokens of `key`, those of this forward, receive from the queries behind them.

    query  [batch, heads, tokens, head_dim];  key [batch, key heads, past + tokens, head_dim]
    mask   None for causal; [batch or 1, heads or 1, tokens, past + tokens], bool (True = seen) or added to the logits
    sinks  [heads] logits of a place that no token has, which takes its share of each row
    viewers  [batch, tokens] bool: whose looks count; None: all
    Rows of padding tokens are left out where the mask shows them: they see tokens behind themselves, or not themselves.
    """
    batch, heads, tokens, features = query.shape
    past = key.shape[-2] - tokens
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scale = features**-0.5 if scaling is None else scaling
    looks = torch.zeros(batch, tokens, device=query.device)
    counts = torch.zeros(batch, tokens, device=query.device)
    for begin in range(0, tokens, block_rows):
        rows = slice(begin, min(begin + block_rows, tokens))
        seen = _seen(mask, rows, past, key.shape[-2], query.device)
        logits = (query[:, :, rows] @ key.transpose(-1, -2)).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            beside = sinks.float().reshape(1, -1, 1, 1).expand(batch, heads, logits.shape[2], 1)
            logits = torch.cat([logits, beside], dim=-1)
        attention = logits.softmax(-1).nan_to_num()[..., : key.shape[-2]].mean(1)
        found = _columns(attention, seen.any(1).expand(batch, -1, -1), rows, past, viewers)
        looks += found.looks
        counts += found.viewers
    return Received(looks, counts)


@torch.no_grad()
def received_of_map(attention: Tensor, mask: Tensor | None = None, viewers: Tensor | None = None) -> Received:
    """The received attention from a map [batch, heads, tokens, past + tokens] that a family has made itself.

    mask   as the family was given it; without one every place in a causal row counts as seen
    viewers  [batch, tokens] bool: whose looks count; None: all
    """
    tokens, past = attention.shape[-2], attention.shape[-1] - attention.shape[-2]
    seen = _seen(mask, slice(0, tokens), past, attention.shape[-1], attention.device)
    seen = seen.any(1).expand(len(attention), -1, -1)
    return _columns(attention.float().mean(1), seen, slice(0, tokens), past, viewers)


def _columns(attention: Tensor, seen: Tensor, rows: slice, past: int, viewers: Tensor | None) -> Received:
    """Adds up columns of some rows of a map; attention, seen [batch, rows, past + tokens]; viewers as above."""
    total = seen.shape[-1]
    own = torch.arange(rows.start, rows.stop, device=attention.device) + past  # the rows' own columns
    places = torch.arange(total, device=attention.device)
    sees_ahead = (seen & (places > own[:, None])).any(-1)
    real = seen.gather(-1, own[None, :, None].expand(len(seen), -1, 1))[..., 0] & ~sees_ahead
    if viewers is not None:
        real = real & viewers[:, rows]
    counts = seen & (places < own[:, None]) & real[..., None]
    weighed = attention * counts * seen.sum(-1, keepdim=True)
    return Received(weighed.sum(1)[:, past:], counts.float().sum(1)[:, past:])


def _seen(mask: Tensor | None, rows: slice, past: int, total: int, device: torch.device) -> Tensor:
    """[batch or 1, heads or 1, rows, total] bool: which keys a row may look at."""
    if mask is None:
        own = torch.arange(rows.start, rows.stop, device=device) + past
        return (torch.arange(total, device=device) <= own[:, None])[None, None]
    part = mask[..., rows, :total]
    return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2


class AttentionWatch:
    """Carries the received attention from a decoder layer's attention to its experts; a reader takes it away.

    received  of this forward; None before its attention has run, and where nobody could look:
    alone     how many sequences there are, each with a single token, as while decoding; 0 = others, or not run yet
    maps      what makes them of whole attention maps, for families whose own code has them
    real      [tokens] bool of all forwards, one behind the other: what is no padding; padding looks at nothing
    """

    def __init__(self, real: Tensor | None = None) -> None:
        self._real = real
        self._seen = 0  # tokens of the forwards before
        self.received: Received | None = None
        self.alone = 0
        self.maps: _MapHooks | None = None

    def take(self) -> Received | None:
        """The attention received in this forward; a second call gives None."""
        received, self.received, self.alone = self.received, None, 0
        if received is not None:
            self._seen += received.looks.numel()
        return received

    def viewers(self, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """[batch, tokens] bool of the forward that runs: who is no padding; None: all."""
        if self._real is None:
            return None
        return self._real[self._seen : self._seen + batch * tokens].reshape(batch, tokens).to(device)

    def estimate(self, tokens: int, prior: float) -> Tensor | float | None:
        """[tokens] float32, one number where it is the same for all; None where these tokens were not watched.

        Takes what was received, and the hooks off where an attention function has made it: each costs a decoded token
        about a hundredth of a small model's time. They come back should those functions serve no more.
        """
        alone, received = self.alone, self.take()
        if self.maps is not None:
            self.maps.needed(self.maps.served or not (alone or received))
        if alone == tokens:
            return prior
        if received is None or received.looks.numel() != tokens:
            return None
        return received.estimate(prior)


class _MapHooks:
    """Hooks on modules that may hold attention, which give whole maps to a watch; on or off.

    served  the last forward's map was found by them
    """

    def __init__(self, modules: Sequence[nn.Module], watch: AttentionWatch) -> None:
        self._modules = modules
        self._watch = watch
        self._handles: list[Any] = []
        self.served = False
        self.needed(True)

    def needed(self, needed: bool) -> None:
        self.served = False
        if needed and not self._handles:
            self._handles = [m.register_forward_hook(self._take_map, with_kwargs=True) for m in self._modules]
        elif self._handles and not needed:
            self.remove()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _take_map(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _holds_map(output):
            mask = kwargs.get("attention_mask")
            mask = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
            attention = output[1]
            viewers = self._watch.viewers(len(attention), attention.shape[-2], attention.device)
            self._watch.received = received_of_map(attention, mask, viewers)
            self.served = True


@contextmanager
def watching_attention(decoder_layer: nn.Module, watch: AttentionWatch) -> Iterator[None]:
    """Inside, each forward of `decoder_layer` leaves what its tokens received in `watch`."""
    handles = watch_attention(decoder_layer, watch)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_attention(decoder_layer: nn.Module, watch: AttentionWatch) -> list[Any]:
    """Makes a layer's attention report to `watch` until the returned handles are removed."""
    _watch_functions()
    # Norms have no attention inside, and what holds the experts runs after it: hooks there would only take time.
    holding = [child for child in decoder_layer.children() if _may_attend(child)]
    watch.maps = _MapHooks(holding, watch)
    return [_Mark([module for child in holding for module in child.modules()], watch), watch.maps]


def _may_attend(child: nn.Module) -> bool:
    inner = list(child.modules())[1:]
    return bool(inner) and not any(is_standard_experts(module) for module in inner)


class _Mark:
    """Tells the attention functions which watch a module belongs to, until it is removed."""

    def __init__(self, modules: Sequence[nn.Module], watch: AttentionWatch) -> None:
        self._before = [(module, module.__dict__.get(_WATCH)) for module in modules]
        for module in modules:
            module.__dict__[_WATCH] = watch

    def remove(self) -> None:
        for module, watch in self._before:
            if watch is None:
                del module.__dict__[_WATCH]
            else:
                module.__dict__[_WATCH] = watch


def _holds_map(output: Any) -> bool:
    """True for (hidden states, attention weights [batch, heads, tokens, keys])."""
    if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[0], Tensor):
        return False
    weights = output[1]
    return isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[-2] == output[0].shape[-2]


def _watch_functions() -> None:
    """Lets every attention function that transformers dispatches to look whether it is watched; once per function."""
    for name in list(ALL_ATTENTION_FUNCTIONS):
        function = ALL_ATTENTION_FUNCTIONS[name]
        if not hasattr(function, _WATCHED_MARK) and not name.startswith("paged|"):
            ALL_ATTENTION_FUNCTIONS.register(name, _watched(function))


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        watch = module.__dict__.get(_WATCH)
        if watch is not None and query.ndim == 4:
            if query.shape[-2] == 1:  # decoding: nobody is behind the newest token
                watch.alone = query.shape[0]
            else:
                mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 else None
                scaling, softcap, sinks = (kwargs.get(name) for name in ("scaling", "softcap", "s_aux"))
                viewers = watch.viewers(query.shape[0], query.shape[-2], query.device)
                watch.received = received_attention(
                    query, key, mask, scaling=scaling, softcap=softcap, sinks=sinks, viewers=viewers
                )
        return function(module, query, key, value, attention_mask, **kwargs)

    setattr(attend, _WATCHED_MARK, True)
    return attend
