"""Tiny models exported for transformers, with everything packed that can be: attention, experts, embedding, head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mc_cli.parts import Role
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.packed_folders import packed_work_dir

ROLE_BITS = {Role.ATTENTION: 4, Role.SHARED: 4, Role.DENSE: 3, Role.EMBEDDING: 6, Role.HEAD: 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"tie_word_embeddings": True},  # shared experts; the head is the embedding
    "gpt_oss": {},  # biases, transposed experts, its own gate
}
TOKEN_IDS = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(1))


def exported(checkpoint: Path, folder: Path, *, tied: bool = False, **options: Any) -> Path:
    """Packs a tiny checkpoint into `folder`/work and exports it to `folder`/out, which comes back.

    tied   the head is the embedding, and has no width of its own
    """
    role_bits = {role: bits for role, bits in ROLE_BITS.items() if not (tied and role == Role.HEAD)}
    packed_work_dir(checkpoint, folder / "work", role_bits=role_bits, **options)
    settings = ExportSettings(out=str(folder / "out"))
    export.run(settings, RunSettings(), folder / "work", force=False, progress=SilentProgress())
    return folder / "out"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKEN_IDS, use_cache=False).logits.float()
