"""Reading an exported directory back as its users will, and comparing it with the packed model it was made from.

The exporter opens what it wrote. Every stored tensor that its reader shows is compared: packed ones bit by bit, dense
ones with what the packed model dequantizes to. Then both models compute logits for the same tokens, and the exported
one generates where its engine can.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.pruning import Pruning
from mc_cli.data.batches import Batch
from mc_cli.errors import ArtifactError, counted, listed
from mc_cli.measuring.logit_source import Generates, LogitSource, Open, Reading, Walked
from mc_cli.models.checkpoint import REST
from mc_cli.models.inventory import find_decoder_layers
from mc_cli.models.skeleton import build_skeleton, non_persistent_buffers, put_tensor, rebuild_buffers
from mc_cli.packed.dense_tensors import DenseTensors
from mc_cli.packed.packed_model import PackedSource

SEQUENCES, LENGTH, PROMPT, NEW_TOKENS = 2, 32, 8, 4
# Largest relative error of a token's logits, for the median token. The same numbers on two paths differ by the order of
# sums; a dense export also rounds each weight to its dtype, which a few layers amplify.
_SAME_WEIGHTS = {torch.float32: 1e-4}
_SAME_WEIGHTS_16_BIT = 2e-2
_ROUNDED_WEIGHTS_EPS = 16


@dataclass(frozen=True)
class ReadBack:
    """Findings of reading back; errors are norms of logit differences over norms of logits, per token."""

    method: str  # the reader's own words, such as "whole model"
    tensors: int  # number that were compared; 0 where the reader shows none
    tokens: int
    logit_error_median: float
    logit_error_max: float
    tolerance: float  # the largest median that passes
    same_top_token: float
    generated_tokens: int  # 0 where the reader does not generate
    # Median error against the packed model, where that is more than rounding to the export's dtype should make: the
    # other figures are then against the packed model with its weights rounded to that dtype.
    rounding_error: float | None = None

    @property
    def compared(self) -> str:
        """How it was read and what was compared, in a few words."""
        return f"{self.method}, {f'{self.tensors:,} tensors equal' if self.tensors else 'logits alone'}"

    @property
    def not_done(self) -> str | None:
        """The checks that could not be done, in a sentence for a warning; None where all were."""
        if self.method == Walked.method:
            return (
                "the exported model does not fit into the free memory, so it was read back layer by layer: all tensors "
                "and the logits were compared, but nothing was generated with it."
            )
        done = [word for word, count in (("tensors", self.tensors), ("generation", self.generated_tokens)) if count]
        if len(done) == 2:
            return None
        return (
            f"the exported model was read back by its format's own reader ({self.method}), which offers no "
            f"{' and no '.join(word for word in ('tensors', 'generation') if word not in done)}: its logits were "
            "compared with the packed model's."
        )


def read_back(
    exported: Path,
    packed: Path,
    open_export: Open,
    reading: Reading,
    *,
    dequantized: bool,
    pruning: tuple[Pruning, Mapping[str, Tensor]] | None = None,
) -> ReadBack:
    """The comparison of an exported directory with the packed folder it was made from.

    open_export  the exporter's `open`, which is called with `reading`
    dequantized  whether the export holds plain numbers in the model's own dtype
    pruning      the policy that the export carries, and what it learned: both models are compared under it
    Raises ArtifactError naming what differs, or what the reader said.
    """
    dtype, device = reading.dtype, reading.device
    original = PackedSource(packed, dtype=dtype, device=device, trust_remote_code=reading.trust_remote_code)
    batch = sample_batch(original.config)
    wanted = _Wanted(original, dequantized=dequantized, reading=reading, pruning=pruning)
    with closing(open_export(exported, replace(reading, look=wanted.compare))) as source:
        _raise_if_any(exported, wanted.problems)
        logits = source.logits(batch)
        _raise_if_any(exported, wanted.problems)
        method, generated = source.method, _generated(exported, source, batch)
    found = _compared_logits(exported, logits, Walked(original, pruning).logits(batch), wanted.tolerance(dtype))
    if not found["logit_error_median"] <= found["tolerance"] and wanted.dense is not None:
        twin = Walked(_RoundedTwin(wanted.dense, dtype=dtype, device=device))
        moved = found["logit_error_median"]
        found = _compared_logits(exported, logits, twin.logits(batch), _same_weights(dtype))
        found["rounding_error"] = moved
    if not found["logit_error_median"] <= found["tolerance"]:
        agree = "all tensors agree" if wanted.count else "it was written as read from the packed model"
        raise ArtifactError(
            f"{exported}: the exported model's logits differ from the packed model's by "
            f"{found['logit_error_median']:.2g} (relative, median token), more than {found['tolerance']:.2g}, though "
            f"{agree}. This is a defect of mc-cli, or of the exporter."
        )
    return ReadBack(method=method, tensors=wanted.count, tokens=batch.tokens, generated_tokens=generated, **found)


def _generated(exported: Path, source: LogitSource, batch: Batch) -> int:
    """How many tokens the exported model added to a prompt; 0 where its reader does not generate."""
    if not isinstance(source, Generates):
        return 0
    prompt = Batch.of_text(batch.token_ids[:1, :PROMPT])
    added = int(source.generate(prompt, NEW_TOKENS).shape[1] - prompt.length)
    if added <= 0:
        raise ArtifactError(f"{exported} loads, but generate adds no token.")
    return added


def _compared_logits(exported: Path, logits: Tensor, expected: Tensor, tolerance: float) -> dict[str, Any]:
    if logits.shape != expected.shape:
        raise ArtifactError(
            f"{exported}: its reader gives logits {list(logits.shape)}, the packed model's are {list(expected.shape)}. "
            "This is a defect of the exporter."
        )
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    return {
        "logit_error_median": float(errors.median()),
        "logit_error_max": float(errors.max()),
        "tolerance": tolerance,
        "same_top_token": float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def sample_batch(config: Any) -> Batch:
    """A few rows of random token ids, the same at every call for one model."""
    text = config.get_text_config()
    length = min(LENGTH, getattr(text, "max_position_embeddings", None) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    return Batch.of_text(torch.randint(0, text.vocab_size, (SEQUENCES, length), generator=generator))


class _Wanted:
    """The tensors that the exported model has to hold, and the differences that were found."""

    def __init__(
        self,
        original: PackedSource,
        *,
        dequantized: bool,
        reading: Reading,
        pruning: tuple[Pruning, Mapping[str, Tensor]] | None,
    ) -> None:
        self._original = original
        self._learned: Mapping[str, Tensor] = pruning[1] if pruning else {}
        self.dense = (
            DenseTensors(original.folder, plain=True, trust_remote_code=reading.trust_remote_code)
            if dequantized
            else None
        )
        self.count = 0
        self.problems: list[str] = []

    def _tensors(self, part: int) -> dict[str, Tensor]:
        """Module-tree name -> tensor, of one part."""
        if self.dense is not None:
            return self.dense.by_module(part)
        found = {name: tensor for name, tensor in self._learned.items() if self._original.part_of(name) == part}
        return found | dict(self._original.files.read(self._original.names(part)))

    def compare(self, part: int, tensors: Mapping[str, Tensor]) -> None:
        """Notes what differs in the tensors of one part."""
        wanted = self._tensors(part)
        self.count += len(wanted)
        for name, tensor in wanted.items():
            found = tensors.get(name)
            if found is None:
                self.problems.append(f"{name}: missing")
            elif name in self._original.packed and found.dtype != tensor.dtype:
                self.problems.append(f"{name}: {found.dtype}, packed as {tensor.dtype}")
            elif found.shape != tensor.shape or not torch.equal(found.cpu(), tensor.to(found.dtype)):
                self.problems.append(f"{name}: other values")
        self.problems += [f"{name}: not in the packed model" for name in sorted(tensors.keys() - wanted.keys())]

    def tolerance(self, dtype: torch.dtype) -> float:
        same = _same_weights(dtype)
        return same if self.dense is None else max(same, _ROUNDED_WEIGHTS_EPS * torch.finfo(self.dense.dtype).eps)


def _same_weights(dtype: torch.dtype) -> float:
    return _SAME_WEIGHTS.get(dtype, _SAME_WEIGHTS_16_BIT)


class _RoundedTwin:
    """The packed model with dense weights in the export's dtype, computed in `dtype`: a layer source of its own.

    It differs from the packed model by the rounding alone, which a model may amplify beyond any bound.
    """

    def __init__(self, dense: DenseTensors, *, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._dense = dense
        self.model: Any = build_skeleton(dense.config, dtype=dtype)
        self.layers_path = find_decoder_layers(self.model)
        self._dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        rebuild_buffers(self.model, device)

    def load(self, part: int) -> None:
        for name, tensor in self._dense.by_module(part).items():
            put_tensor(self.model, name, tensor.to(device=self.device, dtype=self._dtypes[name]))
        if part == REST:
            self.model.tie_weights()

    def free(self, layer: int) -> None:
        module = self.model.get_submodule(f"{self.layers_path}.{layer}")
        kept = [(inner, non_persistent_buffers(inner)) for inner in module.modules()]
        module.to("meta")
        for inner, buffers in kept:
            inner._buffers.update(buffers)


def _raise_if_any(exported: Path, problems: list[str]) -> None:
    if problems:
        raise ArtifactError(
            f"{exported}: reading back found {counted(len(problems), 'difference')} from the packed model:\n"
            f"{listed(problems)}\n"
            "The disk may be faulty; if exporting again gives the same, this is a defect of mc-cli."
        )
