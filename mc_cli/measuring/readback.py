"""Reading an exported directory back as its users will, and comparing it with the packed model it was made from.

Every stored tensor is compared: packed ones bit by bit, dense ones with what the packed model dequantizes to. Then
both models compute logits for the same tokens, and the exported one generates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mc_cli.artifacts.pruning import Pruning
from mc_cli.data.batches import Batch
from mc_cli.errors import ArtifactError, McError, listed, shown
from mc_cli.models.checkpoint import REST, Checkpoint
from mc_cli.models.inventory import find_decoder_layers, tied_tensors
from mc_cli.models.memory import available_bytes
from mc_cli.models.model_folder import read_config
from mc_cli.models.skeleton import build_skeleton, non_persistent_buffers, rebuild_buffers
from mc_cli.packed.dense_tensors import DenseTensors
from mc_cli.packed.packed_model import PackedSource
from mc_cli.skipping.pruning import pruned, pruners
from mc_cli.walking.layerwise import LayerSource, LayerWalk

WHOLE, LAYERED = "whole model", "layer by layer"
SEQUENCES, LENGTH, PROMPT, NEW_TOKENS = 2, 32, 8, 4
# Of the memory that is free; the rest is for activations and the tensors under comparison.
_MEMORY_SHARE = 0.7
# Largest relative error of a token's logits, for the median token. The same numbers on two paths differ by the order of
# sums; a dense export also rounds each weight to its dtype, which a few layers amplify.
_SAME_WEIGHTS = {torch.float32: 1e-4}
_SAME_WEIGHTS_16_BIT = 2e-2
_ROUNDED_WEIGHTS_EPS = 16


@dataclass(frozen=True)
class ReadBack:
    """What reading back found; errors are norms of logit differences over norms of logits, per token."""

    method: str  # WHOLE through from_pretrained, or LAYERED where that would not fit in memory
    tensors: int
    tokens: int
    logit_error_median: float
    logit_error_max: float
    tolerance: float  # for the median
    same_top_token: float
    generated_tokens: int  # 0 where layer by layer
    # Median error against the packed model, where that is more than rounding to the export's dtype should make: the
    # other figures are then against the packed model with its weights rounded to that dtype.
    rounding_error: float | None = None


def read_back(
    exported: Path,
    packed: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    free_bytes: int | None = None,
    trust_remote_code: bool = False,
    pruning: tuple[Pruning, Mapping[str, torch.Tensor]] | None = None,
) -> ReadBack:
    """The comparison of an exported directory with the packed folder it was made from.

    free_bytes   memory to plan with, None to ask the system: the whole model is loaded if it fits in 70 % of that, else
                 a layer at a time, without generating
    pruning      the policy that the export carries, and what it learned: both models are compared under it
    Raises ArtifactError naming what differs, or what the loader said.
    """
    transformers_logging.disable_progress_bar()
    original = PackedSource(packed, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    token_ids = sample_tokens(original.config)
    wanted = _Wanted(exported, original, trust_remote_code=trust_remote_code, pruning=pruning)
    needed = sum(size.stat().st_size for size in exported.glob("*.safetensors")) * (2 if dtype == torch.float32 else 1)
    free = free_memory(device) if free_bytes is None else free_bytes
    if free is None or needed <= _MEMORY_SHARE * free:
        logits, tensors, generated = _whole(exported, wanted, token_ids, dtype, device)
        method = WHOLE
    else:
        logits, tensors = _layered(exported, wanted, token_ids, dtype, device)
        method, generated = LAYERED, 0
    found = _compared_logits(logits, _walked_logits(original, token_ids, pruning), wanted.tolerance(dtype))
    if not found["logit_error_median"] <= found["tolerance"] and wanted.dense is not None:
        twin = _RoundedTwin(wanted.dense, dtype=dtype, device=device)
        moved = found["logit_error_median"]
        found = _compared_logits(logits, _walked_logits(twin, token_ids), _same_weights(dtype))
        found["rounding_error"] = moved
    if not found["logit_error_median"] <= found["tolerance"]:
        raise ArtifactError(
            f"{exported}: the exported model's logits differ from the packed model's by "
            f"{found['logit_error_median']:.2g} (relative, median token), more than {found['tolerance']:.2g}, though "
            "all tensors agree. This is a defect of mc-cli."
        )
    return ReadBack(method=method, tensors=tensors, tokens=token_ids.numel(), generated_tokens=generated, **found)


def _compared_logits(logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> dict[str, Any]:
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    return {
        "logit_error_median": float(errors.median()),
        "logit_error_max": float(errors.max()),
        "tolerance": tolerance,
        "same_top_token": float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def sample_tokens(config: Any) -> torch.Tensor:
    """A few sequences of random token ids [sequences, length], the same at every call for one model."""
    text = config.get_text_config()
    length = min(LENGTH, getattr(text, "max_position_embeddings", None) or LENGTH)
    return torch.randint(0, text.vocab_size, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))


class _Wanted:
    """What the exported model has to hold."""

    def __init__(
        self,
        exported: Path,
        original: PackedSource,
        *,
        trust_remote_code: bool,
        pruning: tuple[Pruning, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self._original = original
        self.pruning = pruning
        self.trust_remote_code = trust_remote_code
        config = read_config(exported, trust_remote_code=trust_remote_code)
        self.own_code = type(config).__module__.startswith("transformers_modules")
        self.architectures = tuple(getattr(config, "architectures", None) or ())
        self.is_packed = getattr(config, "quantization_config", None) is not None
        self.dense = (
            None
            if self.is_packed
            else DenseTensors(original.folder, plain_routers=True, trust_remote_code=trust_remote_code)
        )

    @property
    def parts(self) -> list[int]:
        return self._original.parts

    def misnamed(self, model: Any) -> list[str]:
        """What is wrong where config.json names another class than the one whose tensors these are."""
        if not self.architectures or type(model).__name__ in self.architectures:
            return []
        return [f"config.json: names {', '.join(self.architectures)}, the tensors are {type(model).__name__}'s"]

    def tensors(self, part: int) -> dict[str, torch.Tensor]:
        """Module-tree name -> tensor, of one part."""
        if self.dense is not None:
            return self.dense.by_module(part)
        learned = self.pruning[1] if self.pruning else {}
        found = {name: tensor for name, tensor in learned.items() if self._original.part_of(name) == part}
        return found | dict(self._original.files.read(self._original.names(part)))

    def compare(self, state: Mapping[str, torch.Tensor], part: int) -> tuple[int, list[str]]:
        """How many tensors of a part were compared, and what differs."""
        wanted = self.tensors(part)
        problems = []
        for name, tensor in wanted.items():
            found = state.get(name)
            if found is None:
                problems.append(f"{name}: missing")
            elif name in self._original.packed and found.dtype != tensor.dtype:
                problems.append(f"{name}: {found.dtype}, packed as {tensor.dtype}")
            elif found.shape != tensor.shape or not torch.equal(found.cpu(), tensor.to(found.dtype)):
                problems.append(f"{name}: other values")
        return len(wanted), problems

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
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            placed = tensor.to(device=self.device, dtype=self._dtypes[name])
            if leaf in module._buffers:
                module._buffers[leaf] = placed
            else:
                module._parameters[leaf] = torch.nn.Parameter(placed, requires_grad=False)
        if part == REST:
            self.model.tie_weights()

    def free(self, layer: int) -> None:
        module = self.model.get_submodule(f"{self.layers_path}.{layer}")
        kept = [(inner, non_persistent_buffers(inner)) for inner in module.modules()]
        module.to("meta")
        for inner, buffers in kept:
            inner._buffers.update(buffers)


def _whole(
    exported: Path, wanted: _Wanted, token_ids: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, int, int]:
    """(logits, tensors compared, tokens generated) of the directory through from_pretrained."""
    # Packed directories of native models bring code that only imports mc_cli; the native class is asked for, as a user
    # has it then.
    options: dict[str, Any] = {"trust_remote_code": wanted.own_code}
    # All differences are listed below.
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=dtype, **options)
    except McError:
        raise
    except Exception as error:  # whatever transformers makes of a directory that it cannot load
        raise ArtifactError(f"{exported} cannot be loaded: {type(error).__name__}: {error}") from error
    model, info = loaded
    problems = [f"{name}: {kind.replace('_', ' ')}" for kind, names in info.items() for name in _names(names)]
    problems += wanted.misnamed(model)
    state = model.state_dict()
    count = 0
    for part in wanted.parts:
        compared, found = wanted.compare(state, part)
        count, problems = count + compared, problems + found
    _raise_if_any(exported, problems + _left_over(state, wanted, count, tied_tensors(model)))
    model = model.to(device).eval()
    with torch.inference_mode():
        logits = torch.cat([model(row[None].to(device), use_cache=False).logits.float().cpu() for row in token_ids])
        prompt = token_ids[:1, :PROMPT].to(device)
        greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        try:
            text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ArtifactError(
                f"{exported / 'generation_config.json'}: nothing can be generated as it says ({type(error).__name__}: "
                f"{shown(str(error), 300)}). It came with the model: mend it there, and calibrate again."
            ) from error
    if text.shape[1] <= prompt.shape[1]:
        raise ArtifactError(f"{exported} loads, but generate adds no token.")
    return logits, count, int(text.shape[1] - prompt.shape[1])


def _left_over(state: Mapping[str, Any], wanted: _Wanted, count: int, tied: Mapping[str, str]) -> list[str]:
    if len(state.keys() - tied.keys()) == count:
        return []
    known = {name for part in wanted.parts for name in wanted.tensors(part)}
    return [f"{name}: not in the packed model" for name in sorted(state.keys() - tied.keys() - known)]


def _names(entry: Any) -> Iterator[str]:
    """Names in one entry of transformers' loading info: sets of names, or of tuples that begin with one."""
    for item in entry if isinstance(entry, Iterable) and not isinstance(entry, str) else ():
        yield str(item[0] if isinstance(item, tuple) else item)


