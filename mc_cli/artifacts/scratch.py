"""Tensors in scratch files, for what need not be in memory all the time: hidden states, activations, changed weights.

A file is removed as it is made, so that nothing is left behind however the process ends; its room on the disk is taken
at once, so that a full disk is an error here and no crash later. Pages stay with the process until it gives them back.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import ArtifactError

if TYPE_CHECKING:
    import torch

# Tensors from so many bytes on have a file of their own: its pages and its room on the disk go with the tensor.
_OWN_FILE_BYTES = 1 << 20
_SHARED_FILE_BYTES = 1 << 24  # of a file for smaller ones: a process can map some 65,000 files
_COPIED_BYTES = 1 << 26


class InMemory:
    """Tensors in memory, as without a limit."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor on the CPU, whatever is in it."""
        import torch

        return torch.empty(tuple(shape), dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The same, filled with zeros."""
        return self.empty(shape, dtype).zero_()

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is to be held from now on; it may be the same one."""
        return tensor.cpu()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that is held like it."""
        found = self.empty(tensor.shape, tensor.dtype)
        for target, source in zip(_slabs(found), _slabs(tensor), strict=True):
            target.copy_(source)
            self.release(target, source)
        return found

    def release(self, *tensors: torch.Tensor) -> None:
        """Gives back the memory of tensors that are not used for a while; what they hold stays."""


class Scratch(InMemory):
    """Tensors in files of a folder. `most_bytes`: as much as they have taken on the disk at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pages: mmap.mmap | None = None  # the file that has room left
        self._used = 0
        self._files: dict[int, Any] = {}  # first address -> weak reference to the mapped file
        self._begins: list[int] = []  # the first addresses, sorted
        self._taken = self.most_bytes = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Raises ArtifactError where the disk has no room for it."""
        import torch

        count = prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        size = count * dtype.itemsize
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE  # pages of its own, which can be given back alone
        if whole >= _OWN_FILE_BYTES:
            return torch.frombuffer(self._file(whole), dtype=dtype, count=count).view(tuple(shape))
        if self._pages is None or self._used + whole > len(self._pages):
            self._pages, self._used = self._file(_SHARED_FILE_BYTES), 0
        begin, self._used = self._used, self._used + whole
        return torch.frombuffer(self._pages, dtype=dtype, count=count, offset=begin).view(tuple(shape))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Room in a new file reads as zeros, without a page being touched."""
        return self.empty(shape, dtype)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in a file with the same values; the same one where it is there already."""
        if self._file_of(tensor) is not None:
            self.release(tensor)
            return tensor
        return self.copy(tensor.detach())

    def release(self, *tensors: torch.Tensor) -> None:
        """Gives back the pages of those that lie in scratch files. Views that are not contiguous stay."""
        for tensor in tensors:
            found = self._file_of(tensor)
            if found is None or not tensor.is_contiguous() or not hasattr(found[1], "madvise"):
                continue
            begin, pages = found
            offset = tensor.data_ptr() - begin
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            pages.madvise(mmap.MADV_DONTNEED, first, offset + tensor.numel() * tensor.element_size() - first)

    def _file_of(self, tensor: torch.Tensor) -> tuple[int, mmap.mmap] | None:
        """(first address, file) that a tensor lies in."""
        address = tensor.data_ptr() if tensor.device.type == "cpu" else 0
        place = bisect_right(self._begins, address)
        for begin in self._begins[max(0, place - 1) : place]:
            reference = self._files.get(begin)
            pages = None if reference is None else reference()
            if pages is not None and begin <= address < begin + len(pages):
                return begin, pages
        return None

    def _file(self, size: int) -> mmap.mmap:
        import torch

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                pages = mmap.mmap(file.fileno(), size)
        except OSError as error:
            told = refusal(error, self._folder, action=f"has no room for {size:,} bytes of scratch")
            raise ArtifactError(told) from error
        begin = torch.frombuffer(pages, dtype=torch.uint8, count=1).data_ptr()
        self._files[begin] = weakref.ref(pages, lambda _: self._gone(begin, size))
        insort(self._begins, begin)
        self._taken += size
        self.most_bytes = max(self.most_bytes, self._taken)
        return pages

    def _gone(self, begin: int, size: int) -> None:
        """A file that no tensor lies in any more; its room on the disk is free again."""
        self._files.pop(begin, None)
        self._begins.remove(begin)
        self._taken -= size


def _slabs(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in pieces along its first dimension."""
    if tensor.ndim == 0 or not tensor.numel():
        yield tensor
        return
    row = tensor[0].numel() * tensor.element_size()
    yield from tensor.split(max(1, _COPIED_BYTES // max(1, row)))
