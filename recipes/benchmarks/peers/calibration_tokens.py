"""Writes the token windows that `mc-cli calibrate` draws, for the peers: the same text, cut and drawn by the same seed.

python recipes/benchmarks/peers/calibration_tokens.py --model DIR --data FILE --seed 0 --out tokens.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from mc_cli.data import text
from mc_cli.data.batches import TOKENS
from mc_cli.models.model_name import resolve_model
from mc_cli.settings import CalibrateSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    settings = CalibrateSettings(
        model=given.model, data=given.data, sequences=given.sequences, length=given.length, seed=given.seed
    )
    tokenizer = text.load_tokenizer(resolve_model(given.model))
    source = text.TextSource(settings.data, settings.split, settings.text_field)
    windows = text.calibration_windows(
        source.documents(tokenizer),
        tokenizer,
        sequences=settings.sequences,
        length=settings.length,
        seed=settings.seed,
        renderer=source.renderer,
    ).inputs[TOKENS]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"token_ids": windows, "seed": torch.tensor(settings.seed)}, given.out)
    print(f"{given.out}: {tuple(windows.shape)} tokens")


if __name__ == "__main__":
    main()