def _layered(
    exported: Path, wanted: _Wanted, token_ids: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, int]:
    """(logits, tensors compared) of the directory with one layer in memory."""
    source: Any
    if wanted.is_packed:
        source = PackedSource(exported, dtype=dtype, device=device, trust_remote_code=wanted.trust_remote_code)
    else:
        config = read_config(exported, trust_remote_code=wanted.trust_remote_code)
        source = Checkpoint(exported, config, dtype=dtype, device=device)
        _raise_if_any(exported, [f"{name}: not part of the model" for name in source.unused])
    _raise_if_any(exported, wanted.misnamed(source.model))
    compared = _Compared(source, wanted)
    logits = _walked_logits(compared, token_ids, wanted.pruning)
    _raise_if_any(exported, compared.problems)
    return logits, compared.count


class _Compared:
    """A layer source that compares each part when it is loaded."""

    def __init__(self, source: Any, wanted: _Wanted) -> None:
        self.model, self.layers_path, self.device = source.model, source.layers_path, source.device
        self._source, self._wanted = source, wanted
        self.count = 0
        self.problems: list[str] = []

    def load(self, part: int) -> None:
        self._source.load(part)
        compared, problems = self._wanted.compare(self.model.state_dict(), part)
        self.count += compared
        self.problems += problems

    def free(self, layer: int) -> None:
        self._source.free(layer)


