"""A packed model's tensors as a plain checkpoint has them: dequantized, fused or split as the family stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.packed import PackedLayout
from mc_cli.models import experts
from mc_cli.models.inventory import tied_tensors
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.published_names import as_published
from mc_cli.models.router_masks import drop_experts
from mc_cli.models.skeleton import build_skeleton, put_tensor, rebuild_buffers
from mc_cli.packed.narrow_experts import NarrowExperts
from mc_cli.packed.packed_files import PackedFiles, open_packed
from mc_cli.packed.packed_model import PackedSource, read_packed_config
from mc_cli.packed.plain_routers import PlainRouters

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def plain_shapes(config: Any, layout: PackedLayout) -> tuple[PlainRouters, NarrowExperts]:
    """The changes of a plain checkpoint for dropped and cut experts. Raises InputError where it cannot hold them."""
    routers = PlainRouters(config, layout)
    return routers, NarrowExperts(routers.config, layout)


class DenseTensors:
    """The dense tensors of a packed model, one part (decoder layer or REST) at a time.

    Packed tensors come in the model's own dtype unless another is asked for, kept ones as they are stored.

    plain           tensors for readers that mask no router, and have no widths of experts but config.json's: see
                    plain_routers.py and narrow_experts.py. Without, what is dropped or cut is there and zero, for a
                    model of the original's shapes whose routers are masked
    Raises InputError where plain routers cannot pass the dropped experts over, or experts keep unequal widths.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        plain: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.dtype = dtype or weight_dtype(open_packed(folder), trust_remote_code=trust_remote_code)
        self._source = PackedSource(
            folder, dtype=self.dtype, device=torch.device("cpu"), trust_remote_code=trust_remote_code
        )
        layout = self._source.layout if plain else PackedLayout(())
        self._routers, self._widths = plain_shapes(self._source.config, layout)
        self._model: Any = build_skeleton(self._widths.config, dtype=self.dtype)
        self._stored = self._source.files.tensors
        self.parts = self._source.parts

    @property
    def config(self) -> Any:
        """The config of a model with these tensors."""
        return self._widths.config

    def config_json(self) -> dict[str, Any]:
        """config.json of a plain checkpoint with these tensors: with as many and as wide experts as it has."""
        original = read_json(self._source.files.config_folder / "config.json", foreign=True)
        changes = {**self._routers.config_changes, **self._widths.config_changes}
        if isinstance(original.get("text_config"), dict):
            return {**original, "text_config": {**original["text_config"], **changes}}
        return {**original, **changes}

    def by_module(self, part: int) -> dict[str, torch.Tensor]:
        """Module-tree name -> tensor of every parameter and persistent buffer that a plain checkpoint holds."""
        self._source.load(part)
        tied = tied_tensors(self._model)
        names = [name for name in self._model.state_dict() if name not in tied and self._source.part_of(name) == part]
        kept = dict(self._source.files.read(name for name in names if name in self._stored))
        tensors = {name: kept[name] if name in kept else self._dequantized(name) for name in names}
        self._silence_dropped(tensors, part)
        if part >= 0:
            self._source.free(part)
        return {name: self._routers.plain(name, tensor) for name, tensor in tensors.items()}

    def original(self, part: int) -> dict[str, torch.Tensor]:
        """The tensors named and shaped as they are published, such as one matrix per expert."""
        return as_published(self._model, self.by_module(part))

    def _dequantized(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        module = self._source.model.get_submodule(path)
        if not experts.is_packed(module):
            return module.weight
        fused = torch.empty_like(self._model.get_submodule(path)._parameters[leaf], device="cpu")
        for place, slot in enumerate(self._routers.kept(path, module.num_experts)):
            row = fused[place].T if module.is_transposed else fused[place]
            expert = experts.expert_of_slot(module, slot)
            if expert is None:
                row.zero_()
            else:
                row.copy_(self._widths.narrow(module, leaf, experts.dense_weight(module, leaf, expert)))
        return fused

    def _silence_dropped(self, tensors: dict[str, torch.Tensor], part: int) -> None:
        """A dropped expert adds nothing to a token, even if one came: its output bias is zero, as its weights are."""
        for block in self._source.layout.experts:
            name = f"{block.path}.down_proj_bias"
            if self._source.part_of(name) == part and name in tensors:
                dropped = torch.tensor(block.dropped, dtype=torch.int64)
                tensors[name] = tensors[name].index_fill(0, dropped, 0)


def load_dense(
    folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The whole packed model with dequantized weights, in memory: gradients flow through it, none to its weights.

    It runs under our experts implementation, so that policies and observers work on it.
    """
    tensors = DenseTensors(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    config = read_packed_config(open_packed(folder), trust_remote_code=trust_remote_code)
    model: Any = build_skeleton(config, dtype=dtype)
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for part in tensors.parts:
        for name, tensor in tensors.by_module(part).items():
            put_tensor(model, name, tensor.to(device=device, dtype=wanted[name]))
    model.tie_weights()
    rebuild_buffers(model, device)
    drop_experts(model, {block.path: block.dropped for block in open_packed(folder).layout.experts})
    run_our_experts(model)
    return model.eval()


def weight_dtype(files: PackedFiles, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype of the model's weights before packing: config.json's, else that of its largest kept tensor."""
    stated = read_packed_config(files, trust_remote_code=trust_remote_code).get_text_config().dtype
    if isinstance(stated, torch.dtype):
        return stated
    kept = [tensor for tensor in files.tensors.values() if tensor.dtype in _WEIGHT_DTYPES and len(tensor.shape) == 2]
    return max(kept, key=lambda tensor: tensor.size_bytes).dtype
