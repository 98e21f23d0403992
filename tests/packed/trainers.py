"""Trains adapters in the tests of packed models: transformers' Trainer on two sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments


class Sentences(torch.utils.data.Dataset):
    """Two sentences, over and over."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, 300, (12,), generator=torch.Generator().manual_seed(index % 2))
        return {"input_ids": tokens, "labels": tokens}


def trainer_for(model: Any, folder: Path, steps: int = 6, **options: Any) -> Trainer:
    """A Trainer on two sentences; `options` go to its arguments."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=Sentences())