def _walked_logits(
    source: LayerSource,
    token_ids: torch.Tensor,
    pruning: tuple[Pruning, Mapping[str, torch.Tensor]] | None = None,
) -> torch.Tensor:
    walk = LayerWalk(source, Batch.of_text(token_ids), batch_size=1)
    of_layer = {} if pruning is None else pruners(pruning[0], pruning[0].at_rate(None), pruning[1])
    for layer in range(walk.num_layers):
        source.load(layer)
        with ExitStack() as stack:
            for path, pruner in of_layer.items():
                if pruner.layer.layer == layer:
                    stack.enter_context(pruned(source.model, path, pruner))
            walk.run_layer(advance=True)
        source.free(layer)
    return torch.cat([walk.logits(rows).float().cpu() for rows in walk.batches()])


def _raise_if_any(exported: Path, problems: list[str]) -> None:
    if problems:
        raise ArtifactError(
            f"{exported}: reading back found {len(problems)} differences from the packed model:\n{listed(problems)}\n"
            "The disk may be faulty; if exporting again gives the same, this is a defect of mc-cli."
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated now, None where the system does not tell."""
    free = [available_bytes()]
    if device.type == "cuda":
        free.append(torch.cuda.mem_get_info(device)[0])
    return min((count for count in free if count is not None), default=None)
