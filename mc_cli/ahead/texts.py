"""Whether texts can be read and are enough, before a stage needs them hours later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mc_cli.data import dataset_names, documents, large_texts, text
from mc_cli.data.enough import Beginning
from mc_cli.data.inputs import Feeder
from mc_cli.data.text import TextSource
from mc_cli.errors import InputError, Problems
from mc_cli.measuring.policy_checks import LEAST_ROWS, require_rows
from mc_cli.measuring.policy_fitting import fitting_source
from mc_cli.models.session import Session
from mc_cli.stages.calibrate import calibrated_text
from mc_cli.stages.prune_eval import evaluated_text

_READ_WHOLE = 1 << 25  # texts up to this many bytes are read as the stage will read them


@dataclass(frozen=True)
class Reader:
    """The model that is to read the texts.

    tokenizer   None where the texts' lengths are not looked at
    calibrated  tokens of one sequence of calibration
    """

    session: Session | None
    tokenizer: Any
    calibrated: int


def check_texts(todo: Mapping[str, Any], reader: Reader, problems: Problems) -> None:
    """Texts that can be read, have the field, and fill what the stages `todo` draw of them; windows that fit the model.

    todo   settings by stage. What is wrong is added to `problems`.
    """
    session = reader.session
    calibrate, evaluated = todo.get("calibrate"), todo.get("prune-eval")
    first = partial(first_of, online=session is not None)
    if calibrate is not None:
        with problems.catching():
            source = calibrated_text(calibrate, session)
            found = first(source)
            if session is not None:
                _require(found, source, reader, text.fit_length(calibrate.length, session.config))
    if evaluated is None:
        return
    source = evaluated_text(evaluated, session)
    with problems.catching():
        found = first(source)
        if session is not None:
            length = text.fit_length(evaluated.length, session.config)
            text.check_stride(evaluated.stride, length)
            _require(found, source, reader, length, measured=True)
    fitted = fitting_source(evaluated.prune, source) if evaluated.prune.policy else None
    if fitted is not None:
        with problems.catching():
            windows = _require(first(fitted), fitted, reader, reader.calibrated, wanted=LEAST_ROWS)
            require_rows(windows, reader.calibrated)


def _require(
    found: Beginning | None, source: TextSource, reader: Reader, length: int, *, wanted: int = 1, measured: bool = False
) -> int:
    """The number of windows, counted up to `wanted`; as many where that is not known. Raises as drawing them does."""
    session, tokenizer = reader.session, reader.tokenizer
    if found is None or session is None or tokenizer is None or not length:
        return wanted
    feeder = Feeder(session.folder, session.config, session.vocabulary, source, session.compute.trust_remote_code)
    return feeder.require(found, tokenizer, length=length, wanted=wanted, measured=measured)


def first_of(source: TextSource, *, online: bool = True) -> Beginning | None:
    """The documents of a text as far as they are read before a stage. Raises InputError where it cannot be read.

    A small text is read whole, a large one looked through, see `mc_cli.data.large_texts`. Names of `datasets` are
    looked up where `online`, of which no row is fetched: None, as of folders of images.
    """
    source.check_split()
    path = documents.resolve_data(source.data, flag=source.flag)
    if path is None:
        if online:
            dataset_names.check_dataset(source.data, source.split, source.text_field, source.flag)
        return None
    files = _files(path)
    unreadable = [str(file) for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        raise InputError(f"{source.flag} {source.data} cannot be read: no permission for {', '.join(unreadable[:5])}.")
    asked: dict[str, Any] = {"text_field": source.text_field, "flag": source.flag, "images": source.images}
    if sum(file.stat().st_size for file in files) <= _READ_WHOLE:
        return Beginning(source.read(), whole=True)
    if documents.is_saved_dataset(path):
        found = large_texts.first_of_saved(path, split=source.split, **asked)
    elif source.images and documents.picture_files(path):
        found = []
    else:
        found = large_texts.look_through(documents.text_files(path, source.flag), **asked)
    return Beginning(found, whole=False) if found else None


def text_bytes(data: str) -> int | None:
    """Bytes of a text of plain files, above which it has no tokens; None where that is not known."""
    path = documents.resolve_data(data)
    if path is None:
        return None
    files = _files(path)
    return None if any(file.suffix == ".parquet" for file in files) else sum(file.stat().st_size + 1 for file in files)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
