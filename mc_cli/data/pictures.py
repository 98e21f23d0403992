"""Images of a row: files, bytes inside the row, or what `datasets` decoded, to pictures that processors take."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_cli.artifacts.places import require_ordinary
from mc_cli.errors import InputError, MissingDependencyError, first_line, shown

IMAGE_FIELDS = ("images", "image")  # of a row, in the order in which they are looked for
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PLACE = "<image>"  # where an image stands in a text, in rows of LLaVA's form
NEEDS = "Images are read by the model's own processor, which needs pillow and mostly torchvision: run `pip install {}`."


@dataclass(frozen=True)
class ImageSource:
    """Where an image of a row is: a file, bytes, or a picture that was read already; `where`: the row, for messages."""

    where: str
    path: Path | None = None
    content: bytes | None = None
    read: Any = None

    def picture(self) -> Any:
        """The image in RGB. Raises InputError where it is none, MissingDependencyError without pillow."""
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise MissingDependencyError(NEEDS.format("pillow torchvision")) from error
        if self.read is not None:
            return self.read.convert("RGB")
        if self.path is not None:
            if not self.path.is_file():
                raise InputError(f"{self.where}: no such file.")
            require_ordinary(self.path)
        try:
            with Image.open(self.path if self.path is not None else io.BytesIO(self.content or b"")) as opened:
                return opened.convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.where} cannot be read as an image: {first_line(error)}") from error


def image_source(where: str, value: object, folder: Path | None) -> ImageSource:
    """An image that a row names: a path, a data URI, {"url"}, {"bytes", "path"}, or a picture of pillow.

    folder  what relative paths are relative to
    Raises InputError naming what the row holds instead, or a file that is not there.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return ImageSource(where, content=value["bytes"])
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("url", "path", "image") if value.get(name) is not None), value)
    if isinstance(value, bytes):
        return ImageSource(where, content=value)
    if hasattr(value, "convert"):
        return ImageSource(where, read=value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: an image is {shown(value)}, not a path, a data URI or a picture.")
    if value.startswith("data:"):
        return ImageSource(where, content=_embedded(where, value))
    if "://" in value:
        raise InputError(f"{where}: the image {shown(value, 80)} is an address. Download it and name the file.")
    path = Path(value).expanduser()
    path = path if path.is_absolute() or folder is None else folder / path
    if not path.is_file():
        raise InputError(f"{where}: the image {path} is no file.")
    return ImageSource(f"{where}: {path}", path=path)


def images_of_row(where: str, row: Mapping[str, Any], folder: Path | None) -> list[ImageSource]:
    """All images of the row's own field `images` or `image`, which holds one or a list."""
    found = next((row[name] for name in IMAGE_FIELDS if row.get(name) is not None), None)
    if found is None:
        return []
    listed = found if isinstance(found, Sequence) and not isinstance(found, str | bytes) else [found]
    return [image_source(where, value, folder) for value in listed]


def _embedded(where: str, uri: str) -> bytes:
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise InputError(f"{where}: the image's data URI begins {shown(head, 60)}, and only base64 is read.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: the image's data URI is no base64 ({error}).") from error
